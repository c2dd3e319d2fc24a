"""The CogVideoX transformer: a BaseModel whose mixins come from the configuration."""

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from sat.cogvideox.context import NUM_ROWS, TEXT, Grid, NoTextLength, TokenLayout, VideoContext
from sat.cogvideox.mixins import SwiGLUMixin
from sat.config import ConfigNode, did_you_mean, instantiate_from_config, warn_once
from sat.errors import ConfigError
from sat.model.base_model import ARGS_DEFAULT, BaseMixin, BaseModel
from sat.ops.layernorm import LayerNorm, RMSNorm
from sat.ops.modulate import Spans, TokenRows
from sat.ops.sinusoid import sinusoid

OPTIONAL_MIXINS = ("lora",)
_TRANSFORMER_ARGS = {
    "vocab_size",
    "max_sequence_length",
    "layernorm_order",
    "skip_init",
    "model_parallel_size",
    "seed",
} | {attribute for attribute, _ in ARGS_DEFAULT.values()}


class _Sinusoid(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def forward(self, positions: Tensor) -> Tensor:
        return sinusoid(positions, self.size)


def _two_layers(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, outputs), nn.SiLU(), nn.Linear(outputs, outputs))


class DiffusionTransformer(BaseModel):
    """Predicts v from noisy latents, a time and text states (CogVideoX, arXiv:2408.06072).

    The position grid of the configuration is latent_height / p rows, latent_width / q columns and
    (num_frames - 1) // time_compressed_rate + 1 frames, for patch_size [o, p, q]; inputs may have any other.
    """

    MIXINS: ClassVar[Mapping[str, str]] = {
        "pos_embed": "pos_embed_config",
        "patch_embed": "patch_embed_config",
        "adaln_layer": "adaln_layer_config",
        "final_layer": "final_layer_config",
        "lora": "lora_config",
    }
    """Mixins in the order in which they are added, and their keys under `modules`. Others are NAME: NAME_config."""

    def __init__(
        self,
        hidden_size: int,
        num_layers: int,
        num_attention_heads: int,
        num_frames: int,
        latent_height: int,
        latent_width: int,
        in_channels: int,
        out_channels: int,
        modules: Mapping[str, Any],
        patch_size: int | Sequence[int],
        transformer_args: Mapping[str, Any] | None = None,
        time_compressed_rate: int = 4,
        time_embed_dim: int | None = None,
        ofs_embed_dim: int | None = None,
        num_classes: int | str | None = None,
        adm_in_channels: int | None = None,
        elementwise_affine: bool = True,
        height_interpolation: float = 1.0,
        width_interpolation: float = 1.0,
        time_interpolation: float = 1.0,
        use_SwiGLU: bool = False,
        use_RMSNorm: bool = False,
        input_time: str = "adaln",
    ) -> None:
        if input_time != "adaln":
            raise ConfigError(f"input_time is '{input_time}'; only 'adaln' is supported")
        patch_size = (1, patch_size, patch_size) if isinstance(patch_size, int) else tuple(patch_size)
        grid = _stored_grid(num_frames, time_compressed_rate, latent_height, latent_width, patch_size)
        if hidden_size % num_attention_heads:
            raise ConfigError(f"hidden_size {hidden_size} does not divide by num_attention_heads {num_attention_heads}")
        time_embed_dim = time_embed_dim or hidden_size
        arguments = dict(transformer_args or {})
        _check_transformer_args(transformer_args or {})
        layernorm: Any = RMSNorm if use_RMSNorm else partial(LayerNorm, elementwise_affine=elementwise_affine)
        super().__init__(
            {
                "vocab_size": 1,
                "max_sequence_length": 64,
                **arguments,
                "hidden_size": hidden_size,
                "num_layers": num_layers,
                "num_attention_heads": num_attention_heads,
            },
            layernorm=layernorm,
        )
        # The transformer's word table is never looked up: patches are the words.
        del self.transformer.word_embeddings
        self.hidden_size = hidden_size
        self.patch_size = patch_size
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.stored_grid = grid

        self.time_embed = _two_layers(hidden_size, time_embed_dim)
        self.ofs_embed_dim = ofs_embed_dim
        if ofs_embed_dim is not None:
            if ofs_embed_dim != time_embed_dim:
                raise ConfigError(
                    f"ofs_embed_dim {ofs_embed_dim} must equal time_embed_dim {time_embed_dim}: the two are added"
                )
            self.ofs_embed = _two_layers(ofs_embed_dim, ofs_embed_dim)
        self.vector_width = adm_in_channels if num_classes == "sequential" else None
        self.label_emb = _make_label_embedding(num_classes, adm_in_channels, hidden_size, time_embed_dim)

        sequence_parallel = self.transformer.parallel.sequence_parallel
        sizes = {
            "hidden_size": hidden_size,
            "num_layers": num_layers,
            "hidden_size_head": hidden_size // num_attention_heads,
            "time_embed_dim": time_embed_dim,
            "patch_size": patch_size,
            "grid": grid,
            "in_channels": in_channels,
            "out_channels": out_channels,
            "elementwise_affine": elementwise_affine,
            "height_interpolation": height_interpolation,
            "width_interpolation": width_interpolation,
            "time_interpolation": time_interpolation,
            "layer_num": num_layers,
            "num_attention_heads": num_attention_heads,
            "sequence_parallel": sequence_parallel,
        }
        self._add_configured_mixins(modules, sizes)
        if use_SwiGLU:
            self.add_mixin("swiglu", SwiGLUMixin(num_layers, hidden_size, sequence_parallel), reinit=True)

    def _add_configured_mixins(self, modules: Mapping[str, Any], sizes: Mapping[str, Any]) -> None:
        known = list(self.MIXINS.values())
        for key in modules:
            if not key.endswith("_config"):
                where = modules.where(key) if isinstance(modules, ConfigNode) else f"modules.{key}"
                raise ConfigError(f"{where}: mixins are named NAME_config{did_you_mean(key, known)}")
        others = {key.removesuffix("_config"): key for key in modules if key not in known}
        for name, key in {**self.MIXINS, **others}.items():
            config = modules.get(key)
            if config is None:
                if name in OPTIONAL_MIXINS:
                    continue
                raise ConfigError(f"modules has no {key}; this transformer needs {', '.join(known)} (lora is optional)")
            mixin: BaseMixin = instantiate_from_config(config, **sizes)
            self.add_mixin(name, mixin, reinit=True)
            if getattr(mixin, "replaces_position_embeddings", False):
                del self.transformer.position_embeddings

    def forward(  # type: ignore[override]  # the network's own inputs; `run` is what the two have in common
        self,
        x: Tensor | Sequence[Tensor],
        timesteps: Tensor,
        context: Tensor,
        y: Tensor | None = None,
        concat_images: Tensor | Sequence[Tensor] | None = None,
        ofs: Tensor | None = None,
        lora_scale: float | Sequence[float] | None = None,
    ) -> Any:
        """Predict v.

        x (b t c h w), or a list of (t c h w) of any sizes, which are packed into one row; timesteps (b,) in 0 .. 999,
        whole or fractional, context (b n x) text states, y (b, a) optional vector condition of adm_in_channels numbers,
        concat_images (b or b/2, t, c2, h, w), or a list, appended to the channels, ofs (1,) or (b,). lora_scale: of
        adapters, see VideoContext. -> like x, with out_channels.
        """
        latents = _append_channels(x, concat_images)
        layout = self._layout(latents, context)
        sequence = layout.share(self.transformer.parallel, context.device)
        spans = layout.modality_spans(sequence)
        text_length = sum(span.stop - span.start for span in spans if span.row == TEXT)
        grid = layout.grids[0]
        ctx = VideoContext(
            images=latents,
            encoder_outputs=context,
            emb=self.embed_time(timesteps, context.dtype, y, ofs),
            layout=layout,
            text_length=NoTextLength() if layout.is_packed else text_length,
            seq_length=sum(map(math.prod, layout.grids)) if layout.is_packed else math.prod(grid),
            rope_T=grid[0],
            rope_H=grid[1],
            rope_W=grid[2],
            spans=spans,
            token_rows=self._token_rows(spans, layout, context),
            sequence=sequence,
            lora_scale=lora_scale,
        )
        return self.run(latents, None, None, ctx)[0]  # type: ignore[arg-type]  # hooks read ctx.images

    def _token_rows(self, spans: Spans, layout: TokenLayout, like: Tensor) -> TokenRows | None:
        if not self.transformer.compiles_layers:
            return None
        return TokenRows.of_spans(spans, NUM_ROWS, len(layout.grids) if layout.is_packed else 1, like)

    def _layout(self, latents: Tensor | Sequence[Tensor], context: Tensor) -> TokenLayout:
        is_packed = not isinstance(latents, Tensor)
        grids = tuple(self._grid(clip) for clip in latents)
        if len(grids) != len(context):
            raise ValueError(f"there are {len(grids)} clips and text states for {len(context)}")
        return TokenLayout(grids, context.shape[1], is_packed)

    def _grid(self, clip: Tensor) -> Grid:
        """Token grid of a clip (t c h w)."""
        frames, channels, height, width = clip.shape
        if channels != self.in_channels:
            raise ValueError(
                f"the latents have {channels} channels, the network takes in_channels = {self.in_channels}"
            )
        if any(size % patch for size, patch in zip((frames, height, width), self.patch_size)):
            raise ValueError(
                f"latents of {frames} x {height} x {width} do not divide into patches of {list(self.patch_size)}"
            )
        o, p, q = self.patch_size
        return frames // o, height // p, width // q

    def embed_time(
        self, timesteps: Tensor, dtype: torch.dtype, y: Tensor | None = None, ofs: Tensor | None = None
    ) -> Tensor:
        """The time embedding (b e), with the optional second number and vector condition added."""
        emb = self.time_embed(sinusoid(timesteps, self.hidden_size).to(dtype))
        if self.label_emb is not None:
            if y is None:
                raise ValueError("this network has num_classes, so it needs the vector condition y")
            emb = emb + self.label_emb(y).repeat_interleave(len(emb) // len(y), dim=0)
        if self.ofs_embed_dim is not None:
            if ofs is None:
                raise ValueError("this network has ofs_embed_dim, so it needs ofs (2.0 in the released models)")
            emb = emb + self.ofs_embed(sinusoid(ofs, self.ofs_embed_dim).to(dtype))
        return emb


def _append_channels(
    x: Tensor | Sequence[Tensor], images: Tensor | Sequence[Tensor] | None
) -> Tensor | Sequence[Tensor]:
    if images is None:
        return x
    if not isinstance(x, Tensor):
        return [torch.cat([clip, image.to(clip.dtype)], dim=1) for clip, image in zip(x, images)]
    assert isinstance(images, Tensor)
    if len(images) != len(x):  # both halves of a guidance batch share the condition
        images = images.repeat(2, 1, 1, 1, 1)
    return torch.cat([x, images.to(x.dtype)], dim=2)


def _stored_grid(
    num_frames: int, time_compressed_rate: int, latent_height: int, latent_width: int, patch_size: Sequence[int]
) -> tuple[int, int, int]:
    """The grid of stored position tables. Time is not divided by the patch: released tables count latent frames."""
    if len(patch_size) != 3:
        raise ConfigError(
            f"patch_size is {list(patch_size)}; give [frames, rows, columns] or one number for both sides"
        )
    for name, size, patch in (
        ("latent_height", latent_height, patch_size[1]),
        ("latent_width", latent_width, patch_size[2]),
    ):
        if size % patch:
            raise ConfigError(f"{name} {size} does not divide by the patch size {patch}")
    return ((num_frames - 1) // time_compressed_rate + 1, latent_height // patch_size[1], latent_width // patch_size[2])


def _check_transformer_args(arguments: Mapping[str, Any]) -> None:
    for key in arguments:
        if key not in _TRANSFORMER_ARGS:
            where = arguments.where(key) if isinstance(arguments, ConfigNode) else f"transformer_args.{key}"
            raise ConfigError(f"unknown key {where}{did_you_mean(key, _TRANSFORMER_ARGS)}")


def _make_label_embedding(
    num_classes: int | str | None, adm_in_channels: int | None, hidden_size: int, time_embed_dim: int
) -> nn.Module | None:
    if num_classes is None:
        if adm_in_channels is not None:
            warn_once("network_config: adm_in_channels has no effect without num_classes")
        return None
    if isinstance(num_classes, int):
        return nn.Embedding(num_classes, time_embed_dim)
    if num_classes == "continuous":
        return nn.Linear(1, time_embed_dim)
    if num_classes == "timestep":
        return nn.Sequential(_Sinusoid(hidden_size), _two_layers(hidden_size, time_embed_dim))
    if num_classes == "sequential":
        if adm_in_channels is None:
            raise ConfigError("num_classes: sequential needs adm_in_channels, the width of its vector condition")
        return nn.Sequential(_two_layers(adm_in_channels, time_embed_dim))
    raise ConfigError(f"num_classes is '{num_classes}'; give a number, continuous, timestep or sequential")
