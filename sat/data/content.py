"""What a clip is made of: its bytes, by their hash, and how they are read.

Hashing a file means reading it, so hashes are kept, in DIR/files/NAME.jsonl: one row a clip, with the size and the time
of the file for which they hold. A file that has been changed since is hashed again.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sat.data.clip import Clip

FILES = "files"
DIGEST_TYPE = "S64"
KEY_TYPE = "S32"
"""numpy's type of keys: 32 hexadecimal digits."""


def make_key(**parts: Any) -> str:
    """A short name for values that JSON can hold: the same for the same values."""
    text = json.dumps(parts, sort_keys=True, ensure_ascii=False).encode("utf-8", "surrogatepass")
    return hashlib.blake2b(text, digest_size=16).hexdigest()


@dataclass(frozen=True)
class Source:
    """A clip and how a dataset reads it: together they decide the pixels."""

    clip: Clip
    reading: Mapping[str, Any]
    """Frames, size and cut, as values that JSON can hold."""

    def row(self) -> dict[str, Any]:
        """Where the clip is and its state there. Raises BadClip."""
        return {"place": self.clip.place, "state": self.clip.state()}


class KnownFiles:
    """The hashes that are kept in a cache: 96 bytes of memory a clip."""

    def __init__(self, cache_dir: Path) -> None:
        rows: dict[str, str] = {}
        for piece in sorted((cache_dir / FILES).glob("*.jsonl")):
            for line in piece.read_text(encoding="utf-8").splitlines():
                row = json.loads(line)
                rows[_stamp(row)] = row["digest"]
        self._stamps = np.array(sorted(rows), dtype=KEY_TYPE)
        self._digests = np.array([rows[stamp] for stamp in sorted(rows)], dtype=DIGEST_TYPE)

    def look_up(self, source: Source) -> tuple[str, dict[str, Any] | None]:
        """The hash of a clip's bytes, and the row to keep where it had to be computed. Raises BadClip."""
        row = source.row()
        place = int(np.searchsorted(self._stamps, (stamp := _stamp(row).encode())))
        if place < len(self._stamps) and self._stamps[place] == stamp:
            return self._digests[place].decode(), None
        digest = source.clip.digest()
        return digest, {**row, "digest": digest}


def _stamp(row: Mapping[str, Any]) -> str:
    return make_key(place=row["place"], state=row["state"])


def as_lines(rows: Iterable[Mapping[str, Any]]) -> str:
    """Rows as KnownFiles reads them."""
    return "".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows)
