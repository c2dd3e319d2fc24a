"""Which clips there are: a folder, a JSONL manifest or tar shards, as an index that is small and quick to open."""

import json
import os
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from sat.data.clip import HEADER_KEYS, IMAGE_SUFFIXES, VIDEO_SUFFIXES, Clip, wrong_numbers
from sat.data.quarantine import BadClip
from sat.data.shards import LATENTS, PICTURES, ShardClip, index_shard, is_shards, shard_places
from sat.errors import DataError, DownloadError

NO_CAPTION = "no caption"
"""The reason for which a clip without a caption is dropped."""

NO_VIDEO = "no video"
"""The reason for which what stands in a shard beside no video, image or latents is dropped."""

WRONG_ROW = "wrong row"
"""The reason for which a row is dropped that says nothing, or something that cannot be."""

CAPTION_ADVICE = (
    "write one for each, list clips and captions in a manifest and give that, or train without captions: "
    "data.params.missing_caption=empty"
)

Check = Callable[["Clip", int, float], object]
"""Called with a clip, its number of frames and its frames per second; a BadClip that it raises drops the clip."""

SIZE_KEYS = ("num_frames", "fps", "height", "width")
"""Numbers by which rows of clips are planned."""

Found = tuple[bytes, dict[str, Any]]
"""A row as it is kept, and what it says."""
Size = tuple[float, ...]
"""SIZE_KEYS, 0 for those that a row does not say, and whether it is an image."""
Kept = tuple[bytes, Clip]
"""A row as it is kept, and its clip."""


class PackedRows:
    """Many short byte strings as one: a million rows cost their bytes, and workers that fork share them untouched."""

    def __init__(self, rows: Iterable[bytes]) -> None:
        self._bytes, bounds = bytearray(), array("q", [0])
        for row in rows:
            self._bytes += row
            bounds.append(len(self._bytes))
        self._bounds = np.frombuffer(bounds, dtype=np.int64)

    def __len__(self) -> int:
        return len(self._bounds) - 1

    def __getitem__(self, index: int) -> bytes:
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        return bytes(self._bytes[self._bounds[index] : self._bounds[index + 1]])


@dataclass(frozen=True)
class Dropped:
    """A clip that was found but is not in the index."""

    key: str
    reason: str
    """Short, for tables: `no caption`, `too short`, `unreadable`, ..."""
    detail: str


def make_clip(folder: Path, row: dict[str, Any], caption_key: str) -> Clip:
    """The clip of a row, in a file or in a shard."""
    return (ShardClip if "shard" in row else Clip)(folder, row, caption_key)


@dataclass(frozen=True)
class ClipIndex:
    """The clips of one data set, in an order that is the same on every machine. `index[i]` is a Clip."""

    source: Path | str
    """The folder, the manifest, or what names the shards."""
    folder: Path
    """What the paths of the rows are relative to."""
    rows: PackedRows
    """One JSON object for each clip."""
    sizes: np.ndarray
    """What rows say of sizes, each once: float64 (sizes, 5) SIZE_KEYS, 0 where one does not say, and 1 for an image."""
    which_size: np.ndarray
    """Of each clip, its row of `sizes`."""
    dropped: tuple[Dropped, ...] = ()
    caption_key: str = "caption"

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Clip:
        return make_clip(self.folder, json.loads(self.rows[index]), self.caption_key)

    def summary(self) -> str:
        """A small table: clips kept, and clips dropped by reason with an example each."""
        total = len(self) + len(self.dropped)
        lines = [f"{self.source}: {len(self)} of {total} clips kept"]
        for reason, count in Counter(clip.reason for clip in self.dropped).most_common():
            example = next(clip for clip in self.dropped if clip.reason == reason)
            lines.append(f"  {count:>7} dropped, {reason}: e.g. {example.key} ({example.detail})")
        return "\n".join(lines)


