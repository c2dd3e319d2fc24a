"""Attention within segments as one operation: results, gradients, what a compiler is told of it, and its FLOPs."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from sat.mpu.context import SequenceShard
from sat.mpu.state import get_parallel_state
from sat.ops.attention import attend_in_segments, attend_packed
from sat.ops.packed_attention import packed_attention

BOUNDS = (0, 5, 6, 13)
LENGTH = 15  # two of padding


def draw(dtype: torch.dtype = torch.float64, device: str = "cpu") -> list[Tensor]:
    tensors = torch.randn(3, 1, 2, LENGTH, 16, generator=torch.Generator().manual_seed(0))
    return [tensor.to(device, dtype).requires_grad_() for tensor in tensors]


def run(attended: Tensor, tensors: list[Tensor]) -> list[Tensor]:
    weights = torch.linspace(-1.0, 1.0, attended.numel()).view(attended.shape).to(attended)
    return [attended.detach(), *torch.autograd.grad((attended * weights).sum(), tensors)]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 1e-5)])
def test_it_equals_one_call_for_each_segment(dtype: torch.dtype, tolerance: float) -> None:
    tensors = draw(dtype)
    expected = run(attend_in_segments(*tensors, BOUNDS, F.scaled_dot_product_attention), tensors)
    found = run(packed_attention(*tensors, torch.tensor(BOUNDS), 0.25)[0], tensors)
    for ours, theirs in zip(found, expected):
        torch.testing.assert_close(ours, theirs, rtol=0.0, atol=tolerance)
    assert not found[0][:, :, BOUNDS[-1] :].any()


def test_the_compiler_is_told_the_truth() -> None:
    torch.library.opcheck(packed_attention, (*draw(torch.float32), torch.tensor(BOUNDS), 0.25))


def test_its_products_are_counted() -> None:
    tensors = draw()
    with FlopCounterMode(display=False) as counter:
        attended = packed_attention(*tensors, torch.tensor(BOUNDS), 0.25)[0]
        forward = counter.get_total_flops()
        attended.sum().backward()
    product = sum(2 * 2 * 16 * length**2 for length in (5, 1, 7))
    assert (forward, counter.get_total_flops()) == (2 * product, 6 * product)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_on_a_gpu_it_equals_one_call_for_each_segment(dtype: torch.dtype) -> None:
    tensors = draw(dtype, "cuda")
    sequence = SequenceShard.of(BOUNDS[-1], get_parallel_state(), BOUNDS, torch.device("cuda"))
    assert sequence is not None
    expected = run(attend_in_segments(*tensors, BOUNDS, F.scaled_dot_product_attention), tensors)
    for ours, theirs in zip(run(attend_packed(*tensors, sequence, 0.25), tensors), expected):
        torch.testing.assert_close(ours, theirs, rtol=0.0, atol=2e-2 if dtype is torch.bfloat16 else 1e-5)
