"""Cross entropy over a vocabulary that is split over the tensor-parallel ranks (Shoeybi et al. 2019, sec. 3)."""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from sat.mpu.shards import split_evenly
from sat.mpu.state import get_parallel_state


class _VocabParallelCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits: Tensor, target: Tensor, group: dist.ProcessGroup) -> Tensor:
        highest = logits.amax(dim=-1)
        dist.all_reduce(highest, op=dist.ReduceOp.MAX, group=group)
        shifted = logits - highest.unsqueeze(-1)
        own = _own_target(logits.shape[-1], target, group)
        # Sum of exponentials and logit of the target: each rank knows a part of both.
        chosen = shifted.gather(-1, own.clamp(min=0).unsqueeze(-1)).squeeze(-1).masked_fill(own < 0, 0.0)
        parts = torch.stack([shifted.exp().sum(dim=-1), chosen])
        dist.all_reduce(parts, group=group)
        total, chosen = parts
        ctx.save_for_backward((shifted.exp() / total.unsqueeze(-1)), own)
        return total.log() - chosen

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        probabilities, own = ctx.saved_tensors
        is_target = F.one_hot(own.clamp(min=0), probabilities.shape[-1]) * (own >= 0).unsqueeze(-1)
        return (probabilities - is_target) * grad.unsqueeze(-1), None, None


def _own_target(num_own: int, target: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Place of the target among this rank's words, -1 where another rank has it."""
    total = torch.tensor(num_own, device=target.device)
    dist.all_reduce(total, group=group)
    first = sum(split_evenly(int(total), group.size())[: group.rank()])
    own = target - first
    return torch.where((own >= 0) & (own < num_own), own, -1)


def vocab_parallel_cross_entropy(logits: Tensor, target: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """-log softmax(logits)[target], (...).

    logits (... v): this rank's words of a vocabulary that is split as `VocabParallelEmbedding` splits it (a model's
    output with parallel_output). target (...): word numbers of the whole vocabulary. group: the tensor-parallel one by
    default.
    """
    group = group if group is not None else get_parallel_state().group("tp")
    if group is None:
        return F.cross_entropy(logits.flatten(0, -2), target.flatten(), reduction="none").view_as(target)
    return _VocabParallelCrossEntropy.apply(logits, target, group)
