"""What all kinds of recordings share: finding and reading files, comparing numbers, one result for each case."""

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor


class RecordingError(Exception):
    """A recording cannot be read, or lacks something that its format promises."""


class CannotReplay(Exception):
    """A recording is sound, but this project has nothing to replay it with; the message is the reason."""


# --- reading ---------------------------------------------------------------------------------------------------------


class Recording:
    """The tensors of one safetensors file, and which of them have been used."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.tensors = read_tensors(path)
        self.used: set[str] = set()

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.tensors:
            raise RecordingError(f"{self.path.name} has no tensor '{name}'")
        self.used.add(name)
        return self.tensors[name]

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    def optional(self, name: str) -> Tensor | None:
        """The tensor of that name where there is one."""
        return self[name] if name in self.tensors else None

    def group(self, prefix: str) -> dict[str, Tensor]:
        """All tensors whose name starts with a prefix, without it."""
        return {name.removeprefix(prefix): self[name] for name in self.tensors if name.startswith(prefix)}

    def unused(self) -> list[str]:
        """Names of the tensors that nobody asked for."""
        return sorted(set(self.tensors) - self.used)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file."""
    if not path.is_file():
        raise RecordingError(f"{path.name} is missing beside the other files of this case")
    try:
        with safe_open(path, framework="pt") as reader:
            return {name: reader.get_tensor(name) for name in reader.keys()}  # noqa: SIM118 (not a mapping)
    except (SafetensorError, OSError) as error:
        raise RecordingError(f"{path.name} cannot be read: {error}") from error


def read_metadata(path: Path) -> dict[str, str]:
    """The texts in the header of a safetensors file."""
    try:
        with safe_open(path, framework="pt") as reader:
            return reader.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise RecordingError(f"{path.name} cannot be read: {error}") from error


def find_upwards(start: Path, name: str) -> Path:
    """A file that a recording names relative to the root of its set, wherever that root is above it."""
    for parent in start.parents:
        if (parent / name).is_file():
            return parent / name
    raise RecordingError(f"{start.name} names {name}, which is in no folder above it")


