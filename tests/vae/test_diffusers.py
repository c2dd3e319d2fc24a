"""Our VAE against diffusers' on converted weights: outputs, and the gradient of every parameter."""

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLCogVideoX
from torch import Tensor, nn
from torch.testing import assert_close

from sat.compat.diffusers_names import vae_from_diffusers, vae_name_from_diffusers, vae_to_diffusers
from sat.errors import CheckpointError
from sat.vae import DecodePlan, VideoAutoencoder
from sat.vae.causal_conv import FirstFrame
from tests.vae.tiny import SIZE, build_vae, make_latents, make_pixels

LEVELS = len(SIZE["ch_mult"])
WHOLE = 1 << 30
"""Frames per chunk that no clip reaches."""

OUTPUT_SHARE = 5e-6
"""Of the largest value. Measured worst over all cases: 0.9e-6."""

GRADIENT_SHARE = 5e-5
"""Of a tensor's largest entry. Measured worst over all cases and parameters: 1.1e-5."""


def build_both(frames_per_chunk: int = WHOLE, latents_per_chunk: int = WHOLE) -> tuple[VideoAutoencoder, Any]:
    """The two with the same weights."""
    ours = build_vae()
    theirs = AutoencoderKLCogVideoX(
        block_out_channels=tuple(SIZE["ch"] * factor for factor in SIZE["ch_mult"]),
        layers_per_block=SIZE["num_res_blocks"],
        latent_channels=SIZE["z_channels"],
        norm_num_groups=SIZE["norm_groups"],
    )
    theirs.load_state_dict(vae_to_diffusers(ours.state_dict(), LEVELS), strict=True)
    theirs.num_sample_frames_batch_size = frames_per_chunk
    theirs.num_latent_frames_batch_size = latents_per_chunk
    return ours, theirs.eval()


def assert_near(got: Tensor, expected: Tensor, share: float, name: str) -> None:
    allowed = share * float(expected.detach().abs().max())
    assert_close(got, expected, atol=allowed, rtol=0.0, msg=lambda text: f"{name}: {text}")


def gradients(module: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.grad for name, parameter in module.named_parameters() if parameter.grad is not None}


def assert_same_gradients(ours: nn.Module, theirs: nn.Module, half: str) -> None:
    own, expected = vae_to_diffusers(gradients(ours), LEVELS), gradients(theirs)
    assert set(own) == set(expected) == {name for name, _ in theirs.named_parameters() if name.startswith(half)}
    for name, value in expected.items():
        assert_near(own[name], value, GRADIENT_SHARE, name)


def backward(output: Tensor) -> None:
    """Of the mean of `output` (b c t h w) weighted with fixed random numbers."""
    (output * torch.randn(output.shape, generator=torch.Generator().manual_seed(3))).mean().backward()


@pytest.mark.parametrize("num_frames, frames_per_chunk", [(1, None), (5, None), (9, None), (17, 8), (12, 8), (20, 8)])
def test_moments_and_all_gradients_are_theirs(num_frames: int, frames_per_chunk: int | None) -> None:
    ours, theirs = build_both(frames_per_chunk=frames_per_chunk or WHOLE)
    pixels = make_pixels(num_frames, batch=2).requires_grad_()
    turned = pixels.detach().transpose(1, 2).requires_grad_()

    rule: FirstFrame = "split" if frames_per_chunk is None else "parity"
    posterior = ours.posterior(pixels, first_frame=rule, frames_per_chunk=frames_per_chunk)
    expected = theirs.encode(turned).latent_dist
    assert_near(posterior.moments.transpose(1, 2), expected.parameters, OUTPUT_SHARE, "moments")
    assert_near(posterior.std.transpose(1, 2), expected.std, OUTPUT_SHARE, "std")

    backward(posterior.moments.transpose(1, 2))
    backward(expected.parameters)
    assert pixels.grad is not None and turned.grad is not None
    assert_near(pixels.grad.transpose(1, 2), turned.grad, GRADIENT_SHARE, "pixels")
    assert_same_gradients(ours, theirs, "encoder")


