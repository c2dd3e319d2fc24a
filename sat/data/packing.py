"""Which clips share a row: a plan made from their lengths alone, the same at any number of ranks.

A plan is a function of (order, epoch, rows per step). Every sample of the order stands in it once. Rows are filled from
a pool of the clips that come next in the order: with those that have waited longest, while they fit, so that a row is
as mixed as the order is; then with the largest that still fits, until none does (best fit; Johnson 1973 bounds its
waste).
"""

from abc import ABC, abstractmethod
from bisect import bisect_right, insort
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from heapq import heappop, heappush
from itertools import count, islice
from math import lcm
from typing import Any

import numpy as np

from sat.data.sampler import SampleOrder, epoch_permutation
from sat.errors import DataError

POOL = 1024
"""Clips that a planner looks at together. More fill rows better, and move clips further from their random place."""
AT_A_TIME = 4096
"""Clips whose place in the order is computed together."""
EVEN_RANKS = 64
"""Up to so many ranks, those that divide a step's rows have about equal work."""
GROUPS = 64
"""Groups of rows of about equal cost that are sorted out together. More make the rows of one more equal."""


@dataclass(frozen=True)
class Row:
    """Clips that go through the network together."""

    counters: tuple[int, ...]
    """Sample counters."""
    indices: tuple[int, ...]
    """Their numbers in the dataset."""
    tokens: int
    cost: float
    """What a forward pass of it takes, in multiply-adds up to a factor."""


@dataclass(frozen=True)
class PlannedStep:
    """The rows of one optimizer step."""

    rows: tuple[Row, ...]
    epoch: int
    """Of its first clip."""

    @property
    def num_samples(self) -> int:
        """Clips of the step."""
        return sum(len(row.indices) for row in self.rows)

    def shares(self, num_ranks: int) -> list[list[Row]]:
        """The rows of each rank, equally many, so that the ranks' costs come out about equal.

        The costliest row not yet given away goes to the rank that has least (Graham 1969, longest processing time
        first). Each rank's rows fall in cost, so that in every pass the ranks wait for each other as little as can be.
        """
        per_rank = len(self.rows) // num_ranks
        shares: list[list[Row]] = [[] for _ in range(num_ranks)]
        least = [(0.0, rank) for rank in range(num_ranks)]
        for row in sorted(self.rows, key=lambda row: -row.cost):
            cost, rank = heappop(least)
            shares[rank].append(row)
            if len(shares[rank]) < per_rank:
                heappush(least, (cost + row.cost, rank))
        return shares

    def places(self) -> dict[int, int]:
        """Counter of each clip -> its place among the step's clips."""
        counters = sorted(counter for row in self.rows for counter in row.counters)
        return {counter: place for place, counter in enumerate(counters)}


@dataclass(frozen=True)
class CostModel:
    """Multiply-adds of a forward pass: linear layers grow with the tokens, attention with each clip's square."""

    hidden_size: int

    def __call__(self, lengths: Sequence[int]) -> float:
        linear = 24.0 * self.hidden_size**2 * sum(lengths)
        return linear + 4.0 * self.hidden_size * sum(length * length for length in lengths)


Sample = tuple[int, int]
"""Counter, and the clip's number."""


class _Pool:
    """Samples that wait, by length: the oldest, or the oldest of the longest that fit."""

    def __init__(self) -> None:
        self._by_length: dict[int, deque[Sample]] = {}
        self._lengths: list[int] = []  # of which there are clips, rising
        self._taken: set[Sample] = set()
        self._order: deque[tuple[Sample, int]] = deque()  # (sample, length), oldest first
        self.size = 0

    def add(self, sample: Sample, length: int) -> None:
        if length not in self._by_length:
            self._by_length[length] = deque()
            insort(self._lengths, length)
        self._by_length[length].append(sample)
        self._order.append((sample, length))
        self.size += 1

    def take_oldest(self, room: int) -> tuple[Sample, int] | None:
        """The sample that has waited longest, and its length; None if it has more tokens than that, or none waits."""
        while self._order and self._order[0][0] in self._taken:
            self._taken.discard(self._order.popleft()[0])
        if not self._order or self._order[0][1] > room:
            return None
        sample, length = self._order.popleft()
        self._remove(length)  # it is the oldest of its length, too
        return sample, length

    def take_longest(self, room: int) -> tuple[Sample, int] | None:
        """The longest that fits into so many tokens, and its length; None if none does."""
        place = bisect_right(self._lengths, room)
        if not place:
            return None
        length = self._lengths[place - 1]
        sample = self._by_length[length][0]
        self._remove(length)
        self._taken.add(sample)
        return sample, length

    def _remove(self, length: int) -> None:
        waiting = self._by_length[length]
        waiting.popleft()
        self.size -= 1
        if not waiting:
            del self._by_length[length]
            self._lengths.pop(bisect_right(self._lengths, length) - 1)


