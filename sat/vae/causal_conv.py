"""Convolutions that look back in time but never forward, and the pieces that every layer around them shares.

Letters: `b` batch, `c` channels, `t` frames, `h w` rows and columns, `k` frames that a kernel spans.

Where no gradient is recorded, large activations are worked on in slices along time, so that padded copies and other
intermediate values exist for a few frames only. On the CPU activations lie in memory with channels innermost
(`torch.channels_last_3d`), which is what its convolutions and norms are fastest with.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from itertools import pairwise
from typing import Any, Literal

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from sat.vae.shard import FrameShard

FirstFrame = Literal["split", "nosplit", "parity", "later"]
"""How layers that change the number of frames treat the first one: `split` keeps it apart (not pooled or doubled in
time), `nosplit` treats all frames alike, `parity` keeps it apart wherever a layer meets an odd number of frames.
`later` is for frames that are only a share of a longer clip: all alike, and a lone one, too, is doubled."""

FIRST_FRAME_RULES = ("split", "nosplit", "parity")
"""Those that a caller may ask for."""

SLICE_NUMEL = 1 << 21
"""Values per slice along time where no gradient is recorded: 16 MB in float32, so a slice stays in the CPU's cache."""

FEW_CHANNELS = 4
"""Up to this many input channels (pixels) a causal convolution runs as a 2D convolution over stacked frames: torch has
no fast 3D convolution for so narrow an input (123 ms against 40 ms at 3 -> 64 channels, 17 x 128 x 128, 2 threads)."""


Activate = Callable[[Tensor, int, Tensor], None]
"""What happens to (b c t h w) before a convolution, one slice along time after the other: (frames, start, out). It
writes to `out` what it makes of frames `start` and following."""


def is_first_apart(first_frame: FirstFrame, num_frames: int) -> bool:
    """Whether a layer that sees `num_frames` frames keeps the first one apart."""
    if first_frame == "parity":
        return num_frames > 1 and num_frames % 2 == 1
    return first_frame == "split" and num_frames > 1


def records_gradient(*tensors: Tensor) -> bool:
    """Whether autograd will want the values that an operation on these tensors reads."""
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def memory_format(video: Tensor) -> torch.memory_format:
    """`channels_last_3d` or contiguous: how (b c t h w) lies in memory."""
    is_channels_last = video.is_contiguous(memory_format=torch.channels_last_3d)
    return torch.channels_last_3d if is_channels_last else torch.contiguous_format


