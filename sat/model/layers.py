"""The modules of a transformer layer: parameters and sizes. What they compute is in `defaults.py`, behind the hooks.

Letters: b batch, s tokens, d hidden size, k heads, g key/value heads, e head size.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sat.errors import LayoutError
from sat.model.hooks import Context, Hooks
from sat.mpu.layers import (
    ColumnParallelLinear,
    InitMethod,
    RowParallelLinear,
    scaled_init_method,
    unscaled_init_method,
)
from sat.mpu.mappings import gather_from_model_parallel_region
from sat.mpu.shards import divide, split_evenly
from sat.mpu.utils import gelu
from sat.ops.layernorm import LayerNorm


@dataclass(frozen=True, kw_only=True)
class LayerConfig:
    """Sizes and switches of one transformer layer."""

    hidden_size: int
    num_attention_heads: int
    num_layers: int = 1
    hidden_size_per_attention_head: int | None = None
    num_multi_query_heads: int = 0
    inner_hidden_size: int | None = None
    layernorm_order: str = "pre"
    layernorm_epsilon: float = 1e-5
    use_bias: bool = True
    use_qkv_bias: bool = False
    is_gated_mlp: bool = False
    num_experts: int = 1
    attention_dropout_prob: float = 0.0
    output_dropout_prob: float = 0.0
    drop_path: float = 0.0
    row_parallel_linear_final_bias: bool = True
    cross_attn_hidden_size: int | None = None
    cross_hidden_size_per_attention_head: int | None = None
    cross_num_multi_query_heads: int = 0
    activation_func: Callable[[Tensor], Tensor] = gelu
    layernorm: Callable[..., nn.Module] = LayerNorm
    init_method: InitMethod | None = None
    output_init_method: InitMethod | None = None
    skip_init: bool = False
    params_dtype: torch.dtype | None = None
    device: torch.device | str | None = None
    group: dist.ProcessGroup | None = None
    sequence_parallel: bool = False

    @property
    def world_size(self) -> int:
        """Ranks that share a layer."""
        return 1 if self.group is None else self.group.size()

    def make_norm(self) -> nn.Module:
        """A norm over the hidden size."""
        norm = self.layernorm(self.hidden_size, eps=self.layernorm_epsilon)
        return norm.to(device=self.device, dtype=self.params_dtype)

    def column(self, inputs: int, outputs: int, name: str, module: nn.Module, **options: Any) -> ColumnParallelLinear:
        """A projection whose outputs are split over the tensor-parallel group."""
        return ColumnParallelLinear(
            inputs,
            outputs,
            gather_output=False,
            init_method=self.init_method,
            name=name,
            module=module,
            **{**self._linear(), **options},
        )

    def row(self, inputs: int, outputs: int, name: str, module: nn.Module, **options: Any) -> RowParallelLinear:
        """A projection whose inputs are split over the tensor-parallel group."""
        return RowParallelLinear(
            inputs,
            outputs,
            bias=self.use_bias,
            input_is_parallel=True,
            init_method=self.output_init_method,
            name=name,
            module=module,
            final_bias=self.row_parallel_linear_final_bias,
            **{**self._linear(), **options},
        )

    def _linear(self) -> dict[str, Any]:
        return {
            "skip_init": self.skip_init,
            "params_dtype": self.params_dtype,
            "device": self.device,
            "group": self.group,
            "sequence_parallel": self.sequence_parallel,
        }


class _Attention(nn.Module):
    """Head sizes and dropouts that self and cross attention share.

    Tensor parallelism deals whole key and value heads with the query heads that they serve. Where there are fewer of
    them than ranks, it deals query heads, and channels of the key and value projections; each rank then gathers the
    keys and values of the heads that its queries attend to. So every parameter has one owner at any group size.
    """

    def __init__(self, config: LayerConfig, head_dim: int | None, num_kv_heads: int, hooks: Hooks) -> None:
        super().__init__()
        self.hooks = hooks
        self.hidden_size = config.hidden_size
        self.num_attention_heads = config.num_attention_heads
        self.num_multi_query_heads = num_kv_heads
        self.hidden_size_per_attention_head = head_dim or divide(
            config.hidden_size, config.num_attention_heads, "hidden_size over num_attention_heads:"
        )
        if self.num_attention_heads < config.world_size:
            raise LayoutError(
                f"model_parallel_size {config.world_size} is more than the {self.num_attention_heads} heads; "
                "every rank needs one of its own"
            )
        self.group = config.group
        self.queries_per_kv_head = divide(config.num_attention_heads, self.num_kv_heads, "num_attention_heads")
        rank = 0 if config.group is None else config.group.rank()
        self.kv_rank_sizes: list[int] | None = None
        """Key channels of each rank, where heads are torn apart."""
        if self.num_kv_heads >= config.world_size:
            own_kv_heads = split_evenly(self.num_kv_heads, config.world_size)[rank]
            self.num_attention_heads_per_partition = own_kv_heads * self.queries_per_kv_head
        else:
            own_heads = split_evenly(self.num_attention_heads, config.world_size)
            self.num_attention_heads_per_partition = own_heads[rank]
            self.kv_rank_sizes = split_evenly(
                self.num_kv_heads * self.hidden_size_per_attention_head, config.world_size
            )
            first = sum(own_heads[:rank])
            self.kv_heads_needed = self._find_kv_heads(range(first, first + own_heads[rank]))
            own_kv_heads = len(self.kv_heads_needed)
        self.num_multi_query_heads_per_partition = own_kv_heads if num_kv_heads else 0
        self.inner_hidden_size = self.num_attention_heads * self.hidden_size_per_attention_head
        self.hidden_size_per_partition = self.num_attention_heads_per_partition * self.hidden_size_per_attention_head
        self.attention_dropout = nn.Dropout(config.attention_dropout_prob)
        self.output_dropout = nn.Dropout(config.output_dropout_prob)

    @property
    def num_kv_heads(self) -> int:
        """Key/value heads of the whole model: as many as query heads, or fewer with multi-query attention."""
        return self.num_multi_query_heads or self.num_attention_heads

    @property
    def query_split(self) -> dict[str, Any]:
        """How query channels are dealt: those of the heads that one key and value head serves stay together."""
        head_dim = self.hidden_size_per_attention_head
        return {"unit": self.queries_per_kv_head * head_dim, "fine_units": (head_dim,)}

    def _find_kv_heads(self, query_heads: Iterable[int]) -> list[int]:
        """The key and value heads of some query heads: one for equally many of them, or else one for each."""
        counts = Counter(head // self.queries_per_kv_head for head in query_heads)
        return list(counts) if len(set(counts.values())) == 1 else list(counts.elements())

    def split_kv(self, both: Tensor) -> tuple[Tensor, Tensor]:
        """Projected keys and values, side by side (b s f), as key and value (b g s e) of this rank's query heads."""
        key, value = both.chunk(2, dim=-1)
        if self.kv_rank_sizes is not None:
            stacked = gather_from_model_parallel_region(
                torch.stack([key, value]), self.group, self.kv_rank_sizes, sum_gradients=True
            )
            heads = stacked.unflatten(-1, (-1, self.hidden_size_per_attention_head))[..., self.kv_heads_needed, :]
            key, value = heads.flatten(-2).unbind(0)
        return self._transpose_for_scores(key), self._transpose_for_scores(value)

    def _transpose_for_scores(self, tensor: Tensor) -> Tensor:
        """(b s heads·e) -> (b heads s e)."""
        return tensor.unflatten(-1, (-1, self.hidden_size_per_attention_head)).transpose(1, 2)


