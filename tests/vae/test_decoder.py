"""Frame counts of the decoder, its ways up, and its norms that depend on the latents."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.testing import assert_close

from sat.errors import ConfigError
from sat.vae import ConvCache, Decoder3D, count_pixel_frames
from sat.vae.causal_conv import FirstFrame, is_first_apart
from sat.vae.context import ChunkContext
from sat.vae.decoder import SpatialNormSwish, Upsample, nearest_latents
from tests.vae.tiny import SIZE, make_latents, randomize

TOLERANCE = {"atol": 5e-6, "rtol": 1e-5}
"""Measured worst: 9.5e-7, on values up to 11."""


def test_frame_counts() -> None:
    counts = (1, 2, 3, 5, 13, 21)
    assert [count_pixel_frames(count, 2) for count in counts] == [1, 5, 9, 17, 49, 81]
    assert [count_pixel_frames(count, 2, "nosplit") for count in counts] == [1, 8, 12, 20, 52, 84]
    assert [count_pixel_frames(count, 2, "parity") for count in (1, 2, 3, 4, 13)] == [1, 8, 9, 16, 49]
    assert [count_pixel_frames(count, 0) for count in counts] == list(counts)


@pytest.mark.parametrize("rule", ["split", "nosplit", "parity"])
@pytest.mark.parametrize("num_latents", [1, 2, 3])
@torch.no_grad()
def test_the_decoder_gives_what_is_counted(rule: FirstFrame, num_latents: int) -> None:
    pixels = Decoder3D(**SIZE)(make_latents(num_latents, batch=2).transpose(1, 2), None, rule)
    assert pixels.shape == (2, 3, count_pixel_frames(num_latents, 2, rule), 16, 24)


# --- ways up ---------------------------------------------------------------------------------------------------------


def plain_upsample(up: Upsample, hidden: Tensor, rule: FirstFrame) -> Tensor:
    """Frames doubled, then every frame enlarged and convolved at its full size."""
    if up.compress_time and hidden.shape[2] > 1:
        alone = int(is_first_apart(rule, hidden.shape[2]))
        doubled = hidden[:, :, alone:].repeat_interleave(2, dim=2)
        hidden = torch.cat([hidden[:, :, :alone], doubled], dim=2)
    frames = [F.interpolate(hidden[:, :, index], scale_factor=2.0) for index in range(hidden.shape[2])]
    if up.conv is not None:
        frames = [F.conv2d(frame, up.conv.weight, up.conv.bias, padding=1) for frame in frames]
    return torch.stack(frames, dim=2)


@pytest.mark.parametrize("rule", ["split", "nosplit"])
@pytest.mark.parametrize("frames", [1, 2, 3, 5])
@pytest.mark.parametrize("compress_time, with_conv", [(True, True), (True, False), (False, True)])
def test_the_way_up_and_its_gradients(
    monkeypatch: pytest.MonkeyPatch, rule: FirstFrame, frames: int, compress_time: bool, with_conv: bool
) -> None:
    """The convolution runs at the small size with summed taps; the definition runs at the large one."""
    up = Upsample(6, compress_time, with_conv)
    randomize(up)
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(2, 6, frames, 3, 5, generator=generator).requires_grad_()
    expected = plain_upsample(up, hidden, rule)
    got = up(hidden, ChunkContext(rule))
    assert_close(got, expected, **TOLERANCE)
    cotangent = torch.randn(got.shape, generator=generator)
    inputs = (hidden, *up.parameters())
    own = torch.autograd.grad((got * cotangent).mean(), inputs)
    for gradient, other in zip(own, torch.autograd.grad((expected * cotangent).mean(), inputs)):
        assert_close(gradient, other, **TOLERANCE)
    monkeypatch.setattr("sat.vae.causal_conv.SLICE_NUMEL", 500)
    with torch.no_grad():
        assert_close(up(hidden, ChunkContext(rule)), expected, **TOLERANCE)


# --- norms -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["split", "nosplit", "parity"])
@pytest.mark.parametrize("num_latents, num_frames", [(1, 1), (2, 2), (2, 3), (2, 5), (3, 6), (3, 9), (5, 17), (3, 12)])
def test_frames_take_the_nearest_latent(rule: FirstFrame, num_latents: int, num_frames: int) -> None:
    latents = torch.arange(float(num_latents)).view(1, 1, -1)
    if is_first_apart(rule, num_frames):
        rest = F.interpolate(latents[:, :, 1:], size=num_frames - 1)
        expected = torch.cat([latents[:, :, :1], rest], dim=2)
    else:
        expected = F.interpolate(latents, size=num_frames)
    assert nearest_latents(num_latents, num_frames, rule) == expected.flatten().int().tolist()


def plain_norm(norm: SpatialNormSwish, hidden: Tensor, latents: Tensor, rule: FirstFrame) -> Tensor:
    """The definition: latents resized to the activation's size before the convolutions."""
    sources = torch.tensor(nearest_latents(latents.shape[2], hidden.shape[2], rule))
    resized = F.interpolate(latents.index_select(2, sources), size=hidden.shape[2:])
    if norm.conv is not None:
        resized = norm.conv(resized)
    return F.silu(norm.norm_layer(hidden) * norm.conv_y(resized) + norm.conv_b(resized))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last_3d])
