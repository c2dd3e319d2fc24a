"""Pixels to the moments of a latent distribution.

Letters: `b` batch, `c` channels, `t` frames, `h w` rows and columns, `z` latent channels.
"""

from collections.abc import Sequence
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sat.vae.blocks import Init, Mid, ResidualBlock, count_halvings, norm_conv, shrink_branches
from sat.vae.causal_conv import (
    CausalConv3d,
    ConvCache,
    FirstFrame,
    concat_time,
    from_frames,
    is_first_apart,
    records_gradient,
    time_slices,
    to_frames,
)
from sat.vae.context import ChunkContext
from sat.vae.norms import NormSwish
from sat.vae.shard import FrameShard


def frames_per_level(num_frames: int, num_halvings: int, first_frame: FirstFrame = "split") -> list[int]:
    """Frames of a clip before and after each of `num_halvings` times that time is halved.

    Raises ValueError where a level would meet two frames of which the first stays apart: one frame makes no pair.
    """
    counts = [num_frames]
    for _ in range(num_halvings):
        count = counts[-1]
        apart = is_first_apart(first_frame, count)
        if apart and count == 2:
            factor = 1 << num_halvings
            raise ValueError(
                f"a clip of {num_frames} frames cannot be encoded with its first frame apart; "
                f"give 1 frame or {factor}k + 1 ({factor + 1}, {2 * factor + 1}, ...), or first_frame='parity'"
            )
        counts.append(apart + (count - apart) // 2 if count > 1 else count)
    return counts


def count_latent_frames(num_frames: int, num_halvings: int, first_frame: FirstFrame = "split") -> int:
    """Frames left after time was halved `num_halvings` times: (T - 1) / 4 + 1 for two, of T = 4k + 1."""
    return frames_per_level(num_frames, num_halvings, first_frame)[-1]


class Downsample(nn.Module):
    """Halve rows and columns by a strided 3x3 convolution and, if `compress_time`, frames by averaging pairs."""

    def __init__(self, channels: int, compress_time: bool, with_conv: bool = True) -> None:
        super().__init__()
        self.compress_time = compress_time
        self.conv = nn.Conv2d(channels, channels, 3, stride=2) if with_conv else None

    def forward(self, hidden: Tensor, ctx: ChunkContext) -> Tensor:
        """(b c t h w) -> (b c t' h/2 w/2), rounded down."""
        num_frames = hidden.shape[2]
        pool = self.compress_time and num_frames > 1
        num_alone = (int(is_first_apart(ctx.first_frame, num_frames))) if pool else num_frames
        num_out = num_alone + (num_frames - num_alone) // 2
        slices = time_slices(num_out, 2 * hidden[:, :, 0].numel(), whole=records_gradient(hidden, *self.parameters()))
        return concat_time((self._shrink(_pool_pairs(hidden, num_alone, *cut)) for cut in slices), num_out)

    def _shrink(self, hidden: Tensor) -> Tensor:
        frames = to_frames(hidden)
        if self.conv is None:
            frames = F.avg_pool2d(frames, 2)
        else:
            frames = self.conv(F.pad(frames, (0, 1, 0, 1)))  # zeros below and to the right only
        return from_frames(frames, len(hidden))


def _pool_pairs(hidden: Tensor, num_alone: int, start: int, stop: int) -> Tensor:
    """Output frames start..stop of averaging frames in pairs, but for the first `num_alone`, which stay as they are."""
    alone = hidden[:, :, start : min(stop, num_alone)]
    if stop <= num_alone:
        return alone
    pairs = hidden[:, :, 2 * max(start, num_alone) - num_alone : 2 * stop - num_alone]
    pooled = (pairs[:, :, 0::2] + pairs[:, :, 1::2]) / 2
    return torch.cat([alone, pooled], dim=2) if start < num_alone else pooled


class EncoderLevel(nn.Module):
    """Residual blocks of one resolution, then the way down to the next."""

    def __init__(self, blocks: list[ResidualBlock], downsample: Downsample | None) -> None:
        super().__init__()
        self.block = nn.ModuleList(blocks)
        self.downsample = downsample

    def forward(self, hidden: Tensor, ctx: ChunkContext) -> Tensor:
        """(b c_in t h w) -> (b c_out t' h' w')."""
        for block in self.block:
            hidden = block(hidden, ctx)
        return hidden if self.downsample is None else self.downsample(hidden, ctx)


class Encoder3D(nn.Module):
    """The encoder of the causal video VAE, with the parameter names of the released models.

    ch, ch_mult: width of level i is ch * ch_mult[i]. num_res_blocks: per level. double_z: mean and log-variance.
    temporal_compress_times: 4 means that the first two ways down also halve time. resamp_with_conv: ways down are
    strided convolutions, else averages of 2x2. norm_groups: 32 in the released models. time_kernel: frames that a
    kernel spans; 1 makes a network of images, to be inflated. init: see `Init`.
    """

    def __init__(
        self,
        *,
        ch: int,
        z_channels: int,
        ch_mult: Sequence[int] = (1, 2, 2, 4),
        num_res_blocks: int = 3,
        in_channels: int = 3,
        double_z: bool = True,
        dropout: float = 0.0,
        resamp_with_conv: bool = True,
        temporal_compress_times: int = 4,
        norm_groups: int = 32,
        time_kernel: int = 3,
        init: Init = "released",
    ) -> None:
        super().__init__()
        self.in_channels = in_channels
        self.z_channels = z_channels
        self.out_channels = 2 * z_channels if double_z else z_channels
        self.num_halvings = count_halvings(ch_mult, temporal_compress_times)
        self.spatial_factor = 1 << (len(ch_mult) - 1)
        make_norm = partial(NormSwish, norm_groups)
        widths = [ch, *(ch * factor for factor in ch_mult)]  # the first is what conv_in gives

        self.conv_in = CausalConv3d(in_channels, ch, (time_kernel, 3, 3))
        self.down = nn.ModuleList()
        for index, (width_in, width) in enumerate(pairwise(widths)):
            blocks = [
                ResidualBlock(width if j else width_in, width, make_norm, dropout, time_kernel)
                for j in range(num_res_blocks)
            ]
            is_last = index == len(ch_mult) - 1
            downsample = None if is_last else Downsample(width, index < self.num_halvings, resamp_with_conv)
            self.down.append(EncoderLevel(blocks, downsample))
        self.mid = Mid(widths[-1], make_norm, dropout, time_kernel)
        self.norm_out = make_norm(widths[-1])
        self.conv_out = CausalConv3d(widths[-1], self.out_channels, (time_kernel, 3, 3))
        if init == "identity":
            shrink_branches(self)

    def forward(
        self,
        pixels: Tensor,
        cache: ConvCache | None = None,
        first_frame: FirstFrame = "split",
        shard: FrameShard | None = None,
    ) -> Tensor:
        """Moments (b 2z t h w) of pixels (b 3 T H W); of one time chunk of them where a cache is given."""
        count_latent_frames(pixels.shape[2], self.num_halvings, first_frame)
        ctx = ChunkContext(first_frame, cache, shard=shard)
        hidden = self.conv_in(pixels, cache, shard=shard)
        for level in self.down:
            hidden = level(hidden, ctx)
        hidden = self.mid(hidden, ctx)
        return norm_conv(self.norm_out, self.conv_out, hidden, ctx)
