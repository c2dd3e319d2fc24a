"""What the training loop trains: the video model or the VAE, behind one small interface."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from sat.cogvideox.engine import TEXT_PREFIX, TrainedParts, VideoDiffusionEngine, build_engine
from sat.cogvideox.flops import Clip, TransformerFlops
from sat.cogvideox.presets import VideoSizes, describe_weights
from sat.conditioning.text import FrozenT5Embedder, check_t5_folder
from sat.config import ConfigNode, instantiate_from_config, target_of, warn_once
from sat.errors import ConfigError
from sat.model.activations import Activations
from sat.mpu.random import sample_normal
from sat.ops.attention_kernels import AttentionWork
from sat.training.args import TrainArgs
from sat.training.optim import freeze
from sat.training.preview import model_parts, params_of, text_encoders
from sat.training.timestep_bins import NUM_BINS
from sat.vae.autoencoder import VideoAutoencoder
from sat.vae.checkpoint import find_vae_file

VALIDATION_TIMESTEPS = (100, 300, 500, 700, 900)


class TrainingSystem(Protocol):
    """A model with its loss.

    `trained` is handed to the optimizer; its forward(inputs) gives per-sample values (b,), `loss` among them.
    """

    @property
    def trained(self) -> nn.Module:
        """What the optimizer trains."""

    @property
    def value_names(self) -> tuple[str, ...]:
        """The values that its forward gives, for the metrics."""

    def to(self, device: torch.device) -> None:
        """Move everything to a device."""

    def training_inputs(self, batch: Mapping[str, Any], seed: int, global_batch_size: int) -> Any:
        """What the loss of a batch depends on, drawn from the samples' own streams."""

    def validation_cases(self) -> list[str]:
        """Names of the fixed conditions under which validation measures the loss."""

    def validation_inputs(self, batch: Mapping[str, Any], case: str, seed: int) -> Any:
        """The same for one of them."""

    @property
    def timestep_bins(self) -> tuple[int, int] | None:
        """Timesteps and the number of bins by which the loss is told; None where there are no timesteps."""

    def token_counts(self, inputs: Any) -> list[int]:
        """Tokens of each sample."""

    def train_flops(self, inputs: Any) -> float:
        """Operations of forward and backward of a batch, without recomputation."""

    def recomputed_flops(self, inputs: Any) -> float:
        """What backward computes a second time."""

    def describe(self, shapes: Mapping[str, Any]) -> str:
        """What a state dict of these names and shapes looks like, in words."""

    def may_miss(self, name: str) -> bool:
        """Whether a finetuning run may start without this weight."""

    def rename(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """A checkpoint's weights under the names of `trained`, without those of parts that are not trained."""

    def sizes(self) -> dict[str, Any]:
        """What model_config.json says."""


class DiffusionSystem:
    """The video model: loss of v at a random timestep."""

    value_names = ("loss",)

    def __init__(self, engine: VideoDiffusionEngine, timesteps: Sequence[int] = VALIDATION_TIMESTEPS) -> None:
        self.engine = engine
        freeze(engine, engine.not_trainable_prefixes)
        self.trained = TrainedParts(engine)
        self.timesteps = timesteps
        self.flops = TransformerFlops(engine.network)

    def to(self, device: torch.device) -> None:
        self.engine.to(device)

    def training_inputs(self, batch: Mapping[str, Any], seed: int, global_batch_size: int) -> Any:
        return self.engine.training_inputs(batch, seed, global_batch_size)

    def validation_cases(self) -> list[str]:
        return [str(timestep) for timestep in self.timesteps]

    def validation_inputs(self, batch: Mapping[str, Any], case: str, seed: int) -> Any:
        return self.engine.validation_inputs(batch, int(case), seed)

    @property
    def timestep_bins(self) -> tuple[int, int] | None:
        sampling = self.engine.timestep_sampling
        return sampling.num_idx, sampling.group_num if sampling.uniform_sampling and sampling.group_num else NUM_BINS

    def _clips(self, inputs: Any) -> list[Clip]:
        """Tokens of each sample."""
        o, p, q = self.engine.network.patch_size
        states = inputs.cond.get("crossattn")
        text_length = self.engine.conditioner.text_length if states is None else states.shape[1]
        sizes = [(clip.shape[0], clip.shape[2], clip.shape[3]) for clip in inputs.latents]
        return [Clip(text_length, (t // o) * (h // p) * (w // q)) for t, h, w in sizes]

    def token_counts(self, inputs: Any) -> list[int]:
        return [clip.length for clip in self._clips(inputs)]

    def train_flops(self, inputs: Any) -> float:
        return self.flops.training(self._clips(inputs), is_packed=not isinstance(inputs.latents, Tensor)).total

    def recomputed_flops(self, inputs: Any) -> float:
        transformer = self.engine.network.transformer
        clips = self._clips(inputs)
        whole = self.flops.recomputed(clips, transformer.layers_that_keep("inputs", "attention"))
        return whole.total - self.flops.recomputed(clips, transformer.layers_that_keep("attention")).attention

    def describe(self, shapes: Mapping[str, Any]) -> str:
        return describe_weights(shapes)

    @staticmethod
    def may_miss(name: str) -> bool:
        # A text encoder that the file lacks has the weights of its own folder.
        return name.startswith(TEXT_PREFIX) or any(
            part in name for part in ("mixins.", "cross_attention", "matrix_A", "matrix_B")
        )

    def rename(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        return self.trained.own_weights(weights)

    def sizes(self) -> dict[str, Any]:
        network = self.engine.network
        return {
            "model_class": type(network).__name__,
            "num_layers": len(network.transformer.layers),
            "hidden_size": network.hidden_size,
            "num_attention_heads": network.transformer.num_attention_heads,
            "patch_size": list(network.patch_size),
            "in_channels": network.in_channels,
            "out_channels": network.out_channels,
            "layernorm_order": network.transformer.layernorm_order,
            "model_parallel_size": 1,
        }


@dataclass(frozen=True)
class ReconstructionInputs:
    """Clips and the noise that draws their latents."""

    pixels: Tensor
    """(b t 3 h w) in [-1, 1]."""
    noise: Tensor
    """Standard normal, like the latents."""


class _TrainedAutoencoder(nn.Module):
    """Encoder and decoder under the released names; the forward is the loss."""

    def __init__(self, vae: VideoAutoencoder) -> None:
        super().__init__()
        self.encoder, self.decoder = vae.encoder, vae.decoder
        # Past Module.__setattr__: the VAE owns the two, not the other way round.
        object.__setattr__(self, "vae", vae)

    def forward(self, inputs: ReconstructionInputs) -> dict[str, Tensor]:
        vae: VideoAutoencoder = self.vae  # type: ignore[assignment]
        reconstruction, posterior = vae(inputs.pixels, inputs.noise)
        return vae.loss(inputs.pixels, reconstruction, posterior)  # type: ignore[misc]


def _copy_to_meta(module: nn.Module) -> nn.Module:
    """A copy without numbers, for counting operations: what is trained may be partitioned, and clips shared."""
    empty = {id(value): nn.Parameter(torch.empty_like(value, device="meta")) for value in module.parameters()}
    return copy.deepcopy(module, empty)


class AutoencoderSystem:
    """The VAE: reconstruction and KL."""

    value_names = ("loss", "l1", "l2", "kl", "psnr")
    timestep_bins = None

    def __init__(self, vae: VideoAutoencoder) -> None:
        if vae.loss is None or isinstance(vae.loss, nn.Identity):
            raise ConfigError(
                "model.params has no loss_config to train the VAE with; give sat.vae.losses.ReconstructionLoss"
            )
        self.vae = vae
        self.trained = _TrainedAutoencoder(vae)
        self._halves_on_meta = [_copy_to_meta(half) for half in (vae.encoder, vae.decoder)]
        self._flops: dict[tuple[int, ...], float] = {}

    def to(self, device: torch.device) -> None:
        self.vae.to(device)

    def training_inputs(self, batch: Mapping[str, Any], seed: int, global_batch_size: int) -> ReconstructionInputs:
        return self._inputs(batch, seed, "posterior")

    def validation_cases(self) -> list[str]:
        return ["clip"]

    def validation_inputs(self, batch: Mapping[str, Any], case: str, seed: int) -> ReconstructionInputs:
        return self._inputs(batch, seed, "valid posterior")

    def _inputs(self, batch: Mapping[str, Any], seed: int, stream: str) -> ReconstructionInputs:
        weight = next(self.trained.parameters())
        pixels = batch["pixels"].to(weight.device)
        noise = sample_normal(seed, stream, batch["counters"].tolist(), self.vae.latent_shape(pixels.shape[1:]))
        return ReconstructionInputs(pixels, noise.to(weight.device, weight.dtype))

    def token_counts(self, inputs: ReconstructionInputs) -> list[int]:
        b, t, _, h, w = inputs.noise.shape
        return [t * h * w] * b

    def train_flops(self, inputs: ReconstructionInputs) -> float:
        """Three forward passes of whole clips, as torch counts one for each new shape without computing it."""
        shape = tuple(inputs.pixels.shape)
        if shape not in self._flops:
            with FlopCounterMode(display=False) as counter:
                for half, video in zip(self._halves_on_meta, (inputs.pixels, inputs.noise)):
                    half(video.to("meta").transpose(1, 2))
            self._flops[shape] = 3.0 * counter.get_total_flops()
        return self._flops[shape]

    def recomputed_flops(self, inputs: ReconstructionInputs) -> float:
        return 0.0

    def describe(self, shapes: Mapping[str, Any]) -> str:
        return describe_weights(shapes)

    def may_miss(self, name: str) -> bool:
        return False

    def rename(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        own = {name.removeprefix("first_stage_model."): value for name, value in weights.items()}
        return {name: value for name, value in own.items() if name.startswith(("encoder.", "decoder."))}

    def sizes(self) -> dict[str, Any]:
        return {
            "model_class": type(self.vae).__name__,
            "z_channels": self.vae.encoder.z_channels,
            "temporal_factor": self.vae.temporal_factor,
            "spatial_factor": self.vae.spatial_factor,
        }


def check_files(config: ConfigNode) -> None:
    """Raise CheckpointError where the T5 folder or the VAE's weights are not there, before anything large is built."""
    model = model_parts(config)
    for entry in text_encoders(model):
        folder = (entry.get("params") or {}).get("model_dir")
        if folder is not None and target_of(entry) is FrozenT5Embedder:
            check_t5_folder(Path(folder))
    weights = params_of(model, "first_stage_config").get("ckpt_path")
    if weights is not None:
        find_vae_file(Path(weights))
    elif "encoder_config" in params_of(model, "first_stage_config"):
        warn_once(
            "model.first_stage_config has no ckpt_path: the VAE's weights are random and not saved with the run, so "
            "nothing can decode what is trained on its latents; give the weights of a VAE"
        )


def attention_work(network: Any, sizes: VideoSizes) -> AttentionWork:
    """What attention a network does on clips of that size, in the precision and on the device that it has."""
    parameter = next(network.transformer.layers.parameters())
    attention = network.transformer.layers[0].attention
    return AttentionWork(
        attention.num_attention_heads_per_partition,
        sizes.text_length + sizes.video_tokens,
        attention.hidden_size_per_attention_head,
        parameter.dtype,
        parameter.device,
    )


def build_system(config: ConfigNode, args: TrainArgs) -> TrainingSystem:
    """What the `model:` section describes: the video model, or what its `target` names.

    A target may be the VAE, or a user's own class that is a TrainingSystem.
    """
    activations = None if args.activations is None else Activations.parse(args.activations)
    if "target" in config["model"]:
        built = instantiate_from_config(config["model"])
        if isinstance(built, VideoAutoencoder):
            return AutoencoderSystem(built)
        if not isinstance(built, VideoDiffusionEngine):
            return built
        engine = built
    else:
        engine = build_engine(config["model"])
    transformer = engine.network.transformer
    if args.checkpoint_activations is not None:
        transformer.checkpoint_activations = args.checkpoint_activations
    if args.checkpoint_num_layers is not None:
        transformer.checkpoint_num_layers = args.checkpoint_num_layers
    if activations is not None:
        transformer.activations = activations
    if args.compile:
        transformer.compile_layers()
    return DiffusionSystem(engine, args.eval_timesteps or VALIDATION_TIMESTEPS)
