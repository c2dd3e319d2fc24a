"""One micro batch forward and backward on the first rank of a layout, run without numbers.

A short network is run that has a layer of each way to keep activations, and cut where its layers begin and end. Of the
pieces follows the pass of a network of any depth, whatever its layers keep.
"""

import copy
from collections.abc import Iterator, Mapping, Sequence
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
from sat.model.activations import Activations, Kept
from sat.mpu.gradients import sum_partial_gradients
from sat.mpu.state import ParallelState, choose_ulysses, get_parallel_state, set_parallel_state
from sat.mpu.traffic import Traffic, count_traffic
from sat.training.optim import freeze
from sat.training.planning.dry import NOTHING, Counted, Watch, dry_run
from sat.training.preview import model_parts, params_of

ORDER: tuple[Kept, ...] = ("all", "host", "inputs", "attention", "all")
"""What the layers of the short network keep. The first one is not like the others where what is before it is not
trained; the last one keeps its input, which the network holds until the layer has returned."""


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
    """and in the first layer's backward, when those of all others are gone."""
    forward: Counted
    backward: Counted


@dataclass(frozen=True)
class Layer:
    """What a layer, or a group of layers, takes that keeps a certain part of its activations."""

    held: int
    """Bytes between its forward and its backward;"""
    peak: int
    """and at most within them, each over what was there before its forward."""
    forward: Counted
    backward: Counted


@dataclass(frozen=True)
class Weights:
    """Numbers of parameters."""

    trained: int
    frozen: int
    largest: int
    """Of those that are trained."""