class Folder:
    """The files below a folder. JSON files are parsed once; the ones that are broken are kept with their error."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.files = sorted(path for path in root.rglob("*") if path.is_file())
        self.documents: dict[Path, Any] = {}
        self.broken: dict[Path, str] = {}
        for path in self.with_suffix(".json"):
            try:
                self.documents[path] = json.loads(path.read_text(encoding="utf-8"))
            except (OSError, ValueError) as error:
                self.broken[path] = str(error)

    def with_suffix(self, suffix: str) -> list[Path]:
        """Files of one kind."""
        return [path for path in self.files if path.suffix == suffix]

    def with_keys(self, *keys: str) -> Iterator[tuple[Path, dict[str, Any]]]:
        """JSON files whose top level is a mapping with these keys."""
        for path, content in self.documents.items():
            if isinstance(content, dict) and all(key in content for key in keys):
                yield path, content

    def name(self, path: Path) -> str:
        """A short name for messages: the path below the root, without its suffix."""
        inside = path.relative_to(self.root)
        name = inside.as_posix() if path.is_dir() else inside.with_suffix("").as_posix()
        return path.name if name == "." else name


# --- comparing -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Difference:
    """One comparison: the largest difference and what was allowed there, in the same unit."""

    what: str
    difference: float
    tolerance: float

    @property
    def is_off(self) -> bool:
        return not self.difference <= self.tolerance

    @property
    def share(self) -> float:
        """The difference as a share of the tolerance."""
        if not self.is_off and self.tolerance == 0.0:
            return 0.0
        return math.inf if self.tolerance == 0.0 else self.difference / self.tolerance


@dataclass
class Checks:
    """All comparisons of one case, and the recordings it opened."""

    differences: list[Difference] = field(default_factory=list)
    recordings: list[Recording] = field(default_factory=list)

    def open(self, path: Path) -> Recording:
        """Read a recording; every one of its tensors must be used before the case ends."""
        self.recordings.append(Recording(path))
        return self.recordings[-1]

    def close(self, what: str, got: Any, expected: Any, atol: float = 0.0, rtol: float = 0.0) -> None:
        """|got - expected| <= atol + rtol · |expected|, in every place."""
        pair = self._pair(what, got, expected)
        if pair is None or pair[0].numel() == 0:
            return
        difference = _difference(*pair).flatten()
        allowed = (atol + rtol * pair[1].abs().nan_to_num(posinf=0.0)).flatten()
        excess = difference - allowed
        place = int(excess.argmax())
        if not torch.isfinite(difference).all():
            place = int((~torch.isfinite(difference)).nonzero()[0])
        self.differences.append(Difference(what, float(difference[place]), float(allowed[place])))

    def close_to_largest(self, what: str, got: Any, expected: Any, share: float) -> None:
        """The largest difference, in units of the largest expected entry, is at most `share`."""
        pair = self._pair(what, got, expected)
        if pair is None:
            return
        largest = float(pair[1].abs().max())
        self.differences.append(Difference(what, float(_difference(*pair).max()), share * largest))

    def equal(self, what: str, got: Any, expected: Any) -> None:
        """The same text, number or list."""
        same = got == expected
        label = what if same else f"{what}: {_short(got)} here, {_short(expected)} recorded"
        self.differences.append(Difference(label, 0.0 if same else math.inf, 0.0))

    def _pair(self, what: str, got: Any, expected: Any) -> tuple[Tensor, Tensor] | None:
        got, expected = (torch.as_tensor(x).detach().to(torch.float64) for x in (got, expected))
        if expected.shape == (1,) and got.dim() == 0:
            got = got.unsqueeze(0)
        if got.shape != expected.shape:
            self.equal(f"shape of {what}", tuple(got.shape), tuple(expected.shape))
            return None
        return got, expected

    @property
    def off(self) -> list[Difference]:
        return [difference for difference in self.differences if difference.is_off]

    @property
    def worst(self) -> Difference:
        """The comparison that came nearest to its tolerance, or went furthest past it."""
        return max(self.differences, key=lambda difference: (difference.share, difference.difference))

    def unused(self) -> list[str]:
        """Recorded tensors that nothing was compared with."""
        return [f"{recording.path.name}: {name}" for recording in self.recordings for name in recording.unused()]


def _difference(got: Tensor, expected: Tensor) -> Tensor:
    """|got - expected|; equal infinities differ by 0, and what is not a number by infinity."""
    difference = torch.where(got == expected, torch.zeros_like(got), (got - expected).abs())
    return difference.nan_to_num(nan=math.inf)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 120 else f"{text[:117]}..."


def checksums(tensor: Tensor) -> dict[str, float]:
    """Sum, sum of absolute values and Euclidean norm, in float64."""
    wide = tensor.detach().double()
    return {"sum": float(wide.sum()), "abs_sum": float(wide.abs().sum()), "l2": float(wide.square().sum().sqrt())}


def compare_checksums(checks: Checks, what: str, tensor: Tensor, recorded: Mapping[str, float], share: float) -> None:
    """Each recorded sum of a tensor, to `share` of its sum of absolute values."""
    for name, value in checksums(tensor).items():
        if name in recorded:
            tolerance = share * recorded["abs_sum"]
            if name == "l2":
                tolerance = share * recorded["l2"]
            checks.close(f"{name} of {what}", value, recorded[name], atol=tolerance)


def compare_listing(checks: Checks, what: str, tensors: Mapping[str, Tensor], listed: Mapping[str, Any]) -> None:
    """Names, shapes and dtypes of a file's tensors; an entry is `{shape, dtype}` or `[dtype, shape]`."""
    own = {name: [str(value.dtype).removeprefix("torch."), list(value.shape)] for name, value in tensors.items()}
    recorded = {
        name: [entry["dtype"], entry["shape"]] if isinstance(entry, dict) else entry for name, entry in listed.items()
    }
    checks.equal(f"names in {what}", sorted(own), sorted(recorded))
    for name in set(own) & set(recorded):
        checks.equal(f"form of {name} in {what}", own[name], recorded[name])


# --- cases -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """One recorded case: how to replay it, or the reason why it cannot be."""

    name: str
    files: tuple[Path, ...]
    replay: Callable[[Checks], None] | None = None
    reason: str = ""


Finder = Callable[[Folder], Iterable[Case]]


def with_tensors(path: Path) -> tuple[Path, Path]:
    """A JSON file and the recording of the same name beside it."""
    return path, path.with_suffix(".safetensors")


def require(content: Mapping[str, Any], keys: Sequence[str], path: Path) -> None:
    """Raise RecordingError where a JSON file lacks keys of its format."""
    missing = [key for key in keys if key not in content]
    if missing:
        raise RecordingError(f"{path.name} lacks {', '.join(missing)}")
