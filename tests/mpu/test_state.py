"""Which ranks work together."""

import copy

from torch import nn

from sat.mpu.state import ParallelState
from tests.ranks import run_ranks


def copy_a_module(rank: int) -> bool:
    module = nn.Linear(2, 2)
    module.parallel = ParallelState.build(cp=2)
    copied = copy.deepcopy(module)
    return copied.parallel is module.parallel and copied.weight is not module.weight


def test_a_copied_module_works_with_the_same_ranks() -> None:
    assert all(run_ranks(copy_a_module, 2))
