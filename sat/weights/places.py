"""Places that weights come from: folders on disk and on web servers, and archives and files in either."""

import hashlib
import os
import re
import shutil
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol
from urllib.parse import quote, unquote, urlsplit

from sat.cogvideox import presets
from sat.errors import CheckpointError, DownloadError, SatError
from sat.weights.archive import SUFFIXES, is_archive, unpack
from sat.weights.download import PATIENT, UNKNOWN, AbsentError, Expected, Patience, download
from sat.weights.headers import read_header
from sat.weights.sources import Source
from sat.weights.survey import WEIGHTS_FILE, survey

HUB_PAGES = (
    (re.compile(r"(https://huggingface\.co/[^/]+/[^/]+)(?:/tree/([^/]+))?/?"), "main"),
    (re.compile(r"(https://(?:www\.)?modelscope\.cn/models/[^/]+/[^/]+)(?:/files)?()/?"), "master"),
)
"""The page of a repository, as people copy it from the browser, and the branch that it shows if it names none."""
FILE_SUFFIXES = (*SUFFIXES, ".pt", ".safetensors", ".bin")


class Place(Protocol):
    """A folder that holds parts of a model."""

    @property
    def address(self) -> str:
        """Where it is, for messages."""

    def below(self, name: str) -> "Place":
        """A folder in it; the place itself for an empty name."""

    def get(self, name: str, folder: Path, is_probe: bool = False) -> Path:
        """Bring a file of this place, whole, into a folder. Raises AbsentError if there is none of this name.

        is_probe: it is asked for to see whether the place has what is looked for at all.
        """


@dataclass(frozen=True)
class LocalPlace:
    """A folder on disk."""

    root: Path
    is_ours: bool = False
    """Whether its files were made for this purpose, so that they need no copying."""

    @property
    def address(self) -> str:
        return str(self.root)

    def below(self, name: str) -> "LocalPlace":
        return LocalPlace(self.root / name, self.is_ours)

    def get(self, name: str, folder: Path, is_probe: bool = False) -> Path:
        source, target = self.root / name, folder / name
        if target.exists():
            return target
        if not source.is_file():
            raise AbsentError(f"{source} is not there")
        try:
            check_whole(source)
            target.parent.mkdir(parents=True, exist_ok=True)
            part = target.with_name(f"{target.name}.part")
            part.unlink(missing_ok=True)
            (os.link if self.is_ours else shutil.copyfile)(source, part)
        except OSError as error:
            raise DownloadError(f"cannot copy {source} to {folder}: {error.strerror or error}") from error
        part.replace(target)
        return target


@dataclass(frozen=True)
class WebPlace:
    """A folder on a web server."""

    base: str
    """Its address, with a slash at the end."""
    files: Mapping[str, Expected] = field(default_factory=dict)
    patience: Patience = PATIENT

    @property
    def address(self) -> str:
        return self.base

    def below(self, name: str) -> "WebPlace":
        if not name:
            return self
        inside = f"{name}/"
        files = {path.removeprefix(inside): known for path, known in self.files.items() if path.startswith(inside)}
        return replace(self, base=f"{self.base}{quote(name)}/", files=files)

    def get(self, name: str, folder: Path, is_probe: bool = False) -> Path:
        url, known = f"{self.base}{quote(name)}", self.files.get(name, UNKNOWN)
        download(url, folder / name, known, check_whole, self.patience, is_probe)
        return folder / name


def check_whole(file: Path) -> None:
    """Raise CheckpointError for a file of weights that is cut short, by its own list of contents."""
    name = file.name.removesuffix(".part")
    if name.endswith((".pt", ".safetensors", ".bin")):
        read_header(file)
    elif name.endswith(".zip") and not zipfile.is_zipfile(file):
        raise CheckpointError(f"{file} is half an archive: its end is missing; copy or download it again")


def open_places(source: Source, staging: Path, patience: Patience) -> Iterator[Place]:
    """The folders of a source in which parts may lie. Archives are brought and unpacked below `staging` first."""
    address = source.address
    if "://" not in address:
        yield from _local_places(Path(address), staging)
        return
    for page, branch in HUB_PAGES:
        if match := page.fullmatch(address):
            address = f"{match[1]}/resolve/{match[2] or branch}/"
    url = urlsplit(address)
    if not url.query and not url.path.endswith(FILE_SUFFIXES):
        yield WebPlace(f"{address.rstrip('/')}/", source.files, patience)
        return
    folder = staging / "downloads" / _key(address)
    file = folder / (unquote(url.path.rstrip("/").rpartition("/")[2]) or "download")
    download(address, file, next(iter(source.files.values()), UNKNOWN), check_whole, patience)
    try:
        places = list(_local_places(file, staging))
    except SatError:
        file.unlink()  # so that the next call brings it anew
        raise
    yield from places


def _key(address: str) -> str:
    """A short folder name for an address."""
    return hashlib.sha256(address.encode()).hexdigest()[:12]


def _local_places(path: Path, staging: Path) -> Iterator[LocalPlace]:
    if path.is_dir():
        if any(WEIGHTS_FILE.fullmatch(entry.name) for entry in path.iterdir()):
            yield LocalPlace(_lay_out(sorted(path.glob("mp_rank_*_model_states.pt")), staging))
        below = sorted(folder for pattern in ("*", "*/*") for folder in path.glob(pattern) if folder.is_dir())
        for folder in (path, *below):
            yield LocalPlace(folder, is_ours=folder.is_relative_to(staging / "unpacked"))
        return
    if not path.is_file():
        raise DownloadError(f"there is no file or folder {path}")
    if not is_archive(path):
        yield LocalPlace(_lay_out([path], staging))
        return
    folder = staging / "unpacked" / _key(str(path.resolve()))
    if not folder.exists():
        unpack(path, folder)
    yield from _local_places(folder, staging)


def _lay_out(files: list[Path], staging: Path) -> Path:
    """A folder in which files of weights stand at their places in a released tree, by what they are."""
    finding = survey(files[0])
    root = staging / "unpacked" / _key(str(files[0].resolve()))
    if finding.problem:
        raise DownloadError(finding.problem)
    if finding.preset is not None and len({file.suffix for file in files} - {".pt"}) == 0:
        names = [f"transformer/1/mp_rank_{rank:02d}_model_states.pt" for rank in range(len(files))]
    elif finding.what.startswith(presets.VAE):
        names = ["vae/3d-vae.pt"]
    else:
        raise DownloadError(f"{files[0]} is {finding.what}; give a file of SAT's transformer or VAE, or a folder")
    for file, name in zip(files, names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).unlink(missing_ok=True)
        (root / name).symlink_to(file.resolve())
    if names[0].startswith("transformer"):
        (root / "transformer" / "latest").write_text("1\n", encoding="utf-8")
    return root
