"""One micro batch forward and backward on the first rank of a layout, run without numbers.

Networks of one and of two layers are run; what is counted grows by the same with each further layer.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sat.cogvideox.engine import TrainedParts, TrainingInputs, VideoDiffusionEngine, build_engine
from sat.cogvideox.padding import num_padding
from sat.cogvideox.presets import VideoSizes
from sat.config import ConfigNode, instantiate_from_config
from sat.mpu.gradients import sum_partial_gradients
from sat.mpu.state import ParallelState, choose_ulysses, get_parallel_state, set_parallel_state
from sat.mpu.traffic import count_traffic
from sat.training.optim import freeze
from sat.training.planning.dry import NOTHING, Counted, dry_run
from sat.training.preview import model_parts, params_of


@dataclass(frozen=True)
class Pass:
    """What forward and backward of a micro batch take on a rank: bytes, numbers, and see `Counted`."""

    trained: int
    """Parameters of this rank that are trained,"""
    frozen: int
    """and that are not."""
    largest: int
    """Numbers of the largest parameter that is trained."""
    inputs: int
    """Bytes of latents, noise and text states."""
    activations: int
    """At most, gradients of weights left out;"""
    last_activations: int
    """and in the last layer's backward, when those of all others are gone."""
    forward: Counted
    backward: Counted

    def deeper(self, other: "Pass", num_layers: int) -> "Pass":
        """The pass of a network of so many layers, from those of one and of two (`other`)."""

        def grow(one: Any, two: Any) -> Any:
            return one + (two - one) * (num_layers - 1)

        return Pass(
            trained=grow(self.trained, other.trained),
            frozen=grow(self.frozen, other.frozen),
            largest=self.largest,
            inputs=self.inputs,
            activations=grow(self.activations, other.activations),
            last_activations=self.activations,
            forward=grow(self.forward, other.forward),
            backward=grow(self.backward, other.backward),
        )


@dataclass(frozen=True)
class Work:
    """What a micro batch is made of, the same in every layout."""

    model: ConfigNode
    clip: VideoSizes
    text_width: int
    samples: int
    dtype: torch.dtype
    is_packed: bool = False
    """The samples lie in one row."""
    rows: int = 1
    """What the global batch counts: samples, or rows of them."""

    @property
    def network(self) -> Any:
        """The network's parameters in the configuration."""
        return params_of(model_parts({"model": self.model}), "network_config")

    @property
    def num_layers(self) -> int:
        """Layers of the whole network."""
        return self.network["num_layers"]


@contextmanager
def pretend_ranks(world: int) -> Iterator[None]:
    """Within the block this process is the first of `world`, and its collectives carry nothing."""
    if world == 1:
        yield
        return
    from torch.testing._internal.distributed.fake_pg import FakeStore

    before = get_parallel_state()
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world)
    try:
        yield
    finally:
        dist.destroy_process_group()
        set_parallel_state(before)


