"""How a whole parameter is cut over a tensor-parallel group and put together again. Layout as data, no ranks needed."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sat.errors import LayoutError


def divide(total: int, parts: int, what: str = "size") -> int:
    """total / parts, which must be whole."""
    if total % parts:
        raise LayoutError(f"{what} {total} does not divide by {parts}")
    return total // parts


def split_evenly(total: int, parts: int) -> list[int]:
    """`total` things dealt to `parts` ranks as evenly as whole things go; earlier ranks get the extra ones."""
    share, extra = divmod(total, parts)
    return [share + (part < extra) for part in range(parts)]


@dataclass(frozen=True)
class ShardRule:
    """A parameter is made of `chunks` along `dim`; each chunk is dealt to the ranks in runs of its unit.

    Fused q, k, v: three chunks, dealt in heads. `units` has one number for each chunk; `fine_units` are those for more
    ranks than a chunk has runs, the same where it cannot be torn further.
    """

    dim: int
    chunks: tuple[int, ...]
    units: tuple[int, ...]
    fine_units: tuple[int, ...]

    def sizes(self, world_size: int) -> list[list[int]]:
        """For each chunk, the length of every rank's part."""
        found = []
        for chunk, unit, fine in zip(self.chunks, self.units, self.fine_units):
            run = unit if chunk // unit >= world_size else fine
            found.append([count * run for count in split_evenly(chunk // run, world_size)])
        return found

    def of_chunks(self) -> "list[ShardRule]":
        """The rule of each chunk by itself."""
        parts = zip(self.chunks, self.units, self.fine_units)
        return [ShardRule(self.dim, (chunk,), (unit,), (fine,)) for chunk, unit, fine in parts]

    def size(self, rank: int, world_size: int) -> int:
        """Length of a rank's part along `dim`."""
        return sum(parts[rank] for parts in self.sizes(world_size))

    def cut(self, whole: Tensor, rank: int, world_size: int, out: Tensor | None = None) -> Tensor:
        """A rank's part of the whole: its parts of all chunks, side by side; written to `out` where that is given."""
        if world_size == 1 and out is None:
            return whole
        chunks = whole.split(list(self.chunks), self.dim)
        return torch.cat(
            [chunk.split(parts, self.dim)[rank] for chunk, parts in zip(chunks, self.sizes(world_size))],
            self.dim,
            out=out,
        )

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """The whole, of the parts of all ranks in order."""
        if len(parts) == 1:
            return parts[0]
        sizes = self.sizes(len(parts))
        of_rank = [
            part.split([chunk[rank] for chunk in sizes], self.dim) for rank, part in enumerate(parts)
        ]  # rank, chunk
        return torch.cat([pieces[chunk] for chunk in range(len(sizes)) for pieces in of_rank], self.dim)


def make_rule(
    dim: int,
    total: int,
    stride: int | Sequence[int] = 1,
    unit: int = 1,
    fine_units: Sequence[int] | None = None,
) -> ShardRule:
    """The rule of a dimension made of `stride` equal chunks, or of chunks in the given proportion.

    unit: the smallest run that is not torn apart; for chunks in proportion, that of the smallest chunk, the others'
    grow with them (query heads stay with the key and value head that serves them). fine_units: one for each chunk, of
    what may be torn where there are more ranks than runs; None where no chunk may be.
    """
    ratios = [1] * stride if isinstance(stride, int) else list(stride)
    size = divide(total, sum(ratios), "output size")
    units = [unit * ratio // min(ratios) for ratio in ratios]
    chunks = [size * ratio for ratio in ratios]
    for chunk, own in zip(chunks, units):
        divide(chunk, own, "a block of outputs")
    return ShardRule(dim, tuple(chunks), tuple(units), tuple(fine_units or units))


def mark_sharded(parameter: nn.Parameter, rule: ShardRule) -> None:
    """Note that a rank holds its own part of this parameter, and how the whole is cut.

    DeepSpeed's gradient norm reads `tensor_model_parallel` and its older name: parts add up, copies count once.
    """
    parameter.shard_rule = rule  # type: ignore[attr-defined]
    parameter.model_parallel = True  # type: ignore[attr-defined]
    parameter.tensor_model_parallel = True  # type: ignore[attr-defined]


def is_sharded(parameter: nn.Parameter) -> bool:
    """Whether each tensor-parallel rank holds an own part of the parameter."""
    return getattr(parameter, "shard_rule", None) is not None


def shard_rules(module: nn.Module) -> dict[str, ShardRule]:
    """Name of each split parameter -> the rule by which its whole form is cut."""
    named = module.named_parameters(remove_duplicate=False)
    return {name: parameter.shard_rule for name, parameter in named if is_sharded(parameter)}  # type: ignore[attr-defined]


def cut_state(whole: Mapping[str, Tensor], rules: Mapping[str, ShardRule], rank: int, size: int) -> dict[str, Tensor]:
    """A rank's state dict of a whole one."""
    return {name: rules[name].cut(value, rank, size) if name in rules else value for name, value in whole.items()}


def join_states(parts: Sequence[Mapping[str, Tensor]], rules: Mapping[str, ShardRule]) -> dict[str, Tensor]:
    """The whole state dict of all ranks' ones; what is not split is taken from the first."""
    return {
        name: rules[name].join([part[name] for part in parts]) if name in rules else value
        for name, value in parts[0].items()
    }
