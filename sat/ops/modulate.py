"""Adaptive norm and gated residual over a joint sequence whose parts have parameters of their own.

Letters: b batch, s tokens, d hidden size, r rows of a table of shifts, scales or gates. A `Span` says which tokens take
which row; spans lie side by side. Each operation is one pass over the tokens forward and one backward, and keeps only
what it was given. `TokenRows` says the same in tensors, for graphs that a compiler fuses: one graph serves all mixes.
On GPUs the passes are Triton's kernels (`triton_kernels.py`).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sat.mpu.context import numbers_on
from sat.ops.kernels import is_autocast, triton_kernels

_LEAST_PIECE = 2**15  # numbers; on a CPU below this, one call of the norm for each piece costs more than it saves


@dataclass(frozen=True)
class Span:
    """Tokens [start, stop) take row `row` of each sample's table, or of sample `sample`'s where samples share a row."""

    start: int
    stop: int
    row: int
    sample: int | None = None

    def of(self, table: Tensor) -> Tensor:
        """The row, to broadcast over tokens: table (b r d) -> (b 1 d), or (1 1 d) of one sample."""
        if self.sample is None:
            return table[:, self.row].unsqueeze(1)
        return table[self.sample, self.row].view(1, 1, -1)

    def add_to(self, table: Tensor, summed: Tensor) -> None:
        """Add a sum over the span's tokens (b d) to the row."""
        if self.sample is None:
            table[:, self.row] += summed
        else:
            table[self.sample, self.row] += summed.sum(0)


Spans = Sequence[Span]


class _TakeRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, table: Tensor, index: Tensor, members: Tensor) -> Tensor:
        ctx.save_for_backward(members)
        return table[:, index]

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        (members,) = ctx.saved_tensors
        return members.to(grad.dtype) @ grad, None, None


@dataclass(frozen=True)
class TokenRows:
    """Which row of a table each token takes."""

    index: Tensor
    """Row of each token (s,); where samples share a sequence, their rows stand one behind the other."""
    members: Tensor
    """1 where a row has that token (r s): gradients of rows are a product with it, in one fixed order."""

    @classmethod
    def of_spans(cls, spans: Spans, num_rows: int, num_samples: int, like: Tensor) -> "TokenRows":
        """Spans as tensors on the device and in the dtype of `like`; tables have num_rows for each sample."""
        numbers = [span.row + num_rows * (span.sample or 0) for span in spans for _ in range(span.start, span.stop)]
        index = numbers_on(like.device, numbers).to(like.device).long()
        rows = torch.arange(num_rows * num_samples, device=like.device)
        return cls(index, (rows.unsqueeze(1) == index).to(like.dtype))

    def take(self, table: Tensor) -> Tensor:
        """(b r d), or (k r d) of k samples in one sequence -> each token's row (b s d)."""
        return _TakeRows.apply(table.reshape(-1, len(self.members), table.shape[-1]), self.index, self.members)


class _ModulateSpans(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden: Tensor, shift: Tensor, scale: Tensor, spans: Spans) -> Tensor:
        output = torch.empty_like(hidden)
        for span in spans:
            tokens = slice(span.start, span.stop)
            torch.addcmul(span.of(shift), hidden[:, tokens], 1.0 + span.of(scale), out=output[:, tokens])
        ctx.save_for_backward(hidden, scale)
        ctx.spans = spans
        return output

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        hidden, scale = ctx.saved_tensors
        grad_hidden, grad_shift, grad_scale = torch.empty_like(hidden), torch.zeros_like(scale), torch.zeros_like(scale)
        for span in ctx.spans:
            tokens = slice(span.start, span.stop)
            own = grad[:, tokens]
            span.add_to(grad_shift, own.sum(1))
            span.add_to(grad_scale, (own * hidden[:, tokens]).sum(1))
            torch.mul(own, 1.0 + span.of(scale), out=grad_hidden[:, tokens])
        return grad_hidden, grad_shift, grad_scale, None


class _NormSpans(torch.autograd.Function):
    """norm(hidden) · gain + offset. gain and offset have the gradients of a norm's own weight and bias, so that one
    backward pass of the norm over a span gives all three."""

    @staticmethod
    def forward(ctx, hidden: Tensor, gain: Tensor, offset: Tensor, spans: Spans, eps: float, is_rms: bool) -> Tensor:
        ctx.kernels, ctx.spans, ctx.is_rms = triton_kernels(hidden, gain, offset), spans, is_rms
        if ctx.kernels is not None:
            output, mean, rstd = ctx.kernels.norm_forward(hidden, gain, offset, spans, eps, is_rms)
        else:
            output, mean, rstd = torch.native_layer_norm(hidden, hidden.shape[-1:], None, None, eps)
            for span in spans:
                own = output[:, span.start : span.stop]
                torch.addcmul(span.of(offset), own, span.of(gain), out=own)
        ctx.save_for_backward(hidden, mean, rstd, gain)
        return output

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.kernels is not None:
            grads = ctx.kernels.norm_backward(grad, *ctx.saved_tensors, ctx.spans, ctx.is_rms)
        else:
            grads = _layer_norm_backward(ctx.spans, grad, *ctx.saved_tensors)
        return *grads, None, None, None


