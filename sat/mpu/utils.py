"""Small functions under the import path of SAT's `mpu.utils`."""

from collections.abc import Sequence
from math import sqrt

import torch.nn.functional as F
from torch import Tensor

from sat.mpu.layers import scaled_init_method, unscaled_init_method
from sat.mpu.shards import divide, split_evenly

__all__ = [
    "VocabUtility",
    "divide",
    "gelu",
    "scaled_init_method",
    "split_tensor_along_last_dim",
    "sqrt",
    "unscaled_init_method",
]


def gelu(x: Tensor) -> Tensor:
    """The tanh form of GELU (Hendrycks & Gimpel 2016, sec. 2)."""
    return F.gelu(x, approximate="tanh")


def split_tensor_along_last_dim(
    tensor: Tensor, num_partitions: int | Sequence[int], contiguous_split_chunks: bool = False
) -> tuple[Tensor, ...]:
    """Cut (... d) into equal parts, or into parts in the given proportion."""
    ratios = [1] * num_partitions if isinstance(num_partitions, int) else list(num_partitions)
    unit = divide(tensor.shape[-1], sum(ratios), "last dimension")
    parts = tensor.split([unit * ratio for ratio in ratios], dim=-1)
    return tuple(part.contiguous() for part in parts) if contiguous_split_chunks else parts


class VocabUtility:
    """Which words of a vocabulary a rank holds: [first, last)."""

    @staticmethod
    def vocab_range_from_per_partition_vocab_size(
        per_partition_vocab_size: int, rank: int, world_size: int
    ) -> tuple[int, int]:
        """The range of a rank whose part has the given size, as have those before it."""
        return rank * per_partition_vocab_size, (rank + 1) * per_partition_vocab_size

    @staticmethod
    def vocab_range_from_global_vocab_size(global_vocab_size: int, rank: int, world_size: int) -> tuple[int, int]:
        """The range of a rank out of the whole vocabulary."""
        sizes = split_evenly(global_vocab_size, world_size)
        return sum(sizes[:rank]), sum(sizes[: rank + 1])
