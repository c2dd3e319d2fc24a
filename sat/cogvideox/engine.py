"""The video model with everything around it: text encoder, VAE, denoiser, loss, sampler.

Letters: b batch, t c h w latent frames, channels, rows, columns; n text tokens, x width of the text states.
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sat.cogvideox.padding import drop_front, num_padding, pad_front
from sat.cogvideox.presets import SPACE_FACTOR
from sat.cogvideox.reuse import LayerReuse
from sat.conditioning.image import ImageConditioner, ImageScaling, released_image_scaling
from sat.conditioning.size import sizes_of
from sat.config import ConfigNode, instantiate_from_config
from sat.diffusion.inversion import ddim_invert
from sat.diffusion.loss import VideoDiffusionLoss
from sat.diffusion.samplers import Sampler, Step, VideoDDIMSampler
from sat.diffusion.scaling import Clips, DiscreteDenoiser
from sat.diffusion.schedules import DiscreteSampling, StepPlaces
from sat.errors import ConfigError
from sat.mpu.guidance import GuidanceSplit
from sat.mpu.random import sample_normal, sample_uniform
from sat.vae.chunks import plan_decode
from sat.vae.posterior import DiagonalGaussian

log = logging.getLogger(__name__)

OFS_VALUE = 2.0
"""What the released image-to-video 1.5 model is given as its second scalar condition."""

ENCODERS = ("conditioner_config", "first_stage_config")
"""Parts of the model section that need files of their own."""

NETWORK_PREFIX, VAE_PREFIX, TEXT_PREFIX = "model.diffusion_model.", "first_stage_model.", "conditioner."
"""What the names of each part's weights begin with in released files."""


@dataclass(frozen=True)
class TrainingInputs:
    """All that the loss of some samples depends on besides the trained weights."""

    latents: Clips
    """Scaled latents (b t c h w), or a list of (t c h w) that are packed into one row, float32; in whole patches."""
    timesteps: Tensor
    """(b,) int64."""
    noise: Clips
    """Standard normal, like the latents."""
    cond: dict[str, Any]
    """What the network is conditioned on; without the text where its encoder is trained."""
    captions: Sequence[str] = ()
    text_drop: Tensor | None = None
    """A number in [0, 1) for each sample: its text is dropped below the encoder's rate."""
    sizes: Mapping[str, Tensor] = field(default_factory=dict)
    """What a conditioner may read of the images' sizes, see `sizes_of`."""
    offset_noise: Tensor | None = None
    more: dict[str, Tensor] = field(default_factory=dict)
    """Further inputs of the network, by name."""


