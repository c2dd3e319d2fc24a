"""Numbers that are no longer numbers: caught before the optimizer, told with all that reproduces them.

A loss that is not finite makes every gradient of its rank NaN (see `Stepper.accumulate`), and DeepSpeed, like the stage
that goes without it, leaves out an update whose gradient norm is not finite. So nothing has to be known on the host
before the update, and all ranks leave out the same ones. What follows here is who it was.
"""

import logging
import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sat.errors import TrainingError
from sat.mpu.launch import Launch
from sat.mpu.shards import is_sharded
from sat.mpu.state import ParallelState
from sat.training.files import write_json
from sat.weights.whole import iteration_names

log = logging.getLogger(__name__)

REPORTS = "health"
"""Folder of a run directory with one file for each step that was reported."""


class GradientWatch:
    """Notes which parameters' gradients are not finite on this rank, before ranks add theirs up.

    One sum for each parameter and backward pass, which stays on the device. Make it before the parameters are handed to
    DeepSpeed. names: of the trained parameters; groups: the optimizer's group of each.
    """

    def __init__(self, names: Mapping[nn.Parameter, str], groups: Mapping[nn.Parameter, int]) -> None:
        self.names = list(names.values())
        self.groups = [groups[parameter] for parameter in names]
        self._sums: Tensor | None = None
        for place, parameter in enumerate(names):
            parameter.register_hook(lambda gradient, place=place: self._add(place, gradient))

    def _add(self, place: int, gradient: Tensor) -> None:
        if self._sums is None:
            self._sums = torch.zeros(len(self.names), device=gradient.device)
        self._sums[place].add_(gradient.detach().sum(dtype=torch.float32))

    def take(self) -> dict[str, int]:
        """Name -> optimizer group of the parameters that had a gradient that is not finite; then all is forgotten."""
        if self._sums is None:
            return {}
        bad = (~self._sums.isfinite()).nonzero().flatten().tolist()
        self._sums.zero_()
        return {self.names[place]: self.groups[place] for place in bad}

    def forget(self) -> None:
        """Begin anew, without looking."""
        if self._sums is not None:
            self._sums.zero_()


@dataclass(frozen=True)
class MicroBatch:
    """What is remembered of a micro batch until its step is done."""

    counters: Sequence[int]
    keys: Sequence[str]
    losses: Tensor
    """(b,), on the device."""


@dataclass(frozen=True)
class HealthOptions:
    """When a run is stopped, and what is reported."""

    max_skipped: int = 10
    """Updates left out in a row at which the run stops."""
    spike_deviations: float = 10.0
    """A loss so many deviations above the median of the last steps is reported; 0 reports none."""


