"""Archives, unpacked without trust: nothing leaves the folder, no links, no bombs, whole or not at all."""

import lzma
import shutil
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from sat.errors import DownloadError
from sat.weights.headers import torch_index

MAX_MEMBERS = 10_000
MAX_BYTES = 1 << 38
"""Unpacked, 275 GB: ten times the largest released tree."""
MAX_RATIO = 100
"""Unpacked to packed. Weights shrink by a quarter at best; bombs grow a thousand times and more."""
TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz")
SUFFIXES = (".zip", *TAR_SUFFIXES)
"""Names of files that are archives."""


@dataclass(frozen=True)
class Member:
    """One file in an archive."""

    name: str
    size: int
    open: Callable[[], Any]


def is_archive(file: Path) -> bool:
    """Whether a file's name or first bytes are an archive's. A torch file is a zip too, but not one to unpack."""
    with file.open("rb") as stream:
        start = stream.read(4)
    if start.startswith(b"PK"):
        return not _is_torch(file) if zipfile.is_zipfile(file) else file.name.endswith(".zip")
    return start.startswith(b"\x1f\x8b") or file.name.endswith(TAR_SUFFIXES)


def _is_torch(file: Path) -> bool:
    with zipfile.ZipFile(file) as archive:
        return torch_index(archive) is not None


def list_archive(file: Path) -> dict[str, int]:
    """Name -> size of the files in a zip archive that is safe to unpack; an error says what is wrong with another."""
    try:
        with zipfile.ZipFile(file) as archive:
            return {member.name: member.size for member in _checked(file, _zip_members(file, archive))}
    except (zipfile.BadZipFile, OSError) as error:
        raise DownloadError(f"{file} is no whole zip archive ({error}); copy or download it again") from error


def unpack(file: Path, folder: Path) -> None:
    """Unpack a zip or tar archive into a new folder, which appears whole or not at all.

    Refused: names that lead out of the folder, links and devices, a name given twice, passwords, and what unpacks to
    more than MAX_RATIO times its size, MAX_BYTES, MAX_MEMBERS or the free disk. Raises DownloadError.
    """
    building = folder.with_name(f".{folder.name}.unpacking")
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir(parents=True)
    try:
        if file.name.endswith(TAR_SUFFIXES) or not zipfile.is_zipfile(file):
            with tarfile.open(file) as tar:
                _write_all(file, _checked(file, _tar_members(file, tar)), building)
        else:
            with zipfile.ZipFile(file) as archive:
                # A zip lists all its members beforehand: nothing is written before all are found to be good.
                _write_all(file, list(_checked(file, _zip_members(file, archive))), building)
        building.rename(folder)
    except (zipfile.BadZipFile, tarfile.TarError, zlib.error, lzma.LZMAError, EOFError) as error:
        raise DownloadError(f"{file} is no whole archive ({error}); copy or download it again") from error
    except (OSError, NotImplementedError, RuntimeError) as error:
        raise DownloadError(f"{file} could not be unpacked to {folder} ({error})") from error
    finally:
        shutil.rmtree(building, ignore_errors=True)


def _zip_members(file: Path, archive: zipfile.ZipFile) -> Iterator[Member]:
    for info in archive.infolist():
        kind = stat.S_IFMT(info.external_attr >> 16)
        if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
            raise DownloadError(f"{file} holds {info.filename}, which is a link or a device; it is not unpacked")
        if info.flag_bits & 1:
            raise DownloadError(f"{file} is locked with a password; unpack it yourself and give the folder")
        if not info.is_dir():
            yield Member(info.filename, info.file_size, partial(archive.open, info))


def _tar_members(file: Path, tar: tarfile.TarFile) -> Iterator[Member]:
    for info in tar:
        if not (info.isreg() or info.isdir()):
            raise DownloadError(f"{file} holds {info.name}, which is a link or a device; it is not unpacked")
        if info.isreg():
            yield Member(info.name, info.size, partial(tar.extractfile, info))


def _checked(file: Path, members: Iterable[Member]) -> Iterator[Member]:
    """The same members, with safe names; the first that must not be unpacked is an error."""
    packed, total = file.stat().st_size, 0
    files: set[str] = set()
    folders: set[str] = set()
    for count, member in enumerate(members, start=1):
        name = _safe_name(file, member.name)
        low = name.lower()  # there are disks that do not tell case apart
        above = {low.rsplit("/", depth)[0] for depth in range(1, low.count("/") + 1)}
        if low in files or low in folders or above & files:
            raise DownloadError(f"{file} holds {member.name} twice; it is not unpacked")
        files.add(low)
        folders |= above
        total += member.size
        if total > MAX_RATIO * packed or total > MAX_BYTES or count > MAX_MEMBERS:
            raise DownloadError(
                f"{file} of {packed:,} bytes would unpack to {count:,} files of {total:,} bytes or more; "
                "no archive of weights does, it is not unpacked"
            )
        yield Member(name, member.size, member.open)


def _safe_name(file: Path, name: str) -> str:
    parts = name.replace("\\", "/").removeprefix("./").split("/")
    if any(part in ("", "..", ".") or ":" in part or "\0" in part for part in parts):
        raise DownloadError(f"{file} holds {name!r}, a name that leads out of the folder; it is not unpacked")
    return "/".join(parts)


def _write_all(file: Path, members: Iterable[Member], folder: Path) -> None:
    if isinstance(members, list):
        _check_space(file, sum(member.size for member in members), folder)
    for member in members:
        _check_space(file, member.size, folder)
        target = folder / member.name
        target.parent.mkdir(parents=True, exist_ok=True)
        with member.open() as source, target.open("xb") as stream:
            shutil.copyfileobj(source, stream, 1 << 20)
        if target.stat().st_size != member.size:
            raise DownloadError(f"{file}: {member.name} has {target.stat().st_size:,} bytes instead of {member.size:,}")


def _check_space(file: Path, size: int, folder: Path) -> None:
    free = shutil.disk_usage(folder).free
    if size > free:
        raise DownloadError(f"{folder.parent} has {free:,} bytes free, {file.name} unpacks to {size:,}")
