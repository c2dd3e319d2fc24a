"""Numbers as sinusoids of falling frequency: times and sizes for a network to read."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def sinusoid(positions: Tensor, size: int) -> Tensor:
    """[cos(p f_0) .. | sin(p f_0) ..] with f_k = 10000^(-2k/size): (b,) -> (b, size) float32 (Ho et al. 2020)."""
    half = size // 2
    frequencies = torch.exp(
        -math.log(10000.0) * torch.arange(half, dtype=torch.float32, device=positions.device) / half
    )
    angles = positions.float().unsqueeze(-1) * frequencies
    return F.pad(torch.cat([angles.cos(), angles.sin()], dim=-1), (0, size % 2))
