"""Samples to files.

Letters: t h w frames, rows, columns of pixels.
"""

import re
from collections.abc import Mapping
from pathlib import Path

from einops import rearrange
from numpy import ndarray
from safetensors.torch import save_file
from torch import Tensor

from sat.cogvideox.engine import VideoDiffusionEngine
from sat.data.frames import pixels_to_levels
from sat.data.video import write_mp4, write_png


def to_frames(pixels: Tensor) -> ndarray:
    """Frames (t h w 3) uint8 of pixels (t 3 h w) in [-1, 1]."""
    return rearrange(pixels_to_levels(pixels), "t c h w -> t h w c").cpu().numpy()


def file_stem(index: int, prompt: str, seed: int) -> str:
    """A file name that sorts by the prompt's number, says what it shows, and is another for another seed."""
    words = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:60].strip("-")
    return "-".join(part for part in (f"{index:05d}", words, f"seed{seed}") if part)


def write_sample(
    engine: VideoDiffusionEngine, latents: Tensor, folder: Path, stem: str, fps: float, metadata: Mapping[str, str]
) -> Path:
    """Decode one sample's scaled latents and write FOLDER/STEM.mp4, or a single frame as .png: whole or not at all.

    The other context-parallel processes must call `help_decode` meanwhile.
    """
    chunks = (to_frames(pixels[0]) for pixels in engine.decode_first_stage(latents.unsqueeze(0)))
    if len(latents) == 1:
        path = folder / f"{stem}.png"
        write_png(path, next(chunks)[0], metadata)
        return path
    path = folder / f"{stem}.mp4"
    write_mp4(path, chunks, fps, metadata)
    return path


def help_decode(engine: VideoDiffusionEngine, latents: Tensor) -> None:
    """Do this process' share of the decoding of a sample that another context-parallel process writes."""
    if engine.shares_decoding:
        for _ in engine.decode_first_stage(latents.unsqueeze(0)):
            pass


def write_latents(latents: Tensor, folder: Path, stem: str, metadata: Mapping[str, str]) -> Path:
    """Write one sample's scaled latents (t c h w) to FOLDER/STEM.safetensors: whole or not at all."""
    path, partial = folder / f"{stem}.safetensors", folder / f".{stem}.partial"
    save_file({"latents": latents.cpu().contiguous()}, partial, metadata=dict(metadata))
    return partial.replace(path)
