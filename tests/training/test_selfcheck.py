"""`--selfcheck` passes where all is right, and says what is not."""

import contextlib
import io
import os
from collections.abc import Callable

import pytest
import torch

from sat.mpu import mappings
from tests.ranks import launched, run_processes
from tests.tiny import TINY


def check(words: tuple[str, ...], break_something: Callable[[], None] | None = None) -> tuple[int, str]:
    """(Exit code, what is logged) of train_video.py --selfcheck on the tiny configuration, in this process."""
    from sat.training.cli import main

    if break_something is not None:
        break_something()
    stream, code = io.StringIO(), 0
    with contextlib.redirect_stderr(stream):
        try:
            main(["--base", str(TINY), "--selfcheck", *words])
        except SystemExit as error:
            code = int(error.code or 0)
    return code, stream.getvalue()


def layout(tp: int = 1, cp: int = 1, mode: str = "auto", sp: bool = False, stage: int = 1) -> tuple[str, ...]:
    return (
        f"args.model_parallel_size={tp}",
        f"args.context_parallel_size={cp}",
        f"args.context_parallel_mode={mode}",
        f"args.sequence_parallel={str(sp).lower()}",
        f"deepspeed.zero_optimization.stage={stage}",
    )


@pytest.mark.parametrize(
    ("world", "words", "said"),
    [
        (1, layout(), ["all 1 ranks are here", "passed in", "dp 1 x cp 1 x tp 1, ZeRO stage 1"]),
        (2, layout(tp=2, sp=True, stage=3), ["tp           2 ranks", "tp 2 with sequence parallelism, ZeRO stage 3"]),
        pytest.param(2, layout(stage=2), ["dp           2 ranks", "dp 2 x cp 1 x tp 1"], marks=pytest.mark.slow),
        pytest.param(2, layout(cp=2, mode="ring", stage=0), ["cp           2 ranks"], marks=pytest.mark.slow),
        (4, layout(cp=2, mode="ulysses", stage=2), ["replicas     4 ranks", "cp 2 (ulysses 2 x ring 1) x tp 1"]),
        pytest.param(4, layout(tp=2, cp=2, mode="ring"), ["cp 2 (ulysses 1 x ring 2) x tp 2"], marks=pytest.mark.slow),
    ],
)
def test_right_numbers_pass(world: int, words: tuple[str, ...], said: list[str]) -> None:
    results = run_processes(check, launched(world), words)
    assert [code for code, _ in results] == [0] * world
    first, *others = (text for _, text in results)
    for expected in (*said, f"{os.uname().nodename} ", "gradients, float64", "step of the weights, ZeRO stage"):
        assert expected in first
    assert first.count(" equal ") == 4 and "WRONG" not in first
    assert others == [""] * (world - 1)  # rank 0 speaks


def leave_out_a_sum() -> None:
    mappings._all_reduce = lambda tensor, group: tensor.clone()


def give_nan() -> None:
    mappings._all_reduce = lambda tensor, group: tensor * float("nan")


@pytest.mark.parametrize("break_something", [leave_out_a_sum, pytest.param(give_nan, marks=pytest.mark.slow)])
def test_wrong_numbers_fail(break_something: Callable[[], None]) -> None:
    results = run_processes(check, launched(2), layout(tp=2), break_something)
    assert [code for code, _ in results] == [1, 1]
    assert "gradients, float64                       WRONG" in results[0][1]
    assert "selfcheck FAILED: not what one process computes (loss, float64, gradients, float64, " in results[0][1]
    assert "passed" not in results[0][1]


def test_a_rank_that_does_not_come_is_named() -> None:
    for code, text in run_processes(check, launched(3, ranks=[0, 1]), ("args.timeout_minutes=0.1",)):
        assert code == 2
        assert f"error: rank 2 of 3 on {os.uname().nodename} did not report in within 6 s" in text


def test_the_bandwidth_is_what_a_rank_sends_in_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    from sat.training import selfcheck

    class Group:
        def size(self) -> int:
            return 4

    clock = iter(range(100))
    monkeypatch.setattr(selfcheck.time, "perf_counter", lambda: float(next(clock)))
    monkeypatch.setattr(selfcheck.dist, "all_reduce", lambda tensor, group: None)
    expected = 2 * 3 / 4 * selfcheck.MEASURED_BYTES["cpu"] / 1e9
    assert selfcheck._bandwidth(Group(), torch.device("cpu")) == pytest.approx(expected)  # type: ignore[arg-type]
