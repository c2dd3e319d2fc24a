"""Complete gradients for parameters of which every tensor-parallel rank holds a copy.

A copy's gradient is a rank's share where the parameter met only the rank's heads or only its tokens; the shares are
summed before anything else sees them, so that copies stay equal. (The reference leaves this out: its q and k norms
drift apart.)
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sat.errors import LayoutError
from sat.mpu.shards import is_sharded
from sat.mpu.state import ParallelState


def mark_partial(parameter: nn.Parameter) -> None:
    """Say that a replicated parameter is applied to the rank's own part of something, such as its heads."""
    parameter.partial_over_tp = True  # type: ignore[attr-defined]


def sum_partial_gradients(module: nn.Module, parallel: ParallelState) -> None:
    """From now on, sum over the tensor-parallel ranks the gradients of which each computes a share.

    With sequence parallelism those are the gradients of all replicated parameters, without it those of marked ones.
    Call it once, before the parameters are handed to an optimizer.
    """
    group = parallel.group("tp")
    if group is None:
        return

    def sum_over_ranks(grad: Tensor) -> Tensor:
        total = grad.contiguous().clone()
        dist.all_reduce(total, group=group)
        return total

    for parameter in module.parameters():
        is_partial = parallel.sequence_parallel or getattr(parameter, "partial_over_tp", False)
        if parameter.requires_grad and not is_sharded(parameter) and is_partial:
            parameter.register_hook(sum_over_ranks)


@torch.no_grad()
def check_copies(module: nn.Module, parallel: ParallelState) -> None:
    """Raise LayoutError where tensor-parallel ranks differ in a parameter that is not marked as a part of a whole.

    Unmarked parts would be counted once where they add up: the gradient norm, and with it clipping, would be wrong
    without a word. Every rank must call it.
    """
    group = parallel.group("tp")
    if group is None:
        return
    own = {name: _fingerprint(p) for name, p in module.named_parameters() if not is_sharded(p)}
    all_ranks: list[Any] = [None] * group.size()
    dist.all_gather_object(all_ranks, own, group=group)
    for name, value in own.items():
        if any(other.get(name) != value for other in all_ranks):
            raise LayoutError(
                f"parameter {name} differs between tensor-parallel ranks; if each holds a part of it, say how with "
                "sat.mpu.shards.mark_sharded; if all hold the whole, make it from the run's seed"
            )


def _fingerprint(parameter: Tensor) -> tuple[tuple[int, ...], float, float]:
    wide = {"dtype": torch.promote_types(parameter.dtype, torch.float32)}
    total, length = parameter.sum(**wide), torch.linalg.vector_norm(parameter, **wide)
    return tuple(parameter.shape), float(total), float(length)
