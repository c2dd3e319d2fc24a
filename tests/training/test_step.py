"""The optimizer step by DeepSpeed is the one that plain torch makes; what is frozen takes no part in it."""

import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

from sat.config import ConfigNode, load_config
from sat.errors import ConfigError
from sat.training.args import deepspeed_config, train_args
from sat.training.checkpoint import load_weights
from sat.training.data import TrainingData
from sat.training.optim import build_optimizer, parameter_groups
from sat.training.step import Stepper, _import_deepspeed
from sat.training.systems import TrainingSystem, build_system
from tests.ranks import run_ranks
from tests.tiny import ROOT, only_run, records, tiny_config, train_on_rank

SEED = 7
COMMON = ("args.train_iters=4", "args.global_batch_size=4", "args.lr_decay_style=constant", "args.warmup=0")
LORA = (
    "model.network_config.params.modules.lora_config={target: sat.model.finetune.lora2.LoraMixin, params: {r: 2}}",
    "model.not_trainable_prefixes=[all]",
)


WHAT_IMPORTING_DEEPSPEED_DOES = """
import subprocess, sys
from sat.mpu.launch import joined
from sat.training.step import _import_deepspeed
def refused(*words, **options):
    raise AssertionError(f"the compiler was run: {words}")
subprocess.Popen = refused
with joined():
    deepspeed = _import_deepspeed("cpu")
    from deepspeed.runtime import compiler
    from deepspeed.runtime.zero.muon.muon_optimizer import MuonWithAuxAdam
    assert "torch._dynamo" not in sys.modules
    assert deepspeed.ops.__compatible_ops__ == {"deepspeed_shm_comm": False}
    assert compiler.compile.__module__ == "deepspeed.runtime.compiler"
"""


def test_importing_deepspeed_runs_no_compiler_and_loads_none() -> None:
    environment = {key: value for key, value in os.environ.items() if key != "TORCHDYNAMO_DISABLE"}
    command = [sys.executable, "-c", WHAT_IMPORTING_DEEPSPEED_DOES]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def fresh_system(config: ConfigNode) -> TrainingSystem:
    """What a run starts from."""
    torch.manual_seed(SEED)
    return build_system(config, train_args(config))


def plain_training(words: tuple[str, ...]) -> tuple[list[float], list[float], dict[str, Tensor]]:
    """Losses, gradient norms and final weights of the same run without DeepSpeed."""
    config = tiny_config(*words)
    args, ds = train_args(config), deepspeed_config(config, train_args(config), 1, "cpu")
    system = fresh_system(config)
    trained = [parameter for parameter in system.trained.parameters() if parameter.requires_grad]
    optimizer = build_optimizer(parameter_groups(system.trained, ds.lr), ds.optimizer)
    batches = TrainingData(config, args, SEED, 4, ds.micro_batch_size, 0, 1).batches(0)
    losses, norms = [], []
    for _ in range(args.train_iters or 0):
        optimizer.zero_grad()
        total = 0.0
        for _ in range(ds.grad_accum_steps):
            loss = system.trained(system.training_inputs(next(batches), SEED, 4))["loss"].mean()
            (loss / ds.grad_accum_steps).backward()
            total += loss.item() / ds.grad_accum_steps
        norms.append(float(nn.utils.clip_grad_norm_(trained, ds.gradient_clipping)))
        optimizer.step()
        losses.append(total)
    return losses, norms, system.trained.state_dict()


@pytest.mark.parametrize(("stage", "micro"), [(0, 1), (1, 2), (2, 1), (2, 4)])
def test_a_step_is_that_of_plain_torch(tmp_path: Path, stage: int, micro: int) -> None:
    """With accumulation and with clipping in every step; the norm is that before clipping."""
    words = (
        *COMMON,
        "deepspeed.gradient_clipping=0.05",
        f"deepspeed.train_micro_batch_size_per_gpu={micro}",
        f"deepspeed.zero_optimization.stage={stage}",
    )
    losses, norms, weights = plain_training(words)
    assert min(norms) > 0.1
    run_ranks(train_on_rank, 1, (*words, f"args.save={tmp_path}"))
    run = only_run(tmp_path)
    assert [record["loss"] for record in records(run)] == pytest.approx(losses, rel=1e-6)  # measured 1e-7
    assert [record["grad_norm"] for record in records(run)] == pytest.approx(norms, rel=1e-6)  # measured 1e-7
    saved = load_weights(run)
    for name, value in weights.items():
        if "query_key_value.bias" not in name:  # the key's bias has no gradient but rounding, which Adam amplifies
            torch.testing.assert_close(saved[name], value, rtol=0.0, atol=1e-5, msg=name)  # measured 7e-7