def scan(
    data_dir: str | Path,
    *,
    root: str | Path | None = None,
    caption_key: str = "caption",
    require_caption: bool = True,
    read_headers: bool = True,
    check: Check | None = None,
    strict: bool = True,
    want_latents: bool = False,
    num_workers: int = 8,
) -> ClipIndex:
    """Find the clips below a folder, in a JSONL manifest or in tar shards, and drop those that cannot be used.

    root: the folder that a manifest's paths are relative to and lie in; by default the manifest's own.
    caption_key: the key of a manifest's rows, or the member or JSON key of a shard, that is the caption.
    require_caption: drop clips without a caption; otherwise their caption is "".
    read_headers: open every file, in num_workers threads, and drop what cannot be read. Without it no file is opened:
        that a caption file is empty, or a clip unreadable, is then found when the clip is drawn.
    check: see Check; called where the two numbers are known, from the header or else from the row.
    strict: a wrong row or a shard that cannot be read is an error; otherwise they are dropped, and so may all clips be.
    want_latents: look for latents in shards, not for videos and images; they have no header to read.

    Raises DataError where nothing is found or nothing is kept, and, if strict, for what is wrong in a manifest or
    shard.
    """
    found: Iterable[Found | Dropped]
    if is_shards(str(data_dir)):
        source: Path | str = str(data_dir)
        folder, looked_for = Path(), f"members that end in {' '.join(LATENTS if want_latents else PICTURES)}"
        found = _shard_rows(str(data_dir), caption_key, read_headers, strict, want_latents, num_workers)
    else:
        source = Path(data_dir).absolute()
        folder, found, looked_for = _file_rows(source, root, caption_key, require_caption)
    dropped: list[Dropped] = []
    rows = _sort_out(found, strict, dropped)
    examine = _Examination(folder, caption_key, require_caption, read_headers, check)
    sizes: dict[Size, int] = {}
    which_size = array("L")
    if read_headers:
        packed = PackedRows(line for line, _ in rows)
        with ThreadPoolExecutor(num_workers) as pool:
            kept = PackedRows(
                _kept(
                    pool.map(lambda number: examine(packed[number], json.loads(packed[number])), range(len(packed))),
                    sizes,
                    which_size,
                    dropped,
                )
            )
    else:
        kept = PackedRows(_kept((examine(line, row) for line, row in rows), sizes, which_size, dropped))
    if not len(kept) and not dropped:
        raise DataError(f"no clips in {source}: looked for {looked_for}")
    index = ClipIndex(
        source,
        folder,
        kept,
        np.array(list(sizes), dtype=np.float64).reshape(-1, len(SIZE_KEYS) + 1),
        np.asarray(which_size).astype(np.min_scalar_type(len(sizes))),
        tuple(dropped),
        caption_key,
    )
    if not len(kept) and strict:
        lacks_captions = any(clip.reason == NO_CAPTION for clip in index.dropped)
        advice = f"\n  captions: {CAPTION_ADVICE}" if lacks_captions else ""
        raise DataError(f"no clip can be used\n{index.summary()}{advice}")
    return index


def _file_rows(
    source: Path, root: str | Path | None, caption_key: str, require_caption: bool
) -> tuple[Path, Iterable[Found | Dropped], str]:
    """Of a folder or a manifest: what the paths of its rows are relative to, the rows, what was looked for."""
    if source.is_dir():
        looked_for = f"files that end in {' '.join(VIDEO_SUFFIXES + IMAGE_SUFFIXES)}"
        hint = f"; for its shards give {source}/*.tar" if any(source.glob("*.tar")) else ""
        return source, ((_encode(row), row) for row in _folder_rows(source)), looked_for + hint
    if source.suffix == ".jsonl" and source.is_file():
        folder = source.parent if root is None else Path(root).absolute()
        rows = _manifest_rows(source, folder, caption_key, require_caption)
        return folder, rows, 'lines like {"video": "clips/1.mp4", "caption": "a text"}'
    raise _no_data(source)


def check_source(data_dir: str | Path) -> None:
    """Raise DataError where there is nothing that a data_dir names; no file is opened."""
    source = Path(data_dir).absolute()
    if is_shards(str(data_dir)):
        shard_places(str(data_dir))
    elif not source.is_dir() and not (source.suffix == ".jsonl" and source.is_file()):
        raise _no_data(source)


