"""Several datasets in one run: which set each sample comes from, a function of the seed and its counter alone."""

import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from fractions import Fraction
from itertools import pairwise
from typing import Any, Literal

import numpy as np
from torch.utils.data import ConcatDataset

from sat.config import did_you_mean, instantiate_from_config
from sat.data.sampler import Permutation, ShuffledEpochs
from sat.errors import ConfigError, DataError
from sat.mpu.random import stream_seed

Numbers = Sequence[int] | np.ndarray
BLOCK = 64
"""Samples in which every set gets its share. Fewer make the mix smoother and the places of the sets more regular."""


class MixedOrder:
    """Clips of several sets, each set in shuffled epochs of its own and at its share of the samples.

    Samples come in blocks of about BLOCK. After k blocks, set s of S has given floor(k · BLOCK · share + (s + 1/2) / S)
    samples: the shares are kept to within one sample of each set, however small they are, and what a block holds needs
    none of those before it. Within a block the sets come in random order.

    sets: name -> numbers of its clips. The name keys a set's order: that of a set stays when others join or leave.
    shares: name -> share of the samples, exact and above 0; together 1.
    """

    def __init__(
        self, sets: Mapping[str, Sequence[int]], shares: Mapping[str, Fraction], seed: int, epoch_size: int
    ) -> None:
        self.seed, self.epoch_size, self.shares = seed, epoch_size, dict(shares)
        self.sets = {name: sets[name] for name in shares}
        self._clips = list(self.sets.values())
        self._orders = [ShuffledEpochs(len(sets[name]), seed, f"data order of {name}") for name in shares]
        self._block, self._start, self._members = -1, 0, self._members_of(0)

    def __getitem__(self, counter: int) -> int:
        if not 0 <= counter - self._start < len(self._members):
            self._block = self._block_of(counter)
            self._start, self._members = self._given_before(self._block), self._members_of(self._block)
        which, number = self._members[counter - self._start]
        return int(self._clips[which][self._orders[which][number]])

    def clips(self, counters: range) -> list[int]:
        """Those of samples that follow each other."""
        return [self[counter] for counter in counters]

    def _given(self, block: int) -> list[int]:
        """Samples that each set has given before a block."""
        count = len(self.shares)
        return [
            math.floor(block * BLOCK * share + Fraction(2 * place + 1, 2 * count))
            for place, share in enumerate(self.shares.values())
        ]

    def _given_before(self, block: int) -> int:
        return sum(self._given(block))

    def _block_of(self, counter: int) -> int:
        """The block of a sample. It is near counter / BLOCK: each set's count is off by less than one sample."""
        slack = len(self.shares) + BLOCK
        near = range(max((counter - slack) // BLOCK, 0), (counter + slack) // BLOCK + 1)
        return near[bisect_right(near, counter, key=self._given_before) - 1]

    def _members_of(self, block: int) -> list[tuple[int, int]]:
        """(set, how many samples it gave before) of each sample of a block."""
        given, after = self._given(block), self._given(block + 1)
        sets = [which for which, (low, high) in enumerate(zip(given, after)) for _ in range(high - low)]
        members = []
        for place in Permutation(len(sets), stream_seed(self.seed, "mixture", block)) if sets else []:
            which = sets[place]
            members.append((which, given[which]))
            given[which] += 1
        return members


class Mixture(ConcatDataset):
    """Several datasets by name, and how much of each a run sees.

    sets: name -> a dataset, or the `{target, params}` of one; its params are its own (folder, fps, sizes, captions).
    weights: name -> weight of every set; its share is its weight over their sum. 0 leaves a set out.
    weights_by: `samples`, or `tokens`: a set of long clips then gives fewer samples.
    repeats: instead of weights, how often a set's clips come while those of a set with 1 come once; 1 where it is not
        named. 0.5 is every clip once in two epochs.

    The order in which the sets stand decides nothing. All clips of a set come once before any of them comes again. An
    epoch is as many samples as the sets have clips, each counted as often as it repeats. Items have one more key,
    `set`. Raises ConfigError for weights that cannot be, DataError for an empty set.
    """

    def __init__(
        self,
        sets: Mapping[str, Any],
        weights: Mapping[str, float] | None = None,
        weights_by: Literal["samples", "tokens"] = "samples",
        repeats: Mapping[str, float] | None = None,
    ) -> None:
        if not isinstance(sets, Mapping) or not sets:
            raise ConfigError("data.params.sets names no set; give a mapping of names to {target: ..., params: {...}}")
        if weights is not None and repeats is not None:
            raise ConfigError("data.params has both weights and repeats; give one")
        if weights_by not in ("samples", "tokens"):
            raise ConfigError(f"data.params.weights_by is {weights_by!r}; give samples or tokens")
        if weights is None and weights_by == "tokens":
            raise ConfigError("data.params.weights_by is tokens, and there are no weights; give data.params.weights")
        sets = {name: sets[name] for name in sorted(sets, key=str)}
        names = [str(name) for name in sets]
        self.weights = None if weights is None else _amounts("weights", weights, names)
        self.repeats = None if weights is not None else _amounts("repeats", repeats or {}, names, default=1)
        self.weights_by = weights_by
        built = [instantiate_from_config(part) if isinstance(part, Mapping) else part for part in sets.values()]
        for name, dataset in zip(names, built):
            if not len(dataset):
                raise DataError(f"the set '{name}' of the mixture is empty; leave it out, or mend its files")
        super().__init__(built)
        self.names = names

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {**super().__getitem__(index), "set": self.names[self._set_of(index)]}

    def _set_of(self, index: int) -> int:
        return bisect_right(self.cumulative_sizes, index)

    def peers(self, index: int) -> range:
        """The clips of the set of a clip: what may stand in for it."""
        which = self._set_of(index)
        return range(self.cumulative_sizes[which - 1] if which else 0, self.cumulative_sizes[which])

    def in_turn(self, count: int) -> list[int]:
        """The first clip of each set, the second of each, and so on: so many in all, or as many as there are."""
        starts = [0, *self.cumulative_sizes]
        turns = range(max(len(part) for part in self.datasets))  # type: ignore[arg-type]
        found = (first + turn for turn in turns for first, end in pairwise(starts) if first + turn < end)
        return [index for index, _ in zip(found, range(count))]

    def order(self, seed: int, kept: Numbers, lengths: Numbers | None) -> MixedOrder:
        """The order of a run over the clips that it keeps (their numbers, rising); it gives places among those.

        lengths: tokens of each of them, which weights by tokens need.
        """
        bounds = np.searchsorted(kept, [0, *self.cumulative_sizes]).tolist()
        sets = {name: range(*pair) for name, *pair in zip(self.names, bounds, bounds[1:])}
        amounts = {name: self._samples_of(name, own, lengths) for name, own in sets.items() if self._wants(name)}
        total = sum(amounts.values())
        shares = {name: amount / total for name, amount in amounts.items()}
        epoch_size = sum(len(sets[name]) * (self.repeats[name] if self.repeats else 1) for name in shares)
        return MixedOrder(sets, shares, seed, max(round(epoch_size), 1))

    def _wants(self, name: str) -> bool:
        return bool((self.weights or self.repeats or {})[name])

    def _samples_of(self, name: str, clips: range, lengths: Numbers | None) -> Fraction:
        """What a set's number of samples is proportional to."""
        if not len(clips):
            raise DataError(f"no clip of the set '{name}' fits a row; raise max_tokens, or leave the set out")
        if self.repeats is not None:
            return self.repeats[name] * len(clips)
        assert self.weights is not None
        if self.weights_by == "samples":
            return self.weights[name]
        assert lengths is not None
        return self.weights[name] * len(clips) / int(np.sum(lengths[clips.start : clips.stop]))

    def summary(self, order: MixedOrder, lengths: Numbers | None) -> list[str]:
        """A line for each set: its clips, its share of the samples and, where lengths are known, of the tokens."""
        tokens = {}
        if lengths is not None:
            means = {name: np.mean(np.asarray(lengths)[np.asarray(clips)]) for name, clips in order.sets.items()}
            tokens = {name: float(share) * float(means[name]) for name, share in order.shares.items()}
        lines = []
        for name, share in order.shares.items():
            of_tokens = f", {tokens[name] / sum(tokens.values()):.1%} of the tokens" if tokens else ""
            clips = len(order.sets[name])
            lines.append(f"set {name}: {clips:,} clips, {float(share):.1%} of the samples{of_tokens}")
        return lines + [f"set {name}: left out" for name in self.names if name not in order.shares]


def _amounts(key: str, given: Any, names: Sequence[str], default: int | None = None) -> dict[str, Fraction]:
    """name -> what `given` says of it, exact: 0.3 is three tenths."""
    if not isinstance(given, Mapping):
        raise ConfigError(f"data.params.{key} is {given!r}; give a mapping of the sets' names to numbers")
    given = {str(name): value for name, value in given.items()}
    for name, value in given.items():
        if name not in names:
            raise ConfigError(
                f"data.params.{key} names a set '{name}' that data.params.sets has not{did_you_mean(name, names)}; the "
                f"sets are {', '.join(names)}"
            )
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
            raise ConfigError(f"data.params.{key}.{name} is {value!r}; give a number, 0 or more")
    lacking = [name for name in names if name not in given]
    if lacking and default is None:
        raise ConfigError(f"data.params.{key} says nothing of the set '{lacking[0]}'; give 0 to leave it out")
    amounts = {name: Fraction(str(given.get(name, default))) for name in names}
    if not any(amounts.values()):
        raise ConfigError(f"data.params.{key} are 0 for every set, so there is nothing to draw; raise one")
    return amounts
