"""The first stage without weights: what it keeps of an image, and what it refuses."""

import pytest
import torch
from torch.testing import assert_close

from sat.data.synthetic import SyntheticImages
from sat.errors import ConfigError
from sat.vae.block_dct import BlockDCT


def test_latents_survive_a_round_trip() -> None:
    first_stage = BlockDCT()
    latents = torch.randn(2, 1, 16, 3, 5, generator=torch.Generator().manual_seed(0))
    (pixels,) = first_stage.decode_chunks(latents)
    assert pixels.shape == (2, 1, 3, 24, 40)
    assert_close(first_stage.encode(pixels), latents, atol=2e-6, rtol=0.0)  # measured 4.8e-7


def test_a_plain_colour_is_kept_whole() -> None:
    first_stage = BlockDCT()
    pixels = torch.tensor([0.9, -0.8, 0.3]).view(3, 1, 1).expand(1, 1, 3, 16, 24)
    latents = first_stage.encode(pixels)
    assert latents.shape == (1, *first_stage.latent_shape(pixels.shape[1:])) == (1, 1, 16, 2, 3)
    assert_close(next(first_stage.decode_chunks(latents)), pixels, atol=1e-6, rtol=0.0)
    assert (latents.abs().amax(dim=(0, 1, 3, 4)) > 1e-5).sum() == 3  # one number for each of three mixtures of colours


def test_synthetic_images_lose_little() -> None:
    first_stage, images = BlockDCT(), SyntheticImages(8, 64, 64)
    pixels = torch.stack([images[index]["pixels"] for index in range(8)])
    (again,) = first_stage.decode_chunks(first_stage.encode(pixels))
    assert -10 * torch.log10((again - pixels).square().mean() / 4) > 25  # measured 26.6 dB


@pytest.mark.parametrize("shape", [(1, 2, 3, 16, 16), (1, 1, 3, 12, 16)])
def test_clips_and_odd_sides_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match="BlockDCT takes images with sides that are multiples of 8, not"):
        BlockDCT().encode(torch.zeros(shape))
