"""Whether a checkpoint folder is whole: by its manifest, or by the files themselves where a foreign hand wrote it.

A folder that we wrote got its name after its manifest, so one without a manifest was tampered with. A downloaded folder
has none; its files must then be whole by their own lists of contents. Needs no torch.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from sat.errors import CheckpointError
from sat.weights.headers import read_header

LATEST = "latest"
MANIFEST = "manifest.json"
TRAINING_STATE = "training_state.json"
WEIGHTS_FILE = re.compile(r"mp_rank_(\d+)_model_states\.pt")
AVERAGES = "-ema"
"""End of the name of a folder with averaged weights: 1000-ema belongs to 1000."""


Progress = Callable[[int], object]
"""Called with the number of bytes that were just read."""


def iteration_names(run_dir: Path) -> list[str]:
    """Names of the folders of weights in a run or release, the newest first; those of averages are not among them."""
    names = {entry.parent.name for pattern in (WEIGHTS, MANIFEST) for entry in run_dir.glob(f"*/{pattern}")}
    return sorted((name for name in names if is_iteration(name)), key=step_of, reverse=True)


WEIGHTS = "mp_rank_00_model_states.pt"


def is_iteration(name: str) -> bool:
    """Whether a folder of this name holds an iteration, as `latest` may name it."""
    return name == "release" or (name.isdecimal() and name.isascii())


def step_of(name: str) -> int:
    """The step in the name of an iteration or of its averages; 0 for `release` and all others."""
    digits = name.removesuffix(AVERAGES)
    return int(digits) if digits.isdecimal() else 0


def read_latest(run_dir: Path) -> tuple[str | None, str]:
    """(the iteration that `latest` names, "") or (None, what is wrong with it)."""
    tracker = run_dir / LATEST
    try:
        name = tracker.read_text(encoding="utf-8", errors="replace").strip()
    except FileNotFoundError:
        return None, f"there is no file {LATEST}"
    except OSError as error:
        return None, f"{LATEST} cannot be read ({error.strerror})"
    if not is_iteration(name):
        return None, f"{LATEST} holds '{name[:40]}', not an iteration's number or 'release'"
    return name, ""


# --- manifests -------------------------------------------------------------------------------------------------------


def checksum(file: Path, progress: Progress = lambda num_bytes: None) -> str:
    """BLAKE2b of a file's content."""
    digest = hashlib.blake2b(digest_size=16)
    with file.open("rb") as stream:
        while block := stream.read(1 << 22):
            digest.update(block)
            progress(len(block))
    return digest.hexdigest()


def read_manifest(folder: Path) -> dict[str, dict[str, Any]] | None:
    """File name -> {bytes, blake2b}; None where there is no manifest. Raises CheckpointError for a damaged one."""
    try:
        content = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        files = content["files"]
        if not all(
            isinstance(entry["bytes"], int) and isinstance(entry["blake2b"], str) and "/" not in name
            for name, entry in files.items()
        ):
            raise ValueError("an entry is not a size and a checksum")
    except FileNotFoundError:
        return None
    except OSError as error:
        raise CheckpointError(f"{MANIFEST} cannot be read ({error.strerror})") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{MANIFEST} is damaged") from error
    return files


def problem_of(folder: Path) -> str | None:
    """Why a folder of weights is not whole, by names and sizes; None where nothing is wrong."""
    if not folder.is_dir():
        return "there is no such folder"
    try:
        files = read_manifest(folder)
        return _structure_problem(folder) if files is None else _size_problem(folder, files)
    except CheckpointError as error:
        return str(error)
    except OSError as error:
        return f"it cannot be read ({error.strerror})"


def _size_problem(folder: Path, files: dict[str, dict[str, Any]]) -> str | None:
    for name, entry in sorted(files.items()):
        try:
            size = (folder / name).stat().st_size
        except FileNotFoundError:
            return f"{name} is missing"
        if size != entry["bytes"]:
            return f"{name} has {size:,} bytes of {entry['bytes']:,}"
    return None


def _structure_problem(folder: Path) -> str | None:
    """What is wrong with a folder that has no manifest: one that was downloaded, or one of ours that lost it."""
    names = {entry.name for entry in folder.iterdir()}
    if TRAINING_STATE in names or any(name.startswith("optimizer_rank_") for name in names):
        return f"{MANIFEST} is missing"
    ranks = sorted(int(match[1]) for name in names if (match := WEIGHTS_FILE.fullmatch(name)))
    if not ranks:
        return f"{WEIGHTS} is missing"
    for place, rank in enumerate(ranks):
        if rank != place:
            return f"tensor-parallel rank {place} is missing: it has ranks {ranks}"
    first: set[str] | None = None
    for rank in ranks:
        held = set(read_header(folder / f"mp_rank_{rank:02d}_model_states.pt").tensors)
        if first is not None and held != first:
            return f"the shards of ranks 0 and {rank} hold different names"
        first = held
    return None


def damage_of(
    folder: Path, names: Iterable[str] | None = None, progress: Progress = lambda num_bytes: None
) -> str | None:
    """The first of a folder's files, or of those named, whose content is not what the manifest says. Reads them whole.

    progress: told of the bytes as they are read. A folder without a manifest has nothing to compare with: None.
    """
    files = read_manifest(folder) or {}
    for name in sorted(files if names is None else set(names) & set(files)):
        try:
            found = checksum(folder / name, progress)
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"
        if found != files[name]["blake2b"]:
            return f"{name} is damaged: its checksum is {found}, {MANIFEST} says {files[name]['blake2b']}"
    return None
