"""The law of layout for data parallelism: processes, micro batch and ZeRO stage change nothing but rounding."""

from pathlib import Path

import pytest
import torch

from sat.training.checkpoint import load_weights
from tests.ranks import run_ranks
from tests.tiny import only_run, records, train_on_rank

COMMON = ("args.train_iters=20", "args.global_batch_size=4", "args.save_interval=20")
LOSS_RTOL = 1e-5  # the worst seen over these layouts is 2e-7
WEIGHT_ATOL = 1e-4  # Adam turns rounding of near-zero gradients into steps of up to the learning rate, 1e-3


def run(folder: Path, world: int, micro: int, stage: int, *more: str) -> Path:
    """Train 20 steps on a layout; returns the run directory."""
    options = (
        *COMMON,
        f"args.save={folder}",
        f"deepspeed.train_micro_batch_size_per_gpu={micro}",
        f"deepspeed.zero_optimization.stage={stage}",
        *more,
    )
    run_ranks(train_on_rank, world, options)
    return only_run(folder)


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(tmp_path_factory.mktemp("reference"), world=1, micro=4, stage=0)


@pytest.mark.parametrize(
    ("world", "micro", "stage"),
    [
        *((2, 2, 0), (2, 2, 1), (2, 1, 2)),
        *(pytest.param(*layout, marks=pytest.mark.slow) for layout in ((1, 1, 1), (2, 2, 2), (4, 1, 1))),
    ],
)
def test_same_losses_and_weights(reference: Path, tmp_path: Path, world: int, micro: int, stage: int) -> None:
    other = run(tmp_path, world, micro, stage)
    for name in ("loss", "grad_norm"):
        expected = torch.tensor([record[name] for record in records(reference)])
        got = torch.tensor([record[name] for record in records(other)])
        assert len(got) == 20
        torch.testing.assert_close(got, expected, rtol=LOSS_RTOL, atol=0.0)
    expected_weights, weights = load_weights(reference), load_weights(other)
    assert weights.keys() == expected_weights.keys()
    for name, value in expected_weights.items():
        if "query_key_value.bias" in name:  # the key's bias cannot change the loss: Adam amplifies its rounding
            continue
        torch.testing.assert_close(
            weights[name], value, rtol=0.0, atol=WEIGHT_ATOL, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_the_comparison_has_teeth(reference: Path, tmp_path: Path) -> None:
    """Another seed gives other losses: equality above is not a property of the data."""
    options = (*COMMON, f"args.save={tmp_path}", "deepspeed.train_micro_batch_size_per_gpu=4")
    run_ranks(train_on_rank, 1, options, 8)
    difference = abs(records(only_run(tmp_path))[0]["loss"] - records(reference)[0]["loss"])
    assert difference > 1e-2


@pytest.mark.parametrize("stage", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_bf16_follows_fp32(reference: Path, tmp_path: Path, stage: int) -> None:
    other = run(tmp_path, 2, 2, stage, "deepspeed.bf16.enabled=true")
    losses = [(a["loss"], b["loss"]) for a, b in zip(records(reference), records(other))]
    worst = max(abs(a - b) / a for a, b in losses)
    assert 0.0 < worst < 0.03  # measured 0.9 %: bf16 has three digits


def test_muon_moves_every_rank_alike(tmp_path: Path) -> None:
    muon = "deepspeed.optimizer={type: sat.ops.Muon, params: {lr: 0.01}}"
    one, two = (run(tmp_path / str(world), world, 2, 0, muon) for world in (1, 2))
    expected, got = (torch.tensor([record["loss"] for record in records(other)]) for other in (one, two))
    torch.testing.assert_close(got, expected, rtol=LOSS_RTOL, atol=0.0)


def test_validation_is_the_same_at_any_layout(tmp_path: Path) -> None:
    options = (
        "args.train_iters=2",
        "args.global_batch_size=4",
        "args.eval_interval=1",
        "args.eval_iters=3",
        "args.eval_batch_size=2",
    )
    results = []
    for world in (1, 2):
        run_ranks(train_on_rank, world, (*options, f"args.save={tmp_path / str(world)}"))
        results.append(records(only_run(tmp_path / str(world)), "valid"))
    assert [record["samples"] for record in results[0]] == [6, 6]
    for alone, together in zip(*results):
        for name in ("loss", "loss_100", "loss_900"):
            assert together[name] == pytest.approx(alone[name], rel=1e-6)
