"""LayerNorm and RMSNorm under SAT's import path."""

import torch
from torch import Tensor, nn

from sat.ops.apex import norm_for


class LayerNorm(nn.LayerNorm):
    """torch's LayerNorm, by NVIDIA Apex's kernel on a GPU where Apex is installed."""

    def forward(self, hidden: Tensor) -> Tensor:
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

    def forward(self, hidden: Tensor) -> Tensor:
        wide = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * normed.to(hidden.dtype)
