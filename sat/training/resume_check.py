"""The proof that a run goes on from what it saved: the loss of a saved batch, computed again after loading."""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch.distributed as dist

from sat.errors import CheckpointError
from sat.mpu.state import ParallelState

log = logging.getLogger(__name__)

ROUNDING = {"fp32": 1e-4, "bf16": 5e-2, "fp16": 1e-2}
"""Relative difference of the mean loss that another layout may make. Measured: 3e-7 in fp32, 4e-3 in bf16."""


@dataclass(frozen=True)
class Circumstances:
    """What a loss must be computed under to be the same bit for bit."""

    layout: Mapping[str, int]
    micro_batch_size: int
    precision: str
    device: str
    torch: str


@dataclass(frozen=True)
class LossRecord:
    """The losses of some samples under the saved weights."""

    counters: Sequence[int]
    losses: Sequence[float]
    circumstances: Circumstances

    def as_json(self) -> dict[str, Any]:
        """Plain values, floats in full precision."""
        return asdict(self)

    @classmethod
    def read(cls, content: Mapping[str, Any]) -> "LossRecord":
        """What `as_json` gave."""
        return cls(content["counters"], content["losses"], Circumstances(**content["circumstances"]))


def gather_losses(
    counters: Sequence[int], losses: Sequence[float], parallel: ParallelState, circumstances: Circumstances
) -> LossRecord:
    """Put together what the data-parallel ranks computed; every rank must call it."""
    gathered: list[Any] = [None] * parallel.size("dp")
    dist.all_gather_object(gathered, (list(counters), list(losses)), group=parallel.true_group("dp"))
    return LossRecord(
        [counter for own, _ in gathered for counter in own],
        [loss for _, own in gathered for loss in own],
        circumstances,
    )


def check_losses(
    saved: LossRecord,
    compute: Callable[[bool], tuple[list[int], list[float]]],
    parallel: ParallelState,
    now: Circumstances,
) -> None:
    """Compute the losses of the saved samples again and compare: bit for bit in the same circumstances, or to rounding.

    compute(only_last) -> counters and losses of this rank's last micro batch of the step that was saved, or of all of
    them. Every rank must call it; raises CheckpointError on all where they differ.
    """
    is_same_place = saved.circumstances == now
    again = gather_losses(*compute(is_same_place), parallel, now)
    found = dict(zip(again.counters, again.losses))
    missing = [counter for counter in saved.counters if counter not in found]
    if missing:
        raise CheckpointError(
            f"resume check: sample {missing[0]} was in the step that was saved, and is not in it now: the data set or "
            "its plan has changed. Put it back as it was, or, to go on with it, set args.resume_check=false"
        )
    losses = [found[counter] for counter in saved.counters]
    before, after = (math.fsum(values) / len(values) for values in (saved.losses, losses))
    differing = sum(one != other for one, other in zip(saved.losses, losses))
    tolerance = 0.0 if is_same_place else ROUNDING[now.precision]
    is_equal = differing == 0 if is_same_place else abs(after - before) <= tolerance * abs(before)
    if not is_equal:
        raise CheckpointError(
            f"resume check: {before:.9g} was saved and {after:.9g} comes out now ({differing} of {len(losses)} samples "
            f"differ, {'not a bit may' if is_same_place else f'{tolerance:g} is allowed'}): the weights, the data or "
            "the code are not those that were saved. Go back to an earlier iteration with args.resume=RUN/ITERATION, "
            "or, if you know what has changed, set args.resume_check=false"
        )
    if is_same_place:
        log.info("resume check: %.6f = %.6f", before, after)
    else:
        log.info("resume check: %.6f = %.6f to rounding (saved %s)", before, after, _in_words(saved.circumstances, now))


def _in_words(saved: Circumstances, now: Circumstances) -> str:
    differences = [
        f"{name} {_plain(before)}, now {_plain(after)}"
        for (name, before), after in zip(asdict(saved).items(), asdict(now).values())
        if before != after
    ]
    return "with " + "; ".join(differences)


def _plain(value: Any) -> str:
    return " x ".join(f"{axis} {size}" for axis, size in value.items()) if isinstance(value, Mapping) else str(value)
