"""Counting what the collectives of a stretch of code carry."""

from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction

from sat.mpu.collectives import Collective, all_gather_bytes, watch


class Traffic:
    """The collectives of a `with count_traffic()` block, in order."""

    def __init__(self) -> None:
        self.collectives: list[Collective] = []

    def started(self, collective: Collective) -> None:
        self.collectives.append(collective)

    def returned(self, collective: Collective) -> None:
        pass

    @property
    def sent_bytes(self) -> Fraction:
        """Bytes that this rank sends, see `Collective.sent_bytes`."""
        return sum((collective.sent_bytes for collective in self.collectives), Fraction(0))

    def by_operation(self) -> dict[tuple[str, int], Fraction]:
        """(Function, size of its group) -> bytes that this rank sends."""
        totals: dict[tuple[str, int], Fraction] = {}
        for collective in self.collectives:
            key = (collective.name, len(collective.ranks))
            totals[key] = totals.get(key, Fraction(0)) + collective.sent_bytes
        return totals


@contextmanager
def count_traffic() -> Iterator[Traffic]:
    """Count what this rank's collectives carry within the block."""
    traffic = Traffic()
    with watch(traffic):
        yield traffic


def zero_bytes(weight_bytes: int, replicas: int, stage: int, accumulation: int = 1) -> Fraction:
    """What DeepSpeed's ZeRO sends for one optimizer step over `replicas` of trained weights of that size.

    Stages 0 and 1 sum gradients once a step, 2 for every micro batch, each as an all-reduce; 1 and 2 then gather the
    weights. Stage 3 gathers weights twice for a micro batch, in forward and backward, and scatters the gradients' sums;
    it sends less where the weights of a layer stay, or are small enough to lie whole everywhere.
    """
    once = all_gather_bytes(Fraction(weight_bytes, replicas), replicas)
    return once * {0: 2, 1: 3, 2: 2 * accumulation + 1, 3: 3 * accumulation}[stage]
