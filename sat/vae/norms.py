"""GroupNorm followed by swish: its statistics in slices along time and over processes, its gradient over processes.

Letters: `b` batch, `c` channels, `g` groups of channels, `t` frames, `h w` rows and columns.
"""

from collections.abc import Callable, Iterator
from typing import Protocol

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from sat.errors import ConfigError
from sat.vae.causal_conv import Activate, memory_format, time_slices
from sat.vae.context import ChunkContext
from sat.vae.shard import FrameShard

NORM_EPS = 1e-6

ROWS_PER_SUM = 1024
"""Values added up in float32 before float64 takes over: errors of 6e-7 in a mean and 3e-7 in a variance, relative."""


class NormLike(Protocol):
    """A norm followed by swish: called for (b c t h w) -> (b c t h w), or asked for a function of slices of it."""

    def __call__(self, hidden: Tensor, ctx: "ChunkContext") -> Tensor: ...

    def in_slices(self, hidden: Tensor, ctx: "ChunkContext") -> Activate: ...

    def parameters(self) -> Iterator[nn.Parameter]: ...


MakeNorm = Callable[[int], NormLike]
"""Builds the norm of a number of channels."""


def scale_shift_swish(frames: Tensor, scale: Tensor, shift: Tensor, out: Tensor) -> None:
    """Write swish(frames * scale + shift) to `out`, of shapes that broadcast, computed as precisely as `scale` is."""
    if out.dtype == scale.dtype:
        F.silu(torch.addcmul(shift, frames, scale, out=out), inplace=True)
    else:
        out.copy_(F.silu(torch.addcmul(shift, frames.to(scale.dtype), scale), inplace=True))


def check_groups(num_groups: int, channels: int) -> None:
    """Raise ConfigError unless `channels` divide into `num_groups` norm groups."""
    if channels % num_groups:
        raise ConfigError(
            f"a VAE level of {channels} channels does not divide into {num_groups} norm groups; "
            "make every ch * ch_mult[i] a multiple of norm_groups, or lower norm_groups"
        )


def group_statistics(norm: nn.GroupNorm, hidden: Tensor, shard: FrameShard | None = None) -> Tensor:
    """(3 b g), float64: means and variances of g groups of (b c t h w), and of how many frames. No copy is made.

    Those of slices along time, and of the frames of other processes, are merged as by Chan et al. 1979 ("Updating
    formulae", eq. 2.1).
    """
    is_channels_last = memory_format(hidden) == torch.channels_last_3d
    own = _of_rows(norm, hidden) if is_channels_last else _of_planes(norm, hidden)
    if shard is None or not shard.one_clip:
        return own
    if not shard.has_frames:
        own[2] = 0.0
    return _merge_statistics(shard.gather(own))


def _of_planes(norm: nn.GroupNorm, hidden: Tensor) -> Tensor:
    """`group_statistics` of this process where channels are outermost in memory."""
    batch, channels, num_frames = hidden.shape[:3]
    precision = torch.promote_types(hidden.dtype, torch.float32)
    slices = []
    for start, stop in time_slices(num_frames, hidden[:, :, 0].numel(), whole=False):
        # One row a channel, with plain strides: torch misreads those of a size of 1 as another layout.
        frames = hidden[:, :, start:stop].to(precision).reshape(-1).view(batch, channels, 1, -1)
        numel = frames.shape[3]
        _, mean, rstd = torch.native_group_norm(frames, None, None, batch, channels, numel, norm.num_groups, norm.eps)
        mean, rstd = mean.double(), rstd.double()
        slices.append(torch.stack([mean, rstd**-2 - norm.eps, torch.full_like(mean, stop - start)]))
    return _merge_statistics(torch.stack(slices))


def _of_rows(norm: nn.GroupNorm, hidden: Tensor) -> Tensor:
    """`group_statistics` of this process where channels are innermost in memory.

    torch's statistics of batch norm write nothing but their result, unlike a group norm. They add up in sequence, so
    each sum is kept short.
    """
    rows = rearrange(hidden, "b c t h w -> b (t h w) c")
    precision = torch.promote_types(hidden.dtype, torch.float32)
    blocks = []
    for block in rows.split(ROWS_PER_SUM, dim=1):
        of_clips = [torch.stack(torch.batch_norm_update_stats(clip.to(precision), None, None, 0.0)) for clip in block]
        mean, var = torch.stack(of_clips, dim=1).double()  # b c
        blocks.append(torch.stack([mean, var, torch.full_like(mean, block.shape[1])]))
    of_channels = _merge_statistics(torch.stack(blocks))  # 3 b c
    of_groups = _merge_statistics(rearrange(of_channels, "s b (g n) -> n s b g", g=norm.num_groups))
    of_groups[2] = hidden.shape[2]
    return of_groups


