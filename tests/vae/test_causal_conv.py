"""Causal convolutions: padding, true gradients, caches, slices, inflation."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile
from torch.testing import assert_close

from sat.vae import ConvCache
from sat.vae.causal_conv import (
    CausalConv3d,
    concat_time,
    from_frames,
    inflate_kernels,
    is_first_apart,
    memory_format,
    time_slices,
    to_frames,
)
from tests.vae.tiny import randomize

CHANNELS = (3, 8)
"""Three run as stacked 2D convolutions, eight as 3D ones."""

LAYOUTS = (torch.contiguous_format, torch.channels_last_3d)
TOLERANCE = {"atol": 3e-6, "rtol": 1e-5}
"""Measured worst: 9.5e-7, on values up to 6."""


def make_conv(channels: int, kernel: int | tuple[int, int, int] = 3) -> CausalConv3d:
    conv = CausalConv3d(channels, 5, kernel)
    randomize(conv)
    return conv


def make_video(channels: int, num_frames: int, height: int = 5, width: int = 7, batch: int = 2) -> Tensor:
    return torch.randn(batch, channels, num_frames, height, width, generator=torch.Generator().manual_seed(1))


def plain(conv: nn.Conv3d, video: Tensor, before: Tensor | None = None) -> Tensor:
    """The definition: copies of the first frame (or `before`) in front, zeros around, a plain convolution."""
    frames, rows, columns = conv.kernel_size
    if before is None:
        before = video[:, :, :1].repeat(1, 1, frames - 1, 1, 1)
    padded = F.pad(torch.cat([before, video], dim=2), (columns // 2, columns // 2, rows // 2, rows // 2))
    return F.conv3d(padded, conv.weight, conv.bias)


@pytest.mark.parametrize("channels", CHANNELS)
@pytest.mark.parametrize("kernel", [3, 1, (1, 3, 3), (3, 1, 5), (5, 3, 3), (2, 3, 3)])
@pytest.mark.parametrize("num_frames", [1, 2, 5])
def test_it_is_a_padded_convolution(channels: int, kernel: int, num_frames: int) -> None:
    conv, video = make_conv(channels, kernel), make_video(channels, num_frames)
    assert_close(conv(video), plain(conv.conv, video), **TOLERANCE)


@pytest.mark.parametrize("channels", CHANNELS)
def test_frames_look_back_and_never_forward(channels: int) -> None:
    conv, video = make_conv(channels), make_video(channels, 6)
    changed = video.clone()
    changed[:, :, 3] += 1
    differs = (conv(video) - conv(changed)).abs().amax(dim=(0, 1, 3, 4)) > 1e-3
    assert differs.tolist() == [False, False, False, True, True, True]


@pytest.mark.parametrize("channels", CHANNELS)
def test_gradients_through_the_copies_are_the_true_ones(channels: int) -> None:
    conv = make_conv(channels).double()
    video = make_video(channels, 2, height=2, width=3, batch=1).double().requires_grad_()
    # Finite differences: they would see a gradient that stops at the copies of the first frame.
    assert torch.autograd.gradcheck(conv, (video,))
    weights = tuple(conv.parameters())
    got = torch.autograd.grad(conv(video).square().sum(), (video, *weights))
    expected = torch.autograd.grad(plain(conv.conv, video).square().sum(), (video, *weights))
    for own, other in zip(got, expected):
        assert_close(own, other)


# --- caches ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", CHANNELS)
@pytest.mark.parametrize("kernel", [3, 1, (5, 3, 3)])
@pytest.mark.parametrize("sizes", [(1, 1, 3), (3, 2, 2), (2, 1, 1), (4,)])
def test_chunks_with_a_cache_are_the_whole(channels: int, kernel: int, sizes: tuple[int, ...]) -> None:
    conv, cache = make_conv(channels, kernel), ConvCache()
    video = make_video(channels, sum(sizes))
    chunks = [conv(chunk, cache) for chunk in video.split(list(sizes), dim=2)]
    assert_close(torch.cat(chunks, dim=2), conv(video), **TOLERANCE)


def test_a_cache_keeps_the_last_padded_frames_and_nothing_more() -> None:
    conv, cache, video = make_conv(8), ConvCache(), make_video(8, 6)
    conv(video[:, :, :1], cache)
    kept = cache.take(conv)
    assert kept is not None
    assert torch.equal(kept, video[:, :, [0, 0]])
    assert cache.take(conv) is None
    cache.put(conv, kept)
    conv(video[:, :, 1:], cache)
    kept = cache.take(conv)
    assert kept is not None
    assert torch.equal(kept, video[:, :, -2:])
    assert kept.untyped_storage().nbytes() == kept.numel() * kept.element_size()


def test_a_convolution_of_one_frame_keeps_nothing() -> None:
    conv, cache = make_conv(8, 1), ConvCache()
    conv(make_video(8, 3), cache)
    assert cache.take(conv) is None


def test_clips_under_way_at_once_do_not_meet() -> None:
    conv, caches = make_conv(8), (ConvCache(), ConvCache())
    clips = make_video(8, 4), make_video(8, 4) + 1
    outputs: tuple[list[Tensor], list[Tensor]] = ([], [])
    for chunk in (slice(0, 2), slice(2, 4)):
        for clip, cache, output in zip(clips, caches, outputs):
            output.append(conv(clip[:, :, chunk], cache))
    for clip, output in zip(clips, outputs):
        assert_close(torch.cat(output, dim=2), conv(clip), **TOLERANCE)


# --- slices ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", CHANNELS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("num_frames", [1, 2, 7])
@torch.no_grad()
def test_slices_change_nothing(
    monkeypatch: pytest.MonkeyPatch, channels: int, layout: torch.memory_format, num_frames: int
) -> None:
    conv, video = make_conv(channels), make_video(channels, num_frames).contiguous(memory_format=layout)
    cache, sliced_cache = ConvCache(), ConvCache()
    starts: list[int] = []

    def activate(frames: Tensor, start: int, out: Tensor) -> None:
        starts.append(start)
        out.copy_(frames.tanh())

    expected = conv(video.tanh(), cache)
    monkeypatch.setattr("sat.vae.causal_conv.SLICE_NUMEL", 600)
    assert_close(conv(video, sliced_cache, activate), expected, **TOLERANCE)
    assert len(starts) >= (num_frames + 1) // 2
    assert starts == sorted(set(starts))
    kept, sliced = cache.take(conv), sliced_cache.take(conv)
    assert kept is not None and sliced is not None
    assert torch.equal(sliced, kept)


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")
@torch.no_grad()
def test_a_small_clip_meets_no_slow_kernel() -> None:
    conv, video = make_conv(8), make_video(8, 2, batch=1)
    expected = plain(conv.conv, video)
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        result = conv(video)
    assert_close(result, expected, **TOLERANCE)
    assert "aten::mkldnn_convolution" in {event.name for event in profiler.events()}


def test_with_gradients_there_is_one_slice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sat.vae.causal_conv.SLICE_NUMEL", 1)
    assert [part.shape[2] for part in make_conv(8).parts(make_video(8, 5))] == [5]
    with torch.no_grad():
        assert [part.shape[2] for part in make_conv(8).parts(make_video(8, 5))] == [1] * 5


def test_a_bias_alone_gets_its_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sat.vae.causal_conv.SLICE_NUMEL", 1)
    conv = make_conv(8)
    conv.conv.weight.requires_grad_(False)
    output = conv(make_video(8, 5))
    output.sum().backward()
    assert_close(conv.conv.bias.grad, torch.full_like(conv.conv.bias, output[:, 0].numel()))


@pytest.mark.parametrize("num_frames", [1, 2, 7, 49])
@pytest.mark.parametrize("frame_numel", [1, 1 << 20, 3 << 21, 1 << 30])
def test_time_slices_cover_every_frame_once(num_frames: int, frame_numel: int) -> None:
    slices = time_slices(num_frames, frame_numel, whole=False)
    assert [frame for start, stop in slices for frame in range(start, stop)] == list(range(num_frames))
    lengths = [stop - start for start, stop in slices]
    assert max(lengths) - min(lengths) <= 1
    assert max(lengths) == 1 or max(lengths) * frame_numel <= (1 << 22) + frame_numel
    assert time_slices(num_frames, frame_numel, whole=True) == [(0, num_frames)]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_concat_time_keeps_values_and_layout(layout: torch.memory_format) -> None:
    video = make_video(8, 6).contiguous(memory_format=layout)
    parts = [part.contiguous(memory_format=layout) for part in video.split([1, 3, 2], dim=2)]
    joined = concat_time(iter(parts), 6)
    assert torch.equal(joined, video)
    assert memory_format(joined) == layout
    assert concat_time(iter([video]), 6) is video


def test_frames_of_a_video_go_there_and_back() -> None:
    video = make_video(8, 3)
    frames = to_frames(video)
    assert torch.equal(frames[4], video[1, :, 1])
    assert frames.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(from_frames(frames, 2), video)


@pytest.mark.parametrize(
    "rule, apart", [("split", [0, 1, 1, 1, 1]), ("nosplit", [0, 0, 0, 0, 0]), ("parity", [0, 0, 1, 0, 1])]
)
def test_when_the_first_frame_is_apart(rule: str, apart: list[int]) -> None:
    assert [is_first_apart(rule, count) for count in range(1, 6)] == list(map(bool, apart))  # type: ignore[arg-type]


# --- inflation -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", CHANNELS)
@pytest.mark.parametrize("load", [lambda conv, state: None, inflate_kernels], ids=["on loading", "before"])
def test_an_inflated_kernel_sees_every_frame_alone(channels: int, load: Callable) -> None:
    images, clips = make_conv(channels, (1, 3, 3)), CausalConv3d(channels, 5, 3)
    state = images.state_dict()
    load(clips, state)
    clips.load_state_dict(state, strict=True)
    video = make_video(channels, 4)
    assert_close(clips(video), images(video), **TOLERANCE)
    assert images.conv.weight.shape[2] == 1  # its own tensor is left alone


def test_a_kernel_that_spans_more_frames_does_not_load() -> None:
    with pytest.raises(RuntimeError, match="size mismatch"):
        make_conv(8, (1, 3, 3)).load_state_dict(make_conv(8).state_dict())
