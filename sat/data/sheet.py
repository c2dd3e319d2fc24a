"""A contact sheet: some clips of a set as the model sees them, after choice of frames, resizing and cropping."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

CLIPS = 8
"""Most rows of a set."""
FRAMES = 4
"""Pictures of a clip, from its first frame to its last."""
THUMB = (96, 160)
"""Rows and columns of a picture's place."""


def contact_rows(dataset: Any, numbers: Sequence[int]) -> tuple[np.ndarray, list[str]]:
    """A row of pictures for some of the clips, evenly chosen: uint8 (rows columns 3), and `key: caption` of each.

    Clips that come as latents have none.
    """
    rows, texts = [np.zeros((0, FRAMES * THUMB[1], 3), dtype=np.uint8)], []
    for place in np.linspace(0, len(numbers) - 1, min(CLIPS, len(numbers))).round().astype(int):
        item = dataset[numbers[place]]
        if "pixels" in item:
            rows.append(_row(item["pixels"][: item["num_frames"]]))
            texts.append(f"{item['key']}: {item['caption']}")
    return np.concatenate(rows), texts


def _row(pixels: Tensor) -> np.ndarray:
    """Pictures of a clip (t 3 h w) side by side."""
    chosen = pixels[np.linspace(0, len(pixels) - 1, FRAMES).round().astype(int)]
    scale = min(THUMB[0] / chosen.shape[2], THUMB[1] / chosen.shape[3])
    height, width = (max(round(scale * side), 1) for side in chosen.shape[2:])
    small = F.interpolate(chosen, (height, width), mode="area")
    right, below = THUMB[1] - width, THUMB[0] - height
    small = F.pad(small, (right // 2, right - right // 2, below // 2, below - below // 2), value=-1.0)
    return rearrange((small * 127.5 + 127.5).round().byte().numpy(), "t c h w -> h (t w) c")