@dataclass(frozen=True)
class Pieces:
    """Forward and backward of a micro batch on a rank, taken apart."""

    layers: Mapping[Kept, Layer]
    outside: tuple[Counted, Counted]
    """What is done outside the layers, forward and backward."""
    inputs: int
    base: int
    """Bytes beside the inputs when the first layer begins;"""
    outer: int
    """at most before that and after the first layer's backward;"""
    top: int
    """and at most between the last layer's forward and its backward, over what was there at its end."""
    weights: Weights
    """Of a network without layers,"""
    layer_weights: Weights
    """and of a layer."""

    def whole(self, groups: Sequence[tuple[Sequence[int], Kept]]) -> Pass:
        """The pass of a network of such groups of layers, see `Activations.groups`."""
        alive, peak = self.base, self.outer
        forward, backward = self.outside
        num_layers = 0
        for numbers, kept in groups:
            group = self._group(kept, len(numbers))
            peak = max(peak, alive + group.peak)
            alive += group.held
            forward, backward = forward + group.forward, backward + group.backward
            num_layers += len(numbers)
        numbers, kept = groups[0]
        return Pass(
            trained=self.weights.trained + num_layers * self.layer_weights.trained,
            frozen=self.weights.frozen + num_layers * self.layer_weights.frozen,
            largest=max(self.weights.largest, self.layer_weights.largest),
            inputs=self.inputs,
            activations=max(peak, alive + self.top),
            last_activations=max(self.outer, self.base + self._group(kept, len(numbers)).peak),
            forward=forward,
            backward=backward,
        )

    def _group(self, kept: Kept, size: int) -> Layer:
        """Some layers with one kept input: in backward all are computed again, and then all is there."""
        one, whole, more = self.layers[kept], self.layers["all"], size - 1
        recomputes = kept in ("inputs", "attention")
        return Layer(
            held=one.held + more * (one.held - (self.layers["inputs"].held if recomputes else 0)),
            peak=one.peak + more * (whole.held if recomputes else one.held),
            forward=one.forward * size,
            backward=one.backward * size,
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
    group_size: int = 1
    """Layers with one kept input, where they recompute;"""
    skipped: int = 0
    """and layers at the end that do not."""

    @property
    def network(self) -> Any:
        """The network's parameters in the configuration."""
        return params_of(model_parts({"model": self.model}), "network_config")

    @property
    def num_layers(self) -> int:
        """Layers of the whole network."""
        return self.network["num_layers"]

    def groups(self, choice: str) -> list[tuple[tuple[int, ...], Kept]]:
        """The whole network's layers and what they keep, where `args.activations` is that."""
        return Activations.parse(choice).groups(self.num_layers, self.group_size, self.skipped)


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


@dataclass(frozen=True)
class _OneOfEach(Activations):
    """A layer of each way to keep activations."""

    def groups(self, num_layers: int, group_size: int = 1, skipped: int = 0) -> list[tuple[tuple[int, ...], Kept]]:
        return [((index,), kept) for index, kept in enumerate(ORDER)]


def take_apart(work: Work, parallel: ParallelState) -> Pieces:
    """Run the short network, and take its pass apart."""
    num_layers = len(ORDER)
    parts = run_parts(work, parallel, num_layers, _OneOfEach())
    before, loss, after = parts[0], parts[num_layers + 1 : num_layers + 3], parts[-1]
    ahead, back = parts[1 : num_layers + 1], parts[num_layers + 3 : -1][::-1]
    layers = {
        kept: Layer(
            held=own.end - own.start,
            peak=max(own.peak, again.peak) - own.start,
            forward=own.counted,
            backward=again.counted,
        )
        for kept, own, again in zip(ORDER[1:], ahead[1:], back[1:])
    }
    # What the first layer does otherwise than one further on that keeps all is counted with what is outside.
    forward = before.counted + ahead[0].counted + loss[0].counted + layers["all"].forward * -1
    backward = loss[1].counted + back[0].counted + after.counted + layers["all"].backward * -1
    weights, fewer = (_weights(_build(work, parallel, depth)) for depth in (num_layers, num_layers - 1))
    layer = Weights(weights.trained - fewer.trained, weights.frozen - fewer.frozen, weights.largest)
    return Pieces(
        layers=layers,
        outside=(forward, backward),
        inputs=before.start,
        base=before.end - before.start,
        outer=max(before.peak, after.peak) - before.start,
        top=max(one.peak for one in loss) - loss[0].start,
        weights=Weights(
            weights.trained - num_layers * layer.trained, weights.frozen - num_layers * layer.frozen, weights.largest
        ),
        layer_weights=layer,
    )


@dataclass(frozen=True)
class Part:
    """A stretch of a pass."""

    start: int
    """Bytes at its start,"""
    peak: int
    """at most,"""
    end: int
    """and at its end."""
    counted: Counted


class _Cutter:
    """Cuts a pass where layers begin and end, forward and backward, and where `cut` is called.

    The end of a layer's backward is where the gradient of its input is complete.
    """

    def __init__(self, layers: nn.ModuleList, watch: Watch, traffic: Traffic) -> None:
        self.parts: list[Part] = []
        self.is_forward = True
        self._watch, self._traffic = watch, traffic
        self._start, self._before = 0, NOTHING
        for layer in layers:
            layer.register_forward_pre_hook(lambda layer, inputs: self._between(inputs[0]))
        layers[-1].register_forward_hook(lambda layer, inputs, output: self._between(output))

    def start(self) -> None:
        """Begin the first part here."""
        self._watch.forget_peak()
        self._start, self._before = self._watch.alive, self._counted()

    def cut(self) -> None:
        """End a part here."""
        now = self._counted()
        self.parts.append(Part(self._start, self._watch.peak, self._watch.alive, now - self._before))
        self.start()

    def _between(self, hidden: Tensor) -> None:
        if self.is_forward:  # recomputation comes by here again
            self.cut()
            if hidden.requires_grad:
                hidden.register_hook(lambda gradient: self.cut())

    def _counted(self) -> Counted:
        return replace(self._watch.counted, sent_bytes=self._traffic.sent_bytes)


def run_parts(work: Work, parallel: ParallelState, num_layers: int, activations: Activations) -> list[Part]:
    """Run a network of so many layers: before them; each one; the loss; its backward; each one's, the last one's first;
    after them. What the inputs need is there at the start."""
    parts = _build(work, parallel, num_layers)
    transformer: Any = parts.engine.network.transformer  # type: ignore[union-attr]
    transformer.activations = activations
    transformer.checkpoint_num_layers, transformer.checkpoint_skip_layers = work.group_size, work.skipped
    sum_partial_gradients(parts, parallel)
    for parameter in parts.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(_drop_gradient)
    with count_traffic() as traffic, dry_run() as watch:
        cutter = _Cutter(transformer.layers, watch, traffic)
        inputs = _inputs(work, parts.engine)  # type: ignore[arg-type]
        cutter.start()
        loss = parts(inputs)["loss"].mean()
        cutter.cut()
        cutter.is_forward = False
        loss.backward()
        cutter.cut()
        if len(cutter.parts) < 2 * num_layers + 4:  # nothing before the layers is trained, and nothing happens there
            cutter.cut()
    return cutter.parts


def _drop_gradient(parameter: Tensor) -> None:
    parameter.grad = None


def _build(work: Work, parallel: ParallelState, num_layers: int) -> TrainedParts:
    set_parallel_state(parallel)
    model = copy.deepcopy(work.model)
    network = params_of(model_parts({"model": model}), "network_config")
    network["num_layers"] = num_layers  # type: ignore[index]
    for key in ("checkpoint_num_layers", "checkpoint_skip_layers"):  # they may need more layers
        (network.get("transformer_args") or {}).pop(key, None)
    with torch.device("meta"):
        engine = build_engine(model, with_encoders=False).to(work.dtype)
    freeze(engine, engine.not_trainable_prefixes)
    return TrainedParts(engine.train())


def _weights(parts: TrainedParts) -> Weights:
    trained = [parameter.numel() for parameter in parts.parameters() if parameter.requires_grad]
    frozen = sum(parameter.numel() for parameter in parts.parameters() if not parameter.requires_grad)
    return Weights(sum(trained), frozen, max(trained, default=0))


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
