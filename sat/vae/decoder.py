"""Latents to pixels.

Letters: `b` batch, `c` channels, `t` frames, `h w` rows and columns, `z` latent channels; capitals are those of the
activation that a small latent is spread over.
"""

from collections.abc import Iterator, Sequence
from functools import partial

import torch
from einops import rearrange, repeat
from torch import Tensor, nn
from torch.nn import functional as F

from sat.errors import ConfigError
from sat.vae.blocks import Init, Mid, ResidualBlock, count_halvings, norm_conv, shrink_branches
from sat.vae.causal_conv import (
    Activate,
    CausalConv3d,
    ConvCache,
    FirstFrame,
    concat_time,
    from_frames,
    is_first_apart,
    memory_format,
    records_gradient,
    time_slices,
    to_frames,
)
from sat.vae.context import ChunkContext
from sat.vae.norms import NORM_EPS, check_groups, group_norm, norm_scale_and_shift, scale_shift_swish
from sat.vae.shard import FrameShard


def count_pixel_frames(num_latents: int, num_doublings: int, first_frame: FirstFrame = "split") -> int:
    """Frames that latents decode to: 4t - 3 for two doublings with the first frame apart, else 4t; 1 of 1."""
    count = num_latents
    for _ in range(num_doublings):
        count = 2 * count - is_first_apart(first_frame, count) if count > 1 else count
    return count


