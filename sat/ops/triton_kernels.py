"""Fused operations as Triton kernels. Their plain forms stand in `modulate.py`, `rotary.py` and `adam.py`.

Letters: b batch, s tokens, d hidden size, k heads, e head size, r rows of a table, c chunks. All kernels compute in
float32 and round once, when they store. Sums over tokens (gradients of rows and of weights) are taken first within a
program, in the order of the tokens, then over programs in a fixed order: no atomics, so the same bits every time.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sat.mpu.context import numbers_on
from sat.ops.modulate import Spans

VERSION = triton.__version__

CHUNK = 32
"""Tokens of a program of the operations by span; its sums in memory take a twelfth of what tokens do in bfloat16."""
HEAD_TOKENS = 64
"""Tokens of one head in a program."""
_SUMMED_CHUNKS, _SUMMED_COLUMNS = 32, 64
_ADAM_BLOCK = 1024


def _launch(kernel: Any, grid: tuple[int, ...], like: Tensor, *arguments: Any, **constants: Any) -> None:
    """Start a kernel on the device of `like`, which need not be the current one."""
    with torch.cuda.device_of(like):
        kernel[grid](*arguments, **constants)


def _block(width: int) -> dict[str, int]:
    """A program's columns, and its warps: 16 numbers a thread at the widths of the released models."""
    block = triton.next_power_of_2(width)
    return {"BLOCK": block, "num_warps": min(max(block // 512, 1), 16)}


# Norm and modulation, gated residual: a program takes the tokens of a chunk one by one.


@lru_cache(maxsize=64)
def _chunks(spans: Spans, rows: int, device: torch.device) -> Tensor:
    """Spans in parts of at most CHUNK tokens: start, stop and row of each, (c 3) int32. Samples have `rows` each."""
    numbers: list[int] = []
    for span in spans:
        row = span.row + rows * (span.sample or 0)
        for start in range(span.start, span.stop, CHUNK):
            numbers += (start, min(start + CHUNK, span.stop), row)
    return numbers_on(device, numbers).to(device).view(len(numbers) // 3, 3)


class _Work:
    """How tokens (b s d) and a table (b r d), or (k r d) of k samples in one sequence, are laid over programs."""

    def __init__(self, tokens: Tensor, table: Tensor, spans: Spans) -> None:
        self.batch, self.length, self.width = tokens.shape
        self.is_shared = any(span.sample is not None for span in spans)
        self.chunks = _chunks(tuple(spans), table.shape[1], tokens.device)
        self.rows = table.shape[0] * table.shape[1] if self.is_shared else table.shape[1]
        self.table_stride = 0 if self.is_shared else self.rows * self.width
        self.grid = (len(self.chunks), self.batch)

    def partial(self, like: Tensor) -> Tensor:
        """Room for the sums of all chunks (b c d)."""
        return torch.empty(self.batch, len(self.chunks), self.width, device=like.device, dtype=torch.float32)

    def summed(self, partial: Tensor, table: Tensor) -> Tensor:
        """Sums of chunks -> a gradient of the table, like it."""
        sums = partial.new_empty(self.batch, self.rows, self.width)
        grid = (self.rows, triton.cdiv(self.width, _SUMMED_COLUMNS), self.batch)
        blocks = {"CHUNKS": _SUMMED_CHUNKS, "COLUMNS": _SUMMED_COLUMNS}
        _launch(
            _sum_kernel, grid, partial, partial, sums, self.chunks, len(self.chunks), self.rows, self.width, **blocks
        )
        if self.is_shared:
            sums = sums.sum(0)
        return sums.view_as(table).to(table.dtype)


@triton.jit(do_not_specialize=["num_chunks", "rows"])
def _sum_kernel(partial, sums, chunks, num_chunks, rows, width, CHUNKS: tl.constexpr, COLUMNS: tl.constexpr):
    row, sample = tl.program_id(0), tl.program_id(2)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = columns < width
    total = tl.zeros([COLUMNS], dtype=tl.float32)
    for first in range(0, num_chunks, CHUNKS):
        own = first + tl.arange(0, CHUNKS)
        is_own = tl.load(chunks + own * 3 + 2, mask=own < num_chunks, other=-1) == row
        place = (sample.to(tl.int64) * num_chunks + own)[:, None] * width + columns[None, :]
        total += tl.sum(tl.load(partial + place, mask=is_own[:, None] & inside[None, :], other=0.0), axis=0)
    tl.store(sums + (sample.to(tl.int64) * rows + row) * width + columns, total, mask=inside)


@triton.jit(do_not_specialize=["length"])
def _norm_forward_kernel(
    hidden, gain, offset, output, mean, rstd, chunks, length, width, table_stride, eps,
    IS_CENTRED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    chunk, sample = tl.program_id(0), tl.program_id(1).to(tl.int64)
    start, stop, row = tl.load(chunks + chunk * 3), tl.load(chunks + chunk * 3 + 1), tl.load(chunks + chunk * 3 + 2)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    table = sample * table_stride + row * width + columns
    own_gain = tl.load(gain + table, mask=inside, other=0.0).to(tl.float32)
    own_offset = tl.load(offset + table, mask=inside, other=0.0).to(tl.float32)
    for token in range(start, stop):
        place = sample * length + token
        x = tl.load(hidden + place * width + columns, mask=inside, other=0.0).to(tl.float32)
        if IS_CENTRED:
            middle = tl.sum(x, axis=0) / width
            x = tl.where(inside, x - middle, 0.0)
            tl.store(mean + place, middle)
        spread = 1.0 / tl.sqrt(tl.sum(x * x, axis=0) / width + eps)
        tl.store(rstd + place, spread)
        tl.store(output + place * width + columns, x * spread * own_gain + own_offset, mask=inside)


@triton.jit(do_not_specialize=["length"])
def _norm_backward_kernel(
    grad, hidden, mean, rstd, gain, grad_hidden, gain_sums, offset_sums, chunks, length, width, table_stride,
    IS_CENTRED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    chunk, sample = tl.program_id(0), tl.program_id(1).to(tl.int64)
    start, stop, row = tl.load(chunks + chunk * 3), tl.load(chunks + chunk * 3 + 1), tl.load(chunks + chunk * 3 + 2)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    own_gain = tl.load(gain + sample * table_stride + row * width + columns, mask=inside, other=0.0).to(tl.float32)
    gain_sum = tl.zeros([BLOCK], dtype=tl.float32)
    offset_sum = tl.zeros([BLOCK], dtype=tl.float32)
    for token in range(start, stop):
        place = sample * length + token
        g = tl.load(grad + place * width + columns, mask=inside, other=0.0).to(tl.float32)
        normed = tl.load(hidden + place * width + columns, mask=inside, other=0.0).to(tl.float32)
        spread = tl.load(rstd + place)
        if IS_CENTRED:
            normed = tl.where(inside, normed - tl.load(mean + place), 0.0)
        normed *= spread
        gain_sum += g * normed
        offset_sum += g
        g *= own_gain
        own = g - normed * (tl.sum(g * normed, axis=0) / width)
        if IS_CENTRED:
            own -= tl.sum(g, axis=0) / width
        tl.store(grad_hidden + place * width + columns, own * spread, mask=inside)
    sums = (sample * tl.num_programs(0) + chunk) * width + columns
    tl.store(gain_sums + sums, gain_sum, mask=inside)
    tl.store(offset_sums + sums, offset_sum, mask=inside)


def norm_forward(
    hidden: Tensor, gain: Tensor, offset: Tensor, spans: Spans, eps: float, is_rms: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """norm(hidden) · gain + offset by span; is_rms: RMSNorm, else LayerNorm.

    hidden (b s d), gain and offset (b r d) -> the same as hidden, and mean and 1 / deviation of each token (b s 1),
    float32.
    """
    hidden, gain, offset = hidden.contiguous(), gain.contiguous(), offset.contiguous()
    work = _Work(hidden, gain, spans)
    output = torch.empty_like(hidden)
    mean, rstd = (torch.empty(*hidden.shape[:2], 1, device=hidden.device, dtype=torch.float32) for _ in range(2))
    tensors = (hidden, gain, offset, output, mean, rstd, work.chunks)
    sizes = (work.length, work.width, work.table_stride)
    _launch(_norm_forward_kernel, work.grid, hidden, *tensors, *sizes, eps, IS_CENTRED=not is_rms, **_block(work.width))
    return output, mean, rstd


def norm_backward(
    grad: Tensor, hidden: Tensor, mean: Tensor, rstd: Tensor, gain: Tensor, spans: Spans, is_rms: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of hidden, gain and offset of `norm_forward`."""
    grad, hidden, gain = grad.contiguous(), hidden.contiguous(), gain.contiguous()
    work = _Work(hidden, gain, spans)
    grad_hidden, gain_sums, offset_sums = torch.empty_like(hidden), work.partial(hidden), work.partial(hidden)
    tensors = (grad, hidden, mean, rstd, gain, grad_hidden, gain_sums, offset_sums, work.chunks)
    sizes = (work.length, work.width, work.table_stride)
    _launch(_norm_backward_kernel, work.grid, hidden, *tensors, *sizes, IS_CENTRED=not is_rms, **_block(work.width))
    return grad_hidden, work.summed(gain_sums, gain), work.summed(offset_sums, gain)


@triton.jit(do_not_specialize=["length"])
def _gate_forward_kernel(
    hidden, branch, gate, output, chunks, length, width, table_stride, BLOCK: tl.constexpr
):  # fmt: skip
    chunk, sample = tl.program_id(0), tl.program_id(1).to(tl.int64)
    start, stop, row = tl.load(chunks + chunk * 3), tl.load(chunks + chunk * 3 + 1), tl.load(chunks + chunk * 3 + 2)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    own_gate = tl.load(gate + sample * table_stride + row * width + columns, mask=inside, other=0.0).to(tl.float32)
    for token in range(start, stop):
        place = (sample * length + token) * width + columns
        x = tl.load(hidden + place, mask=inside, other=0.0).to(tl.float32)
        y = tl.load(branch + place, mask=inside, other=0.0).to(tl.float32)
        tl.store(output + place, x + own_gate * y, mask=inside)


@triton.jit(do_not_specialize=["length"])
def _gate_backward_kernel(
    grad, branch, gate, grad_branch, gate_sums, chunks, length, width, table_stride, BLOCK: tl.constexpr
):  # fmt: skip
    chunk, sample = tl.program_id(0), tl.program_id(1).to(tl.int64)
    start, stop, row = tl.load(chunks + chunk * 3), tl.load(chunks + chunk * 3 + 1), tl.load(chunks + chunk * 3 + 2)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    own_gate = tl.load(gate + sample * table_stride + row * width + columns, mask=inside, other=0.0).to(tl.float32)
    gate_sum = tl.zeros([BLOCK], dtype=tl.float32)
    for token in range(start, stop):
        place = (sample * length + token) * width + columns
        g = tl.load(grad + place, mask=inside, other=0.0).to(tl.float32)
        gate_sum += g * tl.load(branch + place, mask=inside, other=0.0).to(tl.float32)
        tl.store(grad_branch + place, g * own_gate, mask=inside)
    tl.store(gate_sums + (sample * tl.num_programs(0) + chunk) * width + columns, gate_sum, mask=inside)


def gate_forward(hidden: Tensor, branch: Tensor, gate: Tensor, spans: Spans) -> Tensor:
    """hidden + gate · branch by span: hidden and branch (b s d), gate (b r d)."""
    hidden, branch, gate = hidden.contiguous(), branch.contiguous(), gate.contiguous()
    work = _Work(hidden, gate, spans)
    output = torch.empty_like(hidden)
    tensors = (hidden, branch, gate, output, work.chunks)
    sizes = (work.length, work.width, work.table_stride)
    _launch(_gate_forward_kernel, work.grid, hidden, *tensors, *sizes, **_block(work.width))
    return output


def gate_backward(grad: Tensor, branch: Tensor, gate: Tensor, spans: Spans) -> tuple[Tensor, Tensor]:
    """Gradients of branch and gate of `gate_forward`."""
    grad, branch, gate = grad.contiguous(), branch.contiguous(), gate.contiguous()
    work = _Work(branch, gate, spans)
    grad_branch, gate_sums = torch.empty_like(branch), work.partial(branch)
    tensors = (grad, branch, gate, grad_branch, gate_sums, work.chunks)
    sizes = (work.length, work.width, work.table_stride)
    _launch(_gate_backward_kernel, work.grid, branch, *tensors, *sizes, **_block(work.width))
    return grad_branch, work.summed(gate_sums, gate)


# Heads: LayerNorm over each head's channels, then the turn of channel pairs (2i, 2i + 1). Either may be left out.


@triton.jit
def _pairs(values, TOKENS: tl.constexpr, HALF: tl.constexpr):
    """(tokens, channels) -> even and odd channels."""
    return tl.split(tl.reshape(values, [TOKENS, HALF, 2]))


@triton.jit
def _from_pairs(even, odd, TOKENS: tl.constexpr, BLOCK: tl.constexpr):
    return tl.reshape(tl.join(even, odd), [TOKENS, BLOCK])


@triton.jit(do_not_specialize=["length"])
def _heads_forward_kernel(
    heads, weight, bias, cos, sin, output, length, size, eps, stride_b, stride_k, stride_s, out_b, out_k, out_s,
    HAS_NORM: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_TURN: tl.constexpr, TOKENS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    head, sample = tl.program_id(1), tl.program_id(2).to(tl.int64)
    tokens, channels = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS), tl.arange(0, BLOCK)
    inside = (tokens < length)[:, None] & (channels < size)[None, :]
    place = sample * stride_b + head * stride_k + tokens[:, None] * stride_s + channels[None, :]
    x = tl.load(heads + place, mask=inside, other=0.0).to(tl.float32)
    if HAS_NORM:
        x = tl.where(inside, x - (tl.sum(x, axis=1) / size)[:, None], 0.0)
        x *= (1.0 / tl.sqrt(tl.sum(x * x, axis=1) / size + eps))[:, None]
        if HAS_WEIGHT:
            x *= tl.load(weight + channels, mask=channels < size, other=0.0).to(tl.float32)[None, :]
            x += tl.load(bias + channels, mask=channels < size, other=0.0).to(tl.float32)[None, :]
    if HAS_TURN:
        angle = tokens[:, None] * size + channels[None, :]
        even, odd = _pairs(x, TOKENS, BLOCK // 2)
        cos_even, cos_odd = _pairs(tl.load(cos + angle, mask=inside, other=0.0).to(tl.float32), TOKENS, BLOCK // 2)
        sin_even, sin_odd = _pairs(tl.load(sin + angle, mask=inside, other=0.0).to(tl.float32), TOKENS, BLOCK // 2)
        x = _from_pairs(even * cos_even - odd * sin_even, odd * cos_odd + even * sin_odd, TOKENS, BLOCK)
    place = sample * out_b + head * out_k + tokens[:, None] * out_s + channels[None, :]
    tl.store(output + place, x, mask=inside)


@triton.jit(do_not_specialize=["length"])
def _heads_backward_kernel(
    grad, heads, weight, cos, sin, grad_heads, weight_sums, bias_sums, length, size, eps,
    grad_b, grad_k, grad_s, stride_b, stride_k, stride_s, out_b, out_k, out_s,
    HAS_NORM: tl.constexpr, HAS_WEIGHT: tl.constexpr, HAS_TURN: tl.constexpr, TOKENS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    head, sample = tl.program_id(1), tl.program_id(2).to(tl.int64)
    tokens, channels = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS), tl.arange(0, BLOCK)
    inside = (tokens < length)[:, None] & (channels < size)[None, :]
    place = sample * grad_b + head * grad_k + tokens[:, None] * grad_s + channels[None, :]
    g = tl.load(grad + place, mask=inside, other=0.0).to(tl.float32)
    if HAS_TURN:
        angle = tokens[:, None] * size + channels[None, :]
        even, odd = _pairs(g, TOKENS, BLOCK // 2)
        cos_even, cos_odd = _pairs(tl.load(cos + angle, mask=inside, other=0.0).to(tl.float32), TOKENS, BLOCK // 2)
        sin_even, sin_odd = _pairs(tl.load(sin + angle, mask=inside, other=0.0).to(tl.float32), TOKENS, BLOCK // 2)
        g = _from_pairs(even * cos_even + odd * sin_odd, odd * cos_odd - even * sin_even, TOKENS, BLOCK)
    if HAS_NORM:
        place = sample * stride_b + head * stride_k + tokens[:, None] * stride_s + channels[None, :]
        normed = tl.load(heads + place, mask=inside, other=0.0).to(tl.float32)
        normed = tl.where(inside, normed - (tl.sum(normed, axis=1) / size)[:, None], 0.0)
        spread = (1.0 / tl.sqrt(tl.sum(normed * normed, axis=1) / size + eps))[:, None]
        normed *= spread
        if HAS_WEIGHT:
            program = (sample * tl.num_programs(1) + head) * tl.num_programs(0) + tl.program_id(0)
            tl.store(weight_sums + program * size + channels, tl.sum(g * normed, axis=0), mask=channels < size)
            tl.store(bias_sums + program * size + channels, tl.sum(g, axis=0), mask=channels < size)
            g *= tl.load(weight + channels, mask=channels < size, other=0.0).to(tl.float32)[None, :]
        g -= (tl.sum(g, axis=1) / size)[:, None] + normed * (tl.sum(g * normed, axis=1) / size)[:, None]
        g *= spread
    place = sample * out_b + head * out_k + tokens[:, None] * out_s + channels[None, :]
    tl.store(grad_heads + place, g, mask=inside)


def _empty_heads(like: Tensor) -> Tensor:
    """(b k s e) with the heads of a token side by side in memory, as projections read and write them."""
    b, k, s, e = like.shape
    return like.new_empty(b, s, k, e).transpose(1, 2)


def _rows_of_heads(heads: Tensor) -> Tensor:
    """The same, with each head's channels side by side in memory: true of any part of a fused projection."""
    return heads if heads.stride(-1) == 1 else heads.contiguous()


def _strides(heads: Tensor | None) -> tuple[int, ...]:
    return (0, 0, 0) if heads is None else heads.stride()[:3]


def _head_constants(heads: Tensor, has_norm: bool, weight: Tensor | None, cos: Tensor | None) -> dict[str, Any]:
    return {
        "HAS_NORM": has_norm,
        "HAS_WEIGHT": weight is not None,
        "HAS_TURN": cos is not None,
        "TOKENS": HEAD_TOKENS,
        "BLOCK": triton.next_power_of_2(heads.shape[-1]),
    }


def _head_grid(heads: Tensor) -> tuple[int, int, int]:
    b, k, s, _ = heads.shape
    return triton.cdiv(s, HEAD_TOKENS), k, b


def heads_forward(
    heads: Tensor,
    eps: float | None,
    weight: Tensor | None,
    bias: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
) -> Tensor:
    """LayerNorm over each head's channels (eps None: none), then the turn by angles (cos None: none).

    heads (b k s e), in any layout, weight and bias (e), cos and sin (s e) -> (b k s e).
    """
    heads, output = _rows_of_heads(heads), _empty_heads(heads)
    cos, sin = (None if table is None else table.contiguous() for table in (cos, sin))
    _launch(
        _heads_forward_kernel,
        _head_grid(heads),
        heads,
        *(heads, weight, bias, cos, sin, output, *heads.shape[2:], eps or 0.0),
        *(*_strides(heads), *_strides(output)),
        **_head_constants(heads, eps is not None, weight, cos),
    )
    return output


def heads_backward(
    grad: Tensor,
    heads: Tensor | None,
    eps: float | None,
    weight: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Gradients of heads, weight and bias of `heads_forward`; without a norm `heads` may be None."""
    grad, output = _rows_of_heads(grad), _empty_heads(grad)
    heads = None if heads is None else _rows_of_heads(heads)
    cos, sin = (None if table is None else table.contiguous() for table in (cos, sin))
    grid = _head_grid(grad)
    weight_sums = bias_sums = None
    if weight is not None:
        weight_sums, bias_sums = (
            torch.empty(grid[0] * grid[1] * grid[2], len(weight), device=grad.device, dtype=torch.float32)
            for _ in range(2)
        )
    _launch(
        _heads_backward_kernel,
        grid,
        grad,
        *(grad, heads, weight, cos, sin, output, weight_sums, bias_sums, *grad.shape[2:], eps or 0.0),
        *(*_strides(grad), *_strides(heads), *_strides(output)),
        **_head_constants(grad, eps is not None, weight, cos),
    )
    if weight is None or weight_sums is None or bias_sums is None:
        return output, None, None
    return output, weight_sums.sum(0).to(weight.dtype), bias_sums.sum(0).to(weight.dtype)


# Adam with a moving average of the weights.


@triton.jit
def _adam_ema_kernel(
    parameter, gradient, first, second, shadow, count,
    rest1, beta2, rest2, kept, coupled_decay, step_size, root_correction, eps, ema_rest,
    BLOCK: tl.constexpr,
):  # fmt: skip
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < count
    p = tl.load(parameter + place, mask=inside)
    g = tl.load(gradient + place, mask=inside) + coupled_decay * p
    m = tl.load(first + place, mask=inside)
    m += rest1 * (g - m)
    v = tl.load(second + place, mask=inside) * beta2 + rest2 * g * g
    p = p * kept - step_size * m / (tl.sqrt(v) / root_correction + eps)
    average = tl.load(shadow + place, mask=inside)
    tl.store(parameter + place, p, mask=inside)
    tl.store(first + place, m, mask=inside)
    tl.store(second + place, v, mask=inside)
    tl.store(shadow + place, average + ema_rest * (p - average), mask=inside)


def adam_ema(tensors: Sequence[Tensor], *scalars: float) -> None:
    """One update in place. tensors: parameter, gradient, exp_avg, exp_avg_sq, shadow; float32, contiguous, of one size.

    scalars: the optimizer's `_Numbers`.
    """
    count = tensors[0].numel()
    _launch(
        _adam_ema_kernel, (triton.cdiv(count, _ADAM_BLOCK),), tensors[0], *tensors, count, *scalars, BLOCK=_ADAM_BLOCK
    )


def try_on(device: torch.device) -> None:
    """Run the plainest kernel: whatever this machine lacks for Triton is raised here, at the start."""
    adam_ema([torch.zeros(1, device=device) for _ in range(5)], *[1.0] * 9)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