def test_clipping_is_in_force(tmp_path: Path) -> None:
    """With SGD a clipped step is as long as lr x clip."""
    words = ("args.train_iters=1", "args.global_batch_size=4", "args.warmup=0", f"args.save={tmp_path}")
    sgd = ("deepspeed.optimizer={type: SGD, params: {lr: 1.0}}", "deepspeed.gradient_clipping=0.01")
    run_ranks(train_on_rank, 1, (*words, *sgd, "args.lr_decay_style=constant"))
    before = fresh_system(tiny_config()).trained.state_dict()
    after = load_weights(only_run(tmp_path))
    length = sum((after[name] - value).square().sum() for name, value in before.items()).sqrt()
    assert length.item() == pytest.approx(0.01, rel=1e-3)


def trained_and_untouched(run: Path, words: tuple[str, ...]) -> tuple[set[str], set[str]]:
    """Names whose weights moved, and names whose bits are those of the start."""
    before, after = fresh_system(tiny_config(*words)).trained.state_dict(), load_weights(run)
    assert before.keys() == after.keys()
    same = {name for name, value in before.items() if torch.equal(after[name], value)}
    return set(before) - same, same


@pytest.mark.parametrize("stage", [0, 2])
@pytest.mark.parametrize(
    ("frozen", "expected"),
    [
        (
            ("model.not_trainable_prefixes=[model.diffusion_model.transformer, model.diffusion_model.time_embed.0]",),
            None,
        ),
        (LORA, "matrix_"),
    ],
)
def test_frozen_parts_are_really_frozen(
    tmp_path: Path, stage: int, frozen: tuple[str, ...], expected: str | None
) -> None:
    """No gradient, no optimizer state, the same bits."""
    words = (*COMMON, f"deepspeed.zero_optimization.stage={stage}", *frozen)
    system = fresh_system(tiny_config(*words))
    inputs = system.training_inputs(
        next(TrainingData(tiny_config(*words), train_args(tiny_config(*words)), SEED, 4, 2, 0, 1).batches(0)), SEED, 4
    )
    system.trained(inputs)["loss"].mean().backward()
    with_gradient = {name for name, parameter in system.trained.named_parameters() if parameter.grad is not None}
    is_frozen = (
        (lambda name: "diffusion_model.transformer." in name or "time_embed.0." in name)
        if expected is None
        else (lambda name: expected not in name)
    )
    assert with_gradient and not any(map(is_frozen, with_gradient))

    run_ranks(train_on_rank, 2, (*words, f"args.save={tmp_path}"))
    run = only_run(tmp_path)
    moved, same = trained_and_untouched(run, words)
    assert moved == with_gradient and all(map(is_frozen, same))
    held: set[str] = set()
    for file in (run / "4").glob("optimizer_rank_*.safetensors"):
        with safe_open(file, framework="pt") as reader:
            held |= {key.split("|")[1] for key in reader.keys()}  # noqa: SIM118 (not a mapping)
    assert held == with_gradient


def test_a_model_that_is_frozen_whole_is_refused() -> None:
    with pytest.raises(
        AssertionError, match=r"nothing to train: every parameter is frozen; shorten model\.not_trainable"
    ):
        run_ranks(train_on_rank, 1, (*COMMON, "model.not_trainable_prefixes=[all]"))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_at_rate_zero_every_bit_stays(tmp_path: Path, precision: str) -> None:
    words = (*COMMON, "deepspeed.optimizer.params.lr=0", f"deepspeed.bf16.enabled={precision == 'bf16'}")
    run_ranks(train_on_rank, 2, (*words, f"args.save={tmp_path}"))
    saved = load_weights(only_run(tmp_path))
    for name, value in fresh_system(tiny_config()).trained.state_dict().items():
        assert torch.equal(saved[name], value.to(torch.bfloat16 if precision == "bf16" else torch.float32)), name


def checked(tmp_path: Path, words: list[str], device_type: str = "cpu") -> Any:
    config = load_config([], words)
    return deepspeed_config(config, train_args(config), 1, device_type)


def test_bf16_asks_for_zero_1(tmp_path: Path, fresh_log: None, caplog: pytest.LogCaptureFixture) -> None:
    for stage, expected in ((0, 1), (1, 1), (2, 2)):
        got = checked(tmp_path, ["deepspeed.bf16.enabled=true", f"deepspeed.zero_optimization.stage={stage}"])
        assert (got.precision, got.zero_stage) == ("bf16", expected)
        assert got.as_deepspeed()["zero_optimization"] == {"stage": expected}
    assert [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING] == [
        "bf16 runs at ZeRO stage 1: at stage 0 DeepSpeed's first Adam step is a step off"
    ]


def test_a_bf16_run_at_stage_0_is_run_at_stage_1(tmp_path: Path) -> None:
    words = ("deepspeed.bf16.enabled=true", "deepspeed.zero_optimization.stage=0", f"args.save={tmp_path}")
    run_ranks(train_on_rank, 1, (*COMMON, *words))
    run = only_run(tmp_path)
    state = json.loads((run / "4" / "training_state.json").read_text())
    assert (state["precision"], state["zero_stage"]) == ("bf16", 1)
    assert {value.dtype for value in load_weights(run).values()} == {torch.bfloat16}


