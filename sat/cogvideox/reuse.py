"""Reuse of the layers' work between the passes of a sampling run, with what it saves and how wrong it is.

Neighbouring steps give the network nearly the same input, and how much the first layer's residual has changed since
the last whole pass tells how much the others' would: below a threshold, the sum of theirs is taken from that pass (the
first-block cache of ParaAttention; TeaCache, arXiv:2411.19108, decides by the time embedding, with numbers that are
fitted to each model). Letters: b batch, s tokens that this rank holds, d hidden size.
"""

import math
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

from sat.model.base_model import BaseMixin, non_conflict
from sat.mpu.context import SequenceShard
from sat.mpu.state import Axis, ParallelState

SHARING_AXES: tuple[Axis, ...] = ("guidance", "cp", "tp")
"""Ranks along these work on the same samples."""


class LayerReuseMixin(BaseMixin):
    """Leaves out all layers but the first where that one changed by less than `threshold` since the last whole pass.

    Its change is |r - r'| / |r'| for its residual now and then: sums of magnitudes over the whole batch, on all ranks
    that share it. Nothing happens until `is_on`; then two tensors (b s d) are kept.
    """

    def __init__(self, threshold: float) -> None:
        super().__init__()
        self.threshold = threshold
        self.is_on = False
        self.is_reusing = False
        """Whether the pass leaves layers out."""
        self.change: float | None = None
        """Of the first layer in this pass; None where there is nothing to compare with."""
        self._first: Tensor | None = None
        self._entered: Tensor | None = None
        self._rest: Tensor | None = None
        # It looks at numbers: where layers are compiled, the first one is not a single graph. Not a decorator of the
        # class, which would import torch's compiler, seconds of work, into every process.
        self._begin = torch.compiler.disable(self._begin_pass)

    def forget(self) -> None:
        """The next pass is whole."""
        self._first = self._entered = self._rest = None

    @non_conflict
    def layer_forward(
        self,
        hidden_states: Tensor,
        mask: Tensor | None,
        *,
        layer_id: int,
        sequence: SequenceShard | None = None,
        old_impl: Any,
    ) -> Tensor:
        if not self.is_on:
            return old_impl(hidden_states, mask)
        is_last = layer_id == self.transformer.num_layers - 1
        if layer_id == 0:
            after = old_impl(hidden_states, mask)
            self._begin(after - hidden_states, after, sequence)
            return after
        if self.is_reusing:
            return hidden_states + cast(Tensor, self._rest) if is_last else hidden_states
        after = old_impl(hidden_states, mask)
        if is_last:
            self._rest, self._entered = after - self._entered, None
        return after

    def _begin_pass(self, residual: Tensor, after: Tensor, sequence: SequenceShard | None) -> None:
        self.change = None if self._rest is None else self._change(residual, sequence)
        self.is_reusing = self.change is not None and self.change < self.threshold
        if not self.is_reusing:
            self._first, self._entered, self._rest = residual, after, None

    def _change(self, residual: Tensor, sequence: SequenceShard | None) -> float | None:
        """None for a batch of another shape: where guidance is 1 at some steps, those have half the batch."""
        assert self._first is not None
        if residual.shape != self._first.shape:
            return None
        own = slice(None) if sequence is None else slice(sequence.count_before(sequence.length))  # without padding
        now, then = residual[:, own], self._first[:, own]
        sums = torch.stack([(now - then).abs().sum(dtype=torch.float32), then.abs().sum(dtype=torch.float32)])
        difference, size = sum_over_sharers(sums, self.transformer.parallel).tolist()
        return difference / size if size > 0.0 else math.inf


def sum_over_sharers(values: Tensor, parallel: ParallelState) -> Tensor:
    """Sums over the ranks that share samples, float64 and of the same bits on all of them, so that they decide alike.

    Ranks that hold equal numbers (of a tp group) count as often as there are: only ratios mean something.
    """
    values = values.double()
    for axis in SHARING_AXES:
        group = parallel.group(axis)
        if group is not None:
            parts = [torch.empty_like(values) for _ in range(group.size())]
            dist.all_gather(parts, values, group=group)
            values = torch.stack(parts).sum(dim=0)
    return values


@dataclass(frozen=True)
class Pass:
    """One pass of the network in a sampling run."""

    shape: tuple[int, ...]
    """Of its input."""
    seconds: float
    is_reused: bool
    change: float | None
    """Of the first layer; None where there was nothing to compare with."""
    error: float | None = None
    """|reused - whole| / |whole| of the network's output (root sums of squares), where it was checked."""
    check_seconds: float = 0.0


