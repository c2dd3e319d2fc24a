"""Attention over keys and values that come around a ring of ranks (Liu et al. 2023, arXiv:2310.01889).

Softmax over blocks of keys is put together from each block's result and log-sum-exp (Milakov & Gimelshein 2018,
arXiv:1805.02867), in float32 or better. Letters: b batch, k heads, s queries, m keys, e head size.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.distributed as dist
from torch import Tensor

from sat.mpu.context import PendingPass, RingPass

HIDDEN_SCORE = -10000.0
"""Score of a key that a mask hides, as in SAT."""

HALF = (torch.float16, torch.bfloat16)
"""Precisions that flash kernels take."""


@dataclass(frozen=True)
class Overlap:
    """Queries [q0, q1) of a rank's share and keys [k0, k1) of another's that attend to each other."""

    q0: int
    q1: int
    k0: int
    k1: int


def overlaps(bounds: Sequence[int], query_start: int, key_start: int, length: int) -> list[Overlap]:
    """Where two shares of `length` tokens meet in the segments between `bounds`; padding is in none of them."""
    found = []
    for low, high in pairwise(bounds):
        q0, q1 = max(low - query_start, 0), min(high - query_start, length)
        k0, k1 = max(low - key_start, 0), min(high - key_start, length)
        if q0 < q1 and k0 < k1:
            found.append(Overlap(q0, q1, k0, k1))
    return found


def block_forward(
    query: Tensor, key: Tensor, value: Tensor, scale: float, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """softmax(q kᵀ · scale) v (b k s e) and the log-sum-exp of its scores (b k s), float32 or better.

    mask (broadcastable to b k s m): 1 keeps, 0 hides, by SAT's rule score · mask - 10000 · (1 - mask).
    """
    if mask is None and query.device.type == "cpu":
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, 0.0, False, scale=scale)
    if mask is None and query.dtype in HALF:
        result = torch.ops.aten._scaled_dot_product_flash_attention(query, key, value, 0.0, False, False, scale=scale)
        return result[0], result[1]
    scores = _scores(query, key, scale, mask)
    lse = scores.logsumexp(-1)
    return torch.matmul((scores - lse.unsqueeze(-1)).exp().to(value.dtype), value), lse


def block_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    lse: Tensor,
    scale: float,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """A block's share of the gradients of query, key and value, given the output and log-sum-exp over all blocks."""
    grad, output, lse = grad.contiguous(), output.contiguous(), lse.contiguous()
    if mask is None and query.device.type == "cpu":
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad, query, key, value, output, lse, 0.0, False, scale=scale
        )
    if mask is None and query.dtype in HALF:
        none = torch.empty(0, dtype=torch.uint64, device=query.device)  # random state: there is no dropout
        return torch.ops.aten._scaled_dot_product_flash_attention_backward(
            grad, query, key, value, output, lse, None, None,
            query.shape[2], key.shape[2], 0.0, False, none, none, scale=scale,
        )  # fmt: skip
    weights = (_scores(query, key, scale, mask) - lse.unsqueeze(-1)).exp().to(value.dtype)
    grad_scores = weights * (torch.matmul(grad, value.mT) - (grad * output).sum(-1, keepdim=True))
    if mask is not None:
        grad_scores = grad_scores * mask
    grad_query, grad_key = torch.matmul(grad_scores, key) * scale, torch.matmul(grad_scores.mT, query) * scale
    return grad_query, grad_key, torch.matmul(weights.mT, grad)


def _scores(query: Tensor, key: Tensor, scale: float, mask: Tensor | None) -> Tensor:
    scores = torch.matmul(query * scale, key.mT)
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    return scores if mask is None else scores * mask + HIDDEN_SCORE * (1.0 - mask)


def merge_block(output: Tensor, lse: Tensor, block: Tensor, block_lse: Tensor) -> None:
    """Take a block's result into a running one, in place: both with the log-sum-exp of the scores seen."""
    whole = torch.logaddexp(lse, block_lse)
    output.mul_((lse - whole).exp().unsqueeze(-1)).add_((block_lse - whole).exp().unsqueeze(-1) * block)
    lse.copy_(whole)