class Health:
    """Watches the losses of a run and reports; every rank makes the same calls.

    A report has all that makes the step again (docs/checkpoints.md): configuration, seed, the checkpoint to start from,
    and the samples of each rank with their losses.
    """

    WINDOW = 64
    FEWEST = 16

    def __init__(
        self,
        options: HealthOptions,
        run_dir: Path | None,
        launch: Launch,
        parallel: ParallelState,
        describe: Mapping[str, Any],
    ) -> None:
        self.options, self.run_dir, self.launch, self.parallel = options, run_dir, launch, parallel
        self.describe = describe
        """What every report says besides: configuration, seed, batch size."""
        self.skipped_in_a_row = 0
        self.first_skipped: int | None = None
        self._losses: deque[float] = deque(maxlen=self.WINDOW)

    def state(self) -> dict[str, Any]:
        """What a checkpoint says of it."""
        return {
            "skipped_in_a_row": self.skipped_in_a_row,
            "first_skipped": self.first_skipped,
            "losses": list(self._losses),
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint's."""
        self.skipped_in_a_row, self.first_skipped = state["skipped_in_a_row"], state["first_skipped"]
        self._losses.clear()
        self._losses.extend(state.get("losses", ()))  # older checkpoints have none

    def updated(self, step: int, loss: float, micro_batches: Sequence[MicroBatch]) -> None:
        """A step whose update was made; every rank must call it. loss: equal on the ranks of a data-parallel group."""
        self.skipped_in_a_row, self.first_skipped = 0, None
        if self._is_spike(loss):
            # Within this group, which has all samples of the step: ranks of another one may see a last bit differ.
            gathered: list[Any] = [self._own(micro_batches)]
            if self.parallel.size("dp") > 1:
                gathered = [None] * self.parallel.size("dp")
                dist.all_gather_object(gathered, self._own(micro_batches), group=self.parallel.true_group("dp"))
            if self.launch.is_main:
                middle = median(self._losses)
                log.warning(
                    "step %d: the loss is %.4g, and was %.4g in the middle of the last %d steps%s",
                    step,
                    loss,
                    middle,
                    len(self._losses),
                    self._report(step, "spike", {"loss": loss, "median": middle}, gathered),
                )
        self._losses.append(loss)

    def _is_spike(self, loss: float) -> bool:
        if not self.options.spike_deviations or len(self._losses) < self.FEWEST:
            return False
        middle = median(self._losses)
        deviation = 1.4826 * median(abs(one - middle) for one in self._losses)  # a Gaussian's, from its quartiles
        return loss > middle + self.options.spike_deviations * max(deviation, 1e-3 * abs(middle))

    def skipped(self, step: int, micro_batches: Sequence[MicroBatch], bad_parameters: Mapping[str, int]) -> None:
        """A step whose update was left out, its loss or a gradient not being finite; every rank must call it.

        bad_parameters: those of this rank, see `GradientWatch`. Raises TrainingError on all ranks when there were too
        many in a row.
        """
        self.skipped_in_a_row += 1
        self.first_skipped = step if self.first_skipped is None else self.first_skipped
        gathered: list[Any] = [None] * self.launch.world_size
        dist.all_gather_object(gathered, {**self._own(micro_batches), "gradients": dict(bad_parameters)})
        what = _in_words(gathered)
        if self.launch.is_main:
            log.error("step %d is skipped: %s%s", step, what, self._report(step, "skipped", {}, gathered))
        if self.skipped_in_a_row >= self.options.max_skipped:
            raise TrainingError(
                f"{self.skipped_in_a_row} steps in a row, from {self.first_skipped} on, had a loss or gradients that "
                f"are not finite (args.max_skipped_steps); at step {step}: {what}"
            )

    def _own(self, micro_batches: Sequence[MicroBatch]) -> dict[str, Any]:
        """This rank's samples of a step, in micro batches, each with its loss as text: JSON has no infinity."""
        samples = [
            [
                {"counter": counter, "key": key, "loss": repr(loss)}
                for counter, key, loss in zip(one.counters, one.keys, one.losses.tolist())
            ]
            for one in micro_batches
        ]
        return {"rank": self.launch.rank, "samples": samples}

    def _report(self, step: int, kind: str, more: Mapping[str, Any], ranks: Sequence[Any]) -> str:
        """Write a report; returns where, for the log."""
        if self.run_dir is None:
            return ""
        file = self.run_dir / REPORTS / f"step_{step:08d}_{kind}.json"
        checkpoint = {"checkpoint": self._checkpoint_before(step)}
        content = {**self.describe, "kind": kind, "step": step, **checkpoint, **more, "ranks": list(ranks)}
        try:
            file.parent.mkdir(exist_ok=True)
            write_json(file, content)
        except OSError as error:
            return f" (no report was written: {error})"
        return f" (see {file})"

    def _checkpoint_before(self, step: int) -> str | None:
        """The newest checkpoint from which the run comes to a step."""
        assert self.run_dir is not None
        names = iteration_names(self.run_dir)
        return next((str(self.run_dir / name) for name in names if name.isdecimal() and int(name) < step), None)


def _bad_samples(own: Mapping[str, Any]) -> list[Mapping[str, str]]:
    """The samples of a rank whose loss is not finite."""
    return [
        sample for micro_batch in own["samples"] for sample in micro_batch if not math.isfinite(float(sample["loss"]))
    ]


def _in_words(gathered: Sequence[Mapping[str, Any]]) -> str:
    """Who it was: ranks with a bad loss, else ranks with bad gradients, else the sum of all."""
    of_loss = [own for own in gathered if _bad_samples(own)]
    if of_loss:
        sample = _bad_samples(of_loss[0])[0]
        ranks = ", ".join(str(own["rank"]) for own in of_loss[:8])
        return f"the loss of sample {sample['counter']} ({sample['key']}) is {sample['loss']} on rank {ranks}"
    of_gradient = [own for own in gathered if own["gradients"]]
    if of_gradient:
        first = of_gradient[0]
        name, group = next(iter(first["gradients"].items()))
        ranks = ", ".join(str(own["rank"]) for own in of_gradient[:8])
        return (
            f"gradients of {len(first['gradients'])} parameters are not finite on rank {ranks}, first {name} "
            f"(parameter group {group}), though the losses are"
        )
    return "the sum of all ranks' gradients is not finite, though each rank's are"


# --- replicas --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def bit_sums(parameters: Mapping[str, nn.Parameter]) -> Tensor:
    """For each parameter the sum of its bit patterns (n,), int64: equal where all bits are, in any order of summing."""
    sums = []
    for parameter in parameters.values():
        integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[parameter.element_size()]
        sums.append(parameter.detach().reshape(-1).view(integers).sum(dtype=torch.int64))
    return torch.stack(sums)


def check_replicas(module: nn.Module, parallel: ParallelState, step: int) -> None:
    """Compare the weights of ranks that must hold the same; every rank must call it.

    Compared are the model's own weights, in the precision in which it computes: all of them over dp and cp, and over tp
    those of which every tp rank holds a copy (what is cut over tp has none there). Not compared are optimizer state and
    averages, of which each rank holds an own part from ZeRO 1 on, and at ZeRO 3 anything, as all is cut.

    Raises TrainingError on all ranks, naming the parameter and the rank that differs from most.
    """
    whole = {
        name: parameter for name, parameter in module.named_parameters() if getattr(parameter, "ds_id", None) is None
    }
    copies = {name: parameter for name, parameter in whole.items() if not is_sharded(parameter)}
    # Both on every rank, whatever the first one found here: the groups of the second are others.
    of_replicas, of_copies = _differing(whole, parallel, "replicas"), _differing(copies, parallel, "tp")
    problem = of_replicas or of_copies
    problems: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(problems, problem)
    first = next((one for one in problems if one is not None), None)
    if first is not None:
        raise TrainingError(f"ranks have come apart at step {step}: {first}")


def _differing(parameters: Mapping[str, nn.Parameter], parallel: ParallelState, axis: Any) -> str | None:
    group = parallel.group(axis)
    if group is None or not parameters:
        return None
    own = bit_sums(parameters)
    bounds = torch.stack([own, -own])
    dist.all_reduce(bounds, op=dist.ReduceOp.MAX, group=group)
    differing = (bounds[0] != -bounds[1]).nonzero().flatten().tolist()
    if not differing:
        return None
    place, name = differing[0], list(parameters)[differing[0]]
    gathered: list[Any] = [None] * group.size()
    dist.all_gather_object(gathered, (dist.get_rank(), int(own[place])), group=group)
    values = [value for _, value in gathered]
    most = max(set(values), key=values.count)
    odd = [rank for rank, value in gathered if value != most]
    rest = f", and {len(differing) - 1} more parameters" if len(differing) > 1 else ""
    if 2 * values.count(most) <= len(values):
        return f"{name} differs between the ranks {', '.join(str(rank) for rank, _ in gathered)}{rest}"
    return f"{name} of rank {', '.join(map(str, odd))} differs from that of the other {values.count(most)} ranks{rest}"