def pretend_layout(work: Work, tp: int, cp: int, mode: Any = "auto") -> ParallelState:
    """The first rank's place in a layout; see `pretend_ranks`."""
    ulysses = choose_ulysses(mode, cp, -(-work.network["num_attention_heads"] // tp))
    return ParallelState.build(tp, cp, "cpu", ulysses, sequence_parallel=tp > 1)


def run_pass(work: Work, parallel: ParallelState, recompute: bool) -> Pass:
    """Forward and backward of the whole network."""
    one, two = (_run(work, parallel, recompute, depth) for depth in (1, 2))
    return one.deeper(two, work.num_layers)


def _run(work: Work, parallel: ParallelState, recompute: bool, depth: int) -> Pass:
    set_parallel_state(parallel)
    with torch.device("meta"):
        parts = _build(work, depth, recompute)
    sum_partial_gradients(parts, parallel)
    trained = [parameter for parameter in parts.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.register_post_accumulate_grad_hook(_drop_gradient)
    with count_traffic() as traffic, dry_run() as watch:
        inputs = _inputs(work, parts.engine)  # type: ignore[arg-type]
        held = watch.alive
        loss = parts(inputs)["loss"].mean()
        forward = replace(watch.counted, sent_bytes=traffic.sent_bytes)
        loss.backward()
        both = replace(watch.counted, sent_bytes=traffic.sent_bytes)
    return Pass(
        trained=sum(parameter.numel() for parameter in trained),
        frozen=sum(value.numel() for value in parts.parameters() if not value.requires_grad),
        largest=max((parameter.numel() for parameter in trained), default=0),
        inputs=held,
        activations=watch.peak - held,
        last_activations=watch.peak - held,
        forward=forward,
        backward=both - forward,
    )


def _drop_gradient(parameter: Tensor) -> None:
    parameter.grad = None


def _build(work: Work, depth: int, recompute: bool) -> TrainedParts:
    model = copy.deepcopy(work.model)
    network = params_of(model_parts({"model": model}), "network_config")
    network["num_layers"] = depth  # type: ignore[index]
    engine = build_engine(model, with_encoders=False).to(work.dtype)
    transformer = engine.network.transformer
    transformer.checkpoint_activations = recompute
    transformer.checkpoint_num_layers, transformer.checkpoint_skip_layers = 1, 0
    freeze(engine, engine.not_trainable_prefixes)
    return TrainedParts(engine.train())


def _inputs(work: Work, engine: VideoDiffusionEngine) -> TrainingInputs:
    clip, network = work.clip, engine.network
    frames = clip.latent_frames + num_padding(clip.latent_frames, engine.patch_frames)
    shape = (frames, network.out_channels, clip.latent_height, clip.latent_width)
    cond = {"crossattn": torch.empty(work.samples, clip.text_length, work.text_width, dtype=work.dtype)}
    if network.in_channels == 2 * network.out_channels:
        cond["concat"] = torch.empty(work.samples, *shape)
    if network.vector_width is not None:
        cond["vector"] = torch.empty(work.samples, network.vector_width)

    def clips() -> Any:
        batch = torch.empty(work.samples, *shape)
        return [clip.clone() for clip in batch] if work.is_packed else batch

    latents = clips()
    return TrainingInputs(
        latents=latents,
        timesteps=torch.empty(work.samples, dtype=torch.int64),
        noise=clips(),
        cond=cond,
        more={"ofs": torch.empty(1)} if network.ofs_embed_dim is not None else {},
    )


@dataclass(frozen=True)
class Encoders:
    """What stands beside the network and is not trained."""

    vae_bytes: int = 0
    text_bytes: int = 0
    encoding_bytes: int = 0
    """What encoding one clip adds at its peak."""
    encoding: Counted = NOTHING
    """What encoding one clip takes."""


T5_XXL_BYTES = 9_524_621_312
"""4,762,310,656 parameters of the released text encoder, two bytes each."""


def run_encoders(work: Work) -> Encoders:
    """Weights of the encoders that the configuration has, and what encoding a clip takes."""
    parts = model_parts({"model": work.model})
    text_bytes = T5_XXL_BYTES if _is_t5_xxl(parts, work.text_width) else 0
    first_stage = parts.get("first_stage_config")
    if first_stage is None or "encoder_config" not in params_of(parts, "first_stage_config"):
        return Encoders(text_bytes=text_bytes)
    config = copy.deepcopy(first_stage)
    config["params"].pop("ckpt_path", None)
    with torch.device("meta"):
        vae: nn.Module = instantiate_from_config(config).requires_grad_(False)
    vae_bytes = sum(parameter.numel() * parameter.element_size() for parameter in vae.parameters())
    clip = work.clip
    with dry_run() as watch, torch.no_grad():
        pixels = torch.empty(1, clip.num_frames, 3, clip.height, clip.width)
        held = watch.alive
        vae.encode(pixels)  # type: ignore[operator]
    return Encoders(vae_bytes, text_bytes, watch.peak - held, watch.counted)


def _is_t5_xxl(parts: Any, text_width: int) -> bool:
    entries = params_of(parts, "conditioner_config").get("emb_models") or []
    return text_width == 4096 and any("model_dir" in (entry.get("params") or {}) for entry in entries)