def test_precisions_that_cannot_be() -> None:
    with pytest.raises(
        ConfigError, match=r"deepspeed\.fp16 is enabled, which DeepSpeed refuses on a CPU; use bf16, or nei"
    ):
        checked(Path(), ["deepspeed.fp16.enabled=true"])
    assert checked(Path(), ["deepspeed.fp16.enabled=true"], "cuda").precision == "fp16"
    with pytest.raises(
        ConfigError, match=r"bf16 and deepspeed\.fp16 are both enabled; enable one \(2B was trained in fp"
    ):
        checked(Path(), ["deepspeed.fp16.enabled=true", "deepspeed.bf16.enabled=true"], "cuda")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["deepspeed.train_micro_batch_size_per_gpu=0"],
            r"train_micro_batch_size_per_gpu \(the command line\) is 0; give",
        ),
        (
            ["deepspeed.gradient_accumulation_steps=1.5"],
            r"gradient_accumulation_steps \(the command line\) is 1\.5; give a",
        ),
        (["deepspeed.zero_optimization.stage=4"], r"zero_optimization\.stage is 4; give 0, 1, 2 or 3"),
        (
            ["deepspeed.zero_optimisation={}"],
            r"key deepspeed\.zero_optimisation \(.*\); did you mean 'zero_optimization'",
        ),
    ],
)
def test_wrong_deepspeed_sections_are_named(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        checked(Path(), words)


def test_deepspeeds_own_checks_come_before_the_model_is_built() -> None:
    for word, message in (
        (
            "deepspeed.zero_optimization.stag=1",
            r"unknown key deepspeed.zero_optimization.stag .*; did you mean 'stage'",
        ),
        (
            "deepspeed.zero_optimization.reduce_bucket_size=many",
            r"(?s)DeepSpeed does not take the deepspeed section: .*buck",
        ),
    ):
        with pytest.raises(AssertionError, match=message):
            run_ranks(train_on_rank, 1, (*COMMON, word, "model.network_config.target=is.never.looked.for"))


@pytest.mark.parametrize(
    ("global_batch", "micro", "dp_size", "expected"),
    [
        (8, 2, 2, 2),
        (8, 1, 1, 8),
        (4, 2, 2, 1),
        (6, 4, 1, "6 is not a multiple of 4"),
        (2, 1, 3, "3 processes cannot share"),
    ],
)
def test_accumulation_follows_from_the_global_batch(
    global_batch: int, micro: int, dp_size: int, expected: int | str
) -> None:
    config = load_config(
        [], [f"args.global_batch_size={global_batch}", f"deepspeed.train_micro_batch_size_per_gpu={micro}"]
    )
    if isinstance(expected, str):
        with pytest.raises(ConfigError, match=expected):
            deepspeed_config(config, train_args(config), dp_size, "cpu")
    else:
        assert deepspeed_config(config, train_args(config), dp_size, "cpu").grad_accum_steps == expected


# --- the loss scale of fp16 ------------------------------------------------------------------------------------------


def evolve_scalers(rank: int) -> tuple[list[Any], list[Any], dict[str, float]]:
    """How the rest of a row of overflows moves DeepSpeed's scaler, and one that was set back from what was saved."""
    _import_deepspeed("cpu")  # the scaler asks for its rank
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler

    def stepper() -> Stepper:
        made = Stepper.__new__(Stepper)  # fp16 needs a GPU; of the engine nothing but its scaler is asked for
        made.config = SimpleNamespace(precision="fp16")  # type: ignore[assignment]
        scaler = DynamicLossScaler(2.0**16, 5, 1.0, delayed_shift=2, consecutive_hysteresis=False)
        made.engine = SimpleNamespace(optimizer=SimpleNamespace(loss_scaler=scaler))
        return made

    def follow(one: Stepper, overflows: list[bool]) -> list[Any]:
        scaler, seen = one.engine.optimizer.loss_scaler, []
        for overflow in overflows:
            scaler.update_scale(overflow)
            seen.append((scaler.cur_scale, scaler.cur_hysteresis, scaler.cur_iter, scaler.last_overflow_iter))
        return seen

    generator = torch.Generator().manual_seed(1)
    overflows = (torch.rand(60, generator=generator) < 0.2).tolist()
    whole, broken = stepper(), stepper()
    follow(whole, [False] * 8 + [True])  # the scale has grown, and one overflow is forgiven
    saved = json.loads(json.dumps(whole.scaler_state()))
    broken.load_scaler_state(saved)
    return follow(whole, overflows), follow(broken, overflows), saved


def test_the_loss_scale_goes_on_where_it_was() -> None:
    ((whole, broken, saved),) = run_ranks(evolve_scalers, 1)
    assert broken == whole and len({scale for scale, *_ in whole}) > 3
    assert saved.keys() == {"cur_scale", "cur_iter", "cur_hysteresis", "last_overflow_iter"}
    fresh = {"cur_scale": 2.0**16, "cur_iter": 0, "cur_hysteresis": 2, "last_overflow_iter": -1}
    assert all(saved[key] != value for key, value in fresh.items())  # each of them was put to use
