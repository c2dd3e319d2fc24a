"""Optimizer state on disk: fragments of flattened parameters, readable at any other layout.

A rank writes what it holds to `optimizer_rank_00000.safetensors`: for each run of a parameter's elements one tensor of
each kind (`master`, `exp_avg`, ..), named `kind|parameter|start|elements`, and single numbers as `kind|parameter`. A
reader takes the overlap of what it needs with what any file has. Where the number of tensor-parallel ranks has changed,
it puts the whole parameter together and cuts its part anew.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from sat.errors import CheckpointError
from sat.mpu.shards import ShardRule
from sat.mpu.state import ParallelState
from sat.training.files import Entry, LazyTensor, write_safetensors


def optimizer_file(rank: int) -> str:
    """Name of the optimizer state of one rank."""
    return f"optimizer_rank_{rank:05d}.safetensors"


@dataclass(frozen=True)
class Fragment:
    """A run of one parameter's flattened elements that this rank keeps optimizer state for."""

    name: str
    start: int
    shape: torch.Size
    """Of the parameter on this tensor-parallel rank."""
    tensors: Mapping[str, Tensor]
    """Kind (`master`, `exp_avg`, ...) -> flat view of the live state, one value for each element of the run."""
    numbers: Mapping[str, Tensor]
    """Kind -> a single live number, such as Adam's step count."""

    @property
    def total(self) -> int:
        """Elements of the parameter on this tensor-parallel rank."""
        return math.prod(self.shape)


def save_fragments(file: Path, fragments: Iterable[Fragment], tp_rank: int, tp_size: int) -> Entry:
    """Write what a rank holds; returns the file's size and checksum."""
    tensors: dict[str, LazyTensor] = {}
    for fragment in fragments:
        for kind, value in fragment.tensors.items():
            tensors[f"{kind}|{fragment.name}|{fragment.start}|{fragment.total}"] = LazyTensor.of(value)
        for kind, value in fragment.numbers.items():
            tensors[f"{kind}|{fragment.name}"] = LazyTensor.of(value)
    return write_safetensors(file, tensors, {"tp_rank": str(tp_rank), "tp_size": str(tp_size)})


@dataclass(frozen=True)
class _Run:
    """A stored run of a kind of one parameter."""

    reader: Any
    """Of the safetensors file, kept open."""
    file: Path
    key: str
    start: int
    total: int

    def copy_to(self, live: Tensor, live_start: int) -> int:
        """Copy what this run and a live one of the same flattened tensor share; returns the number of elements."""
        stored = self.reader.get_slice(self.key)
        low = max(live_start, self.start)
        high = min(live_start + live.numel(), self.start + stored.get_shape()[0])
        if low < high:
            live[low - live_start : high - live_start].copy_(stored[low - self.start : high - self.start])
        return max(high - low, 0)