class NetworkWrapper(nn.Module):
    """Brings inputs to the network's precision and a condition's entries to its arguments."""

    def __init__(self, diffusion_model: nn.Module) -> None:
        super().__init__()
        self.diffusion_model = diffusion_model

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the weights."""
        return next(self.diffusion_model.parameters()).dtype

    def forward(self, noisy: Clips, timesteps: Tensor, cond: Mapping[str, Any], **more: Tensor) -> Any:
        """v for noisy (b t c h w) or a list of (t c h w), timesteps (b,), cond with crossattn (b n x), and optionally
        concat and vector."""
        dtype = self.dtype
        vector = cond.get("vector")
        return self.diffusion_model(
            noisy.to(dtype) if isinstance(noisy, Tensor) else [clip.to(dtype) for clip in noisy],
            timesteps,
            cond["crossattn"].to(dtype),
            y=None if vector is None else vector.to(dtype),
            concat_images=cond.get("concat"),
            **more,
        )


class VideoDiffusionEngine(nn.Module):
    """Network, denoiser, loss, sampler, and the encoders that feed them.

    scale_factor: latents are multiplied by it before diffusion. latent_input: clips arrive as latents.
    not_trainable_prefixes: names that are frozen (`all`: everything but adapters). The conditioner is trained only
    where its entries say is_trainable, the VAE never. noised_image_input: the network continues an image, whose latents
    are appended to its input's channels; in training the image gets some noise, with probability noised_image_dropout
    it is left out, and with noised_image_all_concat it stands at every frame. image_scaling: how its latents are
    scaled, see `scale_image_latents`; by default as the released weights take them.
    """

    def __init__(
        self,
        network: nn.Module,
        denoiser: DiscreteDenoiser,
        loss_fn: VideoDiffusionLoss | None = None,
        sampler: Any = None,
        conditioner: nn.Module | None = None,
        first_stage: nn.Module | None = None,
        scale_factor: float = 1.0,
        latent_input: bool = False,
        not_trainable_prefixes: Sequence[str] = ("first_stage_model",),
        en_and_decode_n_samples_a_time: int | None = None,
        noised_image_input: bool = False,
        noised_image_dropout: float = 0.0,
        noised_image_all_concat: bool = False,
        image_scaling: ImageScaling | None = None,
    ) -> None:
        super().__init__()
        self.model = NetworkWrapper(network)
        self.conditioner: Any = conditioner
        self.first_stage_model: Any = first_stage
        self.denoiser = denoiser
        self.loss_fn = loss_fn
        self.sampler = sampler
        self.reuse: LayerReuse | None = None
        self.scale_factor = scale_factor
        self.latent_input = latent_input
        self.not_trainable_prefixes = tuple(not_trainable_prefixes)
        self.en_and_decode_n_samples_a_time = en_and_decode_n_samples_a_time
        self.image_conditioner: ImageConditioner | None = None
        if noised_image_input:
            self.image_conditioner = ImageConditioner(
                scale_factor=scale_factor,
                scaling=image_scaling or released_image_scaling(self.patch_frames),
                drop_rate=noised_image_dropout,
                everywhere=noised_image_all_concat,
            )
        self.samples_posterior = getattr(getattr(first_stage, "regularizer", None), "samples", True)
        if first_stage is not None:
            first_stage.requires_grad_(False).eval()
        self._check_widths()

    def _check_widths(self) -> None:
        patch_embed = self.network.get_mixin("patch_embed")
        expected = getattr(getattr(patch_embed, "text_proj", None), "in_features", None)
        width = getattr(self.conditioner, "width", None)
        if expected is not None and width is not None and expected != width:
            raise ConfigError(
                f"the text encoder gives states of width {width}, patch_embed_config has text_hidden_size {expected}; "
                "set text_hidden_size to the encoder's, or model_dir to another encoder"
            )
        channels = getattr(getattr(self.first_stage_model, "decoder", None), "z_channels", None)
        if channels is not None and channels != self.network.out_channels:
            raise ConfigError(
                f"the VAE has {channels} latent channels (z_channels), the network's out_channels is "
                f"{self.network.out_channels}; give both the same"
            )
        if self.image_conditioner is not None and self.network.in_channels != 2 * self.network.out_channels:
            raise ConfigError(
                f"noised_image_input is true, and the network has in_channels {self.network.in_channels}, out_channels "
                f"{self.network.out_channels}; the image needs as many again: set in_channels to "
                f"{2 * self.network.out_channels}"
            )
        numbers, wanted = getattr(self.conditioner, "vector_width", 0), getattr(self.network, "vector_width", None) or 0
        if self.conditioner is not None and numbers != wanted:
            raise ConfigError(
                f"the conditioner's sizes give a vector of {numbers} numbers, the network takes {wanted}; make its "
                "adm_in_channels (num_classes: sequential) the sum of 2 x outdim over the size entries of emb_models"
            )

    @property
    def network(self) -> Any:
        """The transformer."""
        return self.model.diffusion_model

    @property
    def patch_frames(self) -> int:
        """Latent frames that a patch of the network spans."""
        return self.network.patch_size[0]

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        return next(self.model.parameters()).device

    # --- pixels and prompts to what the network takes ----------------------------------------------------------------

    @torch.no_grad()
    def encode_first_stage(self, pixels: Tensor, noise: Tensor | None = None) -> Tensor:
        """Scaled latents (b t c h w), float32, of pixels (b T 3 H W) in [-1, 1].

        noise (b t c h w) draws from the posterior; without it the posterior's mean is taken.
        """
        group = self.en_and_decode_n_samples_a_time or len(pixels)
        noises: Sequence[Tensor | None] = [None] * len(pixels) if noise is None else noise.split(group)
        parts = [self._vae().encode(part, noise=own) for part, own in zip(pixels.split(group), noises)]
        return torch.cat(parts).float() * self.scale_factor

    @torch.no_grad()
    def decode_first_stage(self, latents: Tensor) -> Iterator[Tensor]:
        """Pixels (b T 3 H W) in [-1, 1] of scaled latents (b t c h w), in chunks along time."""
        if self.first_stage_model is None:
            raise ConfigError(
                "the model has no first_stage_config, so latents cannot be decoded; save them with only_save_latents"
            )
        chosen = getattr(self.first_stage_model, "decode_preset", "")  # a VAE that decodes in one way has none
        preset = ("main_intended" if self.patch_frames > 1 else "v1") if chosen is None else chosen
        plan = [plan_decode(preset, latents.shape[1], every=True)] if preset else []
        yield from self.first_stage_model.decode_chunks(latents / self.scale_factor, *plan)

    @property
    def shares_decoding(self) -> bool:
        """Whether context-parallel processes decode a clip together; then all of them must."""
        parallel = getattr(self.first_stage_model, "parallel", None)  # a VAE of one's own may know no ranks
        return parallel is not None and parallel.size("cp") > 1

    def latent_shape(self, num_frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        """(t c h w) of a clip given in latent frames and pixels."""
        return (num_frames, self.network.out_channels, height // SPACE_FACTOR, width // SPACE_FACTOR)

    def padded_shape(self, latent_shape: Sequence[int]) -> tuple[int, ...]:
        """The same as the network takes it, in whole patches; see `sat.cogvideox.padding`."""
        num_frames = latent_shape[0]
        return (num_frames + num_padding(num_frames, self.patch_frames), *latent_shape[1:])

    # --- training ----------------------------------------------------------------------------------------------------

    @property
    def timestep_sampling(self) -> DiscreteSampling:
        """What draws the timesteps of training."""
        return self._loss().sigma_sampler

    def free_vae(self) -> None:
        """Let the VAE go, where all clips come as moments and nothing is decoded."""
        self.first_stage_model = None

    @torch.no_grad()
    def training_inputs(self, batch: Mapping[str, Any], seed: int, global_batch_size: int) -> TrainingInputs:
        """Encode a batch and draw its noise and timesteps from the samples' own streams.

        batch: `pixels` (b T 3 H W), `moments` (b t 2c h w) of the VAE or `latents` (b t c h w), or a list of them
        without b, to be packed into a row; `caption` (b texts), `counters` (b,) int64; where rows are planned, also
        `steps`, `places`, `num_samples`; `text_states` (b n x) where the captions were encoded before.
        """
        counters = batch["counters"].tolist()
        if "places" in batch:
            where = StepPlaces(tuple(batch["steps"]), tuple(batch["places"]), batch["num_samples"])
        else:
            where = StepPlaces.of_counters(counters, global_batch_size)
        timesteps = self.timestep_sampling.draw(seed, counters, where)
        drop = sample_uniform(seed, "text drop", counters)
        return self._inputs(batch, timesteps, seed, "", counters, drop)

    @torch.no_grad()
    def validation_inputs(self, batch: Mapping[str, Any], timestep: int, seed: int) -> TrainingInputs:
        """The same at one fixed timestep, with noise that belongs to the clip and nothing dropped."""
        counters = batch["counters"].tolist()
        timesteps = torch.full((len(counters),), timestep)
        return self._inputs(batch, timesteps, seed, f"valid {timestep} ", counters, None)

    def _inputs(
        self,
        batch: Mapping[str, Any],
        timesteps: Tensor,
        seed: int,
        stream: str,
        counters: Sequence[int],
        drop: Tensor | None,
    ) -> TrainingInputs:
        latents = self._latents(batch, seed, stream, counters)
        latents = pad_front(latents, self.patch_frames)
        noise = self._noise(latents, seed, stream, counters)
        offset_noise = None
        if self._loss().offset_noise_level > 0.0:
            offset_noise = sample_normal(seed, f"{stream}offset noise", counters, ()).to(self.device)
        captions, conditioner = batch["caption"], self._text()
        sizes = self._sizes(batch, latents)
        trains_text = conditioner.is_trainable
        known = {"states": batch["text_states"].to(self.device)} if "text_states" in batch else {}
        cond = {} if trains_text else conditioner(captions, drop, sizes, **known)
        if self.image_conditioner is not None:
            cond["concat"] = self.image_conditioner.of_batch(
                self.first_stage_model, batch, latents, seed, stream, counters, is_training=drop is not None
            )
        return TrainingInputs(
            latents=latents,
            timesteps=timesteps.to(self.device),
            noise=noise,
            cond=cond,
            captions=captions if trains_text else (),
            text_drop=drop if trains_text else None,
            sizes=sizes if trains_text else {},
            offset_noise=offset_noise,
            more=self._more(batch),
        )

    def _noise(self, latents: Clips, seed: int, stream: str, counters: Sequence[int]) -> Clips:
        if isinstance(latents, Tensor):
            return sample_normal(seed, f"{stream}noise", counters, latents.shape[1:]).to(latents.device)
        return [self._noise(clip.unsqueeze(0), seed, stream, [c])[0] for clip, c in zip(latents, counters)]

    def _latents(self, batch: Mapping[str, Any], seed: int, stream: str, counters: Sequence[int]) -> Clips:
        name = next(name for name in ("latents", "moments", "pixels") if name in batch)
        if isinstance(batch[name], Tensor):
            return self._encode(batch, seed, stream, counters)
        clips = zip(batch[name], counters)
        return [self._encode({name: clip.unsqueeze(0)}, seed, stream, [c])[0] for clip, c in clips]

    def _encode(self, batch: Mapping[str, Any], seed: int, stream: str, counters: Sequence[int]) -> Tensor:
        """Scaled latents (b t c h w) of clips of one size."""
        if "latents" in batch:
            return batch["latents"].to(self.device, torch.float32, non_blocking=True) * self.scale_factor
        if "moments" in batch:
            t, c2, h, w = batch["moments"].shape[1:]
            noise = sample_normal(seed, f"{stream}posterior", counters, (t, c2 // 2, h, w))
            posterior = DiagonalGaussian(
                batch["moments"].to(self.device, non_blocking=True), deterministic=not self.samples_posterior
            )
            return posterior.sample(noise).float() * self.scale_factor
        pixels = batch["pixels"].to(self.device, non_blocking=True)
        if self.latent_input and pixels.shape[1] > 1:
            if pixels.shape[2] == 3 != self.network.out_channels:
                raise ConfigError(
                    "model.latent_input says that clips come as latents, and they are pixels; set "
                    "model.latent_input=false"
                )
            return pixels.float() * self.scale_factor
        shape = self._vae().latent_shape(pixels.shape[1:])
        noise = sample_normal(seed, f"{stream}posterior", counters, shape).to(pixels.device)
        return self.encode_first_stage(pixels, noise)

    def _sizes(self, batch: Mapping[str, Any], latents: Clips) -> dict[str, Tensor]:
        """What the batch says of its images' sizes, and for the rest the size in pixels of latents (b t c h w)."""
        return sizes_of(batch, [(SPACE_FACTOR * clip.shape[-2], SPACE_FACTOR * clip.shape[-1]) for clip in latents])

    def _more(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        named = {key: batch[key] for key in self._loss().batch2model_keys if key in batch}
        return {**self._constant_inputs(), **named}

    def _constant_inputs(self) -> dict[str, Tensor]:
        has_ofs = getattr(self.network, "ofs_embed_dim", None) is not None
        return {"ofs": torch.tensor([OFS_VALUE], device=self.device)} if has_ofs else {}

    def _loss(self) -> VideoDiffusionLoss:
        if self.loss_fn is None:
            raise ConfigError("the model section has no loss_fn_config, which training needs")
        return self.loss_fn

    def _vae(self) -> Any:
        if self.first_stage_model is None:
            raise ConfigError("the model has no first_stage_config, so clips must come as latents (latent_input: true)")
        return self.first_stage_model

    def _text(self) -> Any:
        if self.conditioner is None:
            raise ConfigError("the model section has no conditioner_config, which turns prompts into text states")
        return self.conditioner

    # --- sampling ----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def sample(
        self,
        prompts: Sequence[str],
        counters: Sequence[int],
        seed: int,
        latent_shape: Sequence[int],
        on_step: Callable[[Step], None] | None = None,
        initial_noise: Tensor | None = None,
        prefix: Tensor | None = None,
        images: Tensor | None = None,
        lora_scale: Sequence[float] | None = None,
    ) -> Tensor:
        """Latents (b t c h w) for prompts; each prompt's noise comes from the stream of its counter.

        latent_shape (t c h w). The result of a prompt depends on (seed, counter) alone, not on what shares its batch.
        initial_noise (t c h w): what all of them start from, instead of a draw, in the padded shape. prefix (f c h w):
        scaled latents of the frames that all of them begin with, where the sampler has fixed_frames, padding among
        them. images (b 1 3 H W) in [-1, 1]: what each continues. lora_scale: of each adapter of the network.
        """
        shape = self.padded_shape(latent_shape)
        noise = KeyedNoise(seed, counters)
        if initial_noise is None:
            latents = sample_normal(seed, "sample", counters, shape).to(self.device)
        else:
            latents = initial_noise.to(self.device).expand(len(prompts), *shape)
        cond = self._conditions(prompts, latents, images)
        uncond = self._text().unconditional_like(cond)
        if prefix is not None:
            padding = prefix[:1].expand(shape[0] - latent_shape[0], *prefix.shape[1:])
            prefix = torch.cat([padding, prefix]).to(self.device)
            prefix = prefix.expand(len(prompts), *prefix.shape)
        group = self.network.transformer.parallel.group("guidance")
        split = None if group is None else GuidanceSplit(group)
        more: dict[str, Any] = self._constant_inputs()
        if lora_scale is not None:
            more["lora_scale"] = lora_scale
        denoise = self.denoise if self.reuse is None else partial(self.denoiser, self.reuse.begin())
        runs = self._sampler().run(denoise, latents, cond, uncond, noise, prefix, split, **more)
        for step, _, after in runs:
            latents = after
            if on_step is not None:
                on_step(step)
        return drop_front(latents, latent_shape[0])

    def reuse_layers(self, threshold: float) -> LayerReuse:
        """From now on, `sample` reuses layers' work between steps; see `LayerReuse`, which is returned."""
        if getattr(self._sampler().guider, "two_passes", False):
            raise ConfigError(
                "layers' work is reused for both halves of guidance at once, and the guider has two_passes; set "
                "model.sampler_config.params.guider_config.params.two_passes=false, or leave args.reuse_threshold out"
            )
        self.reuse = LayerReuse(self.model, self.network, threshold)
        return self.reuse

    def _conditions(self, prompts: Sequence[str], latents: Tensor, images: Tensor | None) -> dict[str, Tensor]:
        """What clips of the size of latents (b t c h w) are conditioned on: prompts and images, one for each."""
        cond = self._text()(prompts, sizes=self._sizes({}, latents))
        if self.image_conditioner is None and images is None:
            return cond
        if self.image_conditioner is None:
            raise ConfigError("an image is given, and the model takes none (model.noised_image_input is not true)")
        if images is None:
            raise ConfigError("the model continues an image (model.noised_image_input), and there is none")
        return {
            **cond,
            "concat": self.image_conditioner.of_images(self._vae(), images.to(self.device), latents.shape[1]),
        }

    @torch.no_grad()
    def invert(
        self,
        latents: Tensor,
        prompts: Sequence[str],
        num_iterations: int = 4,
        on_step: Callable[[Step], None] | None = None,
        images: Tensor | None = None,
    ) -> Tensor:
        """The noise from which sampling with these prompts, without guidance, leads to scaled latents (b t c h w).

        It has the padded shape. See `ddim_invert`; images as for `sample`. Raises ConfigError for a sampler other than
        DDIM.
        """
        sampler = self._sampler()
        if not isinstance(sampler, VideoDDIMSampler):
            raise ConfigError(
                f"inversion runs DDIM backwards, and the sampler is {type(sampler).__name__}; set "
                "model.sampler_config.target=sgm.modules.diffusionmodules.sampling.VideoDDIMSampler"
            )
        latents = pad_front(latents, self.patch_frames)
        cond = self._conditions(prompts, latents, images)
        more = self._constant_inputs()
        for step, before in ddim_invert(sampler, self.denoise, latents, cond, None, num_iterations, **more):
            latents = before
            if on_step is not None:
                on_step(step)
        return latents

    def _sampler(self) -> Sampler:
        if self.sampler is None:
            raise ConfigError("the model section has no sampler_config, which sampling needs")
        return self.sampler

    def denoise(
        self, noisy: Tensor, alpha: Tensor, timesteps: Tensor, cond: Mapping[str, Tensor], **more: Tensor
    ) -> Tensor:
        """The network's estimate of clean latents; see `DiscreteDenoiser`."""
        return self.denoiser(self.model, noisy, alpha, timesteps, cond, **more)


