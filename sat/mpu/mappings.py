"""Collectives of tensor and sequence parallelism as forward/backward pairs. With no group each is the identity."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

Group = dist.ProcessGroup | None

SEQUENCE_DIM = -2
"""Tokens in (b s d)."""


def _all_reduce(tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
    result = tensor.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(result, group=group)
    return result


def _all_gather(tensor: Tensor, group: dist.ProcessGroup, dim: int) -> Tensor:
    """Concatenate equal parts of all ranks."""
    parts = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for _ in range(group.size())]
    dist.all_gather(parts, tensor.contiguous(), group=group)
    return torch.cat(parts, dim)


def _all_gather_sizes(tensor: Tensor, group: dist.ProcessGroup, dim: int, sizes: Sequence[int]) -> Tensor:
    """Concatenate parts whose lengths along `dim` are `sizes`; they travel padded to the longest."""
    if len(set(sizes)) == 1:
        return _all_gather(tensor, group, dim)
    padding = list(tensor.shape)
    padding[dim] = max(sizes) - tensor.shape[dim]
    gathered = _all_gather(torch.cat([tensor, tensor.new_zeros(padding)], dim), group, dim)
    parts = gathered.split(max(sizes), dim)
    return torch.cat([part.narrow(dim, 0, size) for part, size in zip(parts, sizes)], dim)


def _reduce_scatter(tensor: Tensor, group: dist.ProcessGroup, dim: int) -> Tensor:
    """This rank's equal part of the sum over ranks."""
    parts = [part.contiguous() for part in tensor.chunk(group.size(), dim)]
    result = torch.empty_like(parts[group.rank()])
    dist.reduce_scatter(result, parts, group=group)
    return result


class _CopyTo(torch.autograd.Function):
    """Identity forward, sum of the ranks' gradients backward."""

    @staticmethod
    def forward(ctx, tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return _all_reduce(grad, ctx.group), None


class _ReduceFrom(torch.autograd.Function):
    """Sum over the ranks forward; backward, the identity, or the sum of the ranks' gradients."""

    @staticmethod
    def forward(ctx, tensor: Tensor, group: dist.ProcessGroup, sum_gradients: bool) -> Tensor:
        ctx.group, ctx.sum_gradients = group, sum_gradients
        return _all_reduce(tensor, group)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        return _all_reduce(grad, ctx.group) if ctx.sum_gradients else grad, None, None


class _GatherFrom(torch.autograd.Function):
    """Concatenate the ranks' parts forward; backward, this rank's part of the gradient, or of the ranks' sum of it."""

    @staticmethod
    def forward(
        ctx, tensor: Tensor, group: dist.ProcessGroup, dim: int, sizes: Sequence[int], sum_gradients: bool
    ) -> Tensor:
        ctx.group, ctx.dim, ctx.sizes, ctx.sum_gradients = group, dim, sizes, sum_gradients
        return _all_gather_sizes(tensor, group, dim, sizes)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.sum_gradients:
            grad = _all_reduce(grad, ctx.group)
        return grad.split(ctx.sizes, ctx.dim)[ctx.group.rank()].contiguous(), None, None, None, None


class _ScatterTo(torch.autograd.Function):
    """Keep this rank's slice of the last dimension forward, concatenate the ranks' gradients backward."""

    @staticmethod
    def forward(ctx, tensor: Tensor, group: dist.ProcessGroup, sizes: Sequence[int]) -> Tensor:
        ctx.group, ctx.sizes = group, sizes
        return tensor.split(sizes, dim=-1)[group.rank()].contiguous()

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        return _all_gather_sizes(grad, ctx.group, -1, ctx.sizes), None, None


class _GatherSequence(torch.autograd.Function):
    """Concatenate the ranks' tokens forward; backward, sum the ranks' gradients and keep this rank's tokens."""

    @staticmethod
    def forward(ctx, tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return _all_gather(tensor, group, SEQUENCE_DIM)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return _reduce_scatter(grad, ctx.group, SEQUENCE_DIM), None


class _ReduceScatterSequence(torch.autograd.Function):
    """Sum over the ranks and keep this rank's tokens forward, concatenate the ranks' gradients backward."""

    @staticmethod
    def forward(ctx, tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return _reduce_scatter(tensor, group, SEQUENCE_DIM)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return _all_gather(grad, ctx.group, SEQUENCE_DIM), None


def copy_to_model_parallel_region(tensor: Tensor, group: Group) -> Tensor:
    """Enter a sharded region: identity; gradients are summed over the group."""
    return tensor if group is None else _CopyTo.apply(tensor, group)


def reduce_from_model_parallel_region(tensor: Tensor, group: Group, sum_gradients: bool = False) -> Tensor:
    """Leave a sharded region whose ranks hold summands: sum; gradients pass unchanged.

    sum_gradients: as in `gather_from_model_parallel_region`.
    """
    return tensor if group is None else _ReduceFrom.apply(tensor, group, sum_gradients)


def gather_from_model_parallel_region(
    tensor: Tensor, group: Group, sizes: Sequence[int] | None = None, sum_gradients: bool = False
) -> Tensor:
    """Leave a sharded region whose ranks hold slices of the last dimension: concatenate; gradients are sliced.

    sizes: lengths of all ranks' slices, equal by default. sum_gradients: what follows is not the same on all ranks
    (each has tokens of its own), so their gradients are summed first.
    """
    if group is None:
        return tensor
    sizes = [tensor.shape[-1]] * group.size() if sizes is None else sizes
    return _GatherFrom.apply(tensor, group, -1, sizes, sum_gradients)


def scatter_to_model_parallel_region(tensor: Tensor, group: Group, sizes: Sequence[int] | None = None) -> Tensor:
    """Enter a region that is sharded along the last dimension: slice; gradients are concatenated."""
    if group is None:
        return tensor
    if sizes is None:
        sizes = [part.shape[-1] for part in tensor.chunk(group.size(), -1)]
    return _ScatterTo.apply(tensor, group, sizes)


def gather_sequence(tensor: Tensor, group: Group) -> Tensor:
    """(b s/n d) of each rank -> (b s d); gradients are summed and scattered."""
    return tensor if group is None else _GatherSequence.apply(tensor, group)


def reduce_scatter_sequence(tensor: Tensor, group: Group) -> Tensor:
    """Summands (b s d) -> this rank's tokens (b s/n d) of their sum; gradients are gathered."""
    return tensor if group is None else _ReduceScatterSequence.apply(tensor, group)
