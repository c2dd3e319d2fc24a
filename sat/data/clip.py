"""One clip of a set: where its file and its caption are, and what is known of it before it is read."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sat.data.quarantine import BadClip
from sat.data.video import ClipFile, ClipInfo, probe

VIDEO_SUFFIXES = (".mp4", ".avi", ".mkv", ".webm", ".mov", ".m4v")
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg")
HEADER_KEYS = ("num_frames", "fps", "height", "width", "duration")
"""Numbers that may be known of a clip."""
NUMBERS = (int, float)
COUNTS = ("num_frames", "height", "width")
"""Those of them that are whole."""


@dataclass(frozen=True)
class Clip:
    """A clip in a file of its own."""

    folder: Path
    """What the row's paths are relative to."""
    row: dict[str, Any]
    """The row as the manifest has it, keys that nobody here knows included."""
    caption_key: str = "caption"
    """Under which the row has the caption."""

    @property
    def path(self) -> Path:
        return self.folder / self.row["video"]

    @property
    def place(self) -> str:
        """Where the clip is, for messages."""
        return str(self.path)

    def load(self) -> ClipFile:
        """What `sat.data.video` reads. Raises BadClip."""
        return self.path

    def header(self) -> ClipInfo:
        """What the file's header says. Raises BadClip."""
        return probe(self.path)

    def num_bytes(self) -> int:
        """Of what is read. Raises BadClip."""
        try:
            return self.path.stat().st_size
        except OSError as error:
            raise BadClip(f"{self.path} cannot be read: {error.strerror}") from error

    def state(self) -> list[int | None]:
        """What tells that the file has changed without reading it. Raises BadClip."""
        try:
            found = self.path.stat()
        except OSError as error:
            raise BadClip(f"{self.path} cannot be read: {error.strerror}") from error
        return [found.st_size, found.st_mtime_ns]

    def digest(self) -> str:
        """Of what is read, whatever it is called. Raises BadClip."""
        try:
            with self.path.open("rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise BadClip(f"{self.path} cannot be read: {error.strerror}") from error

    @property
    def key(self) -> str:
        """A name that stays the same on every machine: the folder's name and the path below it."""
        return f"{self.folder.name}/{self.row['video']}"

    @property
    def num_frames(self) -> int | None:
        """As its row says, or by duration and fps; None where it does not say."""
        row = self.row
        if row.get("num_frames"):
            return int(row["num_frames"])
        return round(row["duration"] * row["fps"]) if row.get("duration") and row.get("fps") else None

    @property
    def is_image(self) -> bool:
        return str(self.row["video"]).lower().endswith(IMAGE_SUFFIXES)

    @property
    def caption_path(self) -> Path | None:
        """The file of the caption, or None: it is in the row, or there is none."""
        place = None if self.caption_key in self.row else self.row.get("caption_file")
        return self.folder / place if place is not None else None

    def caption(self) -> str:
        """The first line of the caption file, or the row's text; "" where there is none. Raises BadClip."""
        if self.caption_path is None:
            return (self.row.get(self.caption_key) or "").strip()
        try:
            lines = self.caption_path.read_text(encoding="utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise BadClip(f"the caption {self.caption_path} cannot be read: {error}", "unreadable caption") from error
        return lines[0].strip() if lines else ""


def wrong_numbers(row: dict[str, Any]) -> str:
    """What is wrong with the HEADER_KEYS of a row, or nothing."""
    for key in HEADER_KEYS:
        value = row.get(key)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, NUMBERS) or value <= 0:
            return f"'{key}' is {value!r}; give a number above 0"
        if key in COUNTS and value != int(value):
            return f"'{key}' is {value!r}; give a whole number"
    return ""