def _layer_norm_backward(
    spans: Spans, grad: Tensor, hidden: Tensor, mean: Tensor, rstd: Tensor, gain: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of hidden, gain and offset, by torch's own backward pass of LayerNorm over each sample's spans."""
    grad_hidden, grad_gain, grad_offset = torch.empty_like(hidden), torch.zeros_like(gain), torch.zeros_like(gain)
    for span in spans:
        tokens = slice(span.start, span.stop)
        rows = span.of(gain).expand(len(hidden), 1, -1).squeeze(1)
        pieces = zip(*(tensor[:, tokens] for tensor in (grad, hidden, mean, rstd)), rows)
        results = [
            torch.ops.aten.native_layer_norm_backward(g, h, h.shape[-1:], m, r, row, row, [True, True, True])
            for g, h, m, r, row in pieces
        ]
        of_hidden, of_gain, of_offset = (list(own) for own in zip(*results))
        torch.stack(of_hidden, out=grad_hidden[:, tokens])
        span.add_to(grad_gain, torch.stack(of_gain))
        span.add_to(grad_offset, torch.stack(of_offset))
    return grad_hidden, grad_gain, grad_offset


class _GatedResidual(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden: Tensor, branch: Tensor, gate: Tensor, spans: Spans) -> Tensor:
        ctx.kernels, ctx.spans = triton_kernels(hidden, branch, gate), spans
        ctx.save_for_backward(branch, gate)
        if ctx.kernels is not None:
            return ctx.kernels.gate_forward(hidden, branch, gate, spans)
        output = torch.empty_like(hidden)
        for span in spans:
            tokens = slice(span.start, span.stop)
            torch.addcmul(hidden[:, tokens], span.of(gate), branch[:, tokens], out=output[:, tokens])
        return output

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        branch, gate = ctx.saved_tensors
        if ctx.kernels is not None:
            return grad, *ctx.kernels.gate_backward(grad, branch, gate, ctx.spans), None
        grad_branch, grad_gate = torch.empty_like(branch), torch.zeros_like(gate)
        for span in ctx.spans:
            tokens = slice(span.start, span.stop)
            own = grad[:, tokens]
            torch.mul(own, span.of(gate), out=grad_branch[:, tokens])
            span.add_to(grad_gate, (own * branch[:, tokens]).sum(1))
        return grad, grad_branch, grad_gate, None


@dataclass(frozen=True)
class Modulation:
    """What follows a norm: · (1 + scale) + shift, each span with its rows. shift and scale (b r d)."""

    shift: Tensor
    scale: Tensor
    spans: Spans


def fuses_norm(hidden: Tensor, modulation: Modulation, is_rms: bool) -> bool:
    """Whether `norm_spans` takes this work; elsewhere the norm and `modulate_spans` one after the other are quicker."""
    if triton_kernels(hidden, modulation.scale) is not None:
        return True
    num_pieces = len(hidden) * len(modulation.spans)
    return not is_rms and not is_autocast(hidden.device) and hidden.numel() >= _LEAST_PIECE * num_pieces


def norm_spans(
    hidden: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, modulation: Modulation, is_rms: bool = False
) -> Tensor:
    """LayerNorm or RMSNorm of hidden (b s d), weight and bias (d) or none, and the modulation, in one pass."""
    gain, offset = 1.0 + modulation.scale, modulation.shift
    if bias is not None:
        offset = torch.addcmul(offset, gain, bias)
    if weight is not None:
        gain = gain * weight
    return _NormSpans.apply(hidden, gain, offset, modulation.spans, eps, is_rms)


def modulate_spans(hidden: Tensor, shift: Tensor, scale: Tensor, spans: Spans | TokenRows) -> Tensor:
    """hidden · (1 + scale) + shift with each span's rows: hidden (b s d), shift and scale (b r d) -> (b s d)."""
    if isinstance(spans, TokenRows):
        return hidden * (1.0 + spans.take(scale)) + spans.take(shift)
    return _ModulateSpans.apply(hidden, shift, scale, spans)


def gated_residual(hidden: Tensor, branch: Tensor, gate: Tensor, spans: Spans | TokenRows) -> Tensor:
    """hidden + gate · branch with each span's row: hidden and branch (b s d), gate (b r d) -> (b s d)."""
    if isinstance(spans, TokenRows):
        return hidden + spans.take(gate) * branch
    return _GatedResidual.apply(hidden, branch, gate, spans)