def _no_data(source: Path) -> DataError:
    return DataError(
        f"no data at {source}: give a folder with clips, or a manifest that ends in .jsonl, or shards that end in .tar"
    )


def _sort_out(found: Iterable[Found | Dropped], strict: bool, dropped: list[Dropped]) -> Iterator[Found]:
    """The rows, what is wrong among them put to `dropped`; raises DataError for that if strict."""
    for row in found:
        if not isinstance(row, Dropped):
            yield row
        elif strict and row.reason == WRONG_ROW:
            raise DataError(f"{row.key}: {row.detail}")
        else:
            dropped.append(row)


def _kept(
    results: Iterable[Kept | Dropped], sizes: dict[Size, int], which_size: "array[int]", dropped: list[Dropped]
) -> Iterator[bytes]:
    """The rows among the results, what they say of sizes put to `sizes`, and the others to `dropped`."""
    for result in results:
        if isinstance(result, Dropped):
            dropped.append(result)
        else:
            line, clip = result
            said = clip.row.get
            size = (*(said(key) or 0 for key in SIZE_KEYS), clip.is_image)
            which_size.append(sizes.setdefault(size, len(sizes)))
            yield line


@dataclass(frozen=True)
class _Examination:
    """Decides on a row: it, with the header if that was read, or why its clip is dropped."""

    folder: Path
    caption_key: str
    require_caption: bool
    read_headers: bool
    check: Check | None

    def __call__(self, line: bytes, row: dict[str, Any]) -> Kept | Dropped:
        clip = make_clip(self.folder, row, self.caption_key)
        num_frames, fps = clip.num_frames, clip.row.get("fps")
        try:
            knows_caption = self.read_headers or clip.caption_path is None
            if self.require_caption and knows_caption and not clip.caption():
                raise BadClip(_why_no_caption(clip), reason=NO_CAPTION)
            if self.read_headers:
                info = clip.header()
                num_frames, fps = info.num_frames, info.fps
                row = {**row, **{key: getattr(info, key) for key in HEADER_KEYS}}
                line, clip = _encode(row), make_clip(self.folder, row, self.caption_key)
            if self.check and num_frames and fps:
                self.check(clip, num_frames, fps)
        except BadClip as bad:
            return Dropped(clip.key, bad.reason, str(bad))
        return line, clip


def _why_no_caption(clip: Clip) -> str:
    if clip.caption_path is not None:
        return f"{clip.caption_path} is empty"
    if clip.caption_key in clip.row:
        return f"its {clip.caption_key} is empty"
    if isinstance(clip, ShardClip):
        return f"it has no member or JSON key {clip.caption_key}; its members are {', '.join(clip.row['members'])}"
    return f"looked for {' and '.join(_caption_places(clip.row['video']))}"


def _encode(row: dict[str, Any]) -> bytes:
    return json.dumps(row, ensure_ascii=False).encode()


# --- folders ---------------------------------------------------------------------------------------------------------


def _folder_rows(folder: Path) -> Iterator[dict[str, str]]:
    """Every clip below a folder, by path."""
    files = _files_below(folder)
    for video in sorted(files):
        if not video.lower().endswith(VIDEO_SUFFIXES + IMAGE_SUFFIXES):
            continue
        places = [place for place in _caption_places(video) if place in files]
        if not places and "videos" in str(folder):  # the folder given may itself be the one called `videos`
            places = [place for place in _caption_places(f"{folder}/{video}") if Path(place).is_file()]
        yield {"video": video, "caption_file": places[0]} if places else {"video": video}


def _files_below(folder: Path) -> set[str]:
    """Relative paths of all files. Links are followed, each folder once; hidden files and folders are left out."""
    files: set[str] = set()
    seen: set[str] = set()
    for root, directories, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(root)
        if real in seen:
            directories.clear()
            continue
        seen.add(real)
        directories[:] = sorted(name for name in directories if not name.startswith("."))
        below = Path(root).relative_to(folder)
        files.update((below / name).as_posix() for name in names if not name.startswith("."))
    return files


