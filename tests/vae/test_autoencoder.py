"""The VAE as a whole: causality, frame counts, chunks, slices, layouts, memory, and what its doors refuse."""

import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from sat.errors import ConfigError
from sat.vae import (
    DecodePlan,
    Decoder3D,
    DiagonalGaussianRegularizer,
    Encoder3D,
    ReconstructionLoss,
    VideoAutoencoder,
)
from sat.vae.causal_conv import FirstFrame
from tests.vae.memory import PeakMemory
from tests.vae.tiny import SIZE, build_vae, make_latents, make_pixels

TOLERANCE = {"atol": 2e-5, "rtol": 1e-5}
"""Measured worst: 6.2e-6, on values up to 8."""


@pytest.fixture(scope="module")
def vae() -> VideoAutoencoder:
    return build_vae()


def frames_that_differ(one: Tensor, other: Tensor) -> list[bool]:
    """For each frame of (b t c h w)."""
    return [bool(differs) for differs in (one - other).abs().amax(dim=(0, 2, 3, 4)) > 1e-5]


# --- causality -------------------------------------------------------------------------------------------------------


@pytest.fixture
def neutral_norms(monkeypatch: pytest.MonkeyPatch) -> None:
    """Norms without statistics, which span time: what is left of the network must be causal.

    Acts where gradients are recorded.
    """

    def affine(hidden: Tensor, num_groups: int, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        return hidden * weight.view(1, -1, 1, 1, 1) + bias.view(1, -1, 1, 1, 1)

    monkeypatch.setattr(nn.functional, "group_norm", affine)


@pytest.fixture(scope="module")
def exact() -> VideoAutoencoder:
    """In float64, so that values that norms no longer bound leave no doubt."""
    return build_vae().double()


@pytest.mark.parametrize("latent", [0, 1, 2])
def test_latents_see_no_later_frame(exact: VideoAutoencoder, neutral_norms: None, latent: int) -> None:
    pixels = make_pixels(9, height=8, width=8)
    changed = pixels.clone()
    changed[:, 4 * latent + 1 :] *= -1
    differs = frames_that_differ(exact.posterior(pixels).mean, exact.posterior(changed).mean)
    assert differs == [index > latent for index in range(3)]


@pytest.mark.parametrize("latent", [0, 1, 2])
def test_pixels_see_no_later_latent(exact: VideoAutoencoder, neutral_norms: None, latent: int) -> None:
    latents = make_latents(3, height=1, width=1)
    changed = latents.clone()
    changed[:, latent:] *= -1
    differs = frames_that_differ(exact.decode(latents), exact.decode(changed))
    assert differs == [frame > 4 * latent - 4 for frame in range(9)]


def test_a_first_frame_is_an_image(exact: VideoAutoencoder, neutral_norms: None) -> None:
    pixels, latents = make_pixels(5), make_latents(3)
    assert_close(exact.posterior(pixels).mean[:, :1], exact.posterior(pixels[:, :1]).mean)
    assert_close(exact.decode(latents)[:, :1], exact.decode(latents[:, :1]))


@pytest.mark.parametrize("num_frames, frames_per_chunk", [(17, 4), (17, 8), (9, 4), (13, 8)])
def test_encoded_chunks_are_the_whole(
    exact: VideoAutoencoder, neutral_norms: None, num_frames: int, frames_per_chunk: int
) -> None:
    """Without statistics, nothing but the caches stands between a cut clip and a whole one."""
    pixels = make_pixels(num_frames)
    chunked = exact.posterior(pixels, frames_per_chunk=frames_per_chunk)
    assert_close(chunked.moments, exact.posterior(pixels).moments)


@pytest.mark.parametrize("sizes", [(3, 2, 2), (1, 2, 3), (2, 2), (4, 3)])
def test_decoded_chunks_are_the_whole(
    exact: VideoAutoencoder, neutral_norms: None, monkeypatch: pytest.MonkeyPatch, sizes: tuple[int, ...]
) -> None:
    latents = make_latents(sum(sizes))
    expected = exact.decode(latents)
    monkeypatch.setattr("sat.vae.blocks.records_gradient", lambda *tensors: True)  # so that norms are called whole
    chunks = list(exact.decode_chunks(latents, DecodePlan(sizes, split_first=True)))
    assert_close(torch.cat(chunks, dim=1), expected)


# --- frames ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_frames, num_latents", [(1, 1), (5, 2), (9, 3), (17, 5)])
@torch.no_grad()
def test_frames_go_there_and_back(vae: VideoAutoencoder, num_frames: int, num_latents: int) -> None:
    latents = vae.encode(make_pixels(num_frames, height=19, width=31))
    assert latents.shape == (1, num_latents, 4, 2, 3)
    assert latents.shape[1:] == vae.latent_shape((num_frames, 3, 19, 31))
    assert vae.decode(latents).shape == (1, num_frames, 3, 16, 24)


@pytest.mark.parametrize("num_frames", [1, 5, 9])
@torch.no_grad()
def test_both_rules_agree_on_the_lengths_that_matter(vae: VideoAutoencoder, num_frames: int) -> None:
    pixels = make_pixels(num_frames)
    split, parity = (vae.posterior(pixels, first_frame=rule).moments for rule in ("split", "parity"))  # type: ignore[arg-type]
    assert torch.equal(split, parity)
    latents = make_latents(num_frames // 4 + 1)
    if latents.shape[1] % 2:
        assert torch.equal(vae.decode(latents, first_frame="split"), vae.decode(latents, first_frame="parity"))
    else:
        assert torch.equal(vae.decode(latents, first_frame="nosplit"), vae.decode(latents, first_frame="parity"))


def test_the_temporal_factor_is_the_encoders(vae: VideoAutoencoder) -> None:
    assert (vae.temporal_factor, vae.spatial_factor) == (4, 8)
    flat = build_vae(ch_mult=(1, 2), temporal_compress_times=1)
    assert (flat.temporal_factor, flat.spatial_factor) == (1, 2)
    with torch.no_grad():
        assert flat.decode(flat.encode(make_pixels(4))).shape == (1, 4, 3, 16, 24)


# --- with and without gradients --------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_frames", [1, 5, 6, 9])
@pytest.mark.parametrize("size", [(16, 24), (19, 13), (8, 8)], ids=str)
@pytest.mark.parametrize("batch", [1, 2])
def test_encoding_in_slices_is_encoding_with_gradients(
    vae: VideoAutoencoder, monkeypatch: pytest.MonkeyPatch, num_frames: int, size: tuple[int, int], batch: int
) -> None:
    pixels = make_pixels(num_frames, *size, batch=batch).transpose(1, 2).contiguous()
    expected = vae.encoder(pixels)
    assert expected.requires_grad
    monkeypatch.setattr("sat.vae.causal_conv.SLICE_NUMEL", 2000)
    for layout in (torch.contiguous_format, torch.channels_last_3d):
        with torch.no_grad():
            assert_close(vae.encoder(pixels.contiguous(memory_format=layout)), expected, **TOLERANCE)


@pytest.mark.parametrize("num_latents", [1, 2, 3])
@pytest.mark.parametrize("size", [(2, 3), (1, 1), (3, 1)], ids=str)
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("rule", ["split", "nosplit"])
def test_decoding_in_slices_is_decoding_with_gradients(
    vae: VideoAutoencoder,
    monkeypatch: pytest.MonkeyPatch,
    num_latents: int,
    size: tuple[int, int],
    batch: int,
    rule: FirstFrame,
) -> None:
    latents = make_latents(num_latents, *size, batch=batch).transpose(1, 2).contiguous()
    expected = vae.decoder(latents, None, rule)
    assert expected.requires_grad
    monkeypatch.setattr("sat.vae.causal_conv.SLICE_NUMEL", 2000)
    for layout in (torch.contiguous_format, torch.channels_last_3d):
        with torch.no_grad():
            assert_close(vae.decoder(latents.contiguous(memory_format=layout), None, rule), expected, **TOLERANCE)


def test_a_frozen_vae_records_nothing_and_gives_the_same(vae: VideoAutoencoder) -> None:
    frozen = build_vae().requires_grad_(False)
    pixels = make_pixels(5)
    moments = frozen.posterior(pixels).moments
    assert not moments.requires_grad
    assert_close(moments, vae.posterior(pixels).moments, **TOLERANCE)


def test_a_frozen_vae_sends_gradients_to_its_input(vae: VideoAutoencoder) -> None:
    """A loss in pixels on top of a frozen decoder needs them."""
    frozen = build_vae().requires_grad_(False)
    gradients = []
    for decoder in (vae, frozen):
        latents = make_latents(2).requires_grad_()
        (gradient,) = torch.autograd.grad(decoder.decode(latents).square().mean(), latents)
        gradients.append(gradient)
    assert_close(gradients[1], gradients[0], **TOLERANCE)


# --- batches and chunks ----------------------------------------------------------------------------------------------


@torch.no_grad()
def test_clips_of_a_batch_do_not_meet(vae: VideoAutoencoder) -> None:
    pixels, latents = make_pixels(5, batch=3), make_latents(3, batch=3)
    for num_clips in (None, 1, 2):
        alone = [vae.posterior(clip).moments for clip in pixels.split(1)]
        assert_close(vae.posterior(pixels, samples_at_a_time=num_clips).moments, torch.cat(alone), **TOLERANCE)
        decoded = torch.cat([vae.decode(clip) for clip in latents.split(1)])
        assert_close(vae.decode(latents, samples_at_a_time=num_clips), decoded, **TOLERANCE)
        chunked = torch.cat([vae.decode_chunked(clip) for clip in latents.split(1)])
        assert_close(vae.decode_chunked(latents, samples_at_a_time=num_clips), chunked, **TOLERANCE)


def test_a_draw_takes_its_noise_in_any_grouping(vae: VideoAutoencoder) -> None:
    pixels = make_pixels(5, batch=3)
    noise = make_latents(2, batch=3)
    with torch.no_grad():
        posterior = vae.posterior(pixels)
        assert_close(vae.encode(pixels), posterior.mean)
        assert_close(vae.encode(pixels, noise, samples_at_a_time=2), posterior.sample(noise), **TOLERANCE)
        drawn = vae.encode(pixels, generator=torch.Generator().manual_seed(5))
    assert_close(drawn, posterior.sample(generator=torch.Generator().manual_seed(5)))


@pytest.mark.parametrize("preset, num_latents", [("v1", 5), ("v1", 1), ("main_intended", 6), ("main_shipped", 6)])
def test_joined_chunks_are_the_chunks(vae: VideoAutoencoder, preset: str, num_latents: int) -> None:
    latents = make_latents(num_latents, batch=2)
    chunks = list(vae.decode_chunks(latents, preset))
    assert torch.equal(vae.decode_chunked(latents, preset), torch.cat(chunks, dim=1))
    assert not chunks[0].requires_grad


def test_the_preset_of_the_vae_is_taken_where_none_is_named() -> None:
    shipped = VideoAutoencoder(
        *(half(**SIZE) for half in (Encoder3D, Decoder3D)),  # type: ignore[arg-type]
        DiagonalGaussianRegularizer(),
        decode_preset="main_shipped",
    )
    assert shipped.decode_chunked(make_latents(6)).shape[1] == 20
    assert build_vae().decode_chunked(make_latents(5)).shape[1] == 17


def test_two_clips_can_be_under_way(vae: VideoAutoencoder) -> None:
    clips = make_latents(5), make_latents(5, seed=9)
    pairs = list(zip(*(vae.decode_chunks(clip) for clip in clips)))
    for index, clip in enumerate(clips):
        expected = torch.cat(list(vae.decode_chunks(clip)), dim=1)
        assert torch.equal(torch.cat([pair[index] for pair in pairs], dim=1), expected)


# --- memory ----------------------------------------------------------------------------------------------------------


def decode_in_chunks(vae: VideoAutoencoder, num_latents: int) -> None:
    for chunk in vae.decode_chunks(make_latents(num_latents), "v1"):
        del chunk  # as a caller that writes frames to a file


def encode_in_chunks(vae: VideoAutoencoder, num_latents: int) -> None:
    vae.posterior(make_pixels(4 * num_latents - 3), frames_per_chunk=8)


def decode_whole(vae: VideoAutoencoder, num_latents: int) -> None:
    vae.decode(make_latents(num_latents))


@torch.no_grad()
def peak_bytes(run: Callable[[VideoAutoencoder, int], None], vae: VideoAutoencoder, num_latents: int) -> int:
    with PeakMemory() as memory:
        run(vae, num_latents)
    return memory.peak


def test_memory_of_chunks_does_not_grow_with_the_clip(vae: VideoAutoencoder) -> None:
    short, long = (peak_bytes(decode_in_chunks, vae, num_latents) for num_latents in (5, 25))
    latents = make_latents(20).nbytes
    assert short <= long <= short + latents
    # A control: the same count sees a decoder that does take the whole clip.
    assert peak_bytes(decode_whole, vae, 9) > 1.7 * peak_bytes(decode_whole, vae, 5)


def test_memory_of_encoding_in_chunks_is_that_of_a_chunk(vae: VideoAutoencoder) -> None:
    short, long = (peak_bytes(encode_in_chunks, vae, num_latents) for num_latents in (5, 21))
    clips = make_pixels(64).nbytes + make_latents(4 * 16).nbytes
    assert short <= long <= short + clips


def test_nothing_is_kept_after_a_clip(vae: VideoAutoencoder) -> None:
    with PeakMemory() as memory:
        decode_in_chunks(vae, 5)
    assert memory.peak > 0
    assert memory.alive == 0


# --- precision, layout, training -------------------------------------------------------------------------------------


def test_pixels_come_in_any_layout(vae: VideoAutoencoder) -> None:
    pixels = make_pixels(5)
    turned = pixels.permute(0, 2, 3, 4, 1).contiguous().permute(0, 4, 1, 2, 3)
    with torch.no_grad():
        assert torch.equal(vae.posterior(turned).moments, vae.posterior(pixels).moments)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@torch.no_grad()
def test_values_are_of_the_precision_of_the_weights(dtype: torch.dtype) -> None:
    vae = build_vae().to(dtype)
    latents = vae.encode(make_pixels(5))
    pixels = vae.decode(latents.float())
    assert (latents.dtype, pixels.dtype) == (dtype, dtype)
    reference = build_vae().double().decode(latents.float())
    # bfloat16 keeps 8 bits and some 30 layers add to the error: measured 0.04 of the largest value.
    assert float((pixels - reference).abs().max() / reference.abs().max()) < (0.1 if dtype == torch.bfloat16 else 1e-12)


def test_a_training_step_reaches_every_weight(vae: VideoAutoencoder) -> None:
    pixels, noise = make_pixels(5, batch=2), make_latents(2, batch=2)
    reconstruction, posterior = vae(pixels, noise)
    assert reconstruction.shape == pixels.shape
    assert_close(reconstruction, vae.decode(posterior.sample(noise)))
    ReconstructionLoss()(pixels, reconstruction, posterior)["loss"].mean().backward()
    for name, parameter in vae.named_parameters():
        assert parameter.grad is not None and parameter.grad.any(), name
    vae.zero_grad()


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "pixels, message",
    [
        (torch.zeros(1, 3, 5, 16, 16), "pixels are (1, 3, 5, 16, 16); give (batch, frames, 3, height, width)"),
        (torch.zeros(5, 3, 16, 16), "pixels are (5, 3, 16, 16); give (batch, frames, 3, height, width)"),
        (torch.zeros(1, 5, 3, 16, 16, dtype=torch.uint8), "pixels are torch.uint8; give floating-point numbers"),
        (torch.zeros(1, 0, 3, 16, 16), "give at least one clip of one frame of 8 x 8"),
        (torch.zeros(0, 1, 3, 16, 16), "give at least one clip of one frame of 8 x 8"),
        (torch.zeros(1, 1, 3, 7, 16), "give at least one clip of one frame of 8 x 8"),
    ],
)
def test_pixels_that_cannot_be_encoded(vae: VideoAutoencoder, pixels: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        vae.encode(pixels)


@pytest.mark.parametrize(
    "latents, message",
    [
        (torch.zeros(1, 3, 16, 2, 2), "latents are (1, 3, 16, 2, 2); give (batch, frames, 4, height, width)"),
        (torch.zeros(3), "latents are (3,); give (batch, frames, 4, height, width)"),
        (torch.zeros(0, 3, 4, 2, 2), "give at least one clip of one frame of 1 x 1"),
    ],
)
@pytest.mark.parametrize("decode", ["decode", "decode_chunked", "decode_chunks"])
def test_latents_that_cannot_be_decoded(vae: VideoAutoencoder, latents: Tensor, message: str, decode: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        list(getattr(vae, decode)(latents))


def test_clips_of_a_wrong_length_are_refused(vae: VideoAutoencoder) -> None:
    with pytest.raises(ValueError, match=r"a clip of 3 frames cannot be encoded .* give 1 frame or 4k \+ 1"):
        vae.encode(make_pixels(3))


@pytest.mark.parametrize("sizes", [(3, 3), (0, 3), ()])
def test_plans_that_do_not_fit(vae: VideoAutoencoder, sizes: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=re.escape(f"chunks of {sizes} latents do not fit into the 5 that there are")):
        list(vae.decode_chunks(make_latents(5), DecodePlan(sizes, split_first=False)))


@pytest.mark.parametrize("sizes", [(3, 1), (1, 1), (2, 1, 2)])
def test_plans_with_a_lone_latent_in_a_later_chunk(vae: VideoAutoencoder, sizes: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"one latent alone would become one frame instead of 4; give every later"):
        list(vae.decode_chunks(make_latents(5), DecodePlan(sizes, split_first=True)))


@pytest.mark.parametrize("frames", [0, 6, -4])
def test_chunks_that_cut_a_latent(vae: VideoAutoencoder, frames: int) -> None:
    message = f"frames_per_chunk is {frames}; give a multiple of the 4 frames per latent"
    with pytest.raises(ValueError, match=message):
        vae.encode(make_pixels(9), frames_per_chunk=frames)


def test_unknown_rules(vae: VideoAutoencoder) -> None:
    for call in (vae.decode, vae.encode):
        video = make_latents(3) if call == vae.decode else make_pixels(5)
        with pytest.raises(ValueError, match="first_frame is 'none'; give one of split, nosplit, parity"):
            call(video, first_frame="none")  # type: ignore[operator]


def build(encoder: dict | None = None, decoder: dict | None = None, **options: object) -> VideoAutoencoder:
    halves = Encoder3D(**{**SIZE, **(encoder or {})}), Decoder3D(**{**SIZE, **(decoder or {})})
    return VideoAutoencoder(*halves, DiagonalGaussianRegularizer(), **options)  # type: ignore[arg-type]


def test_options_that_contradict_each_other() -> None:
    with pytest.raises(ConfigError, match="encoder_config has z_channels 4, decoder_config 8; make them equal"):
        build(decoder={"z_channels": 8})
    with pytest.raises(ConfigError, match="double_z: false, but the regularizer needs variances; set double_z: true"):
        build({"double_z": False})
    message = "the encoder compresses time and space 4x and 8x, the decoder expands them 2x and 8x; give both the same"
    with pytest.raises(ConfigError, match=message):
        build(decoder={"temporal_compress_times": 2})
    with pytest.raises(ConfigError, match="expands them 4x and 4x; give both the same"):
        build(decoder={"ch_mult": (1, 2, 2)})


def test_options_that_are_not_there() -> None:
    with pytest.raises(ConfigError, match="decode_preset is 'v2'; give one of v1, main_shipped, main_intended"):
        build(decode_preset="v2")
    assert build().decode_preset is None


def test_a_cp_size_that_is_not_the_jobs_warns(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sat.config._warned", set())
    build(cp_size=0)
    build(cp_size=1)
    assert caplog.messages == []
    build(cp_size=2)
    message = "cp_size is 2, but a clip is shared by args.context_parallel_size = 1 processes; leave cp_size out"
    assert caplog.messages == [message]
