"""Samples drawn from their number alone: data sets that need no file, for tests, benchmarks and first runs."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from sat.mpu.random import stream_generator

SIZES = ("small", "large")
DIRECTIONS = {"left": (0.0, -1.0), "right": (0.0, 1.0), "up": (-1.0, 0.0), "down": (1.0, 0.0)}

COLOURS = {
    "red": (0.9, -0.8, -0.8),
    "green": (-0.8, 0.7, -0.7),
    "blue": (-0.7, -0.3, 0.9),
    "yellow": (0.9, 0.8, -0.8),
    "white": (0.9, 0.9, 0.9),
}
"""Red, green and blue in [-1, 1]."""
SHAPES = ("disc", "square")
BACKGROUND = -0.6


class SyntheticLatents(Dataset):
    """Smooth blobs that drift over still latents, and captions that say which: `a small blob moving left`.

    num_samples: how many there are; sample i is the same whatever that number is.
    num_frames, channels, height, width: the latents' shape (t c h w). sizes: instead of one size, a list of
        [num_frames, height, width] from which each sample draws its own.

    An item has `latents` float32 (t c h w) with a standard deviation near 1, and SFTDataset's other keys.
    """

    def __init__(
        self,
        num_samples: int,
        num_frames: int,
        channels: int,
        height: int,
        width: int,
        sizes: Sequence[Sequence[int]] | None = None,
    ) -> None:
        self.num_samples, self.channels = num_samples, channels
        self.sizes = [tuple(size) for size in sizes] if sizes else [(num_frames, height, width)]

    def __len__(self) -> int:
        return self.num_samples

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < self.num_samples:
            raise IndexError(f"sample {index} of {self.num_samples}")
        generator = stream_generator(0, "synthetic latents", index)
        size = SIZES[int(torch.randint(len(SIZES), (), generator=generator))]
        direction = list(DIRECTIONS)[int(torch.randint(len(DIRECTIONS), (), generator=generator))]
        shape = self._size_of(index)
        return {
            "latents": self._blob(size, DIRECTIONS[direction], shape, generator),
            "caption": f"a {size} blob moving {direction}",
            "key": f"synthetic/{index}",
            "fps": 8.0,
            "num_frames": shape[0],
        }

    def latent_sizes(self) -> list[tuple[int, ...]]:
        """(num_frames, height, width) of every sample."""
        return [self._size_of(index) for index in range(self.num_samples)]

    def _size_of(self, index: int) -> tuple[int, ...]:
        if len(self.sizes) == 1:
            return self.sizes[0]
        generator = stream_generator(0, "synthetic sizes", index)
        return self.sizes[int(torch.randint(len(self.sizes), (), generator=generator))]

    def _blob(
        self, size: str, direction: tuple[float, float], shape: Sequence[int], generator: torch.Generator
    ) -> Tensor:
        """A Gaussian bump that crosses half the frame; each channel sees it with its own sign and strength."""
        (num_frames, height, width), channels = shape, self.channels
        strength = 3.0 * torch.randn(channels, generator=generator)
        offset = 0.2 * torch.randn(2, generator=generator)
        travel = torch.linspace(-0.5, 0.5, num_frames) if num_frames > 1 else torch.zeros(1)
        rows = torch.linspace(-1, 1, height)[None, :, None] - (offset[0] + travel * direction[0])[:, None, None]
        columns = torch.linspace(-1, 1, width)[None, None, :] - (offset[1] + travel * direction[1])[:, None, None]
        radius = 0.3 if size == "small" else 0.6
        bump = torch.exp(-(rows.square() + columns.square()) / (2 * radius**2))  # t h w
        return strength[None, :, None, None] * bump[:, None]


class SyntheticImages(Dataset):
    """A disc or a square of one colour on dark grey, and captions that say which: `a red disc`.

    num_samples: how many there are; sample i is the same whatever that number is. height, width: pixels.

    An item has `pixels` float32 (1 3 h w) in [-1, 1], and SFTDataset's other keys.
    """

    def __init__(self, num_samples: int, height: int, width: int) -> None:
        self.num_samples = num_samples
        self.size = (height, width)

    def __len__(self) -> int:
        return self.num_samples

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < self.num_samples:
            raise IndexError(f"sample {index} of {self.num_samples}")
        generator = stream_generator(0, "synthetic images", index)
        colour = list(COLOURS)[int(torch.randint(len(COLOURS), (), generator=generator))]
        shape = SHAPES[int(torch.randint(len(SHAPES), (), generator=generator))]
        cover = self._cover(shape, torch.rand(3, generator=generator)).unsqueeze(0)  # 1 h w
        pixels = BACKGROUND + cover * (torch.tensor(COLOURS[colour]).view(3, 1, 1) - BACKGROUND)
        return {
            "pixels": pixels.unsqueeze(0),
            "caption": f"a {colour} {shape}",
            "key": f"synthetic/{index}",
            "fps": 1.0,
            "num_frames": 1,
        }

    def _cover(self, shape: str, draws: Tensor) -> Tensor:
        """How much of each pixel the shape covers (h w), its edge softened over a pixel; it lies near the middle."""
        height, width = self.size
        radius = min(height, width) * (0.25 + 0.1 * draws[0])
        rows = torch.arange(height) + 0.5 - height * (0.42 + 0.16 * draws[1])
        columns = torch.arange(width) + 0.5 - width * (0.42 + 0.16 * draws[2])
        down, across = rows.abs()[:, None], columns.abs()[None]
        distance = torch.hypot(down, across) if shape == "disc" else torch.maximum(down, across)
        return (radius - distance + 0.5).clamp(0.0, 1.0)