def time_slices(num_frames: int, frame_numel: int, whole: bool) -> list[tuple[int, int]]:
    """(start, stop) of the slices, about equally long, of an operation over `num_frames` frames; one if `whole`."""
    num_slices = 1 if whole else min(num_frames, math.ceil(num_frames * frame_numel / SLICE_NUMEL))
    bounds = [num_frames * index // num_slices for index in range(num_slices + 1)]
    return list(pairwise(bounds))


def concat_time(parts: Iterable[Tensor], num_frames: int) -> Tensor:
    """`torch.cat` along time of parts (b c t h w) that are made one by one: only one and the result are ever alive."""
    result, position = None, 0
    for part in parts:
        if part.shape[2] == num_frames:
            return part
        if result is None:
            shape = (*part.shape[:2], num_frames, *part.shape[3:])
            result = torch.empty(shape, dtype=part.dtype, device=part.device, memory_format=memory_format(part))
        result[:, :, position : position + part.shape[2]] = part
        position += part.shape[2]
        del part  # before the next one is made
    assert result is not None
    assert position == num_frames
    return result


def to_frames(video: Tensor) -> Tensor:
    """(b c t h w) -> (b t, c, h, w), channels innermost in memory."""
    return rearrange(rearrange(video, "b c t h w -> (b t) h w c"), "n h w c -> n c h w")


def from_frames(frames: Tensor, batch: int) -> Tensor:
    """(b t, c, h, w) -> (b c t h w), channels innermost in memory."""
    return rearrange(rearrange(frames, "(b t) c h w -> b t h w c", b=batch), "b t h w c -> b c t h w")


def pointwise(conv: nn.Conv3d, video: Tensor) -> Tensor:
    """A convolution of one tap, (b c_in t h w) -> (b c_out t h w): where no gradient is recorded, as a matrix product.

    torch's own convolution copies channels outwards and back for it. Gradients of a product come out less exact: the
    norm of a small VAE's gradient is 2e-5 off, 3e-7 with the convolution's.
    """
    if memory_format(video) != torch.channels_last_3d or records_gradient(video, *conv.parameters()):
        return conv(video)
    product = F.linear(rearrange(video, "b c t h w -> b t h w c"), conv.weight.flatten(1), conv.bias)
    return rearrange(product, "b t h w c -> b c t h w")


def convolve(conv: nn.Conv3d, video: Tensor) -> Tensor:
    """A convolution of several taps, (b c_in t h w) -> (b c_out t' h w): where no gradient is recorded, by oneDNN.

    torch itself leaves one float32 clip with c_in t h <= 20,480 (`use_mkldnn` in its Convolution.cpp: columns do not
    count) to another kernel, which takes 254 ms against 69 ms at 64 -> 128 channels, 5 x 64 x 64, 1 thread.
    """
    fits_onednn = video.device.type == "cpu" and video.dtype == torch.float32 and torch.backends.mkldnn.is_available()
    if not fits_onednn or records_gradient(video, *conv.parameters()):
        return conv(video)
    assert isinstance(conv.padding, tuple)
    return torch.mkldnn_convolution(
        video, conv.weight, conv.bias, conv.padding, conv.stride, conv.dilation, conv.groups
    )


class ConvCache:
    """What causal convolutions carry from one time chunk of a clip to the next: the last frames that each one saw.

    Make one per clip and hand it to every chunk in turn. Layers hold no state of their own, so any number of clips
    can be under way at once.
    """

    def __init__(self) -> None:
        self._frames: dict[nn.Module, Tensor] = {}

    def take(self, layer: nn.Module) -> Tensor | None:
        """The frames that `layer` left, or None at a clip's start."""
        return self._frames.pop(layer, None)

    def put(self, layer: nn.Module, frames: Tensor) -> None:
        """Keep `frames` (b c k-1 h w) for `layer`'s next chunk."""
        self._frames[layer] = frames


class CausalConv3d(nn.Module):
    """A 3D convolution of stride 1 whose output frame depends on that input frame and the k-1 before it.

    In time, copies of the first frame (or what a cache kept of the chunk before) stand in front; in space, zeros
    around. Gradients through the copies are the true ones: they add up in the first frame. Loading a kernel that spans
    fewer frames puts it into the last ones, so that a network of images becomes one of clips that starts out the same
    on every frame (inflation).
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int | tuple[int, int, int]) -> None:
        super().__init__()
        size = (kernel_size, kernel_size, kernel_size) if isinstance(kernel_size, int) else kernel_size
        self.conv = nn.Conv3d(in_channels, out_channels, size, padding=(0, size[1] // 2, size[2] // 2))
        self.lookback = size[0] - 1
        """k-1: frames before its own that an output frame depends on."""
        self.register_load_state_dict_pre_hook(_inflate_kernel)

    def forward(
        self,
        hidden: Tensor,
        cache: ConvCache | None = None,
        activate: Activate | None = None,
        shard: FrameShard | None = None,
    ) -> Tensor:
        """(b c_in t h w) -> (b c_out t h w). Where no gradient is recorded, `activate` may come before."""
        return concat_time(self.parts(hidden, cache, activate, shard), hidden.shape[2])

    def parts(
        self,
        hidden: Tensor,
        cache: ConvCache | None = None,
        activate: Activate | None = None,
        shard: FrameShard | None = None,
    ) -> Iterator[Tensor]:
        """The same in slices along time. Frames of `hidden` that a slice stands for are not read again after it."""
        if not self.lookback and activate is None:
            return self._parts_alone(hidden)
        before = self._frames_before(hidden, cache, activate, shard)  # b c_in k-1 h w
        keep = cache if shard is None else None
        if records_gradient(hidden, *self.conv.parameters()):
            assert activate is None
            return self._whole(hidden, before, keep)
        return self._parts_in_window(hidden, before, keep, activate)

    def _slices(self, hidden: Tensor, whole: bool) -> list[tuple[int, int]]:
        frame_numel = max(hidden[:, :, 0].numel(), hidden[:, 0, 0].numel() * self.conv.out_channels)
        return time_slices(hidden.shape[2], frame_numel, whole)

    def _parts_alone(self, hidden: Tensor) -> Iterator[Tensor]:
        """Of a kernel that sees each frame alone."""
        for start, stop in self._slices(hidden, whole=records_gradient(hidden, *self.conv.parameters())):
            yield self._convolve(hidden[:, :, start:stop])

    def _whole(self, hidden: Tensor, before: Tensor | None, cache: ConvCache | None) -> Iterator[Tensor]:
        """Of operations that autograd knows."""
        window = torch.cat([self._copies(hidden) if before is None else before, hidden], dim=2)
        if cache is not None:
            cache.put(self, window[:, :, hidden.shape[2] :].clone())  # a view would keep the whole window alive
        yield self._convolve(window)

    def _parts_in_window(
        self, hidden: Tensor, before: Tensor | None, cache: ConvCache | None, activate: Activate | None
    ) -> Iterator[Tensor]:
        """Slice after slice in the same memory, in front of each the last frames of the one before."""
        slices, lookback = self._slices(hidden, whole=False), self.lookback
        shape = list(hidden.shape)
        shape[2] = lookback + max(stop - start for start, stop in slices)
        window = torch.empty(shape, dtype=hidden.dtype, device=hidden.device, memory_format=memory_format(hidden))
        for start, stop in slices:
            end = lookback + stop - start
            frames = window[:, :, lookback:end]
            (activate or _copy)(hidden[:, :, start:stop], start, frames)
            if start == 0:
                window[:, :, :lookback] = self._copies(frames) if before is None else before
            last = window[:, :, end - lookback : end]
            if cache is not None and lookback and stop == hidden.shape[2]:
                cache.put(self, last.clone())  # a view would keep the whole window alive
            yield self._convolve(window[:, :, :end])
            window[:, :, :lookback] = last.clone() if stop - start < lookback else last  # they must not overlap

    def _frames_before(
        self, hidden: Tensor, cache: ConvCache | None, activate: Activate | None, shard: FrameShard | None
    ) -> Tensor | None:
        """What the previous chunk or process left; None at a clip's start."""
        before = None if cache is None else cache.take(self)
        if shard is None or not self.lookback:
            return before
        if before is None and shard.neighbours[0] is None:
            before = self._copies(_activated(hidden, slice(0, 1), activate))
        tail = _activated(hidden, slice(max(0, hidden.shape[2] - self.lookback), None), activate)
        before = shard.frames_before(tail, self.lookback, before)
        if cache is not None and shard.goes_on and (kept := shard.carry_over(tail, before)) is not None:
            cache.put(self, kept)
        return before.contiguous(memory_format=memory_format(hidden))

    def _copies(self, frames: Tensor) -> Tensor:
        """The first frame k-1 times (b c_in k-1 h w)."""
        return frames[:, :, :1].expand(-1, -1, self.lookback, -1, -1)

    def _convolve(self, window: Tensor) -> Tensor:
        """(b c_in t+k-1 h w) -> (b c_out t h w)."""
        if self.conv.kernel_size == (1, 1, 1):
            return pointwise(self.conv, window)
        if self.conv.in_channels > FEW_CHANNELS or not self.lookback:
            return convolve(self.conv, window)
        num_frames = window.shape[2] - self.lookback
        stacked = torch.cat([window[:, :, tap : tap + num_frames] for tap in range(self.lookback + 1)], dim=1)
        kernel = rearrange(self.conv.weight, "o i k h w -> o (k i) h w")
        frames = F.conv2d(to_frames(stacked), kernel, self.conv.bias, padding=self.conv.padding[1:])
        return from_frames(frames, len(window))


def _copy(frames: Tensor, start: int, out: Tensor) -> None:
    out.copy_(frames)


def _activated(hidden: Tensor, cut: slice, activate: Activate | None) -> Tensor:
    """Some frames (b c t h w) of `hidden`, activated."""
    frames = hidden[:, :, cut]
    if activate is None:
        return frames
    result = torch.empty_like(frames)
    activate(frames, cut.start, result)
    return result


def inflate_kernels(network: nn.Module, state: dict[str, Any]) -> None:
    """Bring the kernels in a state dict of `network` to its length in time, as loading does, in place."""
    for prefix, module in network.named_modules():
        if isinstance(module, CausalConv3d):
            _inflate_kernel(module, state, f"{prefix}." if prefix else "")


def _inflate_kernel(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Zeros before the taps of a kernel that spans fewer frames than the module's."""
    kernel = state.get(f"{prefix}conv.weight")
    if kernel is None or kernel.ndim != 5:
        return
    missing = module.lookback + 1 - kernel.shape[2]  # type: ignore[operator]
    if missing > 0:
        state[f"{prefix}conv.weight"] = F.pad(kernel, (0, 0, 0, 0, missing, 0))