@dataclass(frozen=True)
class KeyedNoise:
    """A sampler's noise from the streams of its samples."""

    seed: int
    counters: Sequence[int]

    def __call__(self, kind: str, step: int, like: Tensor) -> Tensor:
        """Standard normal noise shaped like `like` (b ...)."""
        return sample_normal(self.seed, f"sample {kind} {step}", self.counters, like.shape[1:]).to(like.device)


class TrainedParts(nn.Module):
    """What an optimizer trains: the network, and the text encoder where it is trainable. Its forward is the loss.

    Its state dict has the released names; frozen encoders are not in it.
    """

    def __init__(self, engine: VideoDiffusionEngine) -> None:
        super().__init__()
        self.model = engine.model
        self.conditioner = (
            engine.conditioner if engine.conditioner is not None and engine.conditioner.is_trainable else None
        )
        # Past Module.__setattr__: the engine owns these parts, not the other way round.
        object.__setattr__(self, "engine", engine)
        # Left over from the generic transformer, kept for its place in released files; nothing reads it.
        leftover = getattr(engine.network.transformer, "position_embeddings", None)
        if leftover is not None:
            leftover.requires_grad_(False)

    def forward(self, inputs: TrainingInputs) -> dict[str, Tensor]:
        """{"loss": loss of each sample (b,), float32}."""
        engine: VideoDiffusionEngine = self.engine  # type: ignore[assignment]
        cond = inputs.cond
        if self.conditioner is not None:
            cond = {**cond, **self.conditioner(inputs.captions, inputs.text_drop, inputs.sizes)}
        loss = engine._loss()(
            self.model,
            engine.denoiser,
            inputs.latents,
            cond,
            inputs.timesteps,
            inputs.noise,
            inputs.offset_noise,
            **inputs.more,
        )
        return {"loss": loss}

    def own_weights(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A checkpoint's weights without those of parts that are frozen here.

        The bare names of a file that holds the network alone get the released prefix.
        """
        frozen = (VAE_PREFIX,) if self.conditioner is not None else (VAE_PREFIX, TEXT_PREFIX)
        kept = {name: value for name, value in weights.items() if not name.startswith(frozen)}
        if any(name.startswith("transformer.layers.") for name in kept):
            return {f"{NETWORK_PREFIX}{name}": value for name, value in kept.items()}
        return kept


def build_engine(model: Mapping[str, Any], with_encoders: bool = True) -> VideoDiffusionEngine:
    """The engine that a `model:` section describes; without encoders, nothing but the section itself is read."""
    params = ConfigNode("model")
    params.update({key: value for key, value in model.items() if with_encoders or key not in ENCODERS})
    params.origins.update(getattr(model, "origins", {}))
    node = ConfigNode("model")
    node.update({"target": "diffusion_video.SATVideoDiffusionEngine", "params": params})
    return instantiate_from_config(node)
