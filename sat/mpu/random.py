"""Randomness that belongs to the sample: one stream for each (seed, stream name, sample counter).

Nothing here depends on ranks, batch sizes or what was drawn before, so noise and timesteps of a sample are the same at
any layout and after any resume.
"""

import hashlib
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor


def stream_seed(seed: int, stream: str, *counters: int) -> int:
    """A 63-bit seed for one stream, by BLAKE2b of its name and counters."""
    text = "\0".join([str(seed), stream, *map(str, counters)]).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") >> 1


def stream_generator(seed: int, stream: str, *counters: int) -> torch.Generator:
    """A CPU generator at the start of one stream."""
    return torch.Generator().manual_seed(stream_seed(seed, stream, *counters))


def sample_normal(seed: int, stream: str, counters: Iterable[int], shape: Sequence[int]) -> Tensor:
    """Standard normal noise, one row for each sample counter: (len(counters), *shape), float32 on the CPU."""
    return torch.stack([torch.randn(tuple(shape), generator=stream_generator(seed, stream, int(c))) for c in counters])


def sample_uniform(seed: int, stream: str, counters: Iterable[int]) -> Tensor:
    """One number in [0, 1) for each sample counter: (len(counters),), float64 on the CPU."""
    draws = [torch.rand((), dtype=torch.float64, generator=stream_generator(seed, stream, int(c))) for c in counters]
    return torch.stack(draws)
