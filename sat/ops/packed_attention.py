"""Attention within segments of a row, as one operation that a compiler sees whole: where segments lie is in a tensor.

Letters: b batch, k heads, s tokens, e head size.
"""

from collections.abc import Iterable, Iterator
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from sat.ops.ring_attention import block_backward, block_forward


def _segments(marks: Tensor) -> Iterator[slice]:
    return (slice(low, high) for low, high in pairwise(marks.tolist()))


def _joined(parts: Iterable[Tensor], length: int) -> Tensor:
    """Results of all segments side by side along dimension 2, zeros behind the last one."""
    whole = torch.cat(list(parts), dim=2)
    missing = length - whole.shape[2]
    return F.pad(whole, (0, 0) * (whole.dim() - 3) + (0, missing)) if missing else whole


@torch.library.custom_op("sat::packed_attention", mutates_args=())
def packed_attention(query: Tensor, key: Tensor, value: Tensor, marks: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Attention of each segment between neighbouring marks to itself, zeros behind the last one.

    query, key, value (b k s e), marks (n+1,) whole numbers on the CPU -> attended values, and the log-sum-exp of the
    scores (b k s).
    """
    parts = [block_forward(query[:, :, own], key[:, :, own], value[:, :, own], scale) for own in _segments(marks)]
    outputs, lses = zip(*parts)
    return _joined(outputs, query.shape[2]), _joined(lses, query.shape[2])


@packed_attention.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, marks: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    return query.new_empty(query.shape), query.new_empty(query.shape[:3], dtype=_lse_dtype(query))


def _lse_dtype(query: Tensor) -> torch.dtype:
    return torch.promote_types(query.dtype, torch.float32)


@torch.library.custom_op("sat::packed_attention_backward", mutates_args=())
def _packed_attention_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    lse: Tensor,
    marks: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    parts = []
    for own in _segments(marks):
        g, q, k, v, o, block_lse = (x[:, :, own] for x in (grad, query, key, value, output, lse))
        parts.append(block_backward(g, q, k, v, o, block_lse, scale))
    grad_query, grad_key, grad_value = (_joined(own, query.shape[2]) for own in zip(*parts))
    return grad_query, grad_key, grad_value


@_packed_attention_backward.register_fake
def _(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)


def _keep_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.scale = inputs
    ctx.save_for_backward(*tensors, *output)


def _backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    query, key, value, marks, output, lse = ctx.saved_tensors
    grads = _packed_attention_backward(grad, query, key, value, output, lse, marks, ctx.scale)
    return *grads, None, None


packed_attention.register_autograd(_backward, setup_context=_keep_for_backward)


def _products(query: Tensor, marks: Tensor) -> int:
    """Multiply-adds of one product of queries and keys within all segments, counted twice."""
    batch, heads, _, size = query.shape
    return sum(2 * batch * heads * size * (own.stop - own.start) ** 2 for own in _segments(marks))


@register_flop_formula(torch.ops.sat.packed_attention, get_raw=True)
def _forward_flops(query: Tensor, key: Tensor, value: Tensor, marks: Tensor, *_: Any, **__: Any) -> int:
    return 2 * _products(query, marks)


@register_flop_formula(torch.ops.sat.packed_attention_backward, get_raw=True)
def _backward_flops(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *rest: Any, **__: Any) -> int:
    return 4 * _products(query, rest[2])  # without the scores, which are made a second time
