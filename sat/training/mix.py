"""How much each set of a mixture gives to a run."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

KINDS = ("samples", "tokens")


@dataclass(frozen=True)
class Mix:
    """Samples and tokens of each set, over some steps and all ranks."""

    counts: Mapping[str, Mapping[str, int]]
    """Kind -> set -> how many."""

    @property
    def shares(self) -> dict[str, float]:
        """`samples_share_NAME` and `tokens_share_NAME`, for the metrics."""
        return {f"{kind}_share_{name}": share for kind in KINDS for name, share in self._shares(kind).items()}

    def _shares(self, kind: str) -> dict[str, float]:
        own = self.counts[kind]
        whole = sum(own.values())
        return {name: count / whole if whole else 0.0 for name, count in own.items()}

    def __str__(self) -> str:
        samples, tokens = (self._shares(kind) for kind in KINDS)
        parts = [f"{name} {samples[name]:.1%} ({tokens[name]:.1%})" for name in samples]
        return f"mix, samples (tokens): {', '.join(parts)}"


class RealisedMix:
    """Counts what the sets of a mixture have given since the last line of the metrics."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = list(names)
        self.counts = self._nothing()
        """Kind -> set -> how many."""

    def _nothing(self) -> dict[str, dict[str, int]]:
        return {kind: dict.fromkeys(self.names, 0) for kind in KINDS}

    def state(self) -> dict[str, dict[str, int]]:
        """For a checkpoint, so that the first line after a resume covers what it would have without."""
        return {kind: dict(own) for kind, own in self.counts.items()}

    def load(self, state: Mapping[str, Mapping[str, int]]) -> None:
        """Go on from what a checkpoint holds."""
        self.counts = {kind: dict(state[kind]) for kind in KINDS}

    def count(self, batch: Mapping[str, Any], lengths: Sequence[int]) -> dict[str, int]:
        """What a batch gives, under names that a sum over the ranks of a step keeps apart."""
        found = {_key(kind, name): 0 for kind in KINDS for name in self.names}
        for name, length in zip(batch.get("set", []), lengths):
            found[_key("samples", name)] += 1
            found[_key("tokens", name)] += length
        return found

    def add(self, totals: Mapping[str, float]) -> None:
        """Count the sums of a step."""
        for kind in KINDS:
            for name in self.names:
                self.counts[kind][name] += int(totals[_key(kind, name)])

    def take(self) -> Mix:
        """What was counted; counting begins anew."""
        mix, self.counts = Mix(self.counts), self._nothing()
        return mix


def _key(kind: str, name: str) -> str:
    return f"{kind} of {name}"