class StoredState:
    """The optimizer state of a checkpoint, as an index of what is where."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tp_size = 1
        self._runs: dict[tuple[str, str, int], list[_Run]] = {}  # (parameter, kind, tp rank)
        self._numbers: dict[tuple[str, str], _Run] = {}
        for file in sorted(folder.glob("optimizer_rank_*.safetensors")):
            self._index(file)

    def _index(self, file: Path) -> None:
        try:
            reader = safe_open(file, framework="pt")
        except Exception as error:  # safetensors raises its own, undocumented types
            raise CheckpointError(
                f"{file} is not a whole safetensors file ({error}); use an earlier iteration"
            ) from error
        place, keys = reader.metadata() or {}, reader.keys()
        tp_rank, self.tp_size = int(place.get("tp_rank", 0)), int(place.get("tp_size", 1))
        for key in keys:
            kind, name, *run = key.split("|")
            if run:
                self._runs.setdefault((name, kind, tp_rank), []).append(_Run(reader, file, key, *map(int, run)))
            else:
                self._numbers[name, kind] = _Run(reader, file, key, 0, 1)

    def tensor_kinds(self, name: str | None = None) -> set[str]:
        """Kinds of state with a value for each element, besides the master weights; of one parameter, or of any."""
        return {kind for owner, kind, _ in self._runs if name in (None, owner)} - {"master"}

    def number_kinds(self, name: str | None = None) -> set[str]:
        """Kinds of state that are a single number for a parameter; of one parameter, or of any."""
        return {kind for owner, kind in self._numbers if name in (None, owner)}

    def whole(self, name: str, kind: str, tp_rank: int) -> Tensor | None:
        """One kind of state of a whole parameter of one tensor-parallel rank, flat; None where it was not kept."""
        runs = self._runs.get((name, kind, tp_rank))
        if runs is None:
            return None
        flat = torch.empty(runs[0].total)
        if sum(run.copy_to(flat, 0) for run in runs) < len(flat):
            raise CheckpointError(f"{self.folder} holds only a part of the {kind} of {name}")
        return flat

    def fill(
        self,
        fragments: Iterable[Fragment],
        rules: Mapping[str, ShardRule],
        parallel: ParallelState,
        changes: Mapping[str, Callable[[Tensor], Tensor]] | None = None,
    ) -> None:
        """Fill the live state; every element must be found. rules: how the model's parameters are cut over tp ranks.

        changes: what makes of a stored parameter (1 m d), whole on every tp rank, the live one (1 s d); its state
        follows it.
        """
        lacking = []
        for fragment in fragments:
            for kind, live in fragment.tensors.items():
                change = (changes or {}).get(fragment.name)
                if change is not None:
                    found = self._fill_changed(fragment, kind, live, change)
                else:
                    found = self._fill_run(fragment, kind, live, rules.get(fragment.name), parallel)
                if found < live.numel():
                    lacking.append(f"{kind} of {fragment.name}")
            for kind, number in fragment.numbers.items():
                stored = self._numbers.get((fragment.name, kind))
                if stored is None:
                    lacking.append(f"{kind} of {fragment.name}")
                    continue
                number.copy_(stored.reader.get_tensor(stored.key))
        if lacking:
            raise CheckpointError(
                f"{self.folder} lacks optimizer state ({len(lacking)}): {', '.join(lacking[:3])}; "
                "to start a new run from its weights alone set args.mode=finetune"
            )

    def _fill_changed(self, fragment: Fragment, kind: str, live: Tensor, change: Callable[[Tensor], Tensor]) -> int:
        """Fill one run of one kind of a parameter that has changed; returns how many of its elements were found."""
        stored = self.whole(fragment.name, kind, 0)
        if stored is None:
            return 0
        own = change(stored.view(1, -1, fragment.shape[-1])).flatten()
        live.copy_(own[fragment.start : fragment.start + live.numel()])
        return live.numel()

    def _fill_run(
        self, fragment: Fragment, kind: str, live: Tensor, rule: ShardRule | None, parallel: ParallelState
    ) -> int:
        """Fill one run of one kind; returns how many of its elements were found."""
        if rule is None:
            return self._copy(fragment.name, kind, 0, fragment.total, live, fragment.start)
        tp_rank, tp_size = parallel.rank("tp"), parallel.size("tp")
        if tp_size == self.tp_size:
            return self._copy(fragment.name, kind, tp_rank, fragment.total, live, fragment.start)
        parts, found = [], 0
        for stored_rank, shape in enumerate(_stored_shapes(fragment.shape, rule, self.tp_size)):
            part = torch.empty(math.prod(shape), dtype=live.dtype)
            found += self._copy(fragment.name, kind, stored_rank, len(part), part, 0)
            parts.append(part.view(shape))
        if found < sum(part.numel() for part in parts):
            return 0
        own = rule.cut(rule.join(parts), tp_rank, tp_size).flatten()
        live.copy_(own[fragment.start : fragment.start + live.numel()])
        return live.numel()

    def _copy(self, name: str, kind: str, tp_rank: int, total: int, live: Tensor, start: int) -> int:
        runs = self._runs.get((name, kind, tp_rank), [])
        for run in runs:
            if run.total != total:
                raise CheckpointError(
                    f"{run.file}: {name} has {run.total:,} elements there and {total:,} in the model; "
                    "continue with the configuration that the run was started with"
                )
        return sum(run.copy_to(live, start) for run in runs)


def _stored_shapes(own: torch.Size, rule: ShardRule, tp_size: int) -> Sequence[torch.Size]:
    """Shapes of a parameter's parts on `tp_size` ranks, from its shape on any."""
    sizes = [rule.size(rank, tp_size) for rank in range(tp_size)]
    return [torch.Size((*own[: rule.dim], size, *own[rule.dim + 1 :])) for size in sizes]
