"""What encoder and decoder are built of alike: residual blocks, the middle of the network.

Letters: `b` batch, `c` channels, `t` frames, `h w` rows and columns.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from sat.errors import ConfigError
from sat.vae.causal_conv import Activate, CausalConv3d, pointwise, records_gradient
from sat.vae.context import ChunkContext
from sat.vae.norms import MakeNorm, NormLike

Init = Literal["released", "identity"]
"""Weights of a new network. `released`: torch's default. `identity`: latent-conditioned norms start as plain ones and
residual branches small, without which narrow networks (16 channels) stay at 20 dB for hundreds of steps."""


IDENTITY_BRANCH_SCALE = 0.2
"""Factor on the second convolution of every residual block under init `identity`."""


def norm_conv(norm: NormLike, conv: CausalConv3d, hidden: Tensor, ctx: ChunkContext) -> Tensor:
    """conv(norm(hidden)) (b c_out t h w) of (b c t h w)."""
    frames, activate = normalized(norm, conv, hidden, ctx)
    return conv(frames, ctx.cache, activate, ctx.shard)


def normalized(
    norm: NormLike, conv: CausalConv3d, hidden: Tensor, ctx: ChunkContext, dropout: nn.Module | None = None
) -> tuple[Tensor, Activate | None]:
    """What `conv` shall be given to convolve dropout(norm(hidden)): frames, and how to activate slices of them.

    norm: a norm with swish. Where no gradient is recorded, its output exists only in slices.
    """
    if records_gradient(hidden, *norm.parameters(), *conv.parameters()):
        normed = norm(hidden, ctx)
        return normed if dropout is None else dropout(normed), None
    activate = norm.in_slices(hidden, ctx)
    if dropout is None or not dropout.training:
        return hidden, activate

    def activate_and_drop(frames: Tensor, start: int, out: Tensor) -> None:
        activate(frames, start, out)
        out.copy_(dropout(out))

    return hidden, activate_and_drop


class ResidualBlock(nn.Module):
    """x + conv2(swish(norm2(conv1(swish(norm1(x)))))), with a 1x1x1 convolution on x where the width changes.

    make_norm: builds a norm with swish for a number of channels.
    """

    def __init__(
        self, in_channels: int, out_channels: int, make_norm: MakeNorm, dropout: float = 0.0, time_kernel: int = 3
    ) -> None:
        super().__init__()
        self.norm1 = make_norm(in_channels)
        self.conv1 = CausalConv3d(in_channels, out_channels, (time_kernel, 3, 3))
        self.norm2 = make_norm(out_channels)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = CausalConv3d(out_channels, out_channels, (time_kernel, 3, 3))
        self.nin_shortcut = nn.Conv3d(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()

    def forward(self, inputs: Tensor, ctx: ChunkContext) -> Tensor:
        """(b c_in t h w) -> (b c_out t h w)."""
        hidden = norm_conv(self.norm1, self.conv1, inputs, ctx)
        start, num_frames = 0, inputs.shape[2]
        frames, activate = normalized(self.norm2, self.conv2, hidden, ctx, self.dropout)
        for part in self.conv2.parts(frames, ctx.cache, activate, ctx.shard):
            stop = start + part.shape[2]
            shortcut = inputs[:, :, start:stop]
            if isinstance(self.nin_shortcut, nn.Conv3d):
                shortcut = pointwise(self.nin_shortcut, shortcut)
            if part.shape[2] == num_frames:
                return part.add_(shortcut)  # conv2's backward does not read its output
            torch.add(part, shortcut, out=hidden[:, :, start:stop])  # which conv2 has read, and nothing else needs
            start = stop
            del part, shortcut  # before the next ones are made
        return hidden


class Mid(nn.Module):
    """Two residual blocks at the lowest resolution."""

    def __init__(self, channels: int, make_norm: MakeNorm, dropout: float = 0.0, time_kernel: int = 3) -> None:
        super().__init__()
        self.block_1 = ResidualBlock(channels, channels, make_norm, dropout, time_kernel)
        self.block_2 = ResidualBlock(channels, channels, make_norm, dropout, time_kernel)

    def forward(self, hidden: Tensor, ctx: ChunkContext) -> Tensor:
        """(b c t h w) -> (b c t h w)."""
        return self.block_2(self.block_1(hidden, ctx), ctx)


@torch.no_grad()
def shrink_branches(network: nn.Module) -> None:
    """Scale the second convolution of every residual block down, as init `identity` wants."""
    for module in network.modules():
        if isinstance(module, ResidualBlock):
            for parameter in module.conv2.parameters():
                parameter.mul_(IDENTITY_BRANCH_SCALE)


def count_halvings(ch_mult: Sequence[int], temporal_compress_times: int) -> int:
    """The number of levels that halve time; ConfigError where the options contradict each other."""
    num_halvings = temporal_compress_times.bit_length() - 1
    if temporal_compress_times < 1 or temporal_compress_times != 1 << num_halvings:
        raise ConfigError(f"temporal_compress_times is {temporal_compress_times}; give a power of two: 1, 2, 4, ...")
    if num_halvings > len(ch_mult) - 1:
        raise ConfigError(
            f"temporal_compress_times {temporal_compress_times} halves time {num_halvings} times, but ch_mult has "
            f"{len(ch_mult)} levels and so {len(ch_mult) - 1} places to do it; lower the one or lengthen the other"
        )
    return num_halvings
