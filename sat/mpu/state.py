"""Which ranks work together: one frozen `ParallelState` over torch's DeviceMesh, and SAT's functions as views of it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Literal

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from sat.errors import LayoutError

Axis = Literal["dp", "guidance", "cp", "tp", "ring", "ulysses", "replicas"]
"""dp x guidance x cp x tp is the world, cp is ring x ulysses; replicas are the ranks that hold equal weights."""

AXES: tuple[Axis, ...] = ("dp", "cp", "tp")

ContextMode = Literal["auto", "ulysses", "ring", "hybrid"]


@dataclass(frozen=True)
class ParallelState:
    """The axes of this job: world = dp * cp * tp, tp innermost. `axes` is empty for a lone process without a group.

    sequence_parallel: between the sharded products of a layer, the ranks of a tp group hold a share of the tokens each
    (Korthikanti et al. 2022, arXiv:2205.05198, sec. 4.2.2).
    """

    axes: Mapping[Axis, DeviceMesh] = field(default_factory=dict)
    sequence_parallel: bool = False

    @classmethod
    def build(
        cls,
        tp: int = 1,
        cp: int = 1,
        device_type: str = "cpu",
        ulysses: int | None = None,
        sequence_parallel: bool = False,
        guidance: int = 1,
        timeout: timedelta | None = None,
    ) -> "ParallelState":
        """Divide the processes of the running `torch.distributed` job into dp x cp x tp; every rank must call it.

        ulysses: how many of the cp ranks exchange heads, the rest form rings; all of them by default. guidance: 2 where
        sampling computes the halves of guidance on different ranks. timeout: how long a collective may take; by default
        torch's own, which is not that of the job's group.
        """
        world = dist.get_world_size() if dist.is_initialized() else 1
        dp = divide(world, tp, cp, guidance)
        ulysses = cp if ulysses is None else ulysses
        if ulysses < 1 or cp % ulysses:
            raise LayoutError(
                f"context_parallel_size {cp} does not divide into groups of {ulysses} that exchange heads"
            )
        if not dist.is_initialized():
            return cls()
        names: tuple[Axis, ...] = ("dp", "guidance", "ring", "ulysses", "tp")
        shape = (dp, guidance, cp // ulysses, ulysses, tp)
        mesh = init_device_mesh(device_type, shape, mesh_dim_names=names)
        axes: dict[Axis, DeviceMesh] = {axis: mesh[axis] for axis in names}
        axes["cp"] = mesh["ring", "ulysses"]._flatten("cp")
        axes["replicas"] = mesh["dp", "guidance", "ring", "ulysses"]._flatten("replicas")
        if timeout is not None:
            for axis in axes.values():
                axis.get_group().set_timeout(timeout)
        return cls(axes, sequence_parallel and tp > 1)

    def __deepcopy__(self, memo: Any) -> "ParallelState":
        """Itself: process groups cannot be copied, and a copied module works with the same ranks."""
        return self

    def size(self, axis: Axis) -> int:
        """Number of ranks along an axis."""
        return self.axes[axis].size() if self.axes else 1

    def rank(self, axis: Axis) -> int:
        """This process' place along an axis."""
        return self.axes[axis].get_local_rank() if self.axes else 0

    def group(self, axis: Axis) -> dist.ProcessGroup | None:
        """The process group along an axis; None where the axis has one rank, so that layers take their plain path."""
        return None if self.size(axis) == 1 else self.axes[axis].get_group()

    def true_group(self, axis: Axis) -> dist.ProcessGroup | None:
        """The same, also where it has one rank, for code to which None means all ranks. None without any."""
        return self.axes[axis].get_group() if self.axes else None


