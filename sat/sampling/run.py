"""A sampling run: load a model, sample prompts in batches, write mp4 or png files."""

import logging
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from sat.cogvideox.engine import TrainedParts, VideoDiffusionEngine, build_engine
from sat.cogvideox.output import file_stem, help_decode, write_latents, write_sample
from sat.cogvideox.presets import VideoSizes, describe_weights, video_sizes
from sat.conditioning.text import GeneralConditioner
from sat.config import ConfigNode
from sat.data.frames import size_of_short_side
from sat.diffusion.samplers import Step
from sat.errors import ConfigError, SamplingError
from sat.logs import setup_logging
from sat.mpu.launch import Launch, joined, read_launch
from sat.mpu.recorder import Recorder, recorded
from sat.mpu.state import set_parallel_state
from sat.ops.attention_kernels import attention_kernel
from sat.sampling.args import (
    SampleArgs,
    follows_image,
    sample_args,
    sampling_fps,
    sampling_precision,
    sampling_sizes,
    size_warning,
    takes_image,
)
from sat.sampling.inputs import NOISE_NAME, image_size, read_image, read_latents, read_tensor
from sat.sampling.prompts import Prompt, parse_prompt, read_prompts, typed_prompts
from sat.training.adapters import load_lora
from sat.training.checkpoint import fit_weights, load_parts
from sat.training.fit import check_model
from sat.training.layout import build_parallel_state
from sat.training.resume import open_weights
from sat.training.systems import attention_work
from sat.weights.lora import attach_loras

log = logging.getLogger(__name__)

T = TypeVar("T")

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
LONGEST_WAIT_MINUTES = 24 * 60.0
"""Processes that share no video meet once, at the end, and one that has a video more may be hours behind."""
SHARED_WAIT_MINUTES = 60.0
"""Those that sample a video together meet in every layer; between two videos they wait for the one that decodes."""


def sample(config: ConfigNode, seed: int, prompts: Sequence[str] | None = None) -> list[Path]:
    """Sample the prompts given, or those that the args section names; returns the files this process wrote."""
    with joined(LONGEST_WAIT_MINUTES) as launch:
        setup_logging(launch.rank)
        return sample_joined(config, seed, prompts, launch)


def sample_joined(
    config: ConfigNode, seed: int, prompts: Sequence[str] | None = None, launch: Launch | None = None
) -> list[Path]:
    """The same within a process group that is there already."""
    args, launch = sample_args(config), launch or read_launch()
    with recorded(launch, wait_minutes(args)) as recorder:
        return _sample(config, args, seed, prompts, recorder)


def _sample(
    config: ConfigNode, args: SampleArgs, seed: int, prompts: Sequence[str] | None, recorder: Recorder
) -> list[Path]:
    started, launch = time.perf_counter(), recorder.launch
    typed = prompts is None and args.input_type == "cli"
    if typed and launch.world_size > 1:
        raise ConfigError("prompts cannot be typed in to several processes; use args.input_type=txt")
    with_image = takes_image(config, args)
    found = None if typed else [parse_prompt(line, with_image) for line in prompts or read_prompts(args)]
    run = SamplingRun(config, args, seed, recorder)
    with attention_kernel(args.attention, attention_work(run.engine.network, run.sizes)):
        if found is None:  # a typed prompt waits for no others
            written = run.sample_all((parse_prompt(line, with_image) for line in typed_prompts()), 1)
        else:
            written = run.sample_all(found, args.batch_size)
    dist.barrier()
    if run.engine.reuse is not None:
        log.info("%s", run.engine.reuse.report())
    count, seconds = len(written if found is None else found), time.perf_counter() - started
    log.info("%d %s in %s, %.1f s in all", count, "video" if count == 1 else "videos", run.output_dir, seconds)
    return written


def wait_minutes(args: SampleArgs) -> float:
    """How long a collective of processes that work together may take."""
    shares = args.model_parallel_size * args.context_parallel_size > 1 or args.guidance_parallel
    return SHARED_WAIT_MINUTES if shares else LONGEST_WAIT_MINUTES


