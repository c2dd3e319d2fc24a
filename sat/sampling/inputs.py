"""Clips, latents and noise from files, as sampling takes them.

Letters: t latent frames, c channels, h w latent rows and columns.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from sat.cogvideox.engine import VideoDiffusionEngine
from sat.cogvideox.presets import SPACE_FACTOR, TIME_FACTOR
from sat.data.frames import frames_to_pixels
from sat.data.quarantine import BadClip
from sat.data.video import probe, read_frames
from sat.errors import DataError

LATENTS_NAME = "latents"
"""Name of the tensor in a file of latents, as args.only_save_latents writes it."""
NOISE_NAME = "noise"
"""Name of the tensor in a file of noise, as tools/invert.py writes it."""


def read_image(path: Path, size: tuple[int, int]) -> Tensor:
    """The first frame of an image or clip as pixels (1 3 h w) in [-1, 1], resized and cut to size. Raises DataError."""
    try:
        return frames_to_pixels(read_frames(path, [0]), size, 1)
    except BadClip as error:
        raise DataError(str(error)) from error


def image_size(path: Path) -> tuple[int, int]:
    """Rows and columns of an image or clip, upright. Raises DataError."""
    try:
        return read_frames(path, [0]).shape[1:3]
    except BadClip as error:
        raise DataError(str(error)) from error


def read_tensor(path: Path, name: str, shape: Sequence[int] | None = None) -> Tensor:
    """A tensor of a safetensors file. Raises DataError where it is missing or has another shape."""
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise DataError(f"{path} cannot be read as safetensors: {error}") from error
    if name not in tensors:
        raise DataError(f"{path} holds no tensor '{name}'; it holds {', '.join(tensors) or 'nothing'}")
    if shape is not None and tensors[name].shape != tuple(shape):
        raise DataError(
            f"'{name}' of {path} is {tuple(tensors[name].shape)}, the sample is {tuple(shape)} (latent frames, "
            "channels, rows, columns); set args.sampling_image_size and args.sampling_num_frames to its size"
        )
    return tensors[name].float()


def read_latents(engine: VideoDiffusionEngine, path: Path, shape: Sequence[int], at_end: bool = False) -> Tensor:
    """Scaled latents of `shape` (t c h w) from the start of a clip, or from its end, resized and cut to their size.

    A safetensors file holds them as they are; a video or an image is encoded by the VAE, in its own right: the first
    of the latent frames stands for one frame, each further one for four. Raises DataError for a file that is shorter.
    """
    if path.suffix == ".safetensors":
        latents = read_tensor(path, LATENTS_NAME)
        if latents.dim() != 4 or len(latents) < shape[0] or latents.shape[1:] != tuple(shape[1:]):
            raise DataError(f"the latents of {path} are {tuple(latents.shape)}; {tuple(shape)} are needed")
        return latents[-shape[0] :] if at_end else latents[: shape[0]]
    num_frames = (shape[0] - 1) * TIME_FACTOR + 1
    try:
        there = probe(path, count=True).num_frames
        if there < num_frames:
            raise DataError(f"{path} has {there} frames; {shape[0]} latent frames need {num_frames}")
        frames = read_frames(path, np.arange(num_frames) + (there - num_frames if at_end else 0))
    except BadClip as error:
        raise DataError(str(error)) from error
    pixels = frames_to_pixels(frames, (shape[2] * SPACE_FACTOR, shape[3] * SPACE_FACTOR), num_frames)
    return engine.encode_first_stage(pixels.unsqueeze(0).to(engine.device)).squeeze(0)
