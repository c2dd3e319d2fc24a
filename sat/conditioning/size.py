"""Sizes as a condition: how large an image was, and what was cut out of it (Podell et al. 2023, arXiv:2307.01952, 2.2).

Letters: b samples.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sat.ops.sinusoid import sinusoid

SIZE_KEYS = ("original_size_as_tuple", "crop_coords_top_left", "target_size_as_tuple")
"""What a sample may say of its size, each (2,): rows and columns, or the corner's row and column, in pixels."""


def sizes_of(batch: Mapping[str, Any], own: Sequence[tuple[int, int]]) -> dict[str, Tensor]:
    """The sizes of a batch, each (b 2) float32. What it does not say is that of an image that was never resized or cut.

    own: (height, width) of each image of the batch, in pixels.
    """
    sizes = torch.tensor(own).float()
    whole = dict.fromkeys(SIZE_KEYS, sizes) | {"crop_coords_top_left": torch.zeros_like(sizes)}
    return {key: batch[key].float() if key in batch else value for key, value in whole.items()}


class SizeEmbedder(nn.Module):
    """Each number of a size becomes a sinusoid of outdim channels: (b 2) -> (b 2·outdim) float32."""

    def __init__(self, outdim: int) -> None:
        super().__init__()
        self.outdim = outdim

    @property
    def width(self) -> int:
        """Channels of the two numbers together."""
        return 2 * self.outdim

    def forward(self, size: Tensor) -> Tensor:
        return sinusoid(size.flatten(), self.outdim).view(len(size), -1)
