"""LayerNorm and RMSNorm under SAT's import path, and their forms in which something follows in the same pass."""

import torch
from torch import Tensor, nn

from sat.ops.apex import norm_for
from sat.ops.modulate import Modulation, Spans, TokenRows, fuses_norm, modulate_spans, norm_spans
from sat.ops.rotary import norm_and_turn


class LayerNorm(nn.LayerNorm):
    """torch's LayerNorm, by NVIDIA Apex's kernel on a GPU where Apex is installed.

    A modulation of its output may be handed over, to be done in the same pass.
    """

    def forward(self, hidden: Tensor, modulation: Modulation | None = None) -> Tensor:
        if modulation is not None:
            return norm_spans(hidden, self.weight, self.bias, self.eps, modulation)
        norm = norm_for(hidden, self.weight, self.bias)
        if norm is None:
            return super().forward(hidden)
        return norm(hidden, self.weight, self.bias, self.normalized_shape, self.eps)


class RMSNorm(nn.Module):
    """x · rsqrt(mean(x²) + eps) · weight over the last dimension, float32 or better (Zhang & Sennrich 2019, eq. 4)."""

    def __init__(self, hidden_size: int, eps: float = 1e-6, device=None, dtype=None) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(hidden_size, device=device, dtype=dtype))

    def forward(self, hidden: Tensor, modulation: Modulation | None = None) -> Tensor:
        if modulation is not None:
            return norm_spans(hidden, self.weight, None, self.eps, modulation, is_rms=True)
        wide = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * normed.to(hidden.dtype)


class HeadNorm(nn.LayerNorm):
    """LayerNorm over each head's channels; the turn by rotary positions may be done in the same pass."""

    def forward(self, heads: Tensor, rope: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """heads (b k s e), rope: cos and sin (s e) of `rotate_interleaved` -> (b k s e)."""
        return norm_and_turn(self, heads, rope)


def norm_and_modulate(
    norm: nn.Module, hidden: Tensor, shift: Tensor, scale: Tensor, spans: Spans | TokenRows
) -> Tensor:
    """norm(hidden) · (1 + scale) + shift with each span's rows: hidden (b s d), shift and scale (b r d) -> (b s d).

    The norm is called as a module in any case, since hooks may bring it its weights (ZeRO 3).
    """
    if type(norm) in (LayerNorm, RMSNorm) and not isinstance(spans, TokenRows):
        modulation = Modulation(shift, scale, spans)
        if fuses_norm(hidden, modulation, isinstance(norm, RMSNorm)):
            return norm(hidden, modulation)
    return modulate_spans(norm(hidden), shift, scale, spans)
