"""How much memory tensors take at most, counted op by op: exact, unlike the size of the process."""

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class PeakMemory(TorchDispatchMode):
    """Bytes of the storages that operations inside `with` made and that are alive, and the largest sum there was."""

    def __init__(self) -> None:
        super().__init__()
        self.alive = 0
        self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        inputs = {storage._cdata for storage in _storages(tree_leaves((args, kwargs or {})))}
        result = function(*args, **(kwargs or {}))
        for storage in _storages(tree_leaves(result)):
            if storage._cdata not in inputs | self._known:
                self._known.add(storage._cdata)
                self.alive += storage.nbytes()
                weakref.finalize(storage, self._forget, storage._cdata, storage.nbytes())
        self.peak = max(self.peak, self.alive)
        return result

    def _forget(self, key: int, num_bytes: int) -> None:
        self._known.discard(key)
        self.alive -= num_bytes


def _storages(leaves: Iterable[Any]) -> list[torch.UntypedStorage]:
    return [leaf.untyped_storage() for leaf in leaves if isinstance(leaf, Tensor)]
