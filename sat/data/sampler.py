"""Which sample comes when: a function of (seed, step) alone, the same at any number of ranks.

A sample counter numbers all samples of a run, 0 up. An order says which clip each counter reads. Global step s of G
samples is counters s·G ... (s+1)·G - 1.
"""

from collections.abc import Iterator, Sequence
from typing import Protocol, overload

import numpy as np

from sat.errors import ConfigError, DataError
from sat.mpu.random import stream_seed

_MASK = (1 << 64) - 1
_ROUNDS = 8
_MIN_HALF_BITS = 3  # with 2, the orders of 5 and 6 samples are measurably uneven, however many rounds there are


class Permutation(Sequence[int]):
    """A random order of 0 ... num_samples - 1 that takes no memory: each place is computed when it is asked for.

    A balanced Feistel network on the smallest even number of bits (6 or more) that holds num_samples, walked until it
    lands inside the range (Black and Rogaway 2002, "Ciphers with arbitrary finite domains", sec. 4). It is a bijection
    whatever its round function is, and unlike a shuffle from a library it cannot change with that library's version.
    """

    def __init__(self, num_samples: int, key: int) -> None:
        self.num_samples = num_samples
        self.half_bits = max(_MIN_HALF_BITS, ((num_samples - 1).bit_length() + 1) // 2)
        self.round_keys = [_mix64(key + round_index * 0x9E3779B97F4A7C15) for round_index in range(_ROUNDS)]

    def __len__(self) -> int:
        return self.num_samples

    @overload
    def __getitem__(self, place: int) -> int: ...
    @overload
    def __getitem__(self, place: slice) -> list[int]: ...
    def __getitem__(self, place: int | slice) -> int | list[int]:
        if isinstance(place, slice):
            return self._many(np.arange(*place.indices(self.num_samples), dtype=np.uint64)).tolist()
        if not -self.num_samples <= place < self.num_samples:
            raise IndexError(f"place {place} of an order of {self.num_samples} samples")
        value = place % self.num_samples
        while True:
            value = self._shuffle_bits(value)
            if value < self.num_samples:
                return value

    def _many(self, values: np.ndarray) -> np.ndarray:
        """The same for many places at once."""
        values = self._shuffle_many(values)
        while (outside := values >= self.num_samples).any():
            values[outside] = self._shuffle_many(values[outside])
        return values

    def _shuffle_many(self, values: np.ndarray) -> np.ndarray:
        half_bits, half_mask = np.uint64(self.half_bits), np.uint64((1 << self.half_bits) - 1)
        left, right = values >> half_bits, values & half_mask
        for round_key in self.round_keys:
            left, right = right, left ^ (_mix64_many(right ^ np.uint64(round_key)) & half_mask)
        return left << half_bits | right

    def _shuffle_bits(self, value: int) -> int:
        half_mask = (1 << self.half_bits) - 1
        left, right = value >> self.half_bits, value & half_mask
        for round_key in self.round_keys:
            left, right = right, left ^ (_mix64(right ^ round_key) & half_mask)
        return left << self.half_bits | right


def _mix64(value: int) -> int:
    """The finalizer of splitmix64 (Steele, Lea and Flood 2014): 64 bits in, 64 well-mixed bits out."""
    value &= _MASK
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 & _MASK
    value = (value ^ (value >> 27)) * 0x94D049BB133111EB & _MASK
    return value ^ (value >> 31)


def _mix64_many(values: np.ndarray) -> np.ndarray:
    """`_mix64` of uint64, whose products wrap."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def epoch_permutation(num_samples: int, seed: int, epoch: int, stream: str = "data order") -> Permutation:
    """The order of one epoch: a sequence in which each of 0 ... num_samples - 1 stands once."""
    return Permutation(num_samples, stream_seed(seed, stream, epoch))


class SampleOrder(Protocol):
    """Which clip each sample of a run reads: order[counter] is the clip's number."""

    seed: int
    epoch_size: int
    """Samples of one epoch."""

    def __getitem__(self, counter: int) -> int: ...

    def clips(self, counters: range) -> list[int]:
        """Those of samples that follow each other."""


class ShuffledEpochs:
    """Every clip once an epoch, in an order that is new each time: counter c reads permutation(seed, c // N)[c % N].

    stream: name of the random stream; orders of different names are independent. Raises DataError for no clips.
    """

    def __init__(self, num_clips: int, seed: int, stream: str = "data order") -> None:
        if num_clips < 1:
            raise DataError("the dataset is empty: there is no sample to draw")
        self.epoch_size, self.seed, self.stream = num_clips, seed, stream
        self._epoch, self._order = 0, epoch_permutation(num_clips, seed, 0, stream)

    def __getitem__(self, counter: int) -> int:
        epoch, place = divmod(counter, self.epoch_size)
        if epoch != self._epoch:
            self._epoch, self._order = epoch, epoch_permutation(self.epoch_size, self.seed, epoch, self.stream)
        return self._order[place]

    def clips(self, counters: range) -> list[int]:
        epoch, place = divmod(counters.start, self.epoch_size)
        if place + len(counters) > self.epoch_size:
            return [self[counter] for counter in counters]
        return epoch_permutation(self.epoch_size, self.seed, epoch, self.stream)[place : place + len(counters)]


class GlobalBatchSampler:
    """This data-parallel rank's micro-batches, each a list of (sample counter, dataset index).

    Micro-step a of global step s on rank r takes counters s·G + (a·dp_size + r)·m ... + m - 1 (m the micro-batch), so
    the samples of a global step are the same at any dp_size and micro-batch. Nothing is computed before it is asked
    for: starting at step 10^9 costs what starting at 0 does.

    start_step: the first global step (where a resumed run goes on).
    end_step: the global step to stop before; without one it never stops, epoch after epoch.

    Raises ConfigError where global_batch_size is no multiple of micro_batch_size · dp_size.
    """

    def __init__(
        self,
        order: SampleOrder,
        *,
        global_batch_size: int,
        micro_batch_size: int,
        dp_rank: int = 0,
        dp_size: int = 1,
        start_step: int = 0,
        end_step: int | None = None,
    ) -> None:
        if min(global_batch_size, micro_batch_size, dp_size) < 1 or global_batch_size % (micro_batch_size * dp_size):
            raise ConfigError(
                f"global_batch_size {global_batch_size} is no multiple of micro_batch_size {micro_batch_size} x "
                f"{dp_size} data-parallel ranks = {micro_batch_size * dp_size}"
            )
        if not 0 <= dp_rank < dp_size:
            raise ConfigError(f"dp_rank is {dp_rank}; with dp_size {dp_size} it is 0 to {dp_size - 1}")
        self.order = order
        self.seed = order.seed
        self.global_batch_size = global_batch_size
        self.micro_batch_size = micro_batch_size
        self.dp_rank = dp_rank
        self.dp_size = dp_size
        self.start_step = start_step
        self.end_step = end_step

    @property
    def grad_accum_steps(self) -> int:
        """Micro-batches of one rank in one global step."""
        return self.global_batch_size // (self.micro_batch_size * self.dp_size)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        step = self.start_step
        while self.end_step is None or step < self.end_step:
            for micro_step in range(self.grad_accum_steps):
                first = step * self.global_batch_size
                first += (micro_step * self.dp_size + self.dp_rank) * self.micro_batch_size
                yield [(counter, self.order[counter]) for counter in range(first, first + self.micro_batch_size)]
            step += 1
