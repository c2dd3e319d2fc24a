"""Latent frames beyond a clip's own, where a patch spans several: put in front for training, taken off after sampling.

A clip of 4k + 1 pixel frames has k + 1 latent frames. Where a patch spans o of them (CogVideoX1.5: 2) the network takes
a multiple of o, and what is missing stands before the first frame: 81 pixel frames are 21 latent frames, 22 for the
network. Training fills the place with copies of the first latent frame; sampling makes it up and leaves it out.

Letters: t c h w latent frames, channels, rows, columns.
"""

from typing import Any

import torch
from torch import Tensor

from sat.diffusion.scaling import Clips


def num_padding(num_frames: int, patch_frames: int) -> int:
    """How many latent frames a clip of that many lacks."""
    return -num_frames % patch_frames


def pad_front(clips: Clips, patch_frames: int) -> Any:
    """Clips (b t c h w), or a list of (t c h w), with copies of their first frame in front: of the same kind."""
    if isinstance(clips, Tensor):
        return _repeat_first(clips, num_padding(clips.shape[1], patch_frames))
    return [_repeat_first(clip.unsqueeze(0), num_padding(len(clip), patch_frames)).squeeze(0) for clip in clips]


def _repeat_first(clips: Tensor, count: int) -> Tensor:
    return torch.cat([clips[:, :1].expand(-1, count, -1, -1, -1), clips], dim=1) if count else clips


def drop_front(latents: Tensor, num_frames: int) -> Tensor:
    """The clip's own frames of (b t c h w): the last num_frames."""
    return latents[:, latents.shape[1] - num_frames :]