class SelfAttention(_Attention):
    """Fused q, k, v projection (`query_key_value`) and output projection (`dense`)."""

    def __init__(self, config: LayerConfig, layer_id: int, hooks: Hooks) -> None:
        super().__init__(config, config.hidden_size_per_attention_head, config.num_multi_query_heads, hooks)
        self.layer_id = layer_id
        heads, kv_heads = self.num_attention_heads, self.num_kv_heads
        self.stride: int | list[int] = 3 if heads == kv_heads else [heads, kv_heads, kv_heads]
        self.query_key_value = config.column(
            config.hidden_size,
            (heads + 2 * kv_heads) * self.hidden_size_per_attention_head,
            "query_key_value",
            self,
            bias=config.use_bias or config.use_qkv_bias,
            stride=self.stride,
            unit=self.hidden_size_per_attention_head,
            fine_units=(self.hidden_size_per_attention_head, 1, 1),
        )
        self.dense = config.row(self.inner_hidden_size, config.hidden_size, "dense", self, **self.query_split)

    def split_qkv(self, mixed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The output of `query_key_value` (b s f) as query (b k s e), key and value (b g s e)."""
        query_size = self.hidden_size_per_partition
        query, both = mixed.split([query_size, mixed.shape[-1] - query_size], dim=-1)
        return self._transpose_for_scores(query), *self.split_kv(both)

    def forward(
        self, hidden_states: Tensor, mask: Tensor | None, *, ctx: Context | None = None, **values: Any
    ) -> Tensor:
        """Run the `attention_forward` hook. SAT mixins pass the context's values by name, ours pass `ctx`."""
        return self.hooks.call("attention_forward", ctx or Context(values), hidden_states, mask)


class CrossAttention(_Attention):
    """Attention from the hidden states to an encoder's: `query`, fused `key_value`, `dense`."""

    def __init__(self, config: LayerConfig, layer_id: int, hooks: Hooks) -> None:
        super().__init__(config, config.cross_hidden_size_per_attention_head, config.cross_num_multi_query_heads, hooks)
        self.layer_id = layer_id
        bias = config.use_bias or config.use_qkv_bias
        self.query = config.column(
            config.hidden_size, self.inner_hidden_size, "query", self, bias=bias, **self.query_split
        )
        self.key_value = config.column(
            config.cross_attn_hidden_size or config.hidden_size,
            2 * self.num_kv_heads * self.hidden_size_per_attention_head,
            "key_value",
            self,
            bias=bias,
            stride=2,
            unit=self.hidden_size_per_attention_head,
            fine_units=(1, 1),
            sequence_parallel=False,  # the encoder's states are whole on every rank
        )
        self.dense = config.row(self.inner_hidden_size, config.hidden_size, "dense", self, **self.query_split)

    def forward(
        self,
        hidden_states: Tensor,
        cross_attention_mask: Tensor | None,
        encoder_outputs: Tensor | Sequence,
        *,
        ctx: Context | None = None,
        **values: Any,
    ) -> Tensor:
        """Run the `cross_attention_forward` hook."""
        return self.hooks.call(
            "cross_attention_forward", ctx or Context(values), hidden_states, cross_attention_mask, encoder_outputs
        )


class MLP(nn.Module):
    """Up, activation, down; gated: act(gate) · up. With experts, expert 0 has the plain names, others the suffix _i."""

    def __init__(self, config: LayerConfig, layer_id: int, hooks: Hooks) -> None:
        super().__init__()
        self.layer_id = layer_id
        self.hooks = hooks
        self.hidden_size = config.hidden_size
        self.inner_hidden_size = config.inner_hidden_size or 4 * config.hidden_size
        self.activation_func = config.activation_func
        self.is_gated_mlp = config.is_gated_mlp
        self.num_experts = config.num_experts
        self.dropout = nn.Dropout(config.output_dropout_prob)
        for expert in range(config.num_experts):
            suffix = f"_{expert}" if expert else ""
            sizes = (config.hidden_size, self.inner_hidden_size)
            up = config.column(*sizes, f"dense_h_to_4h{suffix}", self, bias=config.use_bias)
            self.add_module(f"dense_h_to_4h{suffix}", up)
            if config.is_gated_mlp:
                gate = config.column(*sizes, f"dense_h_to_4h_gate{suffix}", self, bias=False)
                self.add_module(f"dense_h_to_4h_gate{suffix}", gate)
            down = config.row(self.inner_hidden_size, config.hidden_size, f"dense_4h_to_h{suffix}", self)
            self.add_module(f"dense_4h_to_h{suffix}", down)

    def forward(self, hidden_states: Tensor, *, ctx: Context | None = None, **values: Any) -> Tensor:
        """Run the `mlp_forward` hook, through the router where there are experts."""
        ctx = ctx or Context(values)
        if self.num_experts == 1:
            return self.hooks.call("mlp_forward", ctx, hidden_states)
        return self._mix_experts(hidden_states, ctx)

    def _mix_experts(self, hidden_states: Tensor, ctx: Context) -> Tensor:
        """Each token goes through its chosen experts; their outputs are summed with the router's weights."""
        weights, chosen = self.hooks.call("routing_forward", ctx, hidden_states)  # (b·s, n) each
        tokens = hidden_states.reshape(-1, hidden_states.shape[-1])
        output = torch.zeros_like(tokens)
        for expert in range(self.num_experts):
            rows, slots = torch.where(chosen == expert)
            expert_ctx = ctx.updated({"expert_id": expert})
            result = self.hooks.call("mlp_forward", expert_ctx, tokens[rows].unsqueeze(0)).squeeze(0)
            output = output.index_add(0, rows, weights[rows, slots].unsqueeze(-1) * result)
        return output.view_as(hidden_states)


class BaseTransformerLayer(nn.Module):
    """Norms, attention and MLP of one layer, in SAT's names."""

    def __init__(self, config: LayerConfig, layer_id: int, hooks: Hooks, is_decoder: bool = False) -> None:
        super().__init__()
        self.layer_id = layer_id
        self.hooks = hooks
        self.is_decoder = is_decoder
        self.layernorm_order = config.layernorm_order
        self.drop_path = config.drop_path
        self.input_layernorm = config.make_norm()
        self.attention = SelfAttention(config, layer_id, hooks)
        self.post_attention_layernorm = config.make_norm()
        if config.layernorm_order == "sandwich":
            self.third_layernorm = config.make_norm()
            self.fourth_layernorm = config.make_norm()
        if is_decoder:
            self.cross_attention = CrossAttention(config, layer_id, hooks)
            self.post_cross_attention_layernorm = config.make_norm()
        self.mlp = MLP(config, layer_id, hooks)

    def forward(
        self, hidden_states: Tensor, mask: Tensor | None, *, ctx: Context | None = None, **values: Any
    ) -> Tensor:
        """Run the `layer_forward` hook for this layer."""
        ctx = ctx or Context({"layer_id": self.layer_id, **values})
        output = self.hooks.call("layer_forward", ctx, hidden_states, mask)
        return output[0] if isinstance(output, tuple) else output


def with_init(config: LayerConfig, std: float, init_method: InitMethod | None) -> LayerConfig:
    """The same config with weights drawn from N(0, std²), residual outputs from N(0, std²/2L), or by a given method."""
    if init_method is not None:
        return replace(config, init_method=init_method, output_init_method=init_method)
    return replace(
        config, init_method=unscaled_init_method(std), output_init_method=scaled_init_method(std, config.num_layers)
    )
