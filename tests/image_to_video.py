"""A small image-to-video model for tests, and clips to train it on."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sat.cogvideox.output import to_frames
from sat.data.synthetic import SyntheticImages
from sat.data.video import write_mp4
from sat.mpu.random import stream_generator
from sat.vae.block_dct import BlockDCT

IMAGE_TO_VIDEO = (
    "model.network_config.params.in_channels=32",
    "model.noised_image_input=true",
    "model.noised_image_dropout=0.05",
    "model.scale_factor=0.7",
)
"""Laid over configs/tiny.yaml."""


def write_clips(folder: Path, count: int = 4, num_frames: int = 9, side: int = 32) -> Path:
    """Clips of a coloured shape that moves right, in the fine-tuning layout."""
    (folder / "videos").mkdir(parents=True)
    (folder / "labels").mkdir()
    images = SyntheticImages(count, side, side)
    for index in range(count):
        still = images[index]["pixels"][0]
        moving = torch.stack([still.roll(2 * step, dims=-1) for step in range(num_frames)])
        write_mp4(folder / "videos" / f"{index}.mp4", to_frames(moving), 8)
        (folder / "labels" / f"{index}.txt").write_text(f"{images[index]['caption']} moving right\n")
    return folder


def clip_words(folder: Path, side: int = 32, num_frames: int = 9) -> tuple[str, ...]:
    """What makes a run read them, to train and to look at."""
    params = f"{{video_size: [{side}, {side}], fps: 8, max_num_frames: {num_frames}, skip_frms_num: 0}}"
    return (
        f"data={{target: data_video.SFTDataset, params: {params}}}",
        f"args.train_data=[{folder}]",
        f"args.valid_data=[{folder}]",
        "model.latent_input=false",
    )


class BlocksOverTime(BlockDCT):
    """A first stage of clips that takes no training: the first frame, then the mean of every four, as BlockDCT has
    images."""

    def latent_shape(self, pixel_shape: Sequence[int]) -> tuple[int, int, int, int]:
        return ((pixel_shape[0] - 1) // 4 + 1, *super().latent_shape((1, *pixel_shape[1:]))[1:])

    def encode(self, pixels: Tensor, noise: Tensor | None = None) -> Tensor:
        first, others = pixels[:, :1], pixels[:, 1:].unflatten(1, (-1, 4)).mean(2) if pixels.shape[1] > 1 else None
        frames = [first] if others is None else [first, *others.split(1, dim=1)]
        return torch.cat([super(BlocksOverTime, self).encode(frame) for frame in frames], dim=1)

    def decode_chunks(self, latents: Tensor) -> Iterator[Tensor]:
        (pixels,) = super().decode_chunks(latents)
        yield torch.cat([pixels[:, :1], pixels[:, 1:].repeat_interleave(4, dim=1)], dim=1)


class MovingShapes(SyntheticImages):
    """A shape of some colour that moves right or left, two pixels a frame, around the edge; the text says which way."""

    def __getitem__(self, index: int) -> dict[str, Any]:
        still = super().__getitem__(index)
        way = "right" if stream_generator(0, "way", index).initial_seed() % 2 else "left"
        pixels = self.moved(still["pixels"], way)
        return {**still, "pixels": pixels, "caption": f"moving {way}", "fps": 8.0, "num_frames": 9}

    @staticmethod
    def moved(image: Tensor, way: str) -> Tensor:
        """Nine frames (9 3 h w) of an image (1 3 h w) that moves."""
        side = 1 if way == "right" else -1
        return torch.cat([image.roll(2 * side * step, dims=-1) for step in range(9)])
