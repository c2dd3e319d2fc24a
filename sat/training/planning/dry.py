"""Running code for its shapes alone: what it allocates, multiplies and moves, counted operation by operation.

Tensors on the meta device have shapes and no numbers, so a training step of any size takes a second and no memory. What
is counted is what the code that trains does, not a model of it.
"""

import weakref
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

import sat.ops.packed_attention  # noqa: F401  (registers the operations that are named below)
from sat.model import activations

_ATEN = torch.ops.aten
_ATTENTION = {
    _ATEN._scaled_dot_product_flash_attention_for_cpu: ("attention_forward", 4),
    _ATEN._scaled_dot_product_flash_attention_for_cpu_backward: ("attention_backward", 8),
}
"""Operations of attention, forward and backward, over b k s m e; backward's second set of scores is not counted."""

_PACKED = {
    torch.ops.sat.packed_attention: "attention_forward",
    torch.ops.sat.packed_attention_backward: "attention_backward",
}
"""Attention of packed rows, which says itself how much it does."""


@dataclass(frozen=True)
class Counted:
    """What some code did."""

    products: int = 0
    """Operations of matrix products and convolutions."""
    attention_forward: int = 0
    attention_backward: int = 0
    moved_bytes: int = 0
    """What the other operations read and write."""
    operations: int = 0
    """Kernels started."""
    host_bytes: int = 0
    """Copied to the host's memory, and back."""
    sent_bytes: Fraction = Fraction(0)

    def __sub__(self, other: "Counted") -> "Counted":
        return Counted(*(a - b for a, b in zip(self._values(), other._values())))

    def __add__(self, other: "Counted") -> "Counted":
        return Counted(*(a + b for a, b in zip(self._values(), other._values())))

    def __mul__(self, factor: int) -> "Counted":
        return Counted(*(factor * value for value in self._values()))

    def _values(self) -> Sequence[Any]:
        return [getattr(self, name) for name in self.__dataclass_fields__]


NOTHING = Counted()


class Watch(TorchDispatchMode):
    """Counts the operations inside `with`, and the bytes of the storages that they made on a device and that are alive.

    alive, peak: bytes now and at most. counted: see there.
    """

    def __init__(self, device_type: str) -> None:
        super().__init__()
        self.device_type = device_type
        self.alive = 0
        self.peak = 0
        self._counts: Counter[str] = Counter()
        self._known: set[int] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        inputs = [leaf for leaf in tree_leaves((args, kwargs or {})) if isinstance(leaf, Tensor)]
        result = function(*args, **(kwargs or {}))
        outputs = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        self._allocate(inputs, outputs)
        self._count(function, args, kwargs or {}, result, inputs, outputs)
        return result

    @property
    def counted(self) -> Counted:
        """What happened so far; collectives are counted elsewhere."""
        return Counted(**self._counts)  # type: ignore[arg-type]  # sent_bytes is not among them

    def copied(self, num_bytes: int) -> None:
        """So much went to the host's memory or came from there."""
        self._counts["host_bytes"] += num_bytes

    def forget_peak(self) -> None:
        """Begin a new maximum."""
        self.peak = self.alive

    def _allocate(self, inputs: Iterable[Tensor], outputs: Iterable[Tensor]) -> None:
        before = {tensor.untyped_storage()._cdata for tensor in inputs}
        for tensor in outputs:
            storage = tensor.untyped_storage()
            is_new = storage._cdata not in before and storage._cdata not in self._known
            if is_new and tensor.device.type == self.device_type:
                self._known.add(storage._cdata)
                self.alive += storage.nbytes()
                weakref.finalize(storage, self._free, storage._cdata, storage.nbytes())
        self.peak = max(self.peak, self.alive)

    def _free(self, key: int, num_bytes: int) -> None:
        self._known.discard(key)
        self.alive -= num_bytes

    def _count(
        self, function: Any, args: Any, kwargs: Any, result: Any, inputs: list[Tensor], outputs: list[Tensor]
    ) -> None:
        if function.is_view:
            return
        packet, counts = function._overloadpacket, self._counts
        counts["operations"] += 1
        if packet in flop_registry:
            kind = _PACKED.get(packet, "products")
            counts[kind] += flop_registry[packet](*args, **kwargs, out_val=result)
        elif packet in _ATTENTION:
            kind, products = _ATTENTION[packet]
            query, key = inputs[-3:-1] if kind == "attention_forward" else inputs[1:3]
            counts[kind] += products * query.shape[:3].numel() * key.shape[2] * query.shape[3]
        elif outputs and packet not in _FREE:
            counts["moved_bytes"] += sum(_num_bytes(tensor) for tensor in (*inputs, *outputs))


_FREE = {_ATEN.empty, _ATEN.empty_like, _ATEN.detach, _ATEN.new_empty, _ATEN.empty_strided, _ATEN.new_empty_strided}


def _num_bytes(tensor: Tensor) -> int:
    """Of what a kernel reads or writes: broadcast dimensions count once."""
    return tensor.element_size() * int(
        torch.Size([size for size, stride in zip(tensor.shape, tensor.stride()) if stride or size == 1]).numel()
    )


@contextmanager
def _fused_attention() -> Iterator[None]:
    """On the meta device torch attends by explicit scores; devices have kernels that do without.

    The function is replaced for the time of the block: modes of torch do not reach what backward computes again.
    """
    original = F.scaled_dot_product_attention

    def attend(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if query.device.type != "meta":
            return original(query, key, value, *args, **kwargs)
        return _ATEN._scaled_dot_product_flash_attention_for_cpu(query, key, value, scale=kwargs.get("scale"))[0]

    F.scaled_dot_product_attention = attend
    try:
        yield
    finally:
        F.scaled_dot_product_attention = original


@contextmanager
def _no_host(watch: Watch) -> Iterator[None]:
    """What layers send to the host is counted and let go, and comes back as a new tensor."""
    originals = activations._to_host, activations._from_host

    def to_host(tensor: Tensor) -> Any:
        if not activations.goes_to_host(tensor):
            return tensor
        watch.copied(tensor.numel() * tensor.element_size())
        return tensor.shape, tensor.dtype

    def from_host(kept: Any) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        shape, dtype = kept
        tensor = torch.empty(shape, dtype=dtype, device="meta")
        watch.copied(tensor.numel() * tensor.element_size())
        return tensor

    activations._to_host, activations._from_host = to_host, from_host
    try:
        yield
    finally:
        activations._to_host, activations._from_host = originals


@contextmanager
def dry_run() -> Iterator[Watch]:
    """Count what happens within the block; what is made there is on the meta device unless it says otherwise."""
    with torch.device("meta"), _fused_attention(), Watch("meta") as watch, _no_host(watch):
        yield watch
