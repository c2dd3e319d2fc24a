"""The learning rate as a function of the step; SAT's own numbers are replayed by tests/tools/test_replay_golden.py."""

import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sat.training.lr import LearningRate
from tests.ranks import run_ranks
from tests.tiny import only_run, records, train_on_rank


def rate(**changes: float | str) -> LearningRate:
    return LearningRate(**{"peak": 2.0, "total_steps": 100, "warmup_steps": 10, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("style", "step", "expected"),
    [
        ("linear", 1, 0.2),
        ("linear", 10, 2.0),
        ("linear", 60, 1.0),
        ("linear", 110, 0.0),
        ("linear", 160, -1.0),  # as SAT; the loop stops at 0
        ("cosine", 5, 1.0),
        ("cosine", 60, 2.0 * 0.55),
        ("cosine", 110, 0.2),
        ("cosine", 1000, 0.2),
        ("constant", 10**6, 2.0),
        ("exponential", 10**6, 2.0),  # constant, as SAT
    ],
)
def test_values_worked_out_by_hand(style: str, step: int, expected: float) -> None:
    assert rate(style=style).at(step) == pytest.approx(expected)


def test_cosine_ends_at_its_share_of_the_peak() -> None:
    assert rate(style="cosine", decay_ratio=0.3).at(110) == pytest.approx(0.6)
    middle = rate(style="cosine", decay_ratio=0.0, warmup_steps=0)
    assert middle.at(25) == pytest.approx(1 + math.cos(math.pi / 4))


@given(step=st.integers(1, 400), until=st.integers(0, 300), warmup=st.integers(0, 200))
def test_a_loaded_model_starts_low(step: int, until: int, warmup: int) -> None:
    loaded, fresh = (rate(warmup_steps=warmup, auto_warmup_until=end).at(step) for end in (until, 0))
    if step <= until:
        assert loaded <= 0.05 * 2.0
        assert loaded == pytest.approx(min(0.1, 2.0 * step / warmup if warmup else 2.0))
    else:
        assert loaded == fresh


@given(step=st.integers(1, 99), warmup=st.floats(0, 50))
def test_the_rate_rises_and_then_falls(step: int, warmup: float) -> None:
    for style in ("linear", "cosine"):
        now, later = (rate(style=style, warmup_steps=warmup).at(at) for at in (step, step + 1))
        assert now <= later if step + 1 <= warmup else step < warmup or now >= later
        assert now <= 2.0


def test_a_run_follows_the_curve_and_never_goes_below_zero(tmp_path: Path) -> None:
    words = ("args.train_iters=6", "args.lr_decay_iters=4", "args.lr_decay_style=linear", "args.warmup=0.5")
    run_ranks(train_on_rank, 1, (*words, f"args.save={tmp_path}"))
    expected = [5e-4, 1e-3, 7.5e-4, 5e-4, 2.5e-4, 0.0]
    assert [record["lr"] for record in records(only_run(tmp_path))] == pytest.approx(expected)
