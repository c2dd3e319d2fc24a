"""Rotary position embeddings (Su et al. 2021, arXiv:2104.09864, eq. 34), in the two channel orders in use."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sat.errors import ConfigError
from sat.ops.kernels import triton_kernels


def rotary_frequencies(size: int, base: float = 10000.0, device: torch.device | str | None = None) -> Tensor:
    """base^(-2k/size) for k = 0 .. size/2 - 1, float32."""
    return 1.0 / (base ** (torch.arange(0, size, 2, device=device, dtype=torch.float32) / size))


def split_head_dim(head_dim: int) -> tuple[int, int, int]:
    """Channels of a head that turn with time, row and column: a quarter, three eighths, three eighths."""
    parts = (head_dim // 4, head_dim // 8 * 3, head_dim // 8 * 3)
    if sum(parts) != head_dim or any(part % 2 for part in parts):
        raise ConfigError(f"3D rotary embedding needs a head size that is a multiple of 16, not {head_dim}")
    return parts


def rotary_table_3d(
    grid: Sequence[int],
    head_dim: int,
    base: float = 10000.0,
    device: torch.device | str | None = None,
    coordinates: Sequence[Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """cos and sin of every token of a (t, h, w) grid, each (t·h·w, head_dim), float32, columns fastest.

    coordinates: those of frames (t,), rows (h,) and columns (w,); by default the integers, so that a larger grid only
    adds rows (extrapolation). Each angle stands twice, side by side: the interleaved channel order of
    `rotate_interleaved`.
    """
    if coordinates is None:
        coordinates = [torch.arange(length, dtype=torch.float32) for length in grid]
    angles = []
    for axis, size in enumerate(split_head_dim(head_dim)):
        positions = coordinates[axis].to(device)
        table = torch.outer(positions, rotary_frequencies(size, base, device)).repeat_interleave(2, dim=-1)
        view = [1, 1, 1, size]
        view[axis] = grid[axis]
        angles.append(table.view(view).expand(*grid, size))
    whole = torch.cat(angles, dim=-1).reshape(-1, head_dim)
    return whole.cos(), whole.sin()


def stretched_coordinates(size: Sequence[int], trained: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Rows (h,) and columns (w,) of a grid of that size laid into the middle of the trained one, its aspect kept.

    float32. As diffusers does for CogVideoX 1.0: where the grid does not reach both edges, spacing and start are not
    those of equal steps, because its end is scaled and its start is not.
    """
    (height, width), (rows, columns) = trained, size
    if rows * width > height * columns:
        covered = (height, round(height / rows * columns))
    else:
        covered = (round(width / columns * rows), width)
    ends = []
    for length, own, whole in zip(size, covered, trained):
        start = round((whole - own) / 2.0)
        ends.append(torch.linspace(start, (start + own) * (length - 1) / length, length, dtype=torch.float32))
    return ends[0], ends[1]


class _Turn(torch.autograd.Function):
    """The turn as a product of complex numbers: one pass, and nothing kept but the tables."""

    @staticmethod
    def forward(ctx, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _times_angles(x, cos, sin)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _times_angles(grad, cos, -sin), None, None


def _times_angles(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    pairs = torch.view_as_complex(x.contiguous().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * torch.complex(cos[..., ::2], sin[..., ::2])).flatten(-2)


class _NormAndTurn(torch.autograd.Function):
    """Triton's pass over heads (b k s e). eps None: no norm; cos None: no turn."""

    @staticmethod
    def forward(
        ctx,
        heads: Tensor,
        eps: float | None,
        weight: Tensor | None,
        bias: Tensor | None,
        cos: Tensor | None,
        sin: Tensor | None,
    ) -> Tensor:
        ctx.kernels, ctx.eps = triton_kernels(heads), eps
        ctx.save_for_backward(heads if eps is not None else None, weight, cos, sin)
        return ctx.kernels.heads_forward(heads, eps, weight, bias, cos, sin)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        heads, weight, cos, sin = ctx.saved_tensors
        of_heads, of_weight, of_bias = ctx.kernels.heads_backward(grad, heads, ctx.eps, weight, cos, sin)
        return of_heads, None, of_weight, of_bias, None, None


def rotate_interleaved(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn channel pairs (2k, 2k+1) of x (... s e) by the angles whose cos and sin (s e) are given, each twice."""
    if x.dim() == 4 and triton_kernels(x, cos, sin) is not None:
        return _NormAndTurn.apply(x, None, None, None, cos, sin)
    if x.dtype in (torch.float32, torch.float64) and not torch.compiler.is_compiling():
        return _Turn.apply(x, cos, sin)
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack((-odd, even), dim=-1).flatten(-2)
    return x * cos + turned * sin


def norm_and_turn(norm: nn.LayerNorm, heads: Tensor, rope: tuple[Tensor, Tensor] | None) -> Tensor:
    """LayerNorm over each head's channels with the norm's weights, then `rotate_interleaved`: heads (b k s e)."""
    weights, tables = (norm.weight, norm.bias), rope or (None, None)
    given = [tensor for tensor in (heads, *weights, *tables) if tensor is not None]
    if triton_kernels(*given) is not None:
        return _NormAndTurn.apply(heads, norm.eps, *weights, *tables)
    normed = F.layer_norm(heads, norm.normalized_shape, *weights, norm.eps)
    return normed if rope is None else rotate_interleaved(normed, *rope)


def rotate_half_split(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn channel pairs (k, k + e/2) of x (... s e) by the angles whose cos and sin (... s e) are given."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


class RotaryEmbedding(nn.Module):
    """Half-split rotary positions for language models; the frequencies are a stored buffer, as in SAT's files."""

    inv_freq: Tensor

    def __init__(self, head_dim: int, base: float = 10000.0, device: torch.device | str | None = None) -> None:
        super().__init__()
        self.register_buffer("inv_freq", rotary_frequencies(head_dim, base, device))

    def forward(self, query: Tensor, key: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Turn query (b k s e) and key (b g s e) by their positions, (s,) or (b s)."""
        angles = (position_ids.unsqueeze(-1).float() * self.inv_freq).repeat(*[1] * position_ids.dim(), 2)
        angles = angles.unsqueeze(-3)  # 1 s e, or b 1 s e
        cos, sin = angles.cos().to(query.dtype), angles.sin().to(query.dtype)
        return rotate_half_split(query, cos, sin), rotate_half_split(key, cos, sin)
