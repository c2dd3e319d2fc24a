"""Whole training runs on every layout and ZeRO stage against one process: losses, gradient norms and final weights."""

import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch

from sat.cogvideox.engine import build_engine
from sat.mpu.shards import join_states, shard_rules
from sat.training.checkpoint import load_parts
from sat.weights.finding import find_checkpoint
from tests.cogvideox.tiny import HEADS
from tests.marks import rest_is_slow
from tests.parallel.layouts import LAYOUTS, WIDE, Layout
from tests.ranks import run_ranks
from tests.tiny import FORMS, only_run, records, tiny_config, train_on_rank

STEPS = 5
COMMON = (
    f"args.train_iters={STEPS}",
    "args.global_batch_size=4",
    f"args.save_interval={STEPS}",
)
LOSS_RTOL = 1e-5
WEIGHT_ATOL = 1e-5
"""Adam turns rounding of near-zero gradients into steps of up to the learning rate, 1e-3. Measured worst: 1e-6."""


def widths(heads: int) -> tuple[str, ...]:
    params = "model.network_config.params"
    return f"{params}.hidden_size={16 * heads}", f"{params}.num_attention_heads={heads}"


def options(layout: Layout, stage: int, heads: int | None = None, form: str = "5B") -> tuple[str, ...]:
    return (
        *COMMON,
        *FORMS[form],
        *widths(heads or layout.heads),
        f"deepspeed.zero_optimization.stage={stage}",
        f"deepspeed.train_micro_batch_size_per_gpu={2 if layout.dp == 2 else 4}",
        f"args.model_parallel_size={layout.tp}",
        f"args.context_parallel_size={layout.cp}",
        f"args.context_parallel_mode={layout.mode}",
        f"args.sequence_parallel={str(layout.sp).lower()}",
    )


def train(folder: Path, layout: Layout, stage: int, heads: int | None = None, form: str = "5B") -> Path:
    run_ranks(train_on_rank, layout.world, (*options(layout, stage, heads, form), f"args.save={folder}"))
    return only_run(folder)


def whole_weights(run: Path, heads: int, form: str) -> dict[str, torch.Tensor]:
    """The weights of a run, put together from the files of all tensor-parallel ranks."""
    engine = build_engine(tiny_config(*COMMON, *FORMS[form], *widths(heads))["model"])
    rules = {f"model.diffusion_model.{name}": rule for name, rule in shard_rules(engine.network).items()}
    return join_states(load_parts(find_checkpoint(run)), rules)


@pytest.fixture(scope="module")
def references(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The run of one process of each form, made when it is first asked for."""
    return cache(lambda form: train(tmp_path_factory.mktemp(form), Layout(), stage=0, form=form))


@pytest.fixture
def reference(references: Callable[[str], Path]) -> Path:
    return references("5B")


ALL = [(form, name, stage) for form in FORMS for name in LAYOUTS for stage in (0, 1, 2, 3)]
DEFAULT = [
    (form, name, stage)
    for form, name, stage in ALL
    if form == "5B" and (stage == 2 or (name, stage) in (("TP2+SPxRing2", 3), ("DP2xCP2", 1)))
]


@pytest.mark.parametrize("case", rest_is_slow(ALL, DEFAULT), ids=lambda case: "{}-{}-{}".format(*case))
def test_losses_and_weights_are_those_of_one_process(
    references: Callable[[str], Path], tmp_path: Path, case: tuple[str, str, int]
) -> None:
    form, name, stage = case
    check(train(tmp_path, LAYOUTS[name], stage, form=form), references(form), HEADS, form)


@pytest.mark.slow
@pytest.mark.parametrize("name", WIDE)
def test_four_tensor_parallel_ranks_train_as_one_process(tmp_path: Path, name: str) -> None:
    heads = WIDE[name].heads
    check(train(tmp_path / "four", WIDE[name], 2), train(tmp_path / "one", Layout(), 0, heads), heads)


def check(run: Path, reference: Path, heads: int, form: str = "5B") -> None:
    for key in ("loss", "grad_norm"):
        expected = torch.tensor([record[key] for record in records(reference)])
        got = torch.tensor([record[key] for record in records(run)])
        assert len(got) == STEPS
        torch.testing.assert_close(got, expected, rtol=LOSS_RTOL, atol=0.0)
    expected_weights, weights = whole_weights(reference, heads, form), whole_weights(run, heads, form)
    assert weights.keys() == expected_weights.keys()
    for key, value in expected_weights.items():
        if "query_key_value.bias" not in key:  # the key's bias cannot change the loss: Adam amplifies its rounding
            torch.testing.assert_close(weights[key], value, rtol=0.0, atol=WEIGHT_ATOL)


MOVES = [("DP2xTP2", "DP2xCP2"), ("TP3+SP", "TP2"), ("Ring2", "TP2+SPxUlysses2")]


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 3])
@pytest.mark.parametrize("move", MOVES, ids=" to ".join)
def test_a_run_continues_on_another_layout(reference: Path, tmp_path: Path, move: tuple[str, str], stage: int) -> None:
    before, after = move
    first = ("args.train_iters=5", "args.lr_decay_iters=5", "args.save_interval=2", f"args.save={tmp_path}")
    run_ranks(train_on_rank, LAYOUTS[before].world, (*options(LAYOUTS[before], stage), *first))
    run = only_run(tmp_path)
    for later in ("4", "5"):
        shutil.rmtree(run / later)
    (run / "latest").write_text("2")
    other_stage = {1: 3, 3: 2}[stage]
    again = (*options(LAYOUTS[after], other_stage), f"args.load={run}", "args.mode=pretrain")
    run_ranks(train_on_rank, LAYOUTS[after].world, again)
    expected = torch.tensor([record["loss"] for record in records(reference)])
    torch.testing.assert_close(torch.tensor([r["loss"] for r in records(run)]), expected, rtol=LOSS_RTOL, atol=0.0)