@pytest.mark.parametrize("rule, num_latents, num_frames", [("split", 3, 5), ("nosplit", 3, 6), ("split", 1, 1)])
@pytest.mark.parametrize("add_conv", [False, True])
def test_a_norm_and_its_gradients(
    layout: torch.memory_format, rule: FirstFrame, num_latents: int, num_frames: int, add_conv: bool
) -> None:
    norm = SpatialNormSwish(4, SIZE["z_channels"], add_conv, "released", 8)
    randomize(norm)
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(2, 8, num_frames, 4, 6, generator=generator).contiguous(memory_format=layout).requires_grad_()
    latents = make_latents(num_latents, batch=2).transpose(1, 2).requires_grad_()
    ctx = ChunkContext(rule, latents=latents)
    expected = plain_norm(norm, hidden, latents, rule)
    got = norm(hidden, ctx)
    assert_close(got, expected, **TOLERANCE)
    inputs = (hidden, latents, *norm.parameters())
    own = torch.autograd.grad(got.square().mean(), inputs)
    for gradient, other in zip(own, torch.autograd.grad(expected.square().mean(), inputs)):
        assert_close(gradient, other, **TOLERANCE)
    with torch.no_grad():
        activate, result = norm.in_slices(hidden, ctx), torch.empty_like(hidden)
        for start in range(0, num_frames, 2):
            activate(hidden[:, :, start : start + 2], start, result[:, :, start : start + 2])
        assert_close(result, expected, **TOLERANCE)


def test_the_added_convolution_looks_back_through_the_cache() -> None:
    norm = SpatialNormSwish(4, SIZE["z_channels"], True, "released", 8)
    randomize(norm)
    cache, hidden = ConvCache(), torch.zeros(1, 8, 2, 2, 3)
    latents = make_latents(4).transpose(1, 2)
    outputs = [norm(hidden, ChunkContext("nosplit", cache, chunk)) for chunk in (latents[:, :, :2], latents[:, :, 2:])]
    expected = plain_norm(norm, torch.zeros(1, 8, 4, 2, 3), latents, "nosplit")  # a norm of zeros is zero in any cut
    assert_close(torch.cat(outputs, dim=2), expected, **TOLERANCE)


def test_init_identity_starts_with_plain_norms() -> None:
    decoder = Decoder3D(**SIZE, init="identity")
    norm = decoder.mid.block_1.norm1
    hidden = torch.randn(1, 32, 3, 2, 3, generator=torch.Generator().manual_seed(1))
    got = norm(hidden, ChunkContext("split", latents=make_latents(3).transpose(1, 2)))
    assert_close(got, F.silu(F.group_norm(hidden, 4, eps=1e-6)), **TOLERANCE)


# --- options ---------------------------------------------------------------------------------------------------------


def test_options_change_the_network() -> None:
    def shapes(**changes: Any) -> dict[str, tuple[int, ...]]:
        return {name: tuple(value.shape) for name, value in Decoder3D(**{**SIZE, **changes}).state_dict().items()}

    assert shapes(out_ch=4)["conv_out.conv.weight"] == (4, 8, 3, 3, 3)
    assert shapes(add_conv=True)["norm_out.conv.conv.weight"] == (4, 4, 3, 3, 3)
    assert "up.1.upsample.conv.weight" not in shapes(resamp_with_conv=False)
    assert shapes(zq_ch=4) == shapes()
    assert "up.0.upsample.conv.weight" not in shapes()
    assert max(int(name.split(".")[3]) for name in shapes(num_res_blocks=2) if name.startswith("up.0.block")) == 2


def test_norms_of_other_latents_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"decoder: zq_ch 16 differs from z_channels 4; leave zq_ch out"):
        Decoder3D(**SIZE, zq_ch=16)
