"""Bytes of files on disk and behind HTTP, from any place on."""

import http.client
import io
import logging
import re
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from sat.errors import DownloadError

log = logging.getLogger(__name__)

PAUSES = (0.5, 2.0, 8.0, 30.0)
"""Seconds before each further try at a server."""
TIMEOUT = 30.0
"""Seconds without a byte that end a try."""
PASSING = (408, 425, 429, 500, 502, 503, 504)
"""HTTP statuses that may be gone at the next try."""
SKIP = 1 << 20
"""Bytes that are rather read and thrown away than asked past in a new request."""
AHEAD = 1 << 16
"""Bytes that are read ahead."""
AGENT = "sat-video"

T = TypeVar("T")


class ChangedError(DownloadError):
    """A file has another size than it had before."""


def is_url(place: str) -> bool:
    """Whether a place is a web address."""
    return "://" in place


def open_at(place: str, expected_size: int | None = None, stop: int | None = None) -> BinaryIO:
    """A file on disk or behind HTTP, open for reading at any place.

    stop: no byte from there on is asked for. Raises OSError for a file on disk that cannot be opened, DownloadError for
    a URL that cannot be read or whose server does not send parts of a file, ChangedError for one of another size than
    is expected.
    """
    if is_url(place):
        return io.BufferedReader(RemoteFile(place, expected_size, stop), AHEAD)
    return Path(place).open("rb")


def read_part(place: str, start: int, size: int, expected_size: int | None = None) -> bytes:
    """Some bytes of a file on disk or behind HTTP, fewer where the file ends before. Raises as `open_at` does."""
    if not size:
        return b""
    with open_at(place, expected_size, start + size) as file:
        file.seek(start)
        return file.read(size)


class _Seekable(io.RawIOBase):
    """What files of a known size share that are read from any place on."""

    size: int | None
    place = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.place

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        starts = {io.SEEK_SET: 0, io.SEEK_CUR: self.place, io.SEEK_END: self.size or 0}
        self.place = starts[whence] + offset
        return self.place


class RemoteFile(_Seekable):
    """A file behind HTTP. A connection stays open while it is read forward; what fails in passing is tried again."""

    def __init__(self, url: str, expected_size: int | None = None, stop: int | None = None) -> None:
        super().__init__()
        if not url.startswith(("http://", "https://")):
            raise DownloadError(f"{url} is not a web address; give http:// or https://, or a path")
        self.url, self.size, self.stop = url, expected_size, stop
        self._response: Any = None
        self._arrived = 0  # where the open response stands
        if expected_size is None:
            self._persist(self._connect)

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        end = min(self.size or 0, self.stop or self.size or 0)
        view = view[: max(end - self.place, 0)]
        count = self._persist(lambda: self._read_some(view)) if len(view) else 0
        self.place += count
        return count

    def close(self) -> None:
        self._hang_up()
        super().close()

    def _persist(self, action: Callable[[], T]) -> T:
        """Do something that may fail in passing, several times if need be."""
        for pause in (*PAUSES, None):
            try:
                return action()
            except (OSError, http.client.HTTPException) as error:
                self._hang_up()
                self._wait(pause, error)
        raise AssertionError("the last try raises")

    def _wait(self, pause: float | None, error: Exception) -> None:
        reason = getattr(error, "reason", None) or error
        if isinstance(error, urllib.error.HTTPError):
            reason = f"HTTP {error.code} {error.reason}"
            error.close()
            if error.code not in PASSING:
                raise DownloadError(f"{self.url} cannot be read: {reason}; check the address") from error
        if pause is None:
            raise DownloadError(
                f"{self.url} cannot be read: {reason} (the last of {len(PAUSES) + 1} tries); check the address and the "
                "network"
            ) from error
        log.info("%s: %s; trying again", self.url, reason)
        time.sleep(pause)

    def _read_some(self, view: memoryview) -> int:
        if self._response is None or not 0 <= self.place - self._arrived <= SKIP:
            self._hang_up()
            self._connect()
        while self._arrived < self.place:
            self._arrived += _or_broken(len(self._response.read(self.place - self._arrived)))
        count = _or_broken(self._response.readinto(view))
        self._arrived += count
        return count

    def _connect(self) -> None:
        stop = "" if self.stop is None else self.stop - 1
        headers = {"User-Agent": AGENT, "Accept-Encoding": "identity", "Range": f"bytes={self.place}-{stop}"}
        try:
            response = urllib.request.urlopen(urllib.request.Request(self.url, headers=headers), timeout=TIMEOUT)
        except urllib.error.HTTPError as error:
            if error.code != 416 or self.place:
                raise
            self.size = 0  # no byte is there to begin with
            return
        place = re.match(r"bytes (\d+)-\d+/(\d+)$", response.headers.get("Content-Range", ""))
        if response.status != 206 or place is None or int(place[1]) != self.place:
            response.close()
            raise DownloadError(
                f"{self.url}: the server does not send parts of a file (HTTP range requests), as shards are read; "
                "use one that does, or copy the file to a disk"
            )
        if self.size is not None and self.size != int(place[2]):
            response.close()
            raise ChangedError(f"{self.url} has {int(place[2]):,} bytes, and had {self.size:,} before")
        self.size, self._response, self._arrived = int(place[2]), response, self.place

    def _hang_up(self) -> None:
        if self._response is not None:
            self._response.close()
            self._response = None


def _or_broken(count: int) -> int:
    if not count:
        raise http.client.IncompleteRead(b"")
    return count


class Window(_Seekable):
    """A part of a file, as a file."""

    def __init__(self, file: BinaryIO, start: int, size: int) -> None:
        super().__init__()
        self._file, self._start, self.size = file, start, size

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")[: max((self.size or 0) - self.place, 0)]
        self._file.seek(self._start + self.place)
        content = self._file.read(len(view))
        view[: len(content)] = content
        self.place += len(content)
        return len(content)

    def close(self) -> None:
        self._file.close()
        super().close()
