"""Videos that a training run samples as it goes: those that sample_video.py gives from the same weights, bit for bit.

RUN/samples/prompts.txt              a line for each, as sample_video.py reads them (args.input_file)
RUN/samples/image-00000.png          image to video: the first frame of the clip, which the sample continues
RUN/samples/STEP/00000-...mp4        without a VAE: latents (.safetensors)
"""

import copy
import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from sat.cogvideox.engine import VideoDiffusionEngine
from sat.cogvideox.output import file_stem, help_decode, to_frames, write_latents, write_sample
from sat.config import ConfigNode
from sat.data.frames import frames_to_pixels
from sat.data.video import write_png
from sat.errors import ConfigError
from sat.mpu.state import ParallelState
from sat.training.data import ValidationData
from sat.training.preview import clip_fps, clip_sizes

log = logging.getLogger(__name__)

SAMPLES = "samples"
PROMPTS = "prompts.txt"


@dataclass(frozen=True)
class Asked:
    """One sample: what the script would be asked for."""

    index: int
    caption: str
    picture: np.ndarray | None
    """The image that it continues, uint8 (1 h w 3)."""
    is_counted: bool
    """Whether this rank writes it; else it takes part in the others' work alone."""


class ValidationSamples:
    """Samples of the first captions of the validation set; every rank must make the same calls.

    Data-parallel ranks share them; all have equally many forward passes, as ZeRO 3 needs.
    """

    def __init__(
        self,
        config: ConfigNode,
        count: int,
        engine: VideoDiffusionEngine,
        validation: ValidationData,
        parallel: ParallelState,
        seed: int,
        run_dir: Path,
    ) -> None:
        sizes = clip_sizes(config)
        if engine.sampler is None or sizes is None:
            raise ConfigError("args.log_sample is set, and the model section has no sampler_config to sample with")
        self.engine, self.parallel, self.seed = engine, parallel, seed
        self.folder = run_dir / SAMPLES
        self.fps = clip_fps(config)
        self.latent_shape = engine.latent_shape(sizes.latent_frames, sizes.height, sizes.width)
        size = (sizes.height, sizes.width) if engine.image_conditioner is not None else None
        self.asked = [
            Asked(index, " ".join(batch["caption"][0].split()), size and _picture(batch, size), is_counted)
            for index, batch, is_counted in validation.first(count)
        ]
        everyone: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, [one for one in self.asked if one.is_counted])
        if dist.get_rank() == 0:
            self._write_prompts({one.index: one for own in everyone for one in own})

    def write(self, step: int) -> None:
        """Sample with the weights as they are now."""
        started = time.perf_counter()
        was_training = self.engine.model.training
        self.engine.model.eval()
        with _vae_as_in_sampling(self.engine):
            for one in self.asked:
                images = None if one.picture is None else frames_to_pixels(one.picture, one.picture.shape[1:3], 1)[None]
                latents = self.engine.sample([one.caption], [one.index], self.seed, self.latent_shape, images=images)
                if not one.is_counted or self.parallel.rank("tp") > 0:
                    continue
                if self.parallel.rank("cp") == 0:
                    self._write(step, one, latents[0])
                else:
                    help_decode(self.engine, latents[0])
        self.engine.model.train(was_training)
        log.info("sampled step %d in %.1f s", step, time.perf_counter() - started)

    def _write_prompts(self, asked: Mapping[int, Asked]) -> None:
        """What the samples are asked for, in files that sample_video.py reads."""
        self.folder.mkdir(exist_ok=True)
        lines = []
        for index, one in sorted(asked.items()):
            image = self.folder.absolute() / f"image-{index:05d}.png"
            if one.picture is not None:
                write_png(image, one.picture[0])
            lines.append(one.caption if one.picture is None else f"{one.caption}@@{image}")
        (self.folder / PROMPTS).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")

    def _write(self, step: int, one: Asked, latents: Tensor) -> None:
        folder, stem = self.folder / str(step), file_stem(one.index, one.caption, self.seed)
        folder.mkdir(parents=True, exist_ok=True)
        metadata = {"prompt": one.caption, "seed": str(self.seed), "index": str(one.index), "step": str(step)}
        if self.engine.first_stage_model is None:
            write_latents(latents, folder, stem, metadata)
            return
        write_sample(self.engine, latents, folder, stem, self.fps, metadata)


def _picture(batch: Mapping[str, Any], size: tuple[int, int]) -> np.ndarray:
    """The first frame of a batch's one clip, uint8 (1 h w 3), resized and cut to size."""
    images = batch["image"] if "image" in batch else batch.get("pixels")
    if images is None:
        raise ConfigError("args.log_sample is set, and the clips come as latents without the image to continue")
    pixels = frames_to_pixels(to_frames(images[0][:1]), size, 1)
    return to_frames(pixels)


@contextmanager
def _vae_as_in_sampling(engine: VideoDiffusionEngine) -> Iterator[None]:
    """The VAE in the network's precision, where sample_video.py has it so."""
    vae, dtype = engine.first_stage_model, engine.model.dtype
    if vae is None or engine.device.type == "cpu" or dtype == torch.float32:
        yield
        return
    engine.first_stage_model = copy.deepcopy(vae).to(dtype)
    try:
        yield
    finally:
        engine.first_stage_model = vae
