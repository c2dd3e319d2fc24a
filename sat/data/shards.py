"""Clips in tar files, as webdataset writes them, read from any place on.

The members of a clip share their name up to its first dot:

    00042.mp4 | .avi ... | .jpg | .png      the video or image; or .safetensors, .npy: its latents
    00042.txt | .caption                    the caption
    00042.json                              caption, fps, duration, num_frames, height, width and whatever else
    00042.fps, 00042.duration ...           one number each

What a shard holds is read once into an index, which is kept; from then on a clip is one read at a known place. So a
clip has a number, and everything that holds for single files holds for shards: the order is a function of the seed and
the sample counter, at any number of ranks and workers.
"""

import fcntl
import glob
import hashlib
import io
import json
import logging
import os
import re
import struct
import tarfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import urlsplit

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

from sat.data.clip import COUNTS, HEADER_KEYS, IMAGE_SUFFIXES, VIDEO_SUFFIXES, Clip, wrong_numbers
from sat.data.quarantine import BadClip
from sat.data.remote import ChangedError, Window, is_url, open_at, read_part
from sat.data.video import ClipInfo, Embedded, probe
from sat.environment import cache_folder
from sat.errors import ConfigError, DataError

log = logging.getLogger(__name__)

PICTURES = tuple(suffix[1:] for suffix in VIDEO_SUFFIXES + IMAGE_SUFFIXES)
LATENTS = ("safetensors", "npy")
LATENT_NAMES = ("moments", "latents")
"""Tensors that a safetensors member may hold; an npy member holds moments."""
TEXT_LIMIT = 1 << 16
"""Bytes of the largest member that is taken for a text and kept in the index."""
INDEX_VERSION = 1
OWN_KEYS = ("key", "members", "shard", "shard_size", "latents", "unreadable", "wrong")
"""Keys of a row that say where a clip is and what is wrong with it; no member or JSON key may set them."""


def is_shards(source: str) -> bool:
    """Whether a data_dir names tar shards: a path, a pattern or a URL that ends in .tar."""
    return (urlsplit(source).path if is_url(source) else source).endswith(".tar")


def shard_places(source: str) -> list[str]:
    """The shards of a pattern: {000..019} counts, {a,b} lists, and * ? [] are matched against the disk.

    In order; raises ConfigError for a pattern that cannot be read, DataError where a shard is not there or named twice.
    """
    places: list[str] = []
    for one in expand_braces(source):
        if is_url(one):
            places.append(one)
            continue
        path = os.path.abspath(one)  # noqa: PTH100  # Path has no way to make a pattern absolute
        found = sorted(glob.glob(path)) if glob.has_magic(path) else [path] * os.path.exists(path)  # noqa: PTH110, PTH207
        if not found:
            raise DataError(f"there is no shard {one} (data_dir {source})")
        places += found
    place, count = Counter(places).most_common(1)[0]
    if count > 1:
        raise DataError(f"the shard {place} is named twice by {source}")
    return places


def expand_braces(pattern: str) -> list[str]:
    """`a{0..2}` -> a0, a1, a2; `a{00..10}` keeps the zeros; `a{b,c}` -> ab, ac."""
    match = re.search(r"\{([^{}]*)\}", pattern)
    if match is None:
        return [pattern]
    before, inside, after = pattern[: match.start()], match[1], pattern[match.end() :]
    count = re.fullmatch(r"(\d+)\.\.(\d+)", inside)
    if count and int(count[1]) <= int(count[2]):
        words = [str(number).zfill(len(count[1])) for number in range(int(count[1]), int(count[2]) + 1)]
    elif "," in inside:
        words = inside.split(",")
    else:
        raise ConfigError(f"cannot read {{{inside}}} in {pattern}; write {{000..019}} or {{a,b}}")
    return [one for word in words for one in expand_braces(before + word + after)]


