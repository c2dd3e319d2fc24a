"""What a hook does when no mixin speaks up: the plain transformer.

Each default takes the transformer, the context, then the hook's tensors. `attention_fn_default` and
`standard_attention` are also called by users' mixins, by themselves.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sat.errors import HookError
from sat.model.hooks import Context
from sat.mpu.context import SequenceShard
from sat.mpu.mappings import copy_to_model_parallel_region, gather_from_model_parallel_region
from sat.mpu.state import get_parallel_state
from sat.ops.attention import attention, attention_by_scores


def standard_attention(
    query_layer: Tensor,
    key_layer: Tensor,
    value_layer: Tensor,
    attention_mask: Tensor | None,
    attention_dropout: nn.Module | None = None,
    log_attention_weights: Tensor | None = None,
    scaling_attention_score: bool = True,
    **_: Any,
) -> Tensor:
    """Attention with explicit scores: score · mask - 10000 · (1 - mask), so that a fractional mask blends.

    query, key, value (b k s e), all tokens; mask broadcastable to (b k s s), 1 keeps; log_attention_weights is added to
    the scores.
    """
    scale = query_layer.shape[-1] ** -0.5 if scaling_attention_score else 1.0
    dropout_p = _probability(attention_dropout)
    return attention_by_scores(
        query_layer, key_layer, value_layer, attention_mask, dropout_p, scale, log_attention_weights
    )


def attention_fn_default(
    query_layer: Tensor,
    key_layer: Tensor,
    value_layer: Tensor,
    attention_mask: Tensor | None,
    attention_dropout: nn.Module | None = None,
    log_attention_weights: Tensor | None = None,
    scaling_attention_score: bool = True,
    sequence: SequenceShard | None = None,
    cross_attention: bool = False,
    **_: Any,
) -> Tensor:
    """Attention by torch's fused kernels where nothing is masked, by explicit scores elsewhere.

    query (b k s e), key and value (b g m e). Multi-query heads serve consecutive query heads. sequence is the context's
    value of that name, which says what tokens of a shared sequence these are. cross_attention: key and value are an
    encoder's, whole on every rank; the mask has the rows of this rank's queries.
    """
    if cross_attention:
        sequence = None
    elif sequence is None and get_parallel_state().size("cp") > 1:
        raise HookError(
            "this rank holds a part of the tokens (context parallelism), so attention_fn_default needs the context's "
            "`sequence`: let your attention_fn declare `sequence` or **kwargs and hand it on"
        )
    return attention(
        query_layer,
        key_layer,
        value_layer,
        mask=attention_mask,
        dropout_p=_probability(attention_dropout),
        scale=None if scaling_attention_score else 1.0,
        bias=log_attention_weights,
        sequence=sequence,
    )


def _probability(dropout: nn.Module | None) -> float:
    return dropout.p if isinstance(dropout, nn.Dropout) else 0.0


def _attention_fn(
    _: nn.Module, ctx: Context, query: Tensor, key: Tensor, value: Tensor, mask: Any, dropout: Any
) -> Tensor:
    return attention_fn_default(
        query,
        key,
        value,
        mask,
        dropout,
        ctx.get("log_attention_weights"),
        ctx.get("scaling_attention_score", True),
        ctx.get("sequence"),
        ctx.get("cross_attention", False),
    )


def project(linear: Any, hidden: Tensor, ctx: Context) -> Tensor:
    """A projection's output. One that `reads_context`, as adapters do, is handed the context of the call."""
    return linear(hidden, ctx) if getattr(linear, "reads_context", False) else linear(hidden)


def _attention_forward(transformer: Any, ctx: Context, hidden_states: Tensor, mask: Tensor | None) -> Tensor:
    module = transformer.layers[int(ctx.layer_id)].attention
    query, key, value = module.split_qkv(project(module.query_key_value, hidden_states, ctx))
    if transformer.is_rotary_emb:
        query, key = transformer.position_embeddings(query, key, ctx.position_ids)
    dropout = module.attention_dropout if module.training else None
    attended = transformer.hooks.call("attention_fn", ctx, query, key, value, mask, dropout)
    return module.output_dropout(project(module.dense, attended.transpose(1, 2).flatten(2), ctx))


def _cross_attention_forward(
    transformer: Any, ctx: Context, hidden_states: Tensor, cross_attention_mask: Tensor | None, encoder_outputs: Any
) -> Tensor:
    module = transformer.layers[int(ctx.layer_id)].cross_attention
    query = module._transpose_for_scores(project(module.query, hidden_states, ctx))
    if isinstance(encoder_outputs, Tensor):
        key, value = module.split_kv(project(module.key_value, encoder_outputs, ctx))
    else:  # one (key, value) pair for each layer, kept from an earlier call
        key, value = encoder_outputs[int(ctx.layer_id)]
    sequence, mask = ctx.get("sequence"), cross_attention_mask
    if sequence is not None and mask is not None and mask.shape[-2] > 1:
        mask = sequence.take_for_attention(mask, dim=-2)
    dropout = module.attention_dropout if module.training else None
    ctx = ctx.updated({"cross_attention": True, "mem_cross": (key, value)})
    attended = transformer.hooks.call("attention_fn", ctx, query, key, value, mask, dropout)
    return module.output_dropout(project(module.dense, attended.transpose(1, 2).flatten(2), ctx))


