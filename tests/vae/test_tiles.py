"""Tiles along space: how they are put together, memory, options."""

import re
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from sat.errors import ConfigError
from sat.vae import Decoder3D, DiagonalGaussianRegularizer, Encoder3D, VideoAutoencoder
from sat.vae.tiles import LatentTiling, Tiling
from tests.vae.memory import PeakMemory
from tests.vae.tiny import SIZE, build_vae, make_latents, make_pixels

TILE = {"height": 32, "width": 24, "overlap_height": 8, "overlap_width": 8}
TOLERANCE = {"atol": 2e-5, "rtol": 1e-5}
"""As of the whole VAE; measured worst: ..."""


def tiled_vae(**tile: int) -> VideoAutoencoder:
    """The tiny VAE with tiles."""
    vae = build_vae()
    vae.tiling = Tiling(**{**TILE, **tile}).in_latents(vae.spatial_factor)
    return vae


def blend(tiles: list[list[Tensor]], overlap: tuple[int, int], step: tuple[int, int]) -> Tensor:
    """The definition: line by line, each tile with those above and to its left, which are blended already."""
    for row, line in enumerate(tiles):
        for column, tile in enumerate(line):
            if row:
                above = tiles[row - 1][column]
                length = min(overlap[0], above.shape[3], tile.shape[3])
                for y in range(length):
                    share = y / length
                    tile[..., y, :] = above[..., y - length, :] * (1 - share) + tile[..., y, :] * share
            if column:
                left = line[column - 1]
                length = min(overlap[1], left.shape[4], tile.shape[4])
                for x in range(length):
                    share = x / length
                    tile[..., x] = left[..., x - length] * (1 - share) + tile[..., x] * share
    return torch.cat([torch.cat([tile[..., : step[0], : step[1]] for tile in line], 4) for line in tiles], 3)


@pytest.mark.parametrize("size", [(4, 3), (5, 3), (4, 4), (7, 9), (8, 6)], ids=str)
@torch.no_grad()
def test_decoded_tiles_are_put_together(size: tuple[int, int]) -> None:
    vae, latents = tiled_vae(), make_latents(3, *size, batch=2)
    plain = build_vae()
    rows, columns = range(0, size[0], 3), range(0, size[1], 2)
    tiles = [[plain.decode(latents[..., y : y + 4, x : x + 3]) for x in columns] for y in rows]
    expected = plain.decode(latents) if size == (4, 3) else blend(tiles, (8, 8), (24, 16))
    assert expected.shape == (2, 9, 3, 8 * size[0], 8 * size[1])
    assert_close(vae.decode(latents), expected, **TOLERANCE)
    assert_close(vae.decode(latents, samples_at_a_time=1), expected, **TOLERANCE)


@torch.no_grad()
def test_encoded_tiles_are_put_together() -> None:
    vae, plain, pixels = tiled_vae(), build_vae(), make_pixels(5, 60, 43)  # 7 x 5 latents; 4 rows, 3 columns left over
    rows, columns = ((0, 32), (24, 60), (48, 60)), ((0, 24), (16, 43), (32, 43))
    tiles = [[plain.posterior(pixels[..., y:y2, x:x2]).moments for x, x2 in columns] for y, y2 in rows]
    expected = blend(tiles, (1, 1), (3, 2))
    assert expected.shape == (1, 2, 8, 7, 5)
    assert_close(vae.posterior(pixels).moments, expected, **TOLERANCE)


def test_gradients_are_those_of_the_blend() -> None:
    vae, plain, latents = tiled_vae(), build_vae(), make_latents(2, 5, 4).requires_grad_()
    tiles = [[plain.decode(latents[..., y : y + 4, x : x + 3]) for x in (0, 2)] for y in (0, 3)]
    (expected,) = torch.autograd.grad(blend(tiles, (8, 8), (24, 16)).square().mean(), latents)
    (gradient,) = torch.autograd.grad(vae.decode(latents).square().mean(), latents)
    assert_close(gradient, expected, **TOLERANCE)


