"""The two halves of classifier-free guidance on two ranks."""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class GuidanceSplit:
    """This rank computes one of the two estimates, the other rank of the group the other."""

    group: dist.ProcessGroup

    @property
    def is_conditional(self) -> bool:
        """Whether this rank's half is the one with the prompt."""
        return self.group.rank() == 1

    def exchange(self, own: Tensor) -> tuple[Tensor, Tensor]:
        """The unconditional and the conditional estimate, of which this rank computed one."""
        halves = [torch.empty_like(own), torch.empty_like(own)]
        dist.all_gather(halves, own.contiguous(), group=self.group)
        return halves[0], halves[1]
