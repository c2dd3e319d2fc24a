"""Layouts to compare with one process, and what every comparison needs."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sat.mpu.shards import cut_state, shard_rules
from sat.mpu.state import ContextMode, ParallelState, choose_ulysses, set_parallel_state
from tests.cogvideox.tiny import HEADS


@dataclass(frozen=True)
class Layout:
    """dp x cp x tp ranks."""

    dp: int = 1
    cp: int = 1
    tp: int = 1
    mode: ContextMode = "auto"
    sp: bool = False

    @property
    def heads(self) -> int:
        """Attention heads of the tiny networks: three, which few numbers divide, or one for each rank."""
        return max(HEADS, self.tp)

    @property
    def world(self) -> int:
        return self.dp * self.cp * self.tp

    def build(self, num_heads: int) -> ParallelState:
        """The state of this rank."""
        ulysses = choose_ulysses(self.mode, self.cp, -(-num_heads // self.tp))
        return ParallelState.build(tp=self.tp, cp=self.cp, ulysses=ulysses, sequence_parallel=self.sp)


LAYOUTS = {
    "TP2": Layout(tp=2),
    "TP3": Layout(tp=3),
    "TP2+SP": Layout(tp=2, sp=True),
    "TP3+SP": Layout(tp=3, sp=True),
    "Ulysses2": Layout(cp=2, mode="ulysses"),
    "Ulysses4": Layout(cp=4, mode="ulysses"),
    "Ring2": Layout(cp=2, mode="ring"),
    "Ring3": Layout(cp=3, mode="ring"),
    "Ulysses2xRing2": Layout(cp=4, mode="hybrid"),
    "TP2xUlysses2": Layout(cp=2, tp=2, mode="ulysses"),
    "TP2xRing2": Layout(cp=2, tp=2, mode="ring"),
    "TP2+SPxRing2": Layout(cp=2, tp=2, mode="ring", sp=True),
    "TP2+SPxUlysses2": Layout(cp=2, tp=2, mode="ulysses", sp=True),
    "DP2": Layout(dp=2),
    "DP2xTP2": Layout(dp=2, tp=2),
    "DP2xCP2": Layout(dp=2, cp=2),
}


WIDE = {"TP4": Layout(tp=4), "TP4+SP": Layout(tp=4, sp=True)}
"""Layouts of more tensor-parallel ranks than LAYOUTS' networks have heads: these have four."""


@contextmanager
def parallel_state(state: ParallelState) -> Iterator[ParallelState]:
    """Make a state the current one for a `with` block."""
    set_parallel_state(state)
    try:
        yield state
    finally:
        set_parallel_state(ParallelState())


def load_own_part(module: nn.Module, whole: dict[str, Tensor], parallel: ParallelState) -> None:
    """Give a sharded module its part of whole weights."""
    own = cut_state(whole, shard_rules(module), parallel.rank("tp"), parallel.size("tp"))
    module.load_state_dict(own, strict=True)


def mean_over_replicas(gradient: Tensor, parallel: ParallelState) -> Tensor:
    """What DeepSpeed does with gradients."""
    group = parallel.group("replicas")
    if group is None:
        return gradient
    total = gradient.clone()
    dist.all_reduce(total, group=group)
    return total / group.size()


@torch.no_grad()
def worst_difference(own: Tensor, expected: Tensor, floor: float = 1e-6) -> float:
    """Largest difference over the largest expected entry, or over `floor` where all are smaller: rounding of zero."""
    assert own.shape == expected.shape
    return float((own - expected).abs().max() / expected.abs().max().clamp(min=floor)) if expected.numel() else 0.0


def gradients(module: nn.Module) -> dict[str, Any]:
    """Gradients of the trained parameters; zeros where autograd gave none."""
    return {
        name: torch.zeros_like(p) if p.grad is None else p.grad
        for name, p in module.named_parameters()
        if p.requires_grad
    }
