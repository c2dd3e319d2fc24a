"""A collective that fails or hangs ends with rank, step, operation and shapes, and names the rank to look at."""

import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from sat.errors import CommunicationError
from sat.mpu.launch import Launch, joined
from sat.mpu.recorder import REPORT_SECONDS, is_communication_failure, recorded
from sat.mpu.rollcall import LINGER_SECONDS
from sat.mpu.state import ParallelState
from tests.ranks import launched, run_processes, run_ranks

SECONDS = 5.0
STEP = 17


def work(guilty: int, misdeed: str) -> tuple[str, float]:
    """Some collectives, in which one rank misbehaves; returns the error and how long it took to come."""
    try:
        with joined(SECONDS / 60.0) as launch, recorded(launch, SECONDS / 60.0) as recorder:
            recorder.step = STEP
            dist.all_reduce(torch.ones(2, 3))
            started = time.monotonic()
            if launch.rank == guilty:
                if misdeed == "fail":
                    raise ValueError("a broken clip")
                time.sleep(SECONDS + REPORT_SECONDS + LINGER_SECONDS + 1.0)
            dist.all_reduce(torch.ones(4, 5, dtype=torch.float64))
    except (CommunicationError, ValueError) as error:
        return str(error), time.monotonic() - started
    return "", 0.0


@pytest.mark.parametrize("misdeed", [pytest.param("hang", marks=pytest.mark.slow), "fail"])
def test_the_others_end_with_what_they_were_doing(misdeed: str) -> None:
    results = run_processes(work, launched(3), 1, misdeed)
    for rank, (message, seconds) in enumerate(results):
        if rank != 1:
            assert f"a collective failed at rank {rank} on " in message
            assert f"step {STEP}, in all_reduce of float64 (4, 5) over ranks 0, 1, 2" in message
            assert "before it all_reduce of float32 (2, 3)" in message
            assert "rank 1 on " in message
            assert "did not fail with the others: look there first" in message
            assert seconds < SECONDS + REPORT_SECONDS + 2.0
    if misdeed == "fail":
        assert "a broken clip" in results[1][0]  # its own error, not that of the connection


def exchange_with_a_sleeper() -> str:
    """An asynchronous exchange, which fails when it is waited for."""
    try:
        with joined(SECONDS / 60.0) as launch, recorded(launch, SECONDS / 60.0):
            if launch.rank == 1:
                time.sleep(2 * SECONDS)
                return ""
            operations = [dist.P2POp(dist.isend, torch.ones(7), 1), dist.P2POp(dist.irecv, torch.ones(7), 1)]
            for pending in dist.batch_isend_irecv(operations):
                pending.wait()
    except CommunicationError as error:
        return str(error)
    return ""


@pytest.mark.slow
def test_what_fails_later_than_it_was_called_is_told_too() -> None:
    message, _ = run_processes(exchange_with_a_sleeper, launched(2))
    assert "before the first step, after batch_isend_irecv of float32 (7,) over ranks 0, 1" in message
    assert "NCCL_SOCKET_IFNAME" in message  # ranks that have never got through to each other


def idle(seconds: float) -> str:
    """What is logged when one rank makes the other wait for more than half of the timeout."""
    import io
    import logging

    stream = io.StringIO()
    logging.getLogger("sat").addHandler(logging.StreamHandler(stream))
    with joined(seconds / 60.0) as launch, recorded(launch, seconds / 60.0) as recorder:
        recorder.step = STEP
        if launch.rank == 1:
            time.sleep(0.8 * seconds)
        dist.all_reduce(torch.ones(2, 3))
    return stream.getvalue()


def test_a_warning_comes_at_half_of_the_timeout() -> None:
    logged, _ = run_processes(idle, launched(2), 6.0)
    assert logged.count("no collective has begun for") == 1
    assert f"step {STEP}, in all_reduce of float32 (2, 3) over ranks 0, 1" in logged


def wait_in_a_group(rank: int) -> str:
    """How a collective of a tensor-parallel group of two among four ranks ends when its other rank is late."""
    parallel = ParallelState.build(tp=2, timeout=timedelta(seconds=1))
    if parallel.rank("tp") == 0:
        with pytest.raises(RuntimeError) as caught:
            dist.all_reduce(torch.ones(1), group=parallel.group("tp"))
        return str(caught.value)
    time.sleep(2.0)
    return ""


def test_the_timeout_holds_for_the_groups_of_a_layout() -> None:
    """torch gives a mesh's groups half an hour, whatever the job's group has."""
    assert "Timed out waiting 1000ms" in run_ranks(wait_in_a_group, 4)[0]


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (RuntimeError("[/x/third_party/gloo/gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 4000ms"), True),
        (dist.DistBackendError("NCCL error in: ..."), True),
        (RuntimeError("CUDA out of memory"), False),
    ],
)
def test_only_failures_of_the_connection_are_reworded(error: RuntimeError, expected: bool) -> None:
    assert is_communication_failure(error) == expected


def test_other_errors_pass_unchanged() -> None:
    launch = Launch(0, 0, 1, torch.device("cpu"))
    with pytest.raises(RuntimeError, match="out of memory"), recorded(launch, 1.0):
        raise RuntimeError("CUDA out of memory")
