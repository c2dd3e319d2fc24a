"""A first stage without weights: an image as the low frequencies of its 8x8 blocks.

For toys and tests of image models: latents of 16 channels at an eighth of the size, like a VAE's, and no file to load.

Letters: b batch, t frames, h w blocks along rows and columns; i j frequencies along a block's rows and columns.
"""

import math
from collections.abc import Iterator, Sequence

import torch
from einops import rearrange
from torch import Tensor, nn

from sat.errors import ConfigError

SIDE = 8
"""Pixels of a block along rows and columns."""
Z_CHANNELS = 16

_BRIGHTNESS = (1 / 3**0.5, 1 / 3**0.5, 1 / 3**0.5)
_RED_BLUE = (1 / 2**0.5, 0.0, -1 / 2**0.5)
_GREEN_MAGENTA = (-1 / 6**0.5, 2 / 6**0.5, -1 / 6**0.5)
KEPT = ((_BRIGHTNESS, 3), (_RED_BLUE, 1), (_GREEN_MAGENTA, 1))
"""Orthonormal mixtures of red, green and blue, and the largest i + j kept of each: 10 + 3 + 3 numbers of a block."""


class BlockDCT(nn.Module):
    """Orthonormal type-II cosine transform of each 8x8 block (Ahmed et al. 1974), cut to 16 of its 192 numbers.

    Images only: clips of one frame. Decoding is the transpose of encoding, so latents survive a round trip and pixels
    lose what the kept frequencies cannot show.
    """

    basis: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("basis", _basis(), persistent=False)  # 16 · (3·8·8)

    def latent_shape(self, pixel_shape: Sequence[int]) -> tuple[int, int, int, int]:
        """(t 16 h w) of an image of shape (t 3 H W)."""
        num_frames, _, height, width = pixel_shape
        if num_frames != 1 or height % SIDE or width % SIDE:
            raise ConfigError(
                f"BlockDCT takes images with sides that are multiples of {SIDE}, not {num_frames} frames of "
                f"{height}x{width}"
            )
        return num_frames, Z_CHANNELS, height // SIDE, width // SIDE

    def encode(self, pixels: Tensor, noise: Tensor | None = None) -> Tensor:
        """Latents (b t 16 h w) of pixels (b t 3 H W) in [-1, 1]; nothing is drawn, so noise changes nothing."""
        self.latent_shape(pixels.shape[1:])
        blocks = rearrange(pixels, "b t c (h i) (w j) -> b t h w (c i j)", i=SIDE, j=SIDE)
        return rearrange(blocks.to(self.basis) @ self.basis.T, "b t h w z -> b t z h w")

    def decode_chunks(self, latents: Tensor) -> Iterator[Tensor]:
        """Pixels (b t 3 H W) of latents (b t 16 h w), in one chunk."""
        blocks = rearrange(latents, "b t z h w -> b t h w z").to(self.basis) @ self.basis
        yield rearrange(blocks, "b t h w (c i j) -> b t c (h i) (w j)", c=3, i=SIDE, j=SIDE)


def _basis() -> Tensor:
    """Pixels of each kept number: (16, 3·8·8) float32, rows orthonormal."""
    places = torch.arange(SIDE, dtype=torch.float64)
    waves = torch.cos(math.pi * (2 * places + 1) * places.unsqueeze(1) / (2 * SIDE)) * (2 / SIDE) ** 0.5
    waves[0] /= 2**0.5
    rows = [
        torch.einsum("c,i,j->cij", torch.tensor(colour, dtype=torch.float64), waves[i], waves[j]).flatten()
        for colour, highest in KEPT
        for i in range(SIDE)
        for j in range(SIDE)
        if i + j <= highest
    ]
    return torch.stack(rows).float()
