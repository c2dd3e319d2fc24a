"""Which ranks work together."""

import copy

import pytest
from torch import nn

from sat.errors import LayoutError
from sat.mpu.state import ParallelState, legal_layouts
from tests.ranks import run_ranks


def copy_a_module(rank: int) -> bool:
    module = nn.Linear(2, 2)
    module.parallel = ParallelState.build(cp=2)
    copied = copy.deepcopy(module)
    return copied.parallel is module.parallel and copied.weight is not module.weight


def test_a_copied_module_works_with_the_same_ranks() -> None:
    assert all(run_ranks(copy_a_module, 2))


def refuse(rank: int) -> str:
    with pytest.raises(LayoutError) as error:
        ParallelState.build(tp=2, guidance=2)
    return str(error.value)


def test_the_choices_leave_room_for_the_halves_of_guidance() -> None:
    for message in run_ranks(refuse, 2):
        assert message.endswith("choose from dp x cp x tp, beside 2 halves of guidance, = 1 x 1 x 1")
    assert legal_layouts(4, 2).endswith("= 2 x 1 x 1, 1 x 2 x 1, 1 x 1 x 2")
    assert legal_layouts(3, 2).startswith("layouts without args.guidance_parallel")
    assert legal_layouts(2) == "dp x cp x tp = 2 x 1 x 1, 1 x 2 x 1, 1 x 1 x 2"
