"""SAT's way to give every tensor-parallel rank what its first one has read, and draws of its own."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor

from sat.errors import LayoutError
from sat.mpu.random import stream_seed
from sat.mpu.state import get_parallel_state

MODEL_PARALLEL = "model-parallel-rng"
"""SAT's name of the stream that differs between tensor-parallel ranks."""


def broadcast_data(keys: Sequence[str], data: Mapping[str, Tensor] | None, datatype: torch.dtype) -> dict[str, Tensor]:
    """The tensors of these keys that the first rank of the tensor-parallel group has, on the device of each rank.

    data: read on that rank alone; others may pass None. Raises LayoutError, on every rank, where a key is missing or a
    tensor is not of `datatype`.
    """
    group = get_parallel_state().group("tp")
    is_source = group is None or group.rank() == 0
    told: list[list[tuple[int, ...]] | str | None] = [_shapes(keys, data or {}, datatype) if is_source else None]
    if group is not None:
        dist.broadcast_object_list(told, src=dist.get_global_rank(group, 0), group=group)
    shapes = told[0]
    if not isinstance(shapes, list):
        raise LayoutError(str(shapes))
    device = _device(group)
    if group is None:
        return {key: (data or {})[key].to(device) for key in keys}
    sizes = [torch.Size(shape).numel() for shape in shapes]
    flat = torch.empty(sum(sizes), dtype=datatype, device=device)
    if is_source:
        flat = torch.cat([(data or {})[key].flatten().to(device) for key in keys])
    dist.broadcast(flat, src=dist.get_global_rank(group, 0), group=group)
    return {key: part.view(shape) for key, part, shape in zip(keys, flat.split(sizes), shapes)}


def _shapes(keys: Sequence[str], data: Mapping[str, Tensor], datatype: torch.dtype) -> list[tuple[int, ...]] | str:
    """Of each tensor, or what is wrong."""
    for key in keys:
        if key not in data:
            return f"broadcast_data: the first rank's data has no '{key}'; it has {', '.join(data) or 'nothing'}"
        if data[key].dtype != datatype:
            return f"broadcast_data: '{key}' is {data[key].dtype}, and {datatype} was asked for; all must be of it"
    return [tuple(data[key].shape) for key in keys]


def _device(group: dist.ProcessGroup | None) -> torch.device:
    on_gpu = torch.cuda.is_available() if group is None else dist.get_backend(group) == "nccl"
    return torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")


class RngTracker:
    """Named states of a device's default generator, which `fork` puts in its place for a `with` block.

    This project's own draws belong to the sample, see `sat.mpu.random`; this is for dropout of SAT's clients.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._states: dict[str, Tensor] = {}

    def reset(self) -> None:
        """Forget all states."""
        self._states = {}

    def get_states(self) -> dict[str, Tensor]:
        """All states by name, to be saved."""
        return dict(self._states)

    def set_states(self, states: Mapping[str, Tensor]) -> None:
        """Take states that were saved."""
        self._states = dict(states)

    def add(self, name: str, seed: int) -> None:
        """Begin a stream."""
        with torch.random.fork_rng(**self._devices()):
            torch.manual_seed(seed)
            self._states[name] = self._state()

    @contextmanager
    def fork(self, name: str = MODEL_PARALLEL) -> Iterator[None]:
        """Draw from a stream. One that was never added begins at the process' seed and its tensor-parallel rank."""
        if name not in self._states:
            self.add(name, stream_seed(torch.initial_seed(), name, get_parallel_state().rank("tp")))
        before = self._state()
        self._set_state(self._states[name])
        try:
            yield
        finally:
            self._states[name] = self._state()
            self._set_state(before)

    def _devices(self) -> dict[str, list[int]]:
        return {"devices": [torch.cuda.current_device()] if self.device.type == "cuda" else []}

    def _state(self) -> Tensor:
        return torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else torch.get_rng_state()

    def _set_state(self, state: Tensor) -> None:
        if self.device.type == "cuda":
            torch.cuda.set_rng_state(state, self.device)
        else:
            torch.set_rng_state(state)


_trackers: dict[int, RngTracker] = {}


def get_cuda_rng_tracker() -> RngTracker | None:
    """The tracker of this process' GPU; None without one, which SAT's clients test for."""
    if not torch.cuda.is_available():
        return None
    index = torch.cuda.current_device()
    return _trackers.setdefault(index, RngTracker(torch.device("cuda", index)))
