"""The parts that make a transformer a CogVideoX: patches, 3D positions, expert AdaLN, final layer.

Letters: b batch, t c h w latent frames, channels, rows, columns; o p q patch size in frames, rows, columns; n text
tokens, s all tokens (text first), d hidden size, k heads, e head size.
"""

import math
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from sat.cogvideox.context import Grid, TokenLayout, VideoContext
from sat.config import warn_once
from sat.errors import ConfigError
from sat.model.base_model import BaseMixin, BaseModel, non_conflict
from sat.model.defaults import attention_fn_default, project
from sat.mpu.context import SequenceShard
from sat.mpu.gradients import mark_partial
from sat.mpu.layers import ColumnParallelLinear
from sat.ops.layernorm import HeadNorm, LayerNorm, norm_and_modulate
from sat.ops.modulate import Span, gated_residual
from sat.ops.rotary import rotary_table_3d, rotate_interleaved, split_head_dim, stretched_coordinates

QK_NORM_EPSILON = 1e-6
FINAL_NORM_EPSILON = 1e-6
_KEPT_TABLES = 8  # grids whose tables stay in memory


class ImagePatchEmbeddingMixin(BaseMixin):
    """Latent patches and text states become tokens of one sequence, text first."""

    def __init__(
        self, in_channels: int, hidden_size: int, patch_size: Sequence[int], text_hidden_size: int, bias: bool = True
    ):
        super().__init__()
        self.patch_size = tuple(patch_size)
        self.proj = nn.Linear(in_channels * math.prod(self.patch_size), hidden_size, bias=bias)
        self.text_proj = nn.Linear(text_hidden_size, hidden_size)
        self.register_load_state_dict_pre_hook(_flatten_patch_kernel)

    def reinit(self, parent_model: BaseModel | None = None) -> None:
        nn.init.xavier_uniform_(self.proj.weight)
        if self.proj.bias is not None:
            nn.init.zeros_(self.proj.bias)

    def word_embedding_forward(self, input_ids: Any, *, ctx: VideoContext) -> Tensor:
        text = self.text_proj(ctx.encoder_outputs)  # b n d
        if isinstance(ctx.images, Tensor):
            return torch.cat([text, self.proj(self.patches(ctx.images))], dim=1)  # b s d
        patches = [self.patches(clip.unsqueeze(0)) for clip in ctx.images]  # type: ignore[union-attr]
        video = self.proj(torch.cat(patches, dim=1)).split([part.shape[1] for part in patches], dim=1)
        return torch.cat([part for pair in zip(text.split(1), video) for part in pair], dim=1)  # 1 s d

    def patches(self, latents: Tensor) -> Tensor:
        """(b t c h w) -> (b m copq): one vector for each token."""
        o, p, q = self.patch_size
        return rearrange(latents, "b (t o) c (h p) (w q) -> b (t h w) (c o p q)", o=o, p=p, q=q)