@pytest.mark.parametrize("preset, num_latents", [("v1", 5), ("main_intended", 6), ("v1", 1)])
@torch.no_grad()
def test_chunks_of_tiles_are_tiles_of_chunks(preset: str, num_latents: int) -> None:
    """Each tile has convolution caches of its own."""
    vae, plain, latents = tiled_vae(), build_vae(), make_latents(num_latents, 6, 5)
    tiles = [
        [plain.decode_chunked(latents[..., y : y + 4, x : x + 3], preset) for x in range(0, 5, 2)]
        for y in range(0, 6, 3)
    ]
    expected = blend(tiles, (8, 8), (24, 16))
    chunks = list(vae.decode_chunks(latents, preset))
    assert [chunk.shape[1] for chunk in chunks] == [chunk.shape[1] for chunk in plain.decode_chunks(latents, preset)]
    assert_close(torch.cat(chunks, dim=1), expected, **TOLERANCE)
    assert_close(vae.decode_chunked(latents, preset), expected, **TOLERANCE)


def test_a_clip_of_one_tile_is_not_cut() -> None:
    vae, plain = tiled_vae(), build_vae()
    pixels, latents = make_pixels(5, 39, 31), make_latents(5, 4, 3)  # pixels: a tile and what makes no whole latent
    with torch.no_grad():
        assert torch.equal(vae.posterior(pixels).moments, plain.posterior(pixels).moments)
        assert torch.equal(vae.decode(latents), plain.decode(latents))
        assert torch.equal(vae.decode_chunked(latents), plain.decode_chunked(latents))


# --- memory ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def peak_bytes(vae: VideoAutoencoder, num_latents: int, rows: int, columns: int) -> tuple[int, int]:
    """Of encoding and decoding in chunks, without what goes in."""
    latents, pixels = make_latents(num_latents, rows, columns), make_pixels(4 * num_latents - 3, 8 * rows, 8 * columns)
    with PeakMemory() as encoding:
        vae.posterior(pixels, frames_per_chunk=8)
    with PeakMemory() as decoding:
        vae.decode_chunked(latents, "v1")
    return encoding.peak, decoding.peak


def test_memory_depends_on_the_tile_alone() -> None:
    vae, plain = tiled_vae(), build_vae()
    encoding, decoding = peak_bytes(vae, 5, 4, 3)
    num_latents, rows = 9, 7
    larger_encoding, larger_decoding = peak_bytes(vae, num_latents, rows, 3)
    # What is put together, a tile of it, and the edges of a line of tiles.
    moments, pixels = make_latents(2 * num_latents, rows, 3), make_pixels(4 * num_latents, 8 * rows, 24)
    assert encoding <= larger_encoding <= encoding + 3 * moments.nbytes
    assert decoding <= larger_decoding <= decoding + 3 * pixels.nbytes
    # A control: without tiles it does grow.
    assert all(peak > 2 * smaller for peak, smaller in zip(peak_bytes(plain, 5, 10, 3), (encoding, decoding)))


# --- options ---------------------------------------------------------------------------------------------------------


def build(tile: dict[str, Any]) -> VideoAutoencoder:
    return VideoAutoencoder(Encoder3D(**SIZE), Decoder3D(**SIZE), DiagonalGaussianRegularizer(), tile=tile)


def test_overlaps_are_a_sixth_and_a_fifth_by_default() -> None:
    assert build({"height": 240, "width": 360}).tiling == LatentTiling((30, 45), (5, 9))
    assert build({"height": 16, "width": 16}).tiling == LatentTiling((2, 2), (1, 1))
    assert build(TILE).tiling == LatentTiling((4, 3), (1, 1))
    assert build_vae().tiling is None


@pytest.mark.parametrize(
    "tile, message",
    [
        ({"height": 100}, "tile: height 100 is not a multiple of a latent's 8 pixels, from 16 on; give 96 or 104"),
        ({"width": 8}, "tile: width 8 is not a multiple of a latent's 8 pixels, from 16 on; give 16 or 24"),
        ({"overlap_width": 12}, "tile: overlap_width 12 is not a multiple of a latent's 8 pixels, from 8 on; give 8"),
        ({"overlap_height": 0}, "tile: overlap_height 0 is not a multiple of a latent's 8 pixels, from 8 on; give 8"),
        (
            {"overlap_height": 24},
            "tile: overlap_height 24 is more than half of height 32, so that three tiles would share a place; give at "
            "most 16",
        ),
        ({"hight": 32}, "unknown key hight; did you mean 'height'?"),
        ({"width": "wide"}, "width is a text ('wide'); give a whole number"),
    ],
    ids=str,
)
def test_tiles_that_do_not_fit(tile: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        build({**TILE, **tile})
