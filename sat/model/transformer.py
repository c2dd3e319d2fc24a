"""The transformer: embeddings, layers, final norm. Everything it computes goes through the hooks of its model."""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sat.errors import ConfigError, LayoutError
from sat.model.activations import Activations, Kept, held, run_keeping
from sat.model.defaults import DEFAULTS, standard_attention
from sat.model.hooks import Context, Hooks
from sat.model.layers import BaseTransformerLayer, LayerConfig, with_init
from sat.mpu.context import SequenceShard
from sat.mpu.layers import ColumnParallelLinear, InitMethod, VocabParallelEmbedding, unscaled_init_method
from sat.mpu.state import ParallelState, get_parallel_state
from sat.mpu.utils import gelu, split_tensor_along_last_dim
from sat.ops.layernorm import LayerNorm
from sat.ops.rotary import RotaryEmbedding

# All but BaseTransformer are other modules' own; users' mixins import them from here.
__all__ = [
    "BaseTransformer",
    "BaseTransformerLayer",
    "ColumnParallelLinear",
    "split_tensor_along_last_dim",
    "standard_attention",
]

LAYERNORM_ORDERS = ("pre", "post", "sandwich")
_PLAIN_VOCABULARY = 1000  # smaller tables are not worth splitting over ranks


class BaseTransformer(nn.Module):
    """A stack of layers with SAT's parameter names.

    `layer_factory(config, layer_id, hooks, is_decoder)` builds each layer, for models whose layers hold more.
    `hooks` is the set of chains that the model which owns this transformer has resolved.
    """

    def __init__(
        self,
        num_layers: int,
        vocab_size: int,
        hidden_size: int,
        num_attention_heads: int,
        max_sequence_length: int,
        layernorm_order: str = "pre",
        embedding_dropout_prob: float = 0.0,
        attention_dropout_prob: float = 0.0,
        output_dropout_prob: float = 0.0,
        drop_path: float = 0.0,
        inner_hidden_size: int | None = None,
        hidden_size_per_attention_head: int | None = None,
        cross_hidden_size_per_attention_head: int | None = None,
        checkpoint_activations: bool = False,
        checkpoint_num_layers: int = 1,
        checkpoint_skip_layers: int = 0,
        is_decoder: bool | Sequence[bool] = False,
        cross_attn_hidden_size: int | None = None,
        use_final_layernorm: bool = True,
        layernorm_epsilon: float = 1e-5,
        use_bias: bool = True,
        use_qkv_bias: bool = False,
        num_multi_query_heads: int = 0,
        cross_num_multi_query_heads: int = 0,
        row_parallel_linear_final_bias: bool = True,
        is_gated_mlp: bool = False,
        is_rotary_emb: bool = False,
        parallel_output: bool = False,
        num_experts: int = 1,
        init_method_std: float = 0.02,
        init_method: InitMethod | None = None,
        activation_func: Callable[[Tensor], Tensor] = gelu,
        layernorm: Callable[..., nn.Module] = LayerNorm,
        skip_init: bool = False,
        params_dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        parallel: ParallelState | None = None,
        layer_factory: Callable[..., nn.Module] = BaseTransformerLayer,
    ) -> None:
        super().__init__()
        if layernorm_order not in LAYERNORM_ORDERS:
            raise ConfigError(f"layernorm_order is '{layernorm_order}'; give one of {', '.join(LAYERNORM_ORDERS)}")
        if checkpoint_skip_layers > num_layers - checkpoint_num_layers:
            raise ConfigError(
                f"checkpoint_skip_layers {checkpoint_skip_layers} leaves no group of checkpoint_num_layers "
                f"{checkpoint_num_layers} in {num_layers} layers; lower one of the two"
            )
        if hidden_size_per_attention_head is None and hidden_size % num_attention_heads:
            raise ConfigError(
                f"hidden_size {hidden_size} does not divide by num_attention_heads {num_attention_heads}; "
                "change one, or give hidden_size_per_attention_head"
            )
        self.hidden_size = hidden_size
        self.num_layers = num_layers
        self.num_attention_heads = num_attention_heads
        self.max_sequence_length = max_sequence_length
        self.layernorm_order = layernorm_order
        self.layernorm_epsilon = layernorm_epsilon
        self.hidden_size_per_attention_head = hidden_size_per_attention_head or hidden_size // num_attention_heads
        self.inner_hidden_size = inner_hidden_size or 4 * hidden_size
        self.num_multi_query_heads = num_multi_query_heads
        self.num_experts = num_experts
        self.is_decoder = is_decoder
        self.is_gated_mlp = is_gated_mlp
        self.is_rotary_emb = is_rotary_emb
        self.use_final_layernorm = use_final_layernorm
        self.parallel_output = parallel_output
        self.checkpoint_activations = checkpoint_activations
        self.checkpoint_num_layers = checkpoint_num_layers
        self.checkpoint_skip_layers = checkpoint_skip_layers
        self.activations: Activations | None = None
        """What layers keep for backward; None: as the checkpoint_ arguments say."""
        self._compiled: dict[int, Callable[..., Any]] = {}
        self.hooks = Hooks(self, DEFAULTS)
        self.parallel = get_parallel_state() if parallel is None else parallel
        group, sequence_parallel = self.parallel.group("tp"), self.parallel.sequence_parallel
        if sequence_parallel and num_experts > 1:
            raise LayoutError("sequence_parallel is not available for layers with experts; turn it off")

        embedding_init = init_method or unscaled_init_method(init_method_std)
        factory: dict[str, Any] = {"device": device, "dtype": params_dtype}
        if vocab_size < _PLAIN_VOCABULARY:
            self.word_embeddings: nn.Module = nn.Embedding(vocab_size, hidden_size, **factory)
            if not skip_init:
                embedding_init(self.word_embeddings.weight, module=self, name="word_embeddings")
        else:
            self.word_embeddings = VocabParallelEmbedding(
                vocab_size, hidden_size, params_dtype, embedding_init, skip_init, device, group, sequence_parallel
            )
        if is_rotary_emb:
            self.position_embeddings: nn.Module = RotaryEmbedding(self.hidden_size_per_attention_head, device=device)
        else:
            self.position_embeddings = nn.Embedding(max_sequence_length, hidden_size, **factory)
            if not skip_init:
                embedding_init(self.position_embeddings.weight, module=self, name="position_embeddings")
        self.embedding_dropout = nn.Dropout(embedding_dropout_prob)

        config = LayerConfig(
            hidden_size=hidden_size,
            num_attention_heads=num_attention_heads,
            num_layers=num_layers,
            hidden_size_per_attention_head=hidden_size_per_attention_head,
            num_multi_query_heads=num_multi_query_heads,
            inner_hidden_size=inner_hidden_size,
            layernorm_order=layernorm_order,
            layernorm_epsilon=layernorm_epsilon,
            use_bias=use_bias,
            use_qkv_bias=use_qkv_bias,
            is_gated_mlp=is_gated_mlp,
            num_experts=num_experts,
            attention_dropout_prob=attention_dropout_prob,
            output_dropout_prob=output_dropout_prob,
            drop_path=drop_path,
            row_parallel_linear_final_bias=row_parallel_linear_final_bias,
            cross_attn_hidden_size=cross_attn_hidden_size,
            cross_hidden_size_per_attention_head=cross_hidden_size_per_attention_head,
            cross_num_multi_query_heads=cross_num_multi_query_heads,
            activation_func=activation_func,
            layernorm=layernorm,
            skip_init=skip_init,
            params_dtype=params_dtype,
            device=device,
            group=group,
            sequence_parallel=sequence_parallel,
        )
        config = with_init(config, init_method_std, init_method)
        decoders = [is_decoder] * num_layers if isinstance(is_decoder, bool) else list(is_decoder)
        self.layers = nn.ModuleList(
            layer_factory(config, index, self.hooks, decoders[index]) for index in range(num_layers)
        )
        if use_final_layernorm:
            self.final_layernorm = config.make_norm()

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None,
        attention_mask: Tensor | int | None,
        ctx: Context,
        output_hidden_states: bool = False,
    ) -> list[Any]:
        """Embed, run the layers, norm, finish. Returns the final output, then one dict for each layer.

        input_ids (b, ...); position_ids (s,) or (b s); attention_mask: None (every token sees all), a negative number
        (lower triangle), or a tensor of ones and zeros, (s s) or (b 1 s s).
        """
        carried: dict[str, Any] = {}
        embedding_ctx = ctx.updated({"output_cross_layer": carried})
        hidden = self.hooks.call("word_embedding_forward", embedding_ctx, input_ids)
        self._check_positions(position_ids, hidden)
        positions = self.hooks.call("position_embedding_forward", embedding_ctx, position_ids)
        if positions is not None:
            hidden = hidden + positions
        mask = _expand_mask(attention_mask, hidden)
        sequence = ctx.get("sequence") or SequenceShard.of(hidden.shape[1], self.parallel)
        ctx = ctx.updated({"position_ids": position_ids})
        if sequence is not None:
            ctx = ctx.updated({"sequence": sequence, "position_ids": _share_positions(position_ids, sequence)})
            embedding_ctx = embedding_ctx.updated({"sequence": sequence})
            hidden = sequence.take(hidden)
        hidden = self.embedding_dropout(hidden)

        outputs: list[Any] = []
        for group, kept in self._layer_groups():
            kept = kept if self.training else "all"
            run = self._compiled.get(group[0], BaseTransformer._run_group)
            with held(kept):
                hidden, group_outputs, carried = run(
                    self, kept, group, hidden, mask, ctx, carried, output_hidden_states
                )
            outputs.extend(group_outputs)

        if self.use_final_layernorm:
            hidden = self.final_layernorm(hidden)
        final_ctx = embedding_ctx.without("output_cross_layer").updated({"parallel_output": self.parallel_output})
        return [self.hooks.call("final_forward", final_ctx, hidden), *outputs]

    def compile_layers(self, **options: Any) -> None:
        """Let torch compile each layer at its next call. A second set of sizes compiles it once more, for all sizes.

        options: of torch.compile. Each layer is a graph of its own, whose code torch's cache has after the first.
        """
        if "isolate_recompiles" not in inspect.signature(torch.compile).parameters:
            raise ConfigError(f"compiled layers need torch 2.13 or later, not {torch.__version__}; set compile: false")
        options["isolate_recompiles"] = True  # else layers share the number of graphs that torch makes of one function
        self._compiled = {
            index: torch.compile(BaseTransformer._run_group, **options) for index in range(self.num_layers)
        }

    @property
    def compiles_layers(self) -> bool:
        """Whether layers are compiled."""
        return bool(self._compiled)

    def _run_group(self, kept: Kept, *arguments: Any) -> Any:
        """`_run_layers`, of which only so much is kept for backward."""
        return run_keeping(kept, self._run_layers, *arguments)

    def _run_layers(
        self,
        group: Sequence[int],
        hidden: Tensor,
        mask: Tensor | None,
        ctx: Context,
        carried: dict[str, Any],
        keep_hidden: bool,
    ) -> tuple[Tensor, list[dict[str, Any]], dict[str, Any]]:
        """Run some layers. What a layer puts into `output_cross_layer` is among the next layer's context values."""
        outputs = []
        for index in group:
            this_layer: dict[str, Any] = {}
            next_layer: dict[str, Any] = {}
            own = {"layer_id": index, "output_this_layer": this_layer, "output_cross_layer": next_layer}
            hidden = self.layers[index](hidden, mask, ctx=ctx.updated({**carried, **own}))
            if keep_hidden:
                this_layer["hidden_states"] = hidden
            outputs.append(this_layer)
            carried = next_layer
        return hidden, outputs, carried

    def _layer_groups(self) -> list[tuple[tuple[int, ...], Kept]]:
        """The layers in groups, and what each group keeps for backward in training."""
        activations = self.activations or Activations("inputs" if self.checkpoint_activations else "all")
        return activations.groups(self.num_layers, self.checkpoint_num_layers, self.checkpoint_skip_layers)

    def layers_that_keep(self, *kept: Kept) -> int:
        """How many layers keep one of these in training."""
        return sum(len(group) for group, own in self._layer_groups() if own in kept)

    def _check_positions(self, position_ids: Tensor | None, hidden: Tensor) -> None:
        if self.hooks.overridden("position_embedding_forward") or position_ids is None:
            return
        if position_ids.dim() > 2 or position_ids.shape[-1] != hidden.shape[1]:
            raise ValueError(
                f"position_ids has shape {tuple(position_ids.shape)}; "
                f"give ({hidden.shape[1]},) or (batch, {hidden.shape[1]})"
            )


def _share_positions(position_ids: Tensor | None, sequence: SequenceShard) -> Tensor | None:
    """The positions of the tokens that this rank's attention holds."""
    return None if position_ids is None else sequence.take_for_attention(position_ids, dim=position_ids.dim() - 1)


def _expand_mask(mask: Tensor | int | None, hidden: Tensor) -> Tensor | None:
    """The mask as a tensor of the hidden states' dtype, or None where every token sees all."""
    if mask is None:
        return None
    if isinstance(mask, int):
        if mask >= 0:
            raise ValueError(f"attention_mask is {mask}; a number must be negative and means a lower triangle")
        length = hidden.shape[1]
        return torch.ones(length, length, dtype=hidden.dtype, device=hidden.device).tril()
    if mask.dim() not in (2, 4) or (mask.dim() == 4 and mask.shape[1] != 1):
        raise ValueError(f"attention_mask has shape {tuple(mask.shape)}; give (s, s) or (batch, 1, s, s)")
    return mask.to(hidden.dtype)