class Planner(ABC):
    """Deals the clips of epoch after epoch to rows, and rows to steps.

    lengths: tokens of each clip. max_tokens: most of a row. rows_per_step: rows of one optimizer step, over all ranks.
    order: the clip of each sample. Raises DataError for a clip longer than a row.

    So many rows of about equal cost come together as every number of ranks up to EVEN_RANKS that divides a step's rows
    deals out evenly: all of a step of 64, a quarter of a step of 256, so that the plan is the same at any of them and
    has equal work for each. The rows of an epoch end before those of the next begin, to within one such group.
    """

    def __init__(
        self,
        lengths: Sequence[int] | np.ndarray,
        max_tokens: int,
        rows_per_step: int,
        order: SampleOrder,
        cost: CostModel,
    ) -> None:
        self.lengths = np.asarray(lengths, dtype=np.int64)
        if not len(self.lengths):
            raise DataError("the dataset is empty: there is no clip to plan with")
        longest = int(self.lengths.argmax())
        if self.lengths[longest] > max_tokens:
            raise DataError(
                f"clip {longest} has {self.lengths[longest]:,} tokens, more than max_tokens {max_tokens:,}; raise it"
            )
        self.max_tokens, self.rows_per_step, self.order, self.cost = max_tokens, rows_per_step, order, cost
        self.group_size = lcm(*(ranks for ranks in range(1, EVEN_RANKS + 1) if rows_per_step % ranks == 0))

    def steps(self, start_step: int = 0) -> Iterator[PlannedStep]:
        """The optimizer steps from one on, without end. What lies before it is planned over quickly."""
        rows: list[Row] = []
        number = 0
        for row in self._rows():
            rows.append(row)
            if len(rows) == self.rows_per_step:
                if number >= start_step:
                    yield PlannedStep(tuple(rows), rows[0].counters[0] // self.order.epoch_size)
                rows, number = [], number + 1

    def _rows(self) -> Iterator[Row]:
        """The rows of epoch after epoch, those of about equal cost beside each other."""
        if self.group_size == 1:
            for epoch in count():
                yield from self.epoch_rows(epoch)
        left: list[Row] = []  # fewer than a group: the costliest of what came so far
        windows = (window for epoch in count() for window in self._windows(self.epoch_rows(epoch)))
        for number, window in enumerate(windows):
            window.sort(key=lambda row: row.cost)
            lacking = self.group_size - len(left)
            if left and len(window) >= lacking:
                yield from left + window[-lacking:]
                left, window = [], window[:-lacking]
            num_groups = (len(left) + len(window)) // self.group_size
            for group in epoch_permutation(num_groups, self.order.seed, number) if num_groups else ():
                yield from window[group * self.group_size : (group + 1) * self.group_size]
            left += window[num_groups * self.group_size :]

    def _windows(self, rows: Iterator[Row]) -> Iterator[list[Row]]:
        """An epoch's rows in lists of GROUPS groups or more; of fewer only where an epoch has no more."""
        size = GROUPS * self.group_size
        window = list(islice(rows, size))
        while len(following := list(islice(rows, size))) == size:
            yield window
            window = following
        yield window + following

    def epoch_rows(self, epoch: int) -> Iterator[Row]:
        """The rows of one epoch: each of its samples once."""
        first = epoch * self.order.epoch_size
        for members in self._members(range(first, first + self.order.epoch_size)):
            counters, indices = zip(*members)
            lengths = self.lengths[list(indices)].tolist()
            yield Row(counters, indices, sum(lengths), self.cost(lengths))

    @abstractmethod
    def _members(self, counters: range) -> Iterator[list[Sample]]:
        """The samples of each row, of all counters of an epoch."""

    def _coming(self, counters: range) -> Iterator[tuple[Sample, int]]:
        """Each sample and its length, in order."""
        for first in range(counters.start, counters.stop, AT_A_TIME):
            part = range(first, min(first + AT_A_TIME, counters.stop))
            indices = self.order.clips(part)
            yield from zip(zip(part, indices), self.lengths[indices].tolist())


class PackingPlanner(Planner):
    """Rows of any clips, up to max_tokens together (Frame Pack; CogVideoX, arXiv:2408.06072, sec. 2.4)."""

    def _members(self, counters: range) -> Iterator[list[Sample]]:
        pool, coming = _Pool(), self._coming(counters)
        self._refill(pool, coming)
        while pool.size:
            row, room = [], self.max_tokens
            for take in (pool.take_oldest, pool.take_longest):
                while (found := take(room)) is not None:
                    row.append(found[0])
                    room -= found[1]
            yield row
            self._refill(pool, coming)

    @staticmethod
    def _refill(pool: _Pool, coming: Iterator[tuple[Sample, int]]) -> None:
        while pool.size < POOL:
            following = next(coming, None)
            if following is None:
                return
            pool.add(*following)


class BucketPlanner(Planner):
    """Rows of clips of one size, as many as max_tokens holds; what is left of a size at an epoch's end goes as it is.

    shapes: the size of each clip, equal for clips that may share a row.
    """

    def __init__(self, lengths: Sequence[int] | np.ndarray, shapes: Sequence[Any] | np.ndarray, *args: Any) -> None:
        super().__init__(lengths, *args)
        _, buckets = np.unique(np.asarray(shapes), axis=0, return_inverse=True)
        self._buckets = buckets.reshape(-1)

    def _members(self, counters: range) -> Iterator[list[Sample]]:
        waiting: dict[int, list[Sample]] = {}
        for sample, length in self._coming(counters):
            bucket = waiting.setdefault(int(self._buckets[sample[1]]), [])
            bucket.append(sample)
            if (len(bucket) + 1) * length > self.max_tokens:
                yield list(bucket)
                bucket.clear()
        yield from (bucket for bucket in waiting.values() if bucket)