class LayerReuse:
    """The network as a sampler calls it, with its layers' work reused; a record of each pass.

    The reused passes number 1, 4, 9, 16, .. are computed whole besides, to know the error; the samples do not depend on
    that. So checks are dense in a short job and cost little in a long one.
    """

    def __init__(self, model: Callable[..., Tensor], network: Any, threshold: float) -> None:
        self.model, self.threshold = model, threshold
        self.transformer = network.transformer
        self.mixin = LayerReuseMixin(threshold)
        network.add_mixin("layer_reuse", self.mixin)
        self.passes: list[Pass] = []

    def begin(self) -> "LayerReuse":
        """Itself, at the start of a sample: its first pass is whole."""
        self.mixin.forget()
        return self

    def __call__(self, noisy: Tensor, timesteps: Tensor, cond: Mapping[str, Any], **more: Any) -> Tensor:
        output, seconds = self._timed(True, noisy, timesteps, cond, **more)
        is_reused, change = self.mixin.is_reusing, self.mixin.change
        error, check_seconds = None, 0.0
        if is_reused and math.isqrt(count := self.num_reused + 1) ** 2 == count:
            whole, check_seconds = self._timed(False, noisy, timesteps, cond, **more)
            error = self._error(output, whole)
        self.passes.append(Pass(tuple(noisy.shape), seconds, is_reused, change, error, check_seconds))
        return output

    @property
    def num_reused(self) -> int:
        """Passes so far that left layers out."""
        return sum(one.is_reused for one in self.passes)

    def _timed(self, is_on: bool, *inputs: Any, **more: Any) -> tuple[Tensor, float]:
        started = _now(inputs[0].device)
        self.mixin.is_on = is_on
        try:
            output = self.model(*inputs, **more)
        finally:
            self.mixin.is_on = False
        return output, _now(inputs[0].device) - started

    def _error(self, output: Tensor, whole: Tensor) -> float:
        squares = torch.stack([(output.float() - whole.float()).square().sum(), whole.float().square().sum()])
        wrong, size = sum_over_sharers(squares, self.transformer.parallel).sqrt().tolist()
        return wrong / size

    def report(self) -> str:
        """What was reused, saved and wrong, over all ranks of this job; each must call it."""
        group = self.transformer.parallel.group("dp")
        everyone = [self.passes]
        if group is not None:
            everyone = [[] for _ in range(group.size())]
            dist.all_gather_object(everyone, self.passes, group=group)
        return in_words([one for own in everyone for one in own], self.transformer.num_layers, self.threshold)


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def speedup(passes: Sequence[Pass]) -> float:
    """Time of the passes had none been reused, over their time. What checks took is in neither.

    A reused pass would have taken the median of the whole ones of its shape, checks among them: the lower one of two,
    because the first pass may be slow for other reasons, such as compiling.
    """
    whole: dict[tuple[int, ...], list[float]] = defaultdict(list)
    for one in passes:
        if not one.is_reused or one.check_seconds:
            whole[one.shape].append(one.check_seconds or one.seconds)
    typical = {shape: statistics.median_low(seconds) for shape, seconds in whole.items()}
    spent = sum(one.seconds for one in passes)
    return sum(typical[one.shape] if one.is_reused else one.seconds for one in passes) / spent


def in_words(passes: Sequence[Pass], num_layers: int, threshold: float) -> str:
    """The passes of a job for its log."""
    reused = [one for one in passes if one.is_reused]
    skipped, total = len(reused) * (num_layers - 1), len(passes) * num_layers
    text = (
        f"reuse at threshold {threshold:g}: {len(reused)} of {len(passes)} passes of the network reused layers, "
        f"{skipped:,} of {total:,} layer passes ({skipped / max(total, 1):.0%}) were skipped"
    )
    changes = [one.change for one in passes if one.change is not None]
    if changes:
        text += (
            f"; the first layer changed by {min(changes):.3g} to {max(changes):.3g}, median "
            f"{statistics.median(changes):.3g}"
        )
    if not reused:
        return text
    errors = [one.error for one in reused if one.error is not None]
    check_seconds = sum(one.check_seconds for one in reused)
    return (
        f"{text}; the network was {speedup(passes):.2f} times as fast; error of its output "
        f"{statistics.mean(errors):.2%} in the mean, {max(errors):.2%} at most, over {len(errors)} of the reused "
        f"passes, which were computed whole besides in {check_seconds:.1f} s more"
    )
