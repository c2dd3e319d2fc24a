"""Watching what a process' collectives carry: torch.distributed's functions, wrapped for the time of a `with` block."""

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Collective:
    """One call of one of torch.distributed's functions, on this rank."""

    name: str
    ranks: tuple[int, ...]
    """Global ranks of its group."""
    shapes: tuple[tuple[int, ...], ...]
    """Of the tensors that this rank puts in; none for barriers and objects."""
    dtype: torch.dtype | None
    sent_bytes: Fraction
    """What this rank sends, by the count of the ring algorithms (Thakur et al. 2005, doi:10.1177/1094342005051521)."""

    def __str__(self) -> str:
        what = " and ".join(str(shape) for shape in self.shapes)
        of = f" of {str(self.dtype).removeprefix('torch.')} {what}" if self.shapes else ""
        return f"{self.name}{of} over ranks {', '.join(map(str, self.ranks))}"


class Watcher(Protocol):
    """Who is told of collectives."""

    def started(self, collective: Collective) -> None:
        """Told before the call."""

    def returned(self, collective: Collective) -> None:
        """Told after it, unless it failed. On a GPU and in asynchronous calls the tensors may still be on their way."""


@contextmanager
def watch(watcher: Watcher) -> Iterator[None]:
    """Tell `watcher` of every collective that Python code of this process calls through `torch.distributed`.

    It costs some ten microseconds a call. Blocks may be nested. Objects (`all_gather_object`, ..) and barriers count as
    carrying nothing.
    """
    originals = {name: getattr(dist, name) for name in _PAYLOADS if hasattr(dist, name)}
    for name, function in originals.items():
        setattr(dist, name, _wrap(name, function, watcher))
    try:
        yield
    finally:
        for name, function in originals.items():
            setattr(dist, name, function)


def _wrap(name: str, function: Callable[..., Any], watcher: Watcher) -> Callable[..., Any]:
    signature = inspect.signature(function)

    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        collective = _describe(name, signature.bind(*args, **kwargs).arguments)
        watcher.started(collective)
        result = function(*args, **kwargs)
        watcher.returned(collective)
        return result

    return wrapped


def _describe(name: str, arguments: Mapping[str, Any]) -> Collective:
    operations = arguments.get("p2p_op_list")
    group: Any = (operations[0].group if operations else arguments.get("group")) or dist.group.WORLD
    tensors, sent = _PAYLOADS[name](arguments, group)
    return Collective(
        name=name,
        ranks=tuple(dist.get_process_group_ranks(group)),
        shapes=tuple(tuple(tensor.shape) for tensor in tensors),
        dtype=tensors[0].dtype if tensors else None,
        sent_bytes=Fraction(sent),
    )


# --- what each function sends ----------------------------------------------------------------------------------------


def all_reduce_bytes(num_bytes: int | Fraction, size: int) -> Fraction:
    """What a rank sends to sum a tensor of `num_bytes` over `size` ranks: a reduce-scatter, then an all-gather."""
    return Fraction(2 * (size - 1), size) * num_bytes


def all_gather_bytes(own_bytes: int | Fraction, size: int) -> Fraction:
    """What a rank sends to gather `size` tensors of `own_bytes`: every part but one passes through it.

    A reduce-scatter into parts of `own_bytes` sends the same.
    """
    return Fraction(size - 1) * own_bytes


def _num_bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()  # sparse tensors have no nbytes


Payload = tuple[Sequence[Tensor], int | Fraction]


def _reduced_everywhere(arguments: Mapping[str, Any], group: dist.ProcessGroup) -> Payload:
    return [arguments["tensor"]], all_reduce_bytes(_num_bytes(arguments["tensor"]), group.size())


def _passed_along(arguments: Mapping[str, Any], group: dist.ProcessGroup) -> Payload:
    """Broadcast and reduce in a chain: each rank but the last passes the tensor on; the mean over ranks."""
    return [arguments["tensor"]], Fraction(group.size() - 1, group.size()) * _num_bytes(arguments["tensor"])


def _gathered(name: str) -> Callable[[Mapping[str, Any], dist.ProcessGroup], Payload]:
    return lambda arguments, group: (
        [arguments[name]],
        all_gather_bytes(_num_bytes(arguments[name]), group.size()),
    )


def _scattered(arguments: Mapping[str, Any], group: dist.ProcessGroup) -> Payload:
    given = arguments["input_list"] if "input_list" in arguments else [arguments["input"]]
    return given, all_gather_bytes(_num_bytes(arguments["output"]), group.size())


def _exchanged(arguments: Mapping[str, Any], group: dist.ProcessGroup) -> Payload:
    """All to all: everything but what a rank keeps for itself."""
    given, sizes = arguments["input"], arguments.get("input_split_sizes")
    kept = Fraction(sizes[group.rank()], len(given)) if sizes and len(given) else Fraction(1, group.size())
    return [given], (1 - kept) * _num_bytes(given)


def _point_to_point(arguments: Mapping[str, Any], group: dist.ProcessGroup) -> Payload:
    sent = [operation.tensor for operation in arguments["p2p_op_list"] if operation.op is dist.isend]
    return sent, sum(_num_bytes(tensor) for tensor in sent)


def _nothing(arguments: Mapping[str, Any], group: dist.ProcessGroup) -> Payload:
    return [], 0


_PAYLOADS: dict[str, Callable[[Mapping[str, Any], dist.ProcessGroup], Payload]] = {
    "all_reduce": _reduced_everywhere,
    "broadcast": _passed_along,
    "reduce": _passed_along,
    "all_gather": _gathered("tensor"),
    "all_gather_into_tensor": _gathered("input_tensor"),
    "all_gather_single": _gathered("input_tensor"),
    "reduce_scatter": _scattered,
    "reduce_scatter_tensor": _scattered,
    "reduce_scatter_single": _scattered,
    "all_to_all_single": _exchanged,
    "batch_isend_irecv": _point_to_point,
    "barrier": _nothing,
    "all_gather_object": _nothing,
    "broadcast_object_list": _nothing,
}
"""Function of torch.distributed -> the tensors that a rank puts in, and the bytes that it sends."""
