"""The training loss by timestep: which noise levels a model has learned, and which it has not."""

import torch
import torch.distributed as dist
from torch import Tensor

NUM_BINS = 10


class TimestepBins:
    """Mean loss of each of equally wide bins of the timesteps, over the samples since it was last taken.

    group: the processes that have different samples. Bin k holds the timesteps t with floor(t · num_bins / T) = k.
    """

    def __init__(
        self, num_timesteps: int, num_bins: int, device: torch.device, group: dist.ProcessGroup | None
    ) -> None:
        self.num_timesteps, self.num_bins, self.group = num_timesteps, num_bins, group
        self._sums = torch.zeros(2, num_bins, dtype=torch.float64, device=device)

    def add(self, timesteps: Tensor, losses: Tensor) -> None:
        """Count samples: timesteps (b,) int64, losses (b,). Losses that are no numbers are left out."""
        finite = losses.isfinite()
        values = torch.stack([losses.double().where(finite, 0.0), finite.double()])
        self._sums.index_add_(1, timesteps * self.num_bins // self.num_timesteps, values)

    def take(self) -> dict[str, float]:
        """`loss_FIRST-LAST` for each bin that had samples on any rank, and start afresh. Every rank must call it."""
        dist.all_reduce(self._sums, group=self.group)
        sums, counts = self._sums.tolist()
        self._sums.zero_()
        return {self._name(k): sums[k] / counts[k] for k in range(self.num_bins) if counts[k]}

    def _name(self, number: int) -> str:
        first, after = (-(-self.num_timesteps * k // self.num_bins) for k in (number, number + 1))
        return f"loss_{first}-{after - 1}"
