"""SAT's broadcast_data and random streams of tensor-parallel ranks."""

from typing import Any

import pytest
import torch

from sat import mpu
from sat.errors import LayoutError
from sat.mpu.sharing import RngTracker
from tests.ranks import run_ranks

DATA = {"text": torch.arange(6).view(2, 3), "mask": torch.tensor([[[7]]])}


def share(rank: int) -> list[Any]:
    """What every rank of two groups of two gets, and what is said of wrong data."""
    mpu.initialize_model_parallel(2)
    own = {key: value + 100 * rank for key, value in DATA.items()} if rank % 2 == 0 else None
    found = {key: value.tolist() for key, value in mpu.broadcast_data(("text", "mask"), own, torch.int64).items()}
    errors = []
    for keys, dtype in ((("text", "other"), torch.int64), (("text",), torch.float32)):
        with pytest.raises(LayoutError) as error:
            mpu.broadcast_data(keys, own, dtype)
        errors.append(str(error.value))
    draws = []
    tracker = RngTracker(torch.device("cpu"))
    torch.manual_seed(1)
    with tracker.fork():
        draws.append(float(torch.rand(())))
    draws.append(float(torch.rand(())))
    assert mpu.model_parallel_is_initialized()
    mpu.destroy_model_parallel()
    assert not mpu.model_parallel_is_initialized() and mpu.get_model_parallel_world_size() == 1
    return [found, errors, draws]


def test_all_ranks_of_a_group_get_what_its_first_has() -> None:
    results = run_ranks(share, 4)
    for rank, (found, errors, _) in enumerate(results):
        for key, value in DATA.items():
            assert found[key] == (value + 100 * (rank // 2 * 2)).tolist()
        assert "has no 'other'; it has text, mask" in errors[0]
        assert "'text' is torch.int64, and torch.float32 was asked for" in errors[1]
    forked = [draws[0] for _, _, draws in results]
    assert forked[0] == forked[2] and forked[1] == forked[3] and forked[0] != forked[1]
    assert len({draws[1] for _, _, draws in results}) == 1  # outside of it the ranks draw the same


def test_alone_the_data_are_the_processes_own() -> None:
    assert torch.equal(mpu.broadcast_data(["text"], DATA, torch.int64)["text"].cpu(), DATA["text"])


def test_a_fork_neither_disturbs_others_nor_begins_anew() -> None:
    tracker = RngTracker(torch.device("cpu"))
    torch.manual_seed(3)
    expected = [float(torch.rand(())) for _ in range(2)]
    torch.manual_seed(3)
    tracker.add("a", 5)
    found, forked = [], []
    for _ in range(2):
        with tracker.fork("a"):
            forked.append(float(torch.rand(())))
        found.append(float(torch.rand(())))
    assert found == expected and forked[0] != forked[1]
    states = tracker.get_states()
    with tracker.fork("a"):
        third = float(torch.rand(()))
    tracker.set_states(states)
    with tracker.fork("a"):
        assert float(torch.rand(())) == third
    tracker.reset()
    assert not tracker.get_states()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, and the tracker with it")
def test_without_a_gpu_there_is_no_tracker() -> None:
    assert mpu.get_cuda_rng_tracker() is None