# --- clips -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ShardClip(Clip):
    """A clip in a shard; its row says where."""

    @property
    def key(self) -> str:
        return f"{_base_name(self.row['shard'])}/{self.row['key']}"

    @property
    def member(self) -> str:
        """The member with the video or the image."""
        return self._first_of(PICTURES)

    def _first_of(self, names: Sequence[str]) -> str:
        return next(name for name in names if name in self.row["members"])

    @property
    def place(self) -> str:
        return self._place_of(self.member)

    def _place_of(self, member: str) -> str:
        return f"{self.row['shard']}: {self.row['key']}.{member}"

    @property
    def is_image(self) -> bool:
        found = [name for name in PICTURES if name in self.row["members"]]  # none where it is latents
        return bool(found) and f".{found[0]}" in IMAGE_SUFFIXES

    @property
    def caption_path(self) -> None:
        return None

    def caption(self) -> str:
        """The text of the member or JSON key that is called caption_key; for `caption` also that of `txt`."""
        text = self.row.get(self.caption_key) or (self.row.get("txt") if self.caption_key == "caption" else "") or ""
        return str(text).strip()

    def header(self) -> ClipInfo:
        """As the index has it, made with headers."""
        if "unreadable" in self.row:
            message, reason = self.row["unreadable"]
            raise BadClip(message, reason)
        return ClipInfo(**{key: self.row[key] for key in HEADER_KEYS})

    def content(self, member: str) -> bytes:
        """The bytes of a member. Raises BadClip, and DownloadError where the server fails or the shard was replaced."""
        start, size = self.row["members"][member]
        place = self._place_of(member)
        try:
            content = read_part(self.row["shard"], start, size, self.row.get("shard_size"))
        except ChangedError as error:
            _kept_index(self.row["shard"]).unlink(missing_ok=True)
            raise ChangedError(f"{error}: start again, and its index is made anew") from error
        except OSError as error:
            raise BadClip(f"{place} cannot be read: {error.strerror}") from error
        if len(content) < size:
            raise BadClip(f"{place} was cut short: {size - len(content)} bytes are missing", reason="cut short")
        return content

    def load(self) -> Embedded:
        content = self.content(self.member)
        return Embedded(self.place, lambda: io.BytesIO(content))

    def num_bytes(self) -> int:
        return self.row["members"][self._first_of(PICTURES + LATENTS)][1]

    def state(self) -> list[int | None]:
        """Of the shard, and where in it the clip is. Raises BadClip."""
        try:
            shard = _state(self.row["shard"], self.row.get("shard_size"))
        except OSError as error:
            raise BadClip(f"{self.place} cannot be read: {error.strerror}") from error
        return [*shard, *self.row["members"][self.member]]

    def digest(self) -> str:
        return hashlib.sha256(self.content(self._first_of(PICTURES + LATENTS))).hexdigest()

    def latents(self) -> tuple[str, Tensor]:
        """`moments` or `latents`, and the tensor, float32 (t c h w)."""
        member = self._first_of(LATENTS)
        content = self.content(member)
        try:
            if member == "npy":
                return "moments", torch.from_numpy(np.load(io.BytesIO(content), allow_pickle=False)).float()
            tensors = safetensors.torch.load(content)
        except Exception as error:  # safetensors raises its own, undocumented types
            raise BadClip(f"{self._place_of(member)} cannot be read: {error}") from error
        name = next(name for name in LATENT_NAMES if name in tensors)
        return name, tensors[name].float()


def _base_name(shard: str) -> str:
    return (urlsplit(shard).path if is_url(shard) else shard).rpartition("/")[2]


# --- the index -------------------------------------------------------------------------------------------------------


def index_shard(shard: str, with_headers: bool) -> list[bytes]:
    """A row of JSON for each clip of a shard, from the index that is kept, or made now.

    with_headers: the rows of videos and images hold what their headers say; one that cannot be read says so.
    Raises DataError for a shard that ends early or is no tar file, DownloadError for one that cannot be fetched.
    """
    kept = _kept_index(shard)
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        with kept.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # of several ranks that start together, one makes it
            rows = _recall(kept, shard, with_headers)
            if rows is None:
                size, rows = _make_index(shard, with_headers)
                _keep(kept, shard, size, with_headers, rows)
    except OSError as error:
        log.warning("the index of %s cannot be kept in %s (%s); it is made at each start", shard, kept.parent, error)
        _, rows = _make_index(shard, with_headers)
    return rows


def index_folder() -> Path:
    """Where indexes are kept."""
    return cache_folder() / "shards"


def _kept_index(shard: str) -> Path:
    return index_folder() / f"{hashlib.blake2b(shard.encode(), digest_size=16).hexdigest()}.jsonl"


def _state(shard: str, size: int | None) -> list[int | None]:
    """What tells a changed shard: size and time of a file; the size of a URL, which is compared when it is read."""
    if is_url(shard):
        return [size, None]
    found = Path(shard).stat()
    return [found.st_size, found.st_mtime_ns]


def _recall(kept: Path, shard: str, with_headers: bool) -> list[bytes] | None:
    try:
        first, *rows = kept.read_bytes().splitlines()
        about = json.loads(first)
    except (OSError, ValueError):
        return None
    is_same = about["version"] == INDEX_VERSION and about["state"] == _state(shard, about["state"][0])
    return rows if is_same and (about["headers"] or not with_headers) else None