class SamplingRun:
    """A loaded model and the sizes to sample at. What can be wrong without the model is checked before it is built."""

    def __init__(self, config: ConfigNode, args: SampleArgs, seed: int, recorder: Recorder) -> None:
        self.args, self.seed, self.recorder = args, seed, recorder
        self.launch = launch = recorder.launch
        self.sizes = sampling_sizes(config, args)
        self.fps = sampling_fps(config, args)
        self.precision = sampling_precision(config, args)
        if args.load is None:
            raise ConfigError("args.load is not set; give a file, an iteration folder or a run directory")
        with ExitStack() as leases:
            self.checkpoint = open_weights(args.load, args.weights, leases)
            guidance, timeout = 1 + args.guidance_parallel, timedelta(minutes=wait_minutes(args))
            self.parallel = build_parallel_state(config, args, launch.device.type, guidance, timeout)
            set_parallel_state(self.parallel)
            self.decodes = self.parallel.rank("guidance") == 0 and self.parallel.rank("tp") == 0
            self.writes = self.decodes and self.parallel.rank("cp") == 0
            self.output_dir = _writable_folder(args.output_dir)
            self.loras = [load_lora(path, args.weights) for path in args.lora or ()]
            self.follows_image = follows_image(config, args)
            self.patch_size = config["model"]["network_config"]["params"].get("patch_size", 1)
            log.info("sampling %s, %g fps", self.sizes, self.fps)
            warning = size_warning(config, self.sizes)
            if warning is not None:
                log.warning("%s", warning)
            self.engine = self._build(config)
        self.latent_shape = self._latent_shape(self.sizes)
        log.info("%s, seed %d, %s on %s", self._sampler_in_words(), seed, self.precision, launch.device.type)
        self._inputs: dict[VideoSizes, tuple[Tensor | None, Tensor | None]] = {}
        if not self.follows_image:  # else each size that comes has its own
            self._inputs_of(self.sizes)

    def _build(self, config: ConfigNode) -> VideoDiffusionEngine:
        section = config["model"]
        may_miss = (lambda name: True) if self.args.force_inference else (lambda name: False)
        check_model(config, self.checkpoint, may_miss)
        needs_vae = takes_image(config, self.args) or not self.args.only_save_latents
        engine = build_engine(section if needs_vae else _without(section, "first_stage_config"))
        if self.args.reuse_threshold is not None:
            engine.reuse_layers(self.args.reuse_threshold)
        parts = TrainedParts(engine)
        own = [parts.own_weights(part) for part in load_parts(self.checkpoint)]
        missing = fit_weights(parts, own, str(self.checkpoint.path), describe_weights, may_miss, self.parallel)
        if missing:
            log.warning("%d weights are not in %s: %s ...", len(missing), self.checkpoint.path, ", ".join(missing[:3]))
        looks = describe_weights({name: value.shape for name, value in own[0].items()})
        log.info(
            "loaded %s (%s%s)", self.checkpoint.weights(), looks, ", averaged" if self.checkpoint.is_average else ""
        )
        if self.loras:
            attach_loras(engine.network, self.loras)
        if self.args.compile:
            engine.network.transformer.compile_layers()
        engine.model.to(PRECISIONS[self.precision])
        if engine.first_stage_model is not None and self.launch.device.type == "cuda":
            engine.first_stage_model.to(PRECISIONS[self.precision])
        if isinstance(engine.conditioner, GeneralConditioner):
            engine.conditioner.remember_prompts()
        return engine.to(self.launch.device).eval()

    def _latent_shape(self, sizes: VideoSizes) -> tuple[int, int, int, int]:
        return self.engine.latent_shape(sizes.latent_frames, sizes.height, sizes.width)

    def sizes_of(self, prompt: Prompt) -> VideoSizes:
        """Sizes of a prompt's video: the run's, or those of the image that it continues."""
        if prompt.image is None or not self.follows_image:
            return self.sizes
        size = size_of_short_side(*image_size(prompt.image), (self.sizes.height, self.sizes.width))
        return video_sizes(self.sizes.num_frames, *size, self.patch_size, self.sizes.text_length)

    def _inputs_of(self, sizes: VideoSizes) -> tuple[Tensor | None, Tensor | None]:
        """The noise (t c h w) and the prefix (f c h w) that the args section names, for videos of some sizes."""
        if sizes not in self._inputs:
            self._inputs[sizes] = self._read_inputs(self._latent_shape(sizes))
        return self._inputs[sizes]

    def _read_inputs(self, latent_shape: Sequence[int]) -> tuple[Tensor | None, Tensor | None]:
        noise = prefix = None
        if self.args.initial_noise is not None:
            shape = self.engine.padded_shape(latent_shape)
            noise = read_tensor(Path(self.args.initial_noise), NOISE_NAME, shape)
        fixed_frames = getattr(self.engine.sampler, "fixed_frames", 0)
        if self.args.prefix is not None:
            own_frames = fixed_frames + latent_shape[0] - self.engine.padded_shape(latent_shape)[0]
            if own_frames < 1:
                raise ConfigError(
                    "args.prefix is set, but the sampler keeps no frames; say how many latent frames (padding among "
                    "them) with model.sampler_config.params.fixed_frames"
                )
            shape = (own_frames, *latent_shape[1:])
            prefix = read_latents(self.engine, Path(self.args.prefix), shape, at_end=True)
        return noise, prefix

    def sample_all(self, prompts: Iterable[Prompt], batch_size: int) -> list[Path]:
        """Sample this process' share of the prompts; each is sampled by one process, or by those that share a model."""
        written: list[Path] = []
        total = f" of {len(prompts)}" if isinstance(prompts, Sequence) else ""
        batches = _batched(prompts, batch_size, self.parallel.rank("dp"), self.parallel.size("dp"))
        for batch in (part for mixed in batches for part in self._by_size(mixed)):
            latents = self._sample_batch([index for index, _ in batch], [prompt for _, prompt in batch], total)
            for (index, prompt), one in zip(batch, latents):
                if self.writes:
                    written.append(self._write(index, prompt, one))
                    log.info("wrote %s", written[-1])
                elif self.decodes and not self.args.only_save_latents:
                    help_decode(self.engine, one)
        return written

    def _by_size(self, batch: Sequence[tuple[int, Prompt]]) -> list[list[tuple[int, Prompt]]]:
        """The prompts of a batch whose videos are of one size."""
        parts: dict[VideoSizes, list[tuple[int, Prompt]]] = {}
        for index, prompt in batch:
            parts.setdefault(self.sizes_of(prompt), []).append((index, prompt))
        return list(parts.values())

    def _sample_batch(self, indices: Sequence[int], prompts: Sequence[Prompt], of_total: str) -> Tensor:
        sizes = self.sizes_of(prompts[0])
        paths = [prompt.image for prompt in prompts if prompt.image is not None]
        images = [read_image(path, (sizes.height, sizes.width)) for path in paths]
        initial_noise, prefix = self._inputs_of(sizes)
        shows_bar = self.launch.is_main and sys.stderr.isatty()
        num_steps = self.engine.sampler.num_steps
        title = f"prompt {indices[0] + 1}" if len(indices) == 1 else f"prompts {indices[0] + 1} .. {indices[-1] + 1}"
        with tqdm(desc=f"{title}{of_total}", total=num_steps, disable=not shows_bar, unit="step", leave=False) as bar:

            def advance(step: Step) -> None:
                self.recorder.step = step.index
                bar.update()

            latents = self.engine.sample(
                [prompt.text for prompt in prompts],
                indices,
                self.seed,
                self._latent_shape(sizes),
                advance,
                initial_noise,
                prefix,
                torch.stack(images) if images else None,
                self.args.lora_scale,
            )
        if not latents.isfinite().all():
            advice = "; models trained in bf16 overflow, use args.bf16=true" if self.precision == "fp16" else ""
            raise SamplingError(f"the latents of {title} are not finite in {self.precision}{advice}")
        return latents

    def _write(self, index: int, prompt: Prompt, latents: Tensor) -> Path:
        """One sample (t c h w) as an mp4, a single frame as a png, or as latents; files appear whole or not at all."""
        stem = file_stem(index, prompt.text, self.seed)
        metadata = self._metadata(index, prompt)
        if self.args.only_save_latents:
            return write_latents(latents, self.output_dir, stem, metadata)
        return write_sample(self.engine, latents, self.output_dir, stem, self.fps, metadata)

    def _metadata(self, index: int, prompt: Prompt) -> dict[str, str]:
        sampler = self.engine.sampler
        scales = self.args.lora_scale or [1.0] * len(self.loras)
        return {
            "prompt": prompt.text,
            "seed": str(self.seed),
            "index": str(index),
            "sampler": type(sampler).__name__,
            "steps": str(sampler.num_steps),
            "guidance": _in_words(sampler.guider),
            "checkpoint": str(self.checkpoint.path),
            "scale_factor": str(self.engine.scale_factor),
            **({"initial noise": self.args.initial_noise} if self.args.initial_noise else {}),
            **({"prefix": self.args.prefix} if self.args.prefix else {}),
            **({"reuse threshold": f"{self.args.reuse_threshold:g}"} if self.args.reuse_threshold else {}),
            **({"image": str(prompt.image)} if prompt.image else {}),
            **{f"lora {lora.source}": f"scale {scale:g}" for lora, scale in zip(self.loras, scales)},
        }

    def _sampler_in_words(self) -> str:
        sampler = self.engine.sampler
        if sampler is None:
            raise ConfigError("the model section has no sampler_config, which sampling needs")
        return f"{type(sampler).__name__} of {sampler.num_steps} steps, {_in_words(sampler.guider)}"


def _in_words(guider: object) -> str:
    """The guider with its numbers: `DynamicCFG(scale=6, exp=5, num_steps=50, schedule=released)`."""
    return f"{type(guider).__name__}({', '.join(f'{name}={value}' for name, value in vars(guider).items())})"


def _batched(prompts: Iterable[T], size: int, rank: int, world_size: int) -> Iterator[list[tuple[int, T]]]:
    """(number, prompt) of every world_size-th prompt from rank on, in batches."""
    batch: list[tuple[int, T]] = []
    for index, prompt in enumerate(prompts):
        if index % world_size != rank:
            continue
        batch.append((index, prompt))
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def _writable_folder(path: str) -> Path:
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ConfigError(
            f"cannot write to args.output_dir {path}: {error.strerror or error}; give a folder that can be written"
        ) from error
    return folder


def _without(node: ConfigNode, key: str) -> ConfigNode:
    copy = ConfigNode(node.path)
    copy.update({name: value for name, value in node.items() if name != key})
    copy.origins.update(node.origins)
    return copy