def _cut_mask(mask: Tensor | None, own: Overlap, query_start: int, key_start: int) -> Tensor | None:
    """The part of a whole mask (.. s s) that an overlap of two shares sees."""
    if mask is None:
        return None
    rows = slice(query_start + own.q0, query_start + own.q1)
    return mask[..., rows, key_start + own.k0 : key_start + own.k1]


class _RingAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        group: dist.ProcessGroup,
        bounds: Sequence[int],
        scale: float,
        mask: Tensor | None,
    ) -> Tensor:
        wide = torch.promote_types(query.dtype, torch.float32)
        output = torch.zeros(query.shape, dtype=wide, device=query.device)
        lse = torch.full(query.shape[:3], -torch.inf, dtype=wide, device=query.device)
        ring, rank, size, length = RingPass(group), group.rank(), group.size(), query.shape[2]
        block = [key.contiguous(), value.contiguous()]
        for step in range(size):
            pending = ring.start(block) if step < size - 1 else None
            source = (rank - step) % size  # whose keys these are
            for own in overlaps(bounds, rank * length, source * length, length):
                queries, keys = slice(own.q0, own.q1), slice(own.k0, own.k1)
                part = _cut_mask(mask, own, rank * length, source * length)
                result = block_forward(query[:, :, queries], block[0][:, :, keys], block[1][:, :, keys], scale, part)
                merge_block(output[:, :, queries], lse[:, :, queries], *result)
            if pending is not None:
                block = pending.wait()
        narrow = output.to(query.dtype)
        ctx.save_for_backward(query, key, value, narrow, lse, mask)
        ctx.group, ctx.bounds, ctx.scale = group, bounds, scale
        return narrow

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, output, lse, mask = ctx.saved_tensors
        group, scale = ctx.group, ctx.scale
        ring, rank, size, length = RingPass(group), group.rank(), group.size(), query.shape[2]
        wide = lse.dtype
        grad_query = torch.zeros(query.shape, dtype=wide, device=query.device)
        block = [key.contiguous(), value.contiguous()]
        passed: PendingPass | None = None
        for step in range(size):
            pending = ring.start(block) if step < size - 1 else None
            source = (rank - step) % size
            added = [torch.zeros(x.shape, dtype=wide, device=x.device) for x in block]
            for own in overlaps(ctx.bounds, rank * length, source * length, length):
                queries, keys = slice(own.q0, own.q1), slice(own.k0, own.k1)
                part = _cut_mask(mask, own, rank * length, source * length)
                grads = block_backward(
                    grad[:, :, queries], query[:, :, queries], block[0][:, :, keys], block[1][:, :, keys],
                    output[:, :, queries], lse[:, :, queries], scale, part,
                )  # fmt: skip
                grad_query[:, :, queries] += grads[0]
                for total, own_grad in zip(added, grads[1:]):
                    total[:, :, keys] += own_grad
            if pending is not None:
                block = pending.wait()
            # A rank's key and value gradients follow its keys and values; after the last pass they are home.
            if passed is not None:
                added = [total + earlier for total, earlier in zip(added, passed.wait())]
            passed = ring.start(added)
        assert passed is not None
        grad_key, grad_value = passed.wait()
        return grad_query.to(query.dtype), grad_key.to(key.dtype), grad_value.to(value.dtype), None, None, None, None


def ring_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    group: dist.ProcessGroup,
    bounds: Sequence[int],
    scale: float,
    mask: Tensor | None = None,
) -> Tensor:
    """Attention of this rank's tokens to those of all ranks of the group, (b k s/n e) each.

    bounds: tokens between neighbouring bounds attend to each other; what lies past the last one is padding, whose
    output is zero. mask: whole, broadcastable to (b k s s), see `block_forward`.
    """
    return _RingAttention.apply(query, key, value, group, tuple(bounds), scale, mask)