def _keep(kept: Path, shard: str, size: int, with_headers: bool, rows: Sequence[bytes]) -> None:
    about = {"version": INDEX_VERSION, "shard": shard, "state": _state(shard, size), "headers": with_headers}
    temporary = kept.with_suffix(f".{os.getpid()}.tmp")
    temporary.write_bytes(b"\n".join([json.dumps(about).encode(), *rows]))
    temporary.replace(kept)


def _make_index(shard: str, with_headers: bool) -> tuple[int, list[bytes]]:
    """Size of a shard and the rows of its clips."""
    rows: dict[str, dict[str, Any]] = {}
    try:
        with open_at(shard) as file:
            size = file.seek(0, io.SEEK_END)
            if not size:
                raise DataError(f"the shard {shard} is empty (0 bytes); copy it again, or leave it out")
            file.seek(0)
            _read_members(shard, file, rows)
    except OSError as error:
        raise DataError(f"the shard {shard} cannot be read: {error.strerror}") from error
    for row in rows.values():
        row["shard"] = shard
        if is_url(shard):
            row["shard_size"] = size
        if with_headers and any(name in row["members"] for name in PICTURES):
            _add_header(row, size)
    return size, [json.dumps(row, ensure_ascii=False).encode() for row in rows.values()]


def _read_members(shard: str, file: BinaryIO, rows: dict[str, dict[str, Any]]) -> None:
    """Fill key -> row from the members of a tar file."""
    end: int | str = 0
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                folder, slash, name = member.name.removeprefix("./").rpartition("/")
                stem, _, kind = name.partition(".")
                if member.isreg() and stem:
                    row = rows.setdefault(folder + slash + stem, {"key": folder + slash + stem, "members": {}})
                    _add_member(shard, file, member, kind.lower(), row)
            end = tar.offset
            file.seek(end)
            if file.read(tarfile.BLOCKSIZE) == bytes(tarfile.BLOCKSIZE):
                return
    except tarfile.ReadError as error:
        if "end of data" not in str(error):
            raise DataError(
                f"{shard} is no tar file that can be read from any place ({error}); a compressed one must be unpacked"
            ) from error
    raise DataError(
        f"{shard} ends early: its end mark is missing after {len(rows)} clips; copy it again, or leave it out"
    )


def _add_member(shard: str, file: BinaryIO, member: tarfile.TarInfo, kind: str, row: dict[str, Any]) -> None:
    if kind in row["members"]:
        raise DataError(f"{shard} has two members {row['key']}.{kind}; a name may stand in it once, so pack it again")
    start, size = row["members"][kind] = [member.offset_data, member.size]
    if kind in (*PICTURES, *OWN_KEYS) or (kind not in LATENTS and size > TEXT_LIMIT):
        return
    file.seek(start)
    try:
        if kind in LATENTS:
            row["latents"] = _latent_shape(kind, file)
        elif kind == "json":
            row.update({key: value for key, value in _json_object(file.read(size)).items() if key not in OWN_KEYS})
        elif kind in HEADER_KEYS:
            row[kind] = (int if kind in COUNTS else float)(file.read(size))
        else:
            row[kind] = file.read(size).decode("utf-8-sig")
        wrong = wrong_numbers(row)
    except (ValueError, struct.error) as error:
        wrong = f"its member {kind} cannot be read ({error})"
    if wrong:
        row["wrong"] = wrong


def _json_object(text: bytes) -> dict[str, Any]:
    found = json.loads(text)
    if not isinstance(found, dict):
        raise ValueError("not a JSON object")
    return found


def _latent_shape(kind: str, file: BinaryIO) -> list[int]:
    """Frames, channels, rows, columns."""
    if kind == "npy":
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape: Sequence[int] = read(file)[0]
    else:
        (length,) = struct.unpack("<Q", file.read(8))
        tensors = _json_object(file.read(length))
        names = [name for name in LATENT_NAMES if name in tensors]
        if not names:
            raise ValueError(f"it holds {', '.join(tensors)}; give a tensor called {' or '.join(LATENT_NAMES)}")
        shape = tensors[names[0]]["shape"]
    if len(shape) != 4:
        raise ValueError(f"its shape is {list(shape)}; give frames, channels, rows, columns")
    return list(shape)


def _add_header(row: dict[str, Any], shard_size: int) -> None:
    clip = ShardClip(Path(), row)
    start, size = row["members"][clip.member]

    def window() -> BinaryIO:
        return io.BufferedReader(Window(open_at(row["shard"], shard_size), start, size))

    try:
        info = probe(Embedded(clip.place, window))
        row.update({key: getattr(info, key) for key in HEADER_KEYS})
    except BadClip as bad:
        row["unreadable"] = [str(bad), bad.reason]
