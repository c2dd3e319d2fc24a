"""What collectives carry, by the ring algorithms' count."""

from fractions import Fraction

import pytest
import torch
import torch.distributed as dist

from sat.mpu.collectives import Collective, watch
from sat.mpu.traffic import count_traffic
from tests.ranks import run_ranks

WORLD = 3


def call_everything(rank: int) -> dict[str, tuple[Fraction, str]]:
    """(Bytes sent, in words) of one call of each function."""
    whole = torch.ones(2, 6)  # 48 bytes
    parts = [torch.ones(2, 2) for _ in range(WORLD)]  # 16 bytes each
    given, kept = [1, 2, 4], [[1] * 3, [2] * 3, [4] * 3][rank]
    after, before = (rank + 1) % WORLD, (rank - 1) % WORLD
    calls = {
        "all_reduce": lambda: dist.all_reduce(whole),
        "broadcast": lambda: dist.broadcast(whole, src=0),
        "all_gather": lambda: dist.all_gather([torch.empty(2, 6) for _ in range(WORLD)], whole),
        "all_gather_into_tensor": lambda: dist.all_gather_into_tensor(torch.empty(6, 6), whole),
        "reduce_scatter": lambda: dist.reduce_scatter(torch.empty(2, 2), parts),
        "reduce_scatter_tensor": lambda: dist.reduce_scatter_tensor(torch.empty(2, 2), torch.ones(6, 2)),
        "all_to_all_single": lambda: dist.all_to_all_single(torch.empty(sum(kept)), torch.ones(7), kept, given),
        "batch_isend_irecv": lambda: [
            work.wait()
            for work in dist.batch_isend_irecv(
                [dist.P2POp(dist.isend, whole, after), dist.P2POp(dist.irecv, torch.empty(2, 6), before)]
            )
        ],
        "barrier": lambda: dist.barrier(),
        "all_gather_object": lambda: dist.all_gather_object([None] * WORLD, "word"),
    }
    found = {}
    for name, call in calls.items():
        with count_traffic() as traffic:
            call()
        (collective,) = traffic.collectives
        assert traffic.by_operation() == {(name, WORLD): collective.sent_bytes}
        found[name] = (traffic.sent_bytes, str(collective))
    return found


def test_bytes_and_words_of_every_function() -> None:
    for rank, found in enumerate(run_ranks(call_everything, WORLD)):
        ranks = "over ranks 0, 1, 2"
        assert found == {
            "all_reduce": (Fraction(2 * 2 * 48, 3), f"all_reduce of float32 (2, 6) {ranks}"),
            "broadcast": (Fraction(2 * 48, 3), f"broadcast of float32 (2, 6) {ranks}"),
            "all_gather": (2 * 48, f"all_gather of float32 (2, 6) {ranks}"),
            "all_gather_into_tensor": (2 * 48, f"all_gather_into_tensor of float32 (2, 6) {ranks}"),
            "reduce_scatter": (2 * 16, f"reduce_scatter of float32 (2, 2) and (2, 2) and (2, 2) {ranks}"),
            "reduce_scatter_tensor": (2 * 16, f"reduce_scatter_tensor of float32 (6, 2) {ranks}"),
            "all_to_all_single": (4 * (7 - [1, 2, 4][rank]), f"all_to_all_single of float32 (7,) {ranks}"),
            "batch_isend_irecv": (48, f"batch_isend_irecv of float32 (2, 6) {ranks}"),
            "barrier": (0, f"barrier {ranks}"),
            "all_gather_object": (0, f"all_gather_object {ranks}"),
        }


def nest_and_fail(rank: int) -> tuple[list[str], list[str]]:
    """What two watchers, one within the other, are told of a call that fails and one that does not."""

    class Listener:
        def __init__(self) -> None:
            self.told: list[str] = []

        def started(self, collective: Collective) -> None:
            self.told.append(f"started {collective.name}")

        def returned(self, collective: Collective) -> None:
            self.told.append(f"returned {collective.name}")

    outer, inner, original = Listener(), Listener(), dist.all_reduce
    with watch(outer):
        with watch(inner), pytest.raises(RuntimeError):
            dist.all_reduce(torch.ones(2).to_sparse(), op=dist.ReduceOp.MAX)
        dist.all_reduce(torch.ones(2))
    assert dist.all_reduce is original
    dist.all_reduce(torch.ones(2))
    return outer.told, inner.told


def test_watchers_nest_and_leave_no_trace() -> None:
    for outer, inner in run_ranks(nest_and_fail, 1):
        assert inner == ["started all_reduce"]
        assert outer == ["started all_reduce", "started all_reduce", "returned all_reduce"]