def _caption_places(video: str) -> list[str]:
    """Where a clip's caption may stand: in `labels` beside `videos`, as released, or beside the clip."""
    text = PurePosixPath(video).with_suffix(".txt")
    in_labels = PurePosixPath(*("labels" if part == "videos" else part for part in text.parts))
    released = str(text).replace("videos", "labels")  # anywhere in the path: `videos_480p` -> `labels_480p`
    return list(dict.fromkeys([str(in_labels), released, str(text)]))


# --- manifests -------------------------------------------------------------------------------------------------------


def _manifest_rows(path: Path, folder: Path, caption_key: str, require_caption: bool) -> Iterator[Found | Dropped]:
    """The lines of a JSONL file, checked."""
    needed = ("video", caption_key) if require_caption else ("video",)
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            line = line.removeprefix(b"\xef\xbb\xbf").strip()
            if not line:
                continue
            try:
                yield _checked(line, folder, needed, caption_key)
            except ValueError as error:
                yield Dropped(f"{path} line {number}", WRONG_ROW, str(error))


def _checked(line: bytes, folder: Path, needed: Sequence[str], caption_key: str) -> Found:
    """A line that can be used and its row, the path one below the folder. Raises ValueError with what is wrong."""
    try:
        row = json.loads(line.decode())  # of bytes, json would first guess the encoding, as long again
    except ValueError as error:
        raise ValueError(f"not JSON ({error})") from error
    if not isinstance(row, dict):
        raise ValueError("not a JSON object")
    for key in needed:
        if key not in row:
            raise ValueError(f"no '{key}' among its keys: {', '.join(row) or 'none'}")
    if not isinstance(row["video"], str) or not row["video"]:
        raise ValueError(f"'video' is {row['video']!r}; give a path")
    if not isinstance(row.get(caption_key, ""), str):
        raise ValueError(f"'{caption_key}' is {row[caption_key]!r}; give a text")
    if wrong := wrong_numbers(row):
        raise ValueError(wrong)
    video = _path_below(folder, row["video"])
    if video != row["video"]:
        row = {**row, "video": video}
        line = _encode(row)
    return line, row


def _path_below(folder: Path, path: str) -> str:
    """A path as seen from a folder that it lies in."""
    if not path.startswith("/") and ".." not in path:
        return path
    relative = os.path.relpath(os.path.normpath(folder / path), folder)
    if relative.startswith(".."):
        raise ValueError(
            f"'video' is {path!r}, which is not below {folder}; move the manifest to where all clips are below it, or "
            "set data.params.root to such a folder"
        )
    return relative


# --- shards ----------------------------------------------------------------------------------------------------------


def _shard_rows(
    source: str, caption_key: str, read_headers: bool, strict: bool, want_latents: bool, num_workers: int
) -> Iterator[Found | Dropped]:
    """The clips of all shards in order, and what is no clip."""
    kinds, places = LATENTS if want_latents else PICTURES, shard_places(source)

    def rows(shard: str) -> list[bytes] | DataError | DownloadError:
        try:
            return index_shard(shard, read_headers)
        except (DataError, DownloadError) as error:
            return error

    with ThreadPoolExecutor(num_workers) as pool:
        for shard, found in zip(places, pool.map(rows, places)):
            if not isinstance(found, DataError | DownloadError):
                yield from (_shard_row(line, caption_key, kinds) for line in found)
            elif strict:
                pool.shutdown(cancel_futures=True)
                raise found
            else:
                yield Dropped(shard, "unusable shard", str(found))


def _shard_row(line: bytes, caption_key: str, kinds: Sequence[str]) -> Found | Dropped:
    row = json.loads(line)
    name = f"{row['shard']}: {row['key']}"
    if "wrong" in row:
        return Dropped(name, WRONG_ROW, row["wrong"])
    if not isinstance(row.get(caption_key), str | None):
        return Dropped(name, WRONG_ROW, f"its {caption_key} is {row[caption_key]!r}; give a text")
    if not any(kind in row["members"] for kind in kinds):
        found = ", ".join(row["members"])
        return Dropped(name, NO_VIDEO, f"its members are {found}; none of them is {' '.join(kinds)}")
    return line, row