def _flatten_patch_kernel(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Release 1.0 stores the patch projection as a convolution kernel (d c p q): the same numbers in the same order."""
    kernel = state.get(f"{prefix}proj.weight")
    if kernel is not None and kernel.dim() == 4:
        state[f"{prefix}proj.weight"] = kernel.flatten(1)


def _keep(tables: dict[Any, Any], key: Any, table: Any) -> None:
    """Keep the table of a grid, in the place of the oldest where there are many."""
    if len(tables) >= _KEPT_TABLES:
        tables.pop(next(iter(tables)))
    tables[key] = table


def sincos_positions(coordinates: Tensor, size: int) -> Tensor:
    """[sin(c ω_0) .. | cos(c ω_0) ..] with ω_k = 10000^(-2k/size): (m,) float64 -> (m, size)."""
    omega = 10000.0 ** (-torch.arange(size // 2, dtype=torch.float64) / (size / 2))
    angles = torch.outer(coordinates, omega)
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def sincos_table_3d(grid: Sequence[int], hidden_size: int, interpolation: Sequence[float] = (1.0, 1.0, 1.0)) -> Tensor:
    """Fixed positions of a (t, h, w) grid: (t·h·w, hidden_size) float32, columns fastest.

    A quarter of the channels holds the frame, three eighths the column, three eighths the row, in this order; each
    coordinate is divided by its interpolation factor (frames, rows, columns).
    """
    frames, rows, columns = (
        torch.arange(length, dtype=torch.float64) / factor for length, factor in zip(grid, interpolation)
    )
    time_size, space_size = hidden_size // 4, hidden_size // 8 * 3
    parts = (
        sincos_positions(frames, time_size).view(grid[0], 1, 1, -1),
        sincos_positions(columns, space_size).view(1, 1, grid[2], -1),
        sincos_positions(rows, space_size).view(1, grid[1], 1, -1),
    )
    table = torch.cat([part.expand(*grid, -1) for part in parts], dim=-1)
    return table.reshape(-1, table.shape[-1]).float()


class PositionTable(BaseMixin):
    """Additive positions stored for one grid: text rows, then the grid's."""

    pos_embedding: nn.Parameter

    def __init__(self, text_length: int, grid: Sequence[int]) -> None:
        super().__init__()
        self.text_length = text_length
        self.grid: Grid = (grid[0], grid[1], grid[2])

    def lookup(self, layout: TokenLayout) -> Tensor:
        """What is added to a row of tokens (1 s d)."""
        if not layout.is_packed:
            return self._lookup(layout.grids[0], layout.text_length)
        return torch.cat([self._lookup(grid, layout.text_length) for grid in layout.grids], dim=1)

    def _lookup(self, grid: Grid, text_length: int) -> Tensor:
        """Rows for one grid: the stored ones where it has the stored rows and columns, else resampled ones."""
        text, video = self.pos_embedding.split([self.text_length, math.prod(self.grid)], dim=1)
        if text_length > self.text_length:
            raise ConfigError(
                f"the position table holds {self.text_length} text tokens, not {text_length}; set text_length of "
                f"pos_embed_config and max_length of the text encoder to {text_length} both, or both to less"
            )
        return torch.cat([text[:, :text_length], self._at(video, self.grid, grid)], dim=1)

    def adapt(self, table: Tensor, grid: Grid, text_length: int) -> Tensor:
        """A table stored for another grid and number of text tokens (1 m d), at this one's (1 s d).

        By the rule of `lookup`; text tokens that are new start at zero, as all do.
        """
        text, video = table.split([text_length, math.prod(grid)], dim=1)
        if text_length != self.text_length:
            warn_once(f"positions of {text_length} text tokens are cut or filled with zeros to {self.text_length}")
        return torch.cat([F.pad(text, (0, 0, 0, self.text_length - text_length)), self._at(video, grid, self.grid)], 1)

    def _at(self, video: Tensor, stored: Grid, grid: Grid) -> Tensor:
        """Video rows stored for one grid (1 m d), at another."""
        if grid[1:] == stored[1:] and grid[0] <= stored[0]:
            return video[:, : math.prod(grid)]
        return self.resample(video, stored, grid)

    @abstractmethod
    def resample(self, video: Tensor, stored: Grid, grid: Grid) -> Tensor:
        """Video rows stored for one grid (1 m d), at another that holds other places."""


class Basic3DPositionEmbeddingMixin(PositionTable):
    """Fixed 3D sin-cos positions added to the video tokens (CogVideoX-2B). The table is stored but never trained."""

    replaces_position_embeddings = True

    def __init__(
        self,
        grid: Sequence[int],
        text_length: int,
        hidden_size: int,
        height_interpolation: float = 1.0,
        width_interpolation: float = 1.0,
        time_interpolation: float = 1.0,
    ) -> None:
        super().__init__(text_length, grid)
        if hidden_size % 16:
            raise ConfigError(f"3D sin-cos positions need a hidden_size that is a multiple of 16, not {hidden_size}")
        self.hidden_size = hidden_size
        self.interpolation = (time_interpolation, height_interpolation, width_interpolation)
        table = torch.empty(1, text_length + math.prod(self.grid), hidden_size)
        self.pos_embedding = nn.Parameter(table, requires_grad=False)
        self._tables: dict[Any, Tensor] = {}
        self._fill()

    def _fill(self) -> None:
        with torch.no_grad():
            self.pos_embedding[:, : self.text_length] = 0
            self.pos_embedding[0, self.text_length :] = sincos_table_3d(self.grid, self.hidden_size, self.interpolation)

    def reinit(self, parent_model: BaseModel | None = None) -> None:
        self._fill()

    def position_embedding_forward(self, position_ids: Tensor | None, *, ctx: VideoContext) -> Tensor:
        return self.lookup(ctx.layout)  # type: ignore[arg-type]

    def resample(self, video: Tensor, stored: Grid, grid: Grid) -> Tensor:
        warn_once(f"sin-cos positions are computed for grid {grid}; the checkpoint was trained at {stored}")
        key = (grid, video.device, video.dtype)
        table = self._tables.get(key)
        if table is None:
            table = sincos_table_3d(grid, self.hidden_size, self.interpolation).to(video).unsqueeze(0)
            _keep(self._tables, key, table)
        return table


class Rotary3DPositionEmbeddingMixin(PositionTable):
    """3D rotary positions on the video part of q and k; with learnable_pos_embed also an additive trained table.

    The tables follow the true grid. positions: `slice` counts from 0 in the trained unit, so that a grid larger than
    the trained one extrapolates; `interpolate` stretches rows and columns over the trained range, as diffusers does for
    CogVideoX 1.0.
    """

    def __init__(
        self,
        grid: Sequence[int],
        hidden_size: int,
        hidden_size_head: int,
        text_length: int,
        theta: float = 10000.0,
        rot_v: bool = False,
        learnable_pos_embed: bool = False,
        positions: Literal["slice", "interpolate"] = "slice",
    ) -> None:
        super().__init__(text_length, grid)
        split_head_dim(hidden_size_head)
        if positions not in ("slice", "interpolate"):
            raise ConfigError(f"positions is '{positions}'; give slice or interpolate")
        self.positions = positions
        self.head_dim = hidden_size_head
        self.theta = theta
        self.rot_v = rot_v
        self.learnable_pos_embed = learnable_pos_embed
        if learnable_pos_embed:
            self.pos_embedding = nn.Parameter(torch.zeros(1, text_length + math.prod(self.grid), hidden_size))
        self._tables: dict[Any, tuple[Tensor, Tensor]] = {}
        self.register_load_state_dict_pre_hook(_drop_stored_tables)

    def extend_context(self, ctx: VideoContext) -> dict[str, Any]:
        layout, text_states = ctx.layout, ctx.encoder_outputs
        assert layout is not None
        assert text_states is not None
        grids = layout.grids if layout.is_packed else layout.grids[:1]
        parts = [self.tables(grid, layout.text_length, text_states.device, text_states.dtype) for grid in grids]
        cos, sin = parts[0] if len(parts) == 1 else (torch.cat(tables) for tables in zip(*parts))
        if ctx.sequence is not None:
            cos, sin = ctx.sequence.take_for_attention(cos), ctx.sequence.take_for_attention(sin)
        return {"rope": (cos, sin)}

    def tables(self, grid: Grid, text_length: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """cos and sin (n + t·h·w, e); text tokens have angle 0. Made once for each grid."""
        key = (grid, text_length, device, dtype)
        if key not in self._tables:
            cos, sin = rotary_table_3d(grid, self.head_dim, self.theta, device, self._coordinates(grid))
            cos, sin = F.pad(cos, (0, 0, text_length, 0), value=1.0), F.pad(sin, (0, 0, text_length, 0), value=0.0)
            _keep(self._tables, key, (cos.to(dtype), sin.to(dtype)))
        return self._tables[key]

    def _coordinates(self, grid: Grid) -> list[Tensor] | None:
        """Frames, rows and columns of a grid; None: the integers."""
        if self.positions == "slice":
            return None
        return [torch.arange(grid[0], dtype=torch.float32), *stretched_coordinates(grid[1:], self.grid[1:])]

    def position_embedding_forward(self, position_ids: Tensor | None, *, ctx: VideoContext) -> Tensor | None:
        return self.lookup(ctx.layout) if self.learnable_pos_embed else None  # type: ignore[arg-type]

    def resample(self, video: Tensor, stored: Grid, grid: Grid) -> Tensor:
        warn_once(f"learned positions are interpolated from grid {stored} to {grid}: samples may be less sharp")
        volume = rearrange(video, "1 (t h w) d -> 1 d t h w", t=stored[0], h=stored[1])
        volume = F.interpolate(volume.float(), size=grid, mode="trilinear", align_corners=True).to(video.dtype)
        return rearrange(volume, "1 d t h w -> 1 (t h w) d")

    def attention_fn(
        self,
        query_layer: Tensor,
        key_layer: Tensor,
        value_layer: Tensor,
        attention_mask: Tensor | None,
        attention_dropout: nn.Module | None,
        *,
        rope: tuple[Tensor, Tensor],
        sequence: SequenceShard | None,
        qk_norms: tuple[HeadNorm, HeadNorm] | None = None,
    ) -> Tensor:
        """qk_norms: norms of q and k that whoever wraps this leaves to be done in one pass with the turn."""
        if qk_norms is None:
            query_layer, key_layer = rotate_interleaved(query_layer, *rope), rotate_interleaved(key_layer, *rope)
        else:
            query_layer, key_layer = qk_norms[0](query_layer, rope), qk_norms[1](key_layer, rope)
        if self.rot_v:
            value_layer = rotate_interleaved(value_layer, *rope)
        return attention_fn_default(
            query_layer, key_layer, value_layer, attention_mask, attention_dropout, sequence=sequence
        )


def _drop_stored_tables(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Release 1.0 stores the rotary tables of its one grid; they follow from the configuration."""
    for name in ("freqs_sin", "freqs_cos"):
        state.pop(f"{prefix}{name}", None)


def make_modulation(time_embed_dim: int, outputs: int, sequence_parallel: bool) -> ColumnParallelLinear:
    """A projection of the time embedding, split over tensor-parallel ranks; starts as torch's Linear does."""
    bound = time_embed_dim**-0.5

    def draw(parameter: Tensor, **_: Any) -> Tensor:
        return nn.init.uniform_(parameter, -bound, bound)

    return ColumnParallelLinear(
        time_embed_dim, outputs, init_method=draw, bias_init_method=draw, sequence_parallel=sequence_parallel
    )


class AdaLNMixin(BaseMixin):
    """Expert adaptive LayerNorm: text and video tokens share the weights but have their own shifts, scales and gates.

    Per layer one Linear of the time embedding gives twelve vectors of the hidden size: shift, scale and gate before
    attention, the same three before the MLP, first for video, then for text (CogVideoX, arXiv:2408.06072, sec. 2.2).
    qk_ln: LayerNorm over each head's channels of q and k (Dehghani et al. 2023, arXiv:2302.05442, sec. 2).
    """

    def __init__(
        self,
        hidden_size: int,
        num_layers: int,
        time_embed_dim: int,
        hidden_size_head: int,
        qk_ln: bool = True,
        elementwise_affine: bool = True,
        sequence_parallel: bool = False,
    ) -> None:
        super().__init__()
        projections = (make_modulation(time_embed_dim, 12 * hidden_size, sequence_parallel) for _ in range(num_layers))
        self.adaLN_modulations = nn.ModuleList(nn.Sequential(nn.SiLU(), projection) for projection in projections)
        self.qk_ln = qk_ln
        if qk_ln:
            options: dict[str, Any] = {"eps": QK_NORM_EPSILON, "elementwise_affine": elementwise_affine}
            self.query_layernorm_list = nn.ModuleList(HeadNorm(hidden_size_head, **options) for _ in range(num_layers))
            self.key_layernorm_list = nn.ModuleList(HeadNorm(hidden_size_head, **options) for _ in range(num_layers))
            for parameter in (*self.query_layernorm_list.parameters(), *self.key_layernorm_list.parameters()):
                mark_partial(parameter)  # each rank norms only its own heads

    def zero_modulations(self) -> None:
        """Make every layer the identity: all shifts, scales and gates start at zero."""
        for modulation in self.modulations:
            for parameter in modulation.parameters():
                nn.init.zeros_(parameter)

    @property
    def modulations(self) -> nn.ModuleList:
        """One for each layer: time embedding (b e) -> the twelve vectors (b 12d). Releases name them differently."""
        return self.adaLN_modulations

    def layer_forward(self, hidden_states: Tensor, mask: Tensor | None, *, ctx: VideoContext) -> Tensor:
        index, spans = int(ctx.layer_id), ctx.token_rows or ctx.spans
        layer = self.transformer.layers[index]
        modulation = rearrange(self.modulations[index](ctx.emb), "b (r m d) -> m b r d", r=2, m=6)
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = modulation.flip(2)  # stored video first

        normed = norm_and_modulate(layer.input_layernorm, hidden_states, shift_a, scale_a, spans)
        branch = layer.attention(normed, mask, ctx=ctx)
        if layer.layernorm_order == "sandwich":
            branch = layer.third_layernorm(branch)
        hidden_states = gated_residual(hidden_states, branch, gate_a, spans)

        normed = norm_and_modulate(layer.post_attention_layernorm, hidden_states, shift_m, scale_m, spans)
        branch = layer.mlp(normed, ctx=ctx)
        if layer.layernorm_order == "sandwich":
            branch = layer.fourth_layernorm(branch)
        return gated_residual(hidden_states, branch, gate_m, spans)

    @non_conflict
    def attention_fn(
        self, query_layer: Tensor, key_layer: Tensor, *tensors: Any, layer_id: int, old_impl: Any
    ) -> Tensor:
        if not self.qk_ln:
            return old_impl(query_layer, key_layer, *tensors)
        norms = self.query_layernorm_list[int(layer_id)], self.key_layernorm_list[int(layer_id)]
        # A compiler fuses by itself, and a context made anew would tie its graph to the lengths of a mix.
        is_fused = not torch.compiler.is_compiling() and old_impl.declares("qk_norms")
        if is_fused and all(isinstance(norm, HeadNorm) for norm in norms):
            return old_impl(query_layer, key_layer, *tensors, qk_norms=norms)
        return old_impl(norms[0](query_layer), norms[1](key_layer), *tensors)


class SwiGLUMixin(BaseMixin):
    """MLP(x) = down(SiLU(w2 x) · up(x)) (Shazeer 2020, arXiv:2002.05202, eq. 6)."""

    def __init__(self, num_layers: int, hidden_size: int, sequence_parallel: bool = False) -> None:
        super().__init__()
        options: dict[str, Any] = {"bias": False, "gather_output": False, "name": "w2"}
        self.w2 = nn.ModuleList(
            ColumnParallelLinear(hidden_size, 4 * hidden_size, sequence_parallel=sequence_parallel, **options)
            for _ in range(num_layers)
        )

    def mlp_forward(self, hidden_states: Tensor, *, ctx: VideoContext) -> Tensor:
        index = int(ctx.layer_id)
        mlp = self.transformer.layers[index].mlp
        inner = F.silu(self.w2[index](hidden_states)) * project(mlp.dense_h_to_4h, hidden_states, ctx)
        return project(mlp.dense_4h_to_h, inner, ctx)


class FinalLayerMixin(BaseMixin):
    """Video tokens back to latents: modulated norm, projection, patches to places."""

    def __init__(
        self,
        hidden_size: int,
        time_embed_dim: int,
        patch_size: Sequence[int],
        out_channels: int,
        elementwise_affine: bool = True,
        eps: float = FINAL_NORM_EPSILON,
    ) -> None:
        super().__init__()
        self.patch_size = tuple(patch_size)
        self.norm_final = LayerNorm(hidden_size, eps=eps, elementwise_affine=elementwise_affine)
        self.linear = nn.Linear(hidden_size, math.prod(self.patch_size) * out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(time_embed_dim, 2 * hidden_size))

    def reinit(self, parent_model: BaseModel | None = None) -> None:
        nn.init.xavier_uniform_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    @property
    def modulation(self) -> nn.Module:
        """Time embedding (b e) -> shift and scale (b 2d). Releases name it differently."""
        return self.adaLN_modulation

    def final_forward(self, logits: Tensor, *, ctx: VideoContext) -> Any:
        layout, sequence = ctx.layout, ctx.sequence
        assert layout is not None
        if sequence is None:
            logits = logits[:, layout.text_length :]
        shift, scale = self.modulation(ctx.emb).unsqueeze(1).chunk(2, dim=-1)  # b 1 d
        spans = (Span(0, logits.shape[1], 0),) if sequence is None else layout.sample_spans(sequence)
        tokens = self.linear(norm_and_modulate(self.norm_final, logits, shift, scale, spans))  # b thw copq
        if sequence is None:
            return self.unpatchify(tokens, layout.grids[0])
        tokens = sequence.gather(tokens)
        if not layout.is_packed:
            return self.unpatchify(tokens[:, layout.text_length :], layout.grids[0])
        slices = zip(layout.video_slices(), layout.grids)
        return [self.unpatchify(tokens[:, place], grid).squeeze(0) for place, grid in slices]

    def unpatchify(self, tokens: Tensor, grid: Grid) -> Tensor:
        """(b m copq) -> (b t c h w)."""
        (t, h, w), (o, p, q) = grid, self.patch_size
        sizes = {"t": t, "h": h, "w": w, "o": o, "p": p, "q": q}
        return rearrange(tokens, "b (t h w) (c o p q) -> b (t o) c (h p) (w q)", **sizes)
