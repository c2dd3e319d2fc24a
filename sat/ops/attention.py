"""Attention over (batch, heads, tokens, head_dim). One entry for all callers and all layouts.

Letters: b batch, k query heads, g key and value heads, s tokens, e head size.
"""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sat.mpu.context import SequenceShard, exchange_to_heads, exchange_to_tokens
from sat.mpu.shards import split_evenly
from sat.ops.packed_attention import packed_attention
from sat.ops.ring_attention import HALF, HIDDEN_SCORE, ring_attention

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(query, key, value) -> attended values, of whole sequences."""


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None = None,
    dropout_p: float = 0.0,
    scale: float | None = None,
    bias: Tensor | None = None,
    sequence: SequenceShard | None = None,
) -> Tensor:
    """softmax(q kᵀ · scale) v (Vaswani et al. 2017, eq. 1).

    query (b k s e), key and value (b g m e) with g heads that divide k (grouped heads serve consecutive query heads).
    mask: broadcastable to (b k s m); 1 keeps, 0 hides, what lies between blends, by SAT's rule
    score · mask - 10000 · (1 - mask). bias: added to the scores. scale defaults to 1/√e.
    sequence: which of the tokens this rank holds; mask and bias then are whole. -> (b k s e).
    """
    scale = query.shape[-1] ** -0.5 if scale is None else scale

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        if mask is None and bias is None:
            grouped = key.shape[1] != query.shape[1]
            return F.scaled_dot_product_attention(
                query, key, value, dropout_p=dropout_p, scale=scale, enable_gqa=grouped
            )
        return attention_by_scores(query, key, value, mask, dropout_p, scale, bias)

    if sequence is None:
        return attend(query, key, value)
    return _shared_attention(query, key, value, sequence, attend, mask, dropout_p, scale, bias)


def attention_by_scores(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dropout_p: float,
    scale: float,
    bias: Tensor | None = None,
) -> Tensor:
    """Attention with explicit scores; see `attention`."""
    repeats = query.shape[1] // key.shape[1]
    if repeats > 1:
        key, value = (x.repeat_interleave(repeats, dim=1) for x in (key, value))
    scores = torch.matmul(query * scale, key.mT)
    if bias is not None:
        scores = scores + bias
    if mask is not None:
        scores = scores * mask + HIDDEN_SCORE * (1.0 - mask)
    weights = F.softmax(scores, dim=-1)
    return torch.matmul(F.dropout(weights, dropout_p) if dropout_p else weights, value)


def _shared_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sequence: SequenceShard,
    attend: Attend,
    mask: Tensor | None,
    dropout_p: float,
    scale: float,
    bias: Tensor | None,
) -> Tensor:
    """Attention where each rank of cp holds a share of the tokens: heads are exchanged, keys go round, or both."""
    heads = query.shape[1]
    if key.shape[1] != heads:
        key, value = (x.repeat_interleave(heads // x.shape[1], dim=1) for x in (key, value))
    ulysses, ring = sequence.parallel.group("ulysses"), sequence.parallel.group("ring")
    own_heads = split_evenly(heads, sequence.parallel.size("ulysses"))
    if ulysses is not None:
        query, key, value = exchange_to_heads(torch.stack([query, key, value]), ulysses, own_heads).unbind(0)
    if ring is not None:
        if dropout_p or bias is not None:
            what = "attention dropout" if dropout_p else "log_attention_weights"
            raise ValueError(f"{what} is not available where keys go round a ring; use context_parallel_mode ulysses")
        attended = ring_attention(query, key, value, ring, sequence.bounds, scale, mask)
    elif sequence.marks is not None and mask is None and bias is None and not dropout_p:
        attended = attend_packed(query, key, value, sequence, scale)
    else:
        attended = attend_in_segments(query, key, value, sequence.bounds, attend)
    if ulysses is not None:
        attended = exchange_to_tokens(attended.unsqueeze(0), ulysses, own_heads).squeeze(0)
    return attended


def attend_packed(query: Tensor, key: Tensor, value: Tensor, sequence: SequenceShard, scale: float) -> Tensor:
    """Attention of each sample of a packed row to itself (b k s e): by one kernel where there is one for the device."""
    marks = sequence.marks
    assert marks is not None
    if query.shape[1] == 0:
        return query
    if query.device.type in ("cpu", "meta"):
        return packed_attention(query, key, value, marks, scale)[0]
    kernel = load_varlen_kernel() if query.dtype in HALF and len(query) == 1 else None
    if kernel is not None:
        rows = [x[0].transpose(0, 1) for x in (query, key, value)]  # s k e each
        attended = kernel(*rows, marks, marks, sequence.longest, sequence.longest, scale=scale)
        padding = query.shape[2] - sequence.length
        return F.pad(attended[: sequence.length], (0, 0, 0, 0, 0, padding)).transpose(0, 1).unsqueeze(0)
    attend = partial(F.scaled_dot_product_attention, scale=scale)
    return attend_in_segments(query, key, value, sequence.bounds, attend)


def load_varlen_kernel() -> Callable[..., Any] | None:
    """torch's attention over samples of many lengths. Importing it takes seconds, as it brings torch's compiler."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:  # torch before 2.10
        return None
    return varlen_attn


def attend_in_segments(query: Tensor, key: Tensor, value: Tensor, bounds: Sequence[int], attend: Attend) -> Tensor:
    """Attention within each segment between neighbouring bounds, (b k s e); what lies past the last one gives zeros."""
    if query.shape[1] == 0:
        return query
    parts = [
        attend(query[:, :, low:high], key[:, :, low:high], value[:, :, low:high]) for low, high in pairwise(bounds)
    ]
    attended = torch.cat(parts, dim=2) if len(parts) > 1 else parts[0]
    return F.pad(attended, (0, 0, 0, query.shape[2] - bounds[-1]))