def _merge_statistics(parts: Tensor) -> Tensor:
    """(n 3 b g) of n parts -> (3 b g) of the whole."""
    means, variances, counts = parts.unbind(1)  # n b g
    total = counts.sum(0)
    share = counts / total
    mean = (share * means).sum(0)
    return torch.stack([mean, (share * (variances + (means - mean).square())).sum(0), total])


def norm_scale_and_shift(norm: nn.GroupNorm, hidden: Tensor, shard: FrameShard | None = None) -> tuple[Tensor, Tensor]:
    """(b c 1 1 1) both, float32 or better: norm(hidden) = hidden * scale + shift."""
    mean, var, _ = group_statistics(norm, hidden, shard)  # b g
    scale = _per_channel((var + norm.eps).rsqrt(), norm) * norm.weight  # b c
    shift = norm.bias - _per_channel(mean, norm) * scale
    return _spread(scale, hidden), _spread(shift, hidden)


def _per_channel(values: Tensor, norm: nn.GroupNorm) -> Tensor:
    """(b g) -> (b c)."""
    return values.repeat_interleave(norm.num_channels // norm.num_groups, dim=1)


def _spread(values: Tensor, hidden: Tensor) -> Tensor:
    """(b c) -> (b c 1 1 1), float32 or, with `hidden`, better."""
    return rearrange(values, "b c -> b c 1 1 1").to(torch.promote_types(hidden.dtype, torch.float32))


def group_norm(norm: nn.GroupNorm, hidden: Tensor, shard: FrameShard | None) -> Tensor:
    """norm(hidden) (b c t h w) with the statistics of all processes' frames, for where gradients are recorded."""
    if shard is None or not shard.one_clip:
        return F.group_norm(hidden, norm.num_groups, norm.weight, norm.bias, norm.eps)
    return _SharedGroupNorm.apply(hidden, norm.weight, norm.bias, norm, shard)


class _SharedGroupNorm(torch.autograd.Function):
    """GroupNorm over frames of which this process holds some (Wu & He 2018, arXiv:1803.08494, eq. 1 to 6).

    With n = (x - mean) rstd and g = dL/dn, the gradient is dL/dx = rstd (g - [g] - n [g n]), [] being the mean over a
    group's values on all processes. Keeps nothing but x.
    """

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, bias: Tensor, norm: nn.GroupNorm, shard: FrameShard) -> Tensor:
        mean, var, num_frames = group_statistics(norm, hidden, shard)  # b g
        numel = num_frames * hidden[0, :, 0].numel() / norm.num_groups
        mean, rstd = _per_channel(mean, norm), _per_channel((var + norm.eps).rsqrt(), norm)  # b c
        ctx.save_for_backward(hidden, weight, mean, rstd, numel)
        ctx.norm, ctx.shard = norm, shard
        scale = rstd * weight
        shift = bias - mean * scale
        return torch.addcmul(_spread(shift, hidden), hidden, _spread(scale, hidden)).to(hidden.dtype)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, mean, rstd, numel = ctx.saved_tensors
        sum_grad = grad.sum(dim=(2, 3, 4), dtype=torch.float64)  # b c
        sum_product = (grad * hidden).sum(dim=(2, 3, 4), dtype=torch.float64)
        sum_normed = (sum_product - mean * sum_grad) * rstd
        sums = torch.stack([sum_grad * weight, sum_normed * weight])  # 2 b c
        of_groups = ctx.shard.sum(sums.unflatten(2, (ctx.norm.num_groups, -1)).sum(3)) / numel  # 2 b g
        mean_grad, mean_normed = (_per_channel(values, ctx.norm) for values in of_groups)
        if ctx.shard.has_frames:
            slope = -rstd.square() * mean_normed
            offset = -rstd * mean_grad - mean * slope
            grad_hidden = torch.addcmul(_spread(offset, hidden), hidden, _spread(slope, hidden))
            grad_hidden.addcmul_(grad, _spread(rstd * weight, hidden))
        else:
            grad_hidden = torch.zeros_like(hidden)  # its values are in no statistics
        return grad_hidden.to(grad.dtype), sum_normed.sum(0).to(weight), sum_grad.sum(0).to(weight), None, None


class NormSwish(nn.GroupNorm):
    """GroupNorm, then swish. Statistics span time, so of this network only the convolutions are causal."""

    def __init__(self, num_groups: int, channels: int) -> None:
        check_groups(num_groups, channels)
        super().__init__(num_groups, channels, eps=NORM_EPS)

    def forward(self, hidden: Tensor, ctx: ChunkContext) -> Tensor:  # type: ignore[override]
        """(b c t h w) -> (b c t h w)."""
        return F.silu(group_norm(self, hidden, ctx.shard))

    def in_slices(self, hidden: Tensor, ctx: ChunkContext) -> Activate:
        """The same as a function of slices along time of `hidden`."""
        scale, shift = norm_scale_and_shift(self, hidden, ctx.shard)
        return lambda frames, start, out: scale_shift_swish(frames, scale, shift, out)
