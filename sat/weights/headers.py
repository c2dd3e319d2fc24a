"""Names, shapes and precisions of the tensors in a file, without its data and without torch: milliseconds for 20 GB.

No class that a pickle names is ever looked up: a stand-in takes its place, so any file may be read.
"""

import json
import pickle
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from sat.compat.file_types import FOREIGN_STARTS
from sat.errors import CheckpointError

MAX_HEADER_BYTES = 1 << 28
"""No list of names is longer; a file that claims more is damaged, or made to fill the memory."""

STORAGES = {
    "DoubleStorage": ("float64", 8),
    "FloatStorage": ("float32", 4),
    "HalfStorage": ("float16", 2),
    "BFloat16Storage": ("bfloat16", 2),
    "LongStorage": ("int64", 8),
    "IntStorage": ("int32", 4),
    "ShortStorage": ("int16", 2),
    "CharStorage": ("int8", 1),
    "ByteStorage": ("uint8", 1),
    "BoolStorage": ("bool", 1),
    "ComplexFloatStorage": ("complex64", 8),
    "ComplexDoubleStorage": ("complex128", 16),
    "UntypedStorage": ("uint8", 1),
}
"""torch's storage class -> precision, bytes of one number."""

SAFETENSORS_DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
}

LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
"""First number in files that torch wrote before version 1.6."""


@dataclass(frozen=True)
class TensorInfo:
    """A tensor as its file describes it."""

    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class Header:
    """What a file of weights says of itself."""

    tensors: Mapping[str, TensorInfo]
    container: str = ""
    """The entry that holds the tensors: `module`, `state_dict`, or nothing where they lie bare."""
    entries: tuple[str, ...] = ()
    """What else lies beside that entry."""
    classes: frozenset[str] = frozenset()
    """Classes that reading it whole needs besides tensors and plain values."""
    metadata: Mapping[str, str] = field(default_factory=dict)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape."""
        return {name: info.shape for name, info in self.tensors.items()}


def read_header(file: Path) -> Header:
    """Names, shapes and precisions in a torch or safetensors file. Raises CheckpointError that says what is wrong."""
    try:
        with file.open("rb") as stream:
            start = stream.read(64)
            check_start(file, start)
            if is_safetensors(start):
                return _read_safetensors(file, stream)
            if start.startswith(b"PK"):
                return _read_zip(file)
            if start.startswith(b"\x80"):
                stream.seek(0)
                return _read_legacy(file, stream)
    except OSError as error:
        raise CheckpointError(f"cannot read {file}: {error.strerror or error}") from error
    raise CheckpointError(f"{file} is no file of weights: neither torch nor safetensors wrote it")


def check_start(file: Path, start: bytes) -> None:
    """Refuse an empty file, a web page and an LFS pointer by their first bytes."""
    if not start:
        raise CheckpointError(f"{file} is empty; copy or download it again")
    for sign, description in FOREIGN_STARTS.items():
        if start.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(sign):
            raise CheckpointError(f"{file} is {description}")


def is_safetensors(start: bytes) -> bool:
    """Whether a file that begins so (10 bytes or more) can be a safetensors file."""
    return start[8:9] == b"{" and int.from_bytes(start[:8], "little") <= MAX_HEADER_BYTES


def torch_index(archive: zipfile.ZipFile) -> str | None:
    """The member of a zip that makes it a torch file; None for other archives."""
    return next((name for name in archive.namelist() if re.fullmatch(r"([^/]+/)?data\.pkl", name)), None)


# --- safetensors -----------------------------------------------------------------------------------------------------


def _read_safetensors(file: Path, stream: IO[bytes]) -> Header:
    size = file.stat().st_size
    stream.seek(0)
    length = int.from_bytes(stream.read(8), "little")
    text = stream.read(length)
    if len(text) < length:
        raise CheckpointError(f"{file} is half a file: its list of names is cut short; copy or download it again")
    try:
        content: dict[str, Any] = json.loads(text)
        metadata = content.pop("__metadata__", {})
        tensors = {
            name: TensorInfo(tuple(entry["shape"]), SAFETENSORS_DTYPES.get(entry["dtype"], entry["dtype"]))
            for name, entry in content.items()
        }
        end = max((entry["data_offsets"][1] for entry in content.values()), default=0)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{file} has a damaged list of names ({error}); copy or download it again") from error
    if size != 8 + length + end:
        raise CheckpointError(
            f"{file} is half a file: it has {size:,} bytes of {8 + length + end:,}; copy or download it again"
        )
    return Header(tensors, metadata=metadata)


# --- torch -----------------------------------------------------------------------------------------------------------


def _read_zip(file: Path) -> Header:
    if not zipfile.is_zipfile(file):
        raise CheckpointError(f"{file} is half a file: its end is missing; copy or download it again")
    try:
        with zipfile.ZipFile(file) as archive:
            index = torch_index(archive)
            if index is None:
                raise CheckpointError(f"{file} is a zip archive, not a file of weights; unpack it")
            if archive.getinfo(index).file_size > MAX_HEADER_BYTES:
                raise CheckpointError(f"{file} has a list of names of {archive.getinfo(index).file_size:,} bytes")
            with archive.open(index) as stream:
                reader = _Reader(stream)
                content = reader.load_safely(file)
            folder = index.removesuffix("data.pkl")
            stored = {info.filename: info.file_size for info in archive.infolist()}
    except (zipfile.BadZipFile, NotImplementedError) as error:
        raise CheckpointError(f"{file} is a damaged torch file ({error}); copy or download it again") from error
    short = [key for key, needed in reader.storages.items() if stored.get(f"{folder}data/{key}", 0) < needed]
    if short:
        raise CheckpointError(
            f"{file} lacks the numbers of {len(short)} of {len(reader.storages)} tensors; copy or download it again"
        )
    return _header(file, content, reader)


def _read_legacy(file: Path, stream: IO[bytes]) -> Header:
    """torch's format before 1.6: magic number, version, system, the pickle, then the numbers."""
    reader = _Reader(stream)
    if reader.load_safely(file) != LEGACY_MAGIC:
        raise CheckpointError(f"{file} is a pickle, but not one that torch.save wrote; it is not read")
    for _ in ("version", "system"):
        _Reader(stream).load_safely(file)
    reader = _Reader(stream)
    content = reader.load_safely(file)
    _Reader(stream).load_safely(file)  # the order of the storages, each of which comes with its length
    expected = stream.tell() + sum(8 + size for size in reader.storages.values())
    if file.stat().st_size < expected:
        raise CheckpointError(
            f"{file} is half a file: it has {file.stat().st_size:,} bytes of {expected:,}; copy or download it again"
        )
    return _header(file, content, reader)


