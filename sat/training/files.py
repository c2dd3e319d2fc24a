"""Writing files that survive a crash: summed up while they are written, on disk before anything relies on them."""

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

PIECE_BYTES = 1 << 24
"""What is handed to the file system in one call: small enough to stop between two."""

SAVING, DELETING = ".saving", ".deleting"
"""In the names of folders that are being made or unmade; they start with a dot."""

Entry = dict[str, Any]
"""What a manifest says of a file: {bytes, blake2b}."""


class HashedFile:
    """A file that is written once from start to end, in a `with` block; then it is on disk, and `entry` sums it up.

    It takes what torch.save and plain writers write. If the block fails, the file is left as it is.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._stream = path.open("wb")
        self._digest = hashlib.blake2b(digest_size=16)
        self._bytes = 0
        self.failure: OSError | None = None
        """Why a write failed: torch.save tells its caller something else."""

    def __enter__(self) -> "HashedFile":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self._stream.flush()
                os.fsync(self._stream.fileno())
        finally:
            self._stream.close()

    def write(self, data: Any) -> int:
        """Append bytes; returns their number."""
        view = memoryview(data).cast("B")
        for start in range(0, len(view), PIECE_BYTES):
            piece = view[start : start + PIECE_BYTES]
            try:
                self._stream.write(piece)
            except OSError as error:
                self.failure = error
                raise
            self._digest.update(piece)
        self._bytes += len(view)
        return len(view)

    def flush(self) -> None:
        """Nothing: what is written is flushed at the end."""

    @property
    def entry(self) -> Entry:
        """Size and checksum of what was written."""
        return {"bytes": self._bytes, "blake2b": self._digest.hexdigest()}


def sync_folder(path: Path) -> None:
    """Make names in a folder durable, on file systems that can."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):
            raise
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> Entry:
    """Replace a small text file in one step."""
    temporary = path.with_name(f".{path.name}.tmp")
    with HashedFile(temporary) as file:
        file.write(text.encode("utf-8"))
    temporary.replace(path)
    sync_folder(path.parent)
    return file.entry


def write_json(path: Path, content: Mapping[str, Any]) -> Entry:
    """Replace a small JSON file in one step."""
    return write_text(path, json.dumps(content, indent=1, sort_keys=True))


def write_torch(path: Path, content: Any) -> Entry:
    """A file of torch's format. Raises OSError where it cannot be written."""
    with HashedFile(path) as file:
        try:
            torch.save(content, file)  # type: ignore[arg-type]  # it only writes and flushes
        except RuntimeError:
            if file.failure is not None:
                raise file.failure from None
            raise
    return file.entry


# --- safetensors -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LazyTensor:
    """A tensor that is made when its turn to be written has come."""

    shape: torch.Size
    dtype: torch.dtype
    make: Callable[[], Tensor]

    @classmethod
    def of(cls, tensor: Tensor) -> "LazyTensor":
        """One that is there already."""
        return cls(tensor.shape, tensor.dtype, lambda: tensor)

    @property
    def num_bytes(self) -> int:
        """Length of its numbers."""
        return self.shape.numel() * self.dtype.itemsize


_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def write_safetensors(path: Path, tensors: Mapping[str, LazyTensor], metadata: Mapping[str, str]) -> Entry:
    """A safetensors file, with one tensor at a time in memory (the library's own writer copies them all first)."""
    # Wide numbers first, so that each lies at a multiple of its width, as readers that map the file want it.
    order = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    with HashedFile(path) as file:
        file.write(_safetensors_header(order, tensors, metadata))
        for name in order:
            value = tensors[name].make().detach().cpu().contiguous()
            if value.numel():
                file.write(value.view(-1).view(torch.uint8).numpy())
    return file.entry


def _safetensors_header(order: Iterable[str], tensors: Mapping[str, LazyTensor], metadata: Mapping[str, str]) -> bytes:
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    place = 0
    for name in order:
        tensor = tensors[name]
        offsets = [place, place + tensor.num_bytes]
        header[name] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets}
        place = offsets[1]
    text = json.dumps(header, separators=(",", ":")).encode("utf-8")
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


# --- folders ---------------------------------------------------------------------------------------------------------


def put_folder(temporary: Path, final: Path) -> None:
    """Give a finished folder its name; an older one of that name goes."""
    if not final.exists():
        temporary.rename(final)
        return
    doomed = _set_aside(final)
    temporary.rename(final)
    shutil.rmtree(doomed)


def remove_folder(folder: Path) -> None:
    """Delete a folder that has a name: the name goes first, so that no half of it is ever taken for the whole."""
    doomed = _set_aside(folder)
    sync_folder(folder.parent)
    shutil.rmtree(doomed)


def _set_aside(folder: Path) -> Path:
    doomed = folder.with_name(f".{folder.name}{DELETING}")
    shutil.rmtree(doomed, ignore_errors=True)
    folder.rename(doomed)
    return doomed


def remove_leftovers(run_dir: Path) -> None:
    """Delete what an interrupted save or deletion has left in a run directory that no other job writes to."""
    for entry in run_dir.iterdir():
        if entry.name.startswith(".") and (SAVING in entry.name or entry.name.endswith(DELETING)):
            shutil.rmtree(entry, ignore_errors=True)