def _mlp_forward(transformer: Any, ctx: Context, hidden_states: Tensor) -> Tensor:
    module = transformer.layers[int(ctx.layer_id)].mlp
    expert = ctx.get("expert_id", 0)
    suffix = f"_{expert}" if expert else ""
    inner = project(getattr(module, f"dense_h_to_4h{suffix}"), hidden_states, ctx)
    if module.is_gated_mlp:
        inner = module.activation_func(getattr(module, f"dense_h_to_4h_gate{suffix}")(hidden_states)) * inner
    else:
        inner = module.activation_func(inner)
    return module.dropout(project(getattr(module, f"dense_4h_to_h{suffix}"), inner, ctx))


def _routing_forward(transformer: Any, ctx: Context, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
    raise ValueError("a model with num_experts > 1 needs a mixin with routing_forward: there is no default router")


def _drop_path(branch: Tensor, probability: float, is_training: bool) -> Tensor:
    """Leave the whole branch out of some samples (Huang et al. 2016), scaling the rest up."""
    if probability == 0.0 or not is_training:
        return branch
    kept = torch.rand(branch.shape[0], *[1] * (branch.dim() - 1), device=branch.device) >= probability
    return branch * kept / (1.0 - probability)


def _layer_forward(transformer: Any, ctx: Context, hidden_states: Tensor, mask: Tensor | None) -> Tensor:
    layer = transformer.layers[int(ctx.layer_id)]
    branches: list[tuple[nn.Module, Callable[[Tensor], Tensor], nn.Module | None]] = [
        (layer.input_layernorm, lambda x: layer.attention(x, mask, ctx=ctx), getattr(layer, "third_layernorm", None))
    ]
    if layer.is_decoder:
        encoder_outputs, cross_mask, cross_ctx = _take_encoder(ctx)
        if encoder_outputs is not None:
            cross = lambda x: layer.cross_attention(x, cross_mask, encoder_outputs, ctx=cross_ctx)  # noqa: E731
            branches.append((layer.post_cross_attention_layernorm, cross, None))
    branches.append(
        (layer.post_attention_layernorm, lambda x: layer.mlp(x, ctx=ctx), getattr(layer, "fourth_layernorm", None))
    )

    if layer.layernorm_order == "post":
        norms = [norm for norm, _, _ in branches]
        if len(branches) == 3:  # the second norm of a post-order decoder is the MLP's, the third the cross attention's
            norms = [norms[0], norms[2], norms[1]]
        for norm, (_, branch, _) in zip(norms, branches):
            hidden_states = norm(hidden_states)
            hidden_states = hidden_states + _drop_path(branch(hidden_states), layer.drop_path, layer.training)
        return hidden_states
    for norm, branch, output_norm in branches:
        output = branch(norm(hidden_states))
        if output_norm is not None:
            output = output_norm(output)
        hidden_states = hidden_states + _drop_path(output, layer.drop_path, layer.training)
    return hidden_states


def _take_encoder(ctx: Context) -> tuple[Any, Any, Context]:
    """What a decoder layer attends to, its mask, and the context without the two (they travel by position)."""
    values = ctx.named()
    if "encoder_outputs" not in values:
        raise ValueError(
            "a decoder layer needs encoder_outputs=... in the model's forward (None skips cross attention)"
        )
    encoder_outputs, cross_mask = values.pop("encoder_outputs"), values.pop("cross_attention_mask", None)
    return encoder_outputs, cross_mask, Context(values)


def _word_embedding_forward(transformer: Any, ctx: Context, input_ids: Tensor) -> Tensor:
    return transformer.word_embeddings(input_ids)


def _position_embedding_forward(transformer: Any, ctx: Context, position_ids: Tensor) -> Tensor | None:
    return None if transformer.is_rotary_emb else transformer.position_embeddings(position_ids)


def _final_forward(transformer: Any, ctx: Context, hidden_states: Tensor) -> Tensor:
    sequence = ctx.get("sequence")
    if sequence is not None:
        hidden_states = sequence.gather(hidden_states)
    table = transformer.word_embeddings
    group = getattr(table, "group", None)
    logits = F.linear(copy_to_model_parallel_region(hidden_states, group), table.weight)
    if group is None or ctx.get("parallel_output"):
        return logits
    return gather_from_model_parallel_region(logits, group, table.rank_sizes)


DEFAULTS: dict[str, Callable] = {
    "word_embedding_forward": _word_embedding_forward,
    "position_embedding_forward": _position_embedding_forward,
    "layer_forward": _layer_forward,
    "attention_forward": _attention_forward,
    "cross_attention_forward": _cross_attention_forward,
    "attention_fn": _attention_fn,
    "mlp_forward": _mlp_forward,
    "routing_forward": _routing_forward,
    "final_forward": _final_forward,
}
"""Hook name -> what runs when nothing replaces it."""