def nearest_latents(num_latents: int, num_frames: int, first_frame: FirstFrame) -> list[int]:
    """For each of `num_frames` frames, the latent that stands for it under nearest-neighbour resizing in time."""
    alone = int(is_first_apart(first_frame, num_frames) and num_latents > 1)
    rest, rest_frames = num_latents - alone, num_frames - alone
    return [0] * alone + [alone + frame * rest // rest_frames for frame in range(rest_frames)]


class SpatialNormSwish(nn.Module):
    """GroupNorm whose gain and offset depend on the latents (as in MoVQ, arXiv:2209.09002), then swish.

    norm(f) * conv_y(zq) + conv_b(zq), zq being the latents resized to f's frames, rows and columns. Convolutions of
    one tap commute with that resizing, so gain and offset are computed at the latents' size and spread by broadcasting.
    add_conv puts a 3x3x3 convolution on the resized latents before, which does not commute: that is full-size work.
    """

    def __init__(self, num_groups: int, z_channels: int, add_conv: bool, init: Init, channels: int) -> None:
        super().__init__()
        check_groups(num_groups, channels)
        self.norm_layer = nn.GroupNorm(num_groups, channels, eps=NORM_EPS)
        self.conv = CausalConv3d(z_channels, z_channels, 3) if add_conv else None
        self.conv_y = CausalConv3d(z_channels, channels, 1)
        self.conv_b = CausalConv3d(z_channels, channels, 1)
        if init == "identity":
            for parameter in (*self.conv_y.parameters(), *self.conv_b.parameters()):
                nn.init.zeros_(parameter)
            nn.init.ones_(self.conv_y.conv.get_parameter("bias"))

    def forward(self, hidden: Tensor, ctx: ChunkContext) -> Tensor:
        """(b c T H W) -> (b c T H W); ctx.latents are (b z t h w), h and w dividing H and W."""
        gain, offset = self._gain_and_offset(hidden, ctx)
        return F.silu(modulate(group_norm(self.norm_layer, hidden, ctx.shard), gain, offset))

    def in_slices(self, hidden: Tensor, ctx: ChunkContext) -> Activate:
        """The same as a function of slices along time of `hidden`."""
        gain, offset = self._gain_and_offset(hidden, ctx)
        scale, shift = norm_scale_and_shift(self.norm_layer, hidden, ctx.shard)  # b c 1 1 1
        scale, shift = scale * gain, shift * gain + offset  # b c T h w

        def activate(frames: Tensor, start: int, out: Tensor) -> None:
            cut = slice(start, start + frames.shape[2])
            factor, offset = scale[:, :, cut], shift[:, :, cut]
            cells, out_cells = _as_cells(frames, factor), _as_cells(out, factor)
            scale_shift_swish(cells, _over_cells(factor), _over_cells(offset), out_cells)

        return activate

    def _gain_and_offset(self, hidden: Tensor, ctx: ChunkContext) -> tuple[Tensor, Tensor]:
        """(b c T h w) both, lying in memory as `hidden` does."""
        assert ctx.latents is not None
        latents, num_frames = ctx.latents, hidden.shape[2]
        nearest = nearest_latents(latents.shape[2], num_frames, ctx.first_frame)
        sources = torch.tensor(nearest, device=latents.device)
        if self.conv is not None:
            resized = _enlarge(latents.index_select(2, sources), hidden.shape[3:])
            latents = self.conv(resized, ctx.cache, shard=ctx.shard)
            sources = torch.arange(num_frames, device=latents.device)
        layout = memory_format(hidden)
        gain = self.conv_y(latents).index_select(2, sources).contiguous(memory_format=layout)
        offset = self.conv_b(latents).index_select(2, sources).contiguous(memory_format=layout)
        return gain, offset


def _enlarge(video: Tensor, size: Sequence[int]) -> Tensor:
    """Repeat rows and columns of (b c t h w) up to `size`."""
    rows, columns = size[0] // video.shape[3], size[1] // video.shape[4]
    return repeat(video, "b c t h w -> b c t (h rows) (w columns)", rows=rows, columns=columns)


def modulate(hidden: Tensor, gain: Tensor, offset: Tensor) -> Tensor:
    """hidden * gain + offset (b c T H W), gain and offset (b c T h w) repeated over H/h x W/w pixels."""
    cells = _as_cells(hidden, gain)
    return torch.addcmul(_over_cells(offset), cells, _over_cells(gain)).flatten(5, 6).flatten(3, 4)


def _as_cells(hidden: Tensor, small: Tensor) -> Tensor:
    """(b c T H W) as (b c T h H/h w W/w), a view, for a small one of (b c T h w)."""
    rows, columns = small.shape[3:]
    return hidden.unflatten(4, (columns, -1)).unflatten(3, (rows, -1))


def _over_cells(small: Tensor) -> Tensor:
    """(b c T h w) as (b c T h 1 w 1), to be broadcast over cells."""
    return small[:, :, :, :, None, :, None]


class Upsample(nn.Module):
    """Double rows and columns and, if `compress_time`, frames (nearest), followed by a 3x3 convolution per frame.

    Doubled neighbours are equal, so at each of the four places that a pixel goes to the nine taps fall on four
    pixels. The convolution therefore runs at the small size, with four sets of 2x2 taps that are sums of the 3x3
    ones: 4/9 of the multiplications, and no enlarged input in memory. It runs before frames are doubled.
    """

    def __init__(self, channels: int, compress_time: bool, with_conv: bool = True) -> None:
        super().__init__()
        self.compress_time = compress_time
        self.conv = nn.Conv2d(channels, channels, 3, padding=1) if with_conv else None

    def forward(self, hidden: Tensor, ctx: ChunkContext) -> Tensor:
        """(b c t h w) -> (b c t' 2h 2w), t' = t, or with compress_time 2t, or 2t - 1 where the first is apart."""
        num_frames = hidden.shape[2]
        double = self.compress_time and (num_frames > 1 or ctx.first_frame == "later")
        num_alone = int(is_first_apart(ctx.first_frame, num_frames)) if double else num_frames
        slices = time_slices(num_frames, 4 * hidden[:, :, 0].numel(), records_gradient(hidden, *self.parameters()))
        return concat_time(self._parts(hidden, num_alone, slices), 2 * num_frames - num_alone)

    def _parts(self, hidden: Tensor, num_alone: int, slices: list[tuple[int, int]]) -> Iterator[Tensor]:
        kernels = None if self.conv is None else corner_kernels(self.conv.weight)
        for start, stop in slices:
            yield _double_frames(self._grow(hidden[:, :, start:stop], kernels), max(0, num_alone - start))

    def _grow(self, hidden: Tensor, kernels: Tensor | None) -> Tensor:
        """(b c t h w) -> (b c t 2h 2w)."""
        frames = to_frames(hidden)
        if self.conv is None or kernels is None:
            grown = repeat(frames, "n c h w -> n (h i) (w j) c", i=2, j=2)
        else:
            grown = interleave(F.conv2d(frames, kernels, self.conv.get_parameter("bias").repeat(4), padding=1))
        return from_frames(rearrange(grown, "n h w c -> n c h w"), len(hidden))


def corner_kernels(weight: Tensor) -> Tensor:
    """(o i 3 3) -> (4 o, i, 2, 2): the taps that fall on the 2x2 small pixels around each of four doubled places.

    Along one axis the first of two doubled places sees its neighbour before once and itself twice, (a, b + c) of the
    taps (a, b, c); the second sees itself twice and its neighbour after once, (a + b, c).
    """

    def halves(taps: Tensor, axis: int) -> list[Tensor]:
        before, here, after = taps.unbind(axis)
        return [torch.stack([before, here + after], axis), torch.stack([before + here, after], axis)]

    return torch.cat([kernel for half in halves(weight, 2) for kernel in halves(half, 3)])


def interleave(corners: Tensor) -> Tensor:
    """(n, 4 c, h+1, w+1) of the four `corner_kernels`, padded by 1, -> (n 2h 2w c)."""
    height, width = corners.shape[2] - 1, corners.shape[3] - 1
    places = rearrange(corners, "n (i j c) h w -> i j n h w c", i=2, j=2)
    lines = [
        torch.stack([places[i, j, :, i : i + height, j : j + width] for j in (0, 1)], dim=3) for i in (0, 1)
    ]  # each n h w j c
    return rearrange(torch.stack(lines, dim=2), "n h i w j c -> n (h i) (w j) c")


def _double_frames(video: Tensor, num_alone: int) -> Tensor:
    """Each frame of (b c t h w) twice, but for the first `num_alone`."""
    if num_alone >= video.shape[2]:
        return video
    doubled = repeat(video[:, :, num_alone:], "b c t h w -> b (t twice) h w c", twice=2)
    doubled = rearrange(doubled, "b t h w c -> b c t h w")
    return torch.cat([video[:, :, :num_alone], doubled], dim=2) if num_alone else doubled


class DecoderLevel(nn.Module):
    """Residual blocks of one resolution, then the way up to the next."""

    def __init__(self, blocks: list[ResidualBlock], upsample: Upsample | None) -> None:
        super().__init__()
        self.block = nn.ModuleList(blocks)
        self.upsample = upsample

    def forward(self, hidden: Tensor, ctx: ChunkContext) -> Tensor:
        """(b c_in t h w) -> (b c_out t' h' w')."""
        for block in self.block:
            hidden = block(hidden, ctx)
        return hidden if self.upsample is None else self.upsample(hidden, ctx)


class Decoder3D(nn.Module):
    """The decoder of the causal video VAE, with the parameter names of the released models.

    num_res_blocks: a level has one block more than this. zq_ch: channels of the latents that condition the norms;
    since those are the decoder's input, z_channels or nothing. add_conv: see `SpatialNormSwish`. Others as Encoder3D.
    """

    def __init__(
        self,
        *,
        ch: int,
        z_channels: int,
        ch_mult: Sequence[int] = (1, 2, 2, 4),
        num_res_blocks: int = 3,
        out_ch: int = 3,
        dropout: float = 0.0,
        resamp_with_conv: bool = True,
        zq_ch: int | None = None,
        add_conv: bool = False,
        temporal_compress_times: int = 4,
        norm_groups: int = 32,
        time_kernel: int = 3,
        init: Init = "released",
    ) -> None:
        super().__init__()
        if zq_ch not in (None, z_channels):
            raise ConfigError(f"decoder: zq_ch {zq_ch} differs from z_channels {z_channels}; leave zq_ch out")
        self.z_channels = z_channels
        self.num_halvings = count_halvings(ch_mult, temporal_compress_times)
        self.spatial_factor = 1 << (len(ch_mult) - 1)
        make_norm = partial(SpatialNormSwish, norm_groups, z_channels, add_conv, init)
        num_levels = len(ch_mult)
        widths = [*(ch * factor for factor in ch_mult), ch * ch_mult[-1]]  # the last is what conv_in gives

        self.conv_in = CausalConv3d(z_channels, widths[-1], (time_kernel, 3, 3))
        self.mid = Mid(widths[-1], make_norm, dropout, time_kernel)
        self.up = nn.ModuleList()  # by resolution: index 0 is the largest and runs last
        for index in range(num_levels):
            blocks = [
                ResidualBlock(widths[index] if j else widths[index + 1], widths[index], make_norm, dropout, time_kernel)
                for j in range(num_res_blocks + 1)
            ]
            doubles_time = index >= num_levels - self.num_halvings
            upsample = Upsample(widths[index], doubles_time, resamp_with_conv) if index else None
            self.up.append(DecoderLevel(blocks, upsample))
        self.norm_out = make_norm(widths[0])
        self.conv_out = CausalConv3d(widths[0], out_ch, (time_kernel, 3, 3))
        if init == "identity":
            shrink_branches(self)

    def forward(
        self,
        latents: Tensor,
        cache: ConvCache | None = None,
        first_frame: FirstFrame = "split",
        shard: FrameShard | None = None,
    ) -> Tensor:
        """Pixels (b 3 T H W) of latents (b z t h w); of one time chunk of them where a cache is given."""
        ctx = ChunkContext(first_frame, cache, latents, shard)
        hidden = self.conv_in(latents, cache, shard=shard)
        hidden = self.mid(hidden, ctx)
        for level in reversed(self.up):
            hidden = level(hidden, ctx)
        return norm_conv(self.norm_out, self.conv_out, hidden, ctx)