def _header(file: Path, content: Any, reader: "_Reader") -> Header:
    """The state dict that `load_weights` would take, and what lies beside it."""
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{file} holds no state dict, but a {type(content).__name__}")
    container = next((key for key in ("module", "state_dict") if isinstance(content.get(key), Mapping)), "")
    state = content[container] if container else content
    tensors = {str(name): value for name, value in state.items() if isinstance(value, TensorInfo)}
    entries = tuple(str(key) for key in content if container and key != container)
    return Header(tensors, container, entries, frozenset(reader.classes))


class _Dict(dict):
    """A dict that takes attributes, as OrderedDict does."""


class _StandIn:
    """In the place of any other class: takes what it is given and does nothing."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __setstate__(self, _: Any) -> None:
        pass

    def __setitem__(self, _: Any, __: Any) -> None:
        pass

    def append(self, _: Any) -> None:
        """Items of a list-like object."""

    def extend(self, _: Any) -> None:
        """The same."""

    def add(self, _: Any) -> None:
        """Items of a set-like object."""


@dataclass(frozen=True)
class _Storage:
    dtype: str


def _tensor(storage: _Storage, _: int, shape: tuple[int, ...], *rest: Any) -> TensorInfo:
    dtype = next((value.removeprefix("torch.") for value in rest if isinstance(value, str)), storage.dtype)
    return TensorInfo(tuple(shape), dtype)


def _parameter(data: TensorInfo, *_: Any) -> TensorInfo:
    return data


KNOWN_CLASSES = {
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _tensor,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
    "torch.Size": tuple,
    "torch.device": _StandIn,
    "collections.OrderedDict": _Dict,
    "collections.defaultdict": _StandIn,
    "collections.Counter": _StandIn,
    "builtins.set": set,
    "__builtin__.set": set,
}
"""What torch itself reads in a file of plain tensors -> what stands for it here."""


class _Reader(pickle.Unpickler):
    """Reads the structure of a pickle. Notes the classes that it names, looks up none."""

    def __init__(self, stream: IO[bytes]) -> None:
        super().__init__(stream)
        self.classes: set[str] = set()
        self.storages: dict[str, int] = {}

    def load_safely(self, file: Path) -> Any:
        """The object, or an error that names the file."""
        try:
            return self.load()
        except Exception as error:  # a damaged pickle can raise anything
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise CheckpointError(f"{file} is a damaged torch file ({reason}); copy or download it again") from error

    def find_class(self, module: str, name: str) -> Any:
        """The stand-in for a class."""
        path = f"{module}.{name}"
        if path in KNOWN_CLASSES:
            return KNOWN_CLASSES[path]
        if module in ("torch", "torch.storage") and name in STORAGES:
            return name
        if module == "torch" and name.islower():  # a dtype
            return path
        self.classes.add(path)
        return _StandIn

    def persistent_load(self, pid: Any) -> _Storage:
        """A tensor's storage: its precision, with the bytes that the file must hold for it."""
        _, kind, key, _, count = pid[:5]
        dtype, size = STORAGES[kind]
        self.storages[str(key)] = count * size
        return _Storage(dtype)


def read_json(file: Path) -> dict[str, Any]:
    """The mapping in a JSON file; an empty one if there is no such file or mapping."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