@pytest.mark.parametrize(
    "num_latents, rule", [(1, "split"), (2, "nosplit"), (2, "parity"), (3, "split"), (5, "parity")]
)
def test_pixels_and_all_gradients_are_theirs(num_latents: int, rule: FirstFrame) -> None:
    ours, theirs = build_both()
    latents = make_latents(num_latents, batch=2).requires_grad_()
    turned = latents.detach().transpose(1, 2).requires_grad_()

    pixels = ours.decode(latents, first_frame=rule).transpose(1, 2)
    expected = theirs.decode(turned).sample
    assert_near(pixels, expected, OUTPUT_SHARE, "pixels")

    backward(pixels)
    backward(expected)
    assert latents.grad is not None and turned.grad is not None
    assert_near(latents.grad.transpose(1, 2), turned.grad, GRADIENT_SHARE, "latents")
    assert_same_gradients(ours, theirs, "decoder")


EVEN = DecodePlan((2, 2), split_first=False)
"""How diffusers cuts four latents."""


@pytest.mark.parametrize("num_latents, plan", [(1, "v1"), (3, "v1"), (5, "v1"), (7, "v1"), (4, EVEN)])
@torch.no_grad()
def test_chunked_pixels_are_theirs(num_latents: int, plan: str | DecodePlan) -> None:
    ours, theirs = build_both(latents_per_chunk=2)
    latents = make_latents(num_latents, batch=2)
    expected = theirs.decode(latents.transpose(1, 2)).sample
    assert_near(ours.decode_chunked(latents, plan).transpose(1, 2), expected, OUTPUT_SHARE, "pixels")


def test_a_1_5_clip_decodes_as_theirs_without_the_surplus_latent() -> None:
    ours, theirs = build_both(latents_per_chunk=2)
    latents = make_latents(8)
    with torch.no_grad():
        expected = theirs.decode(latents[:, 1:].transpose(1, 2)).sample
    pixels = ours.decode_chunked(latents, "main_intended").transpose(1, 2)
    assert pixels.shape[2] == 25
    assert_near(pixels, expected, OUTPUT_SHARE, "pixels")


# --- names -----------------------------------------------------------------------------------------------------------


def assert_equal_states(got: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert set(got) == set(expected)
    for name, value in expected.items():
        assert torch.equal(got[name], value), name


def test_names_go_both_ways_bit_for_bit() -> None:
    ours, theirs = build_both()
    state = {**ours.state_dict(), "loss.logvar": torch.zeros(())}
    there = vae_to_diffusers(state, LEVELS)
    assert_equal_states(there, theirs.state_dict())
    assert_equal_states(vae_from_diffusers(there, LEVELS), ours.state_dict())
    assert_equal_states(vae_to_diffusers(vae_from_diffusers(theirs.state_dict(), LEVELS), LEVELS), theirs.state_dict())


def test_levels_of_the_decoder_count_from_the_other_end() -> None:
    name = "decoder.up_blocks.3.resnets.0.conv_shortcut.weight"
    assert vae_name_from_diffusers(name, 4) == "decoder.up.0.block.0.nin_shortcut.weight"
    assert vae_name_from_diffusers(name, 5) == "decoder.up.1.block.0.nin_shortcut.weight"


def test_names_of_other_models_are_refused() -> None:
    with pytest.raises(CheckpointError, match=r"diffusers' VAE has no place for the weight 'model\.weight'"):
        vae_to_diffusers({"model.weight": torch.zeros(1)}, LEVELS)
    with pytest.raises(CheckpointError, match=r"our VAE has no place for the weight 'quant_conv\.weight'"):
        vae_from_diffusers({"quant_conv.weight": torch.zeros(1)}, LEVELS)