def choose_ulysses(mode: ContextMode, cp: int, num_heads: int) -> int:
    """How many of `cp` ranks exchange heads (Jacobs et al. 2023, arXiv:2309.14509); the others form rings.

    num_heads: heads that one tensor-parallel rank holds. `auto` exchanges heads over as many ranks as it can: that
    sends 4 (u - 1) / u of a shard's activations per layer, a ring 2 (r - 1). It leaves sizes out at which some rank
    would have over a tenth more heads than the mean, because the others wait for it.
    """
    divisors = [size for size in range(1, cp + 1) if cp % size == 0]
    if mode == "ulysses":
        return cp
    if mode == "ring":
        return 1
    if mode == "hybrid":
        inner = [size for size in divisors if 1 < size < cp and size <= num_heads]
        if not inner:
            raise LayoutError(
                f"context_parallel_mode hybrid needs a context_parallel_size that is a product of two numbers above 1, "
                f"one of them at most {num_heads} (the heads); {cp} is not: use ulysses, ring or auto"
            )
        return inner[-1]
    return max(size for size in divisors if size <= num_heads and -(-num_heads // size) * size <= 1.1 * num_heads)


def divide(world: int, tp: int, cp: int, guidance: int = 1) -> int:
    """Data-parallel ranks of `world` processes. Raises LayoutError where they do not divide."""
    if tp < 1 or cp < 1 or world % (tp * cp * guidance):
        halves = f" x {guidance} halves of guidance" if guidance > 1 else ""
        raise LayoutError(
            f"{world} processes do not divide into model_parallel_size {tp} x context_parallel_size {cp}{halves}; "
            f"start a multiple of {max(tp, 1) * max(cp, 1) * guidance}, or choose from "
            f"{legal_layouts(world, guidance)}"
        )
    return world // (tp * cp * guidance)


def legal_layouts(world: int, guidance: int = 1) -> str:
    """`dp x cp x tp` products that `world` processes divide into, for messages; with guidance, beside its halves."""
    if world % guidance:
        return f"layouts without args.guidance_parallel: its halves need a multiple of {guidance} processes"
    each = world // guidance
    choices = [
        f"{each // (tp * cp)} x {cp} x {tp}"
        for tp in range(1, each + 1)
        for cp in range(1, each + 1)
        if each % (tp * cp) == 0
    ]
    axes = "dp x cp x tp" if guidance == 1 else f"dp x cp x tp, beside {guidance} halves of guidance,"
    return f"{axes} = {', '.join(choices[:12])}{', ...' if len(choices) > 12 else ''}"


_current = ParallelState()


def set_parallel_state(state: ParallelState) -> None:
    """Make `state` the one that SAT's argument-free functions below speak of."""
    global _current
    _current = state


def get_parallel_state() -> ParallelState:
    """The state that SAT's argument-free functions speak of."""
    return _current


def initialize_model_parallel(model_parallel_size: int) -> None:
    """SAT's way to form the groups of a running `torch.distributed` job."""
    device_type = "cuda" if dist.is_initialized() and dist.get_backend() == "nccl" else "cpu"
    set_parallel_state(ParallelState.build(tp=model_parallel_size, device_type=device_type))


def destroy_model_parallel() -> None:
    """Forget the groups; SAT's functions then speak of a lone process. Nothing that was built with them changes."""
    set_parallel_state(ParallelState())


def model_parallel_is_initialized() -> bool:
    """Whether the groups of a multi-process job have been formed."""
    return bool(_current.axes)


def get_model_parallel_group() -> dist.ProcessGroup | None:
    """The tensor-parallel group (None where the groups have not been formed)."""
    return _current.true_group("tp")


def get_model_parallel_world_size() -> int:
    """Size of the tensor-parallel group."""
    return _current.size("tp")


def get_model_parallel_rank() -> int:
    """Rank within the tensor-parallel group."""
    return _current.rank("tp")


def get_model_parallel_src_rank() -> int:
    """Global rank of the first process of this tensor-parallel group."""
    world_rank = dist.get_rank() if dist.is_initialized() else 0
    return world_rank - get_model_parallel_rank()


def get_data_parallel_group() -> dist.ProcessGroup | None:
    """The data-parallel group (None where the groups have not been formed)."""
    return _current.true_group("dp")


def get_data_parallel_world_size() -> int:
    """Size of the data-parallel group."""
    return _current.size("dp")


def get_data_parallel_rank() -> int:
    """Rank within the data-parallel group."""
    return _current.rank("dp")
