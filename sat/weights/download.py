"""One file over HTTP: continued where it broke off, checked, and there whole or not at all.

FILE.part       what has arrived so far; the next call goes on from there
FILE.part.json  from where it came and which version of the file it is
"""

import hashlib
import http.client
import json
import logging
import re
import shutil
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from email.message import Message
from pathlib import Path
from typing import IO, Any
from urllib.parse import urlsplit

from tqdm import tqdm

from sat.compat.file_types import FOREIGN_STARTS
from sat.errors import DownloadError, SatError

log = logging.getLogger(__name__)

BLOCK = 1 << 20
START = 64
AGENT = "sat-video"
GONE = (401, 403, 404, 410)
"""HTTP statuses that say: not here, or not for you. Hubs answer 401 for a repository that does not exist."""
PASSING = (408, 425, 429, 500, 502, 503, 504)
"""HTTP statuses that may be gone at the next try."""


class AbsentError(DownloadError):
    """There is no such file in this place; another may have it."""


@dataclass(frozen=True)
class Expected:
    """What is known of a file before it arrives."""

    size: int | None = None
    sha256: str | None = None


@dataclass(frozen=True)
class Patience:
    """How long a server is put up with."""

    attempts: int = 6
    """Tries in a row that bring no new byte."""
    pause: float = 1.0
    """Seconds before the second try; twice as long before each further one, 30 at most."""
    timeout: float = 30.0
    """Seconds without a byte that end a try."""


PATIENT = Patience()
UNKNOWN = Expected()
PROBE_ATTEMPTS = 2


class _BrokenError(Exception):
    """A try ended early; the next one may go on."""

    def __init__(self, reason: str, wait: float = 0.0) -> None:
        super().__init__(reason)
        self.wait = wait


def download(
    url: str,
    file: Path,
    expected: Expected = UNKNOWN,
    check: Callable[[Path], None] = lambda part: None,
    patience: Patience = PATIENT,
    is_probe: bool = False,
) -> None:
    """Fetch a URL into `file`. What has arrived of it before is kept, what does not stand the checks is thrown away.

    check(part) raises a SatError if the content is wrong. Raises AbsentError where the server says that it has no
    such file, DownloadError for all else. is_probe: the file may well not be there, so a server that does not answer
    and a web page in the place of the file are AbsentErrors too. A file that is there already is taken as it is.
    """
    if file.exists():
        return
    if urlsplit(url).scheme not in ("http", "https"):
        raise DownloadError(f"{url} is not a web address; give http:// or https://")
    file.parent.mkdir(parents=True, exist_ok=True)
    transfer = _Transfer(url, file, expected, patience, is_probe)
    transfer.run()
    try:
        transfer.verify()
        check(transfer.part)
    except SatError as error:
        transfer.forget()
        raise DownloadError(f"{url} did not give what it should: {error}") from error
    transfer.part.replace(file)
    transfer.notes.unlink(missing_ok=True)


class _Transfer:
    """The way of one file from its server to FILE.part."""

    def __init__(self, url: str, file: Path, expected: Expected, patience: Patience, is_probe: bool) -> None:
        self.url, self.name, self.patience = url, file.name, patience
        self.is_probe, self.has_answered = is_probe, False
        self.size, self.sha256 = expected.size, expected.sha256
        self.part = file.with_name(f"{file.name}.part")
        self.notes = file.with_name(f"{file.name}.part.json")
        self.version: str | None = None
        self.is_cut = False
        self._recall()

    @property
    def arrived(self) -> int:
        """Bytes in the part."""
        return self.part.stat().st_size if self.part.exists() else 0

    def _recall(self) -> None:
        """Take up what an earlier call left, if it came from the same address and its version is known."""
        try:
            notes = json.loads(self.notes.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            notes = {}
        if notes.get("url") == self.url and notes.get("version"):
            self.version = notes["version"]
        else:
            self.forget()

    def forget(self) -> None:
        """Throw away what has arrived."""
        self.part.unlink(missing_ok=True)
        self.notes.unlink(missing_ok=True)
        self.version = None

    def run(self) -> None:
        """Try until the file is whole, or until nothing new has come for `patience.attempts` tries."""
        idle, most = 0, self.arrived
        shows_bar = sys.stderr.isatty()
        with tqdm(unit="B", unit_scale=True, desc=self.name, disable=not shows_bar, leave=False) as bar:
            while True:
                try:
                    return self._attempt(bar)
                except _BrokenError as error:
                    idle = 0 if self.arrived > most else idle + 1
                    most = max(most, self.arrived)
                    if self.is_probe and not self.has_answered and idle >= PROBE_ATTEMPTS:
                        raise AbsentError(f"{self.url} does not answer: {error}") from error
                    if idle >= self.patience.attempts:
                        kept = f"the {self.arrived:,} bytes that have arrived are kept, " if self.version else ""
                        raise DownloadError(
                            f"{self.url} could not be fetched: {error} (the last of {idle} tries without a new byte); "
                            f"{kept}run the same command again to go on"
                        ) from error
                    log.info("%s: %s; trying again at byte %s", self.name, error, f"{self.arrived:,}")
                    time.sleep(max(error.wait, min(self.patience.pause * 2 ** max(idle - 1, 0), 30.0)))

    def _attempt(self, bar: Any) -> None:
        """One connection. Returns when the file is whole, raises _BrokenError when the connection ends before."""
        try:
            response = self._open()
            if response is None:
                return
            with response:
                self._receive(response, bar)
        except urllib.error.HTTPError as error:
            with error:
                self._judge(error)
        except (OSError, http.client.HTTPException) as error:  # URLError is an OSError
            raise _BrokenError(f"the connection failed ({_reason(error)})") from error

    def _open(self) -> Any:
        """The response that goes on where the part ends, or None if there is nothing left to fetch."""
        headers = {"User-Agent": AGENT, "Accept-Encoding": "identity"}
        start = self.arrived
        if start:
            headers["Range"] = f"bytes={start}-"
            if self.version is not None:
                headers["If-Range"] = self.version
        redirects = _Redirects()
        opener = urllib.request.build_opener(redirects)
        try:
            response = opener.open(urllib.request.Request(self.url, headers=headers), timeout=self.patience.timeout)
        except urllib.error.HTTPError as error:
            if error.code != 416 or not start:
                raise
            total = re.fullmatch(r"bytes \*/(\d+)", error.headers.get("Content-Range", ""))
            error.close()
            if total and int(total[1]) == start:
                return None
            self.forget()
            raise _BrokenError("the server's file is shorter than what has arrived, so it starts anew") from error
        self.sha256 = self.sha256 or redirects.sha256
        return response

    def _judge(self, error: urllib.error.HTTPError) -> None:
        if error.code in GONE:
            raise AbsentError(f"{self.url} is not there (HTTP {error.code} {error.reason})")
        if error.code in PASSING:
            wait = error.headers.get("Retry-After", "")
            raise _BrokenError(f"HTTP {error.code} {error.reason}", min(float(wait), 60.0) if wait.isdigit() else 0.0)
        raise DownloadError(f"{self.url} could not be fetched: HTTP {error.code} {error.reason}")

    def _receive(self, response: Any, bar: Any) -> None:
        start, total = self._place(response)
        if self.size is not None and total is not None and total != self.size:
            raise DownloadError(f"{self.url} has {total:,} bytes and should have {self.size:,}; it is another file")
        _check_space(self.part, total, start)
        bar.total, bar.n = total or self.size, start
        self.is_cut = False
        block = self._read_start(response) if not start else self._read(response)
        self.has_answered = True
        if not start:
            self._check_start(block)
            self.version = _version(response.headers)
            self.notes.write_text(json.dumps({"url": self.url, "version": self.version}), encoding="utf-8")
        with self.part.open("ab" if start else "wb") as stream:
            while block:
                _append(stream, block)
                bar.update(len(block))
                block = self._read(response)
        if self.is_cut or (total is not None and self.arrived != total):
            whole = "" if total is None else f" of {total:,}"
            raise _BrokenError(f"it ended after {self.arrived:,}{whole} bytes")

    def _place(self, response: Any) -> tuple[int, int | None]:
        """Where a response's first byte belongs, and the size of the whole file if the server tells."""
        if response.status != 206:
            length = response.headers.get("Content-Length", "")
            return 0, int(length) if length.isdigit() else None
        match = re.match(r"bytes (\d+)-\d+/(\d+|\*)", response.headers.get("Content-Range", ""))
        if match is None or int(match[1]) != self.arrived:
            self.forget()
            raise _BrokenError("the server sent another part than was asked for, so it starts anew")
        return self.arrived, int(match[2]) if match[2].isdigit() else None

    def _read_start(self, response: Any) -> bytes:
        """Enough bytes to tell what the file is."""
        start = block = self._read(response)
        while block and len(start) < START:
            block = self._read(response)
            start += block
        return start

    def _read(self, response: Any) -> bytes:
        """What has come by now, so that none of it is lost when the connection ends."""
        try:
            return response.read1(BLOCK)
        except http.client.IncompleteRead as error:
            self.is_cut = True
            return error.partial

    def _check_start(self, block: bytes) -> None:
        for sign, description in FOREIGN_STARTS.items():
            if block[:512].lstrip(b"\xef\xbb\xbf \t\r\n").startswith(sign):
                title = re.search(rb"<title[^>]*>\s*(.*?)\s*</title>", block, re.IGNORECASE | re.DOTALL)
                named = f" ('{title[1].decode(errors='replace')[:80]}')" if title else ""
                kind = AbsentError if self.is_probe else DownloadError
                raise kind(f"{self.url} gives {description.split(';')[0]}{named}, not {self.name}")

    def verify(self) -> None:
        """Size and checksum, where they are known."""
        if not self.arrived:
            raise DownloadError("the file is empty")
        if self.size is not None and self.arrived != self.size:
            raise DownloadError(f"it has {self.arrived:,} bytes instead of {self.size:,}; it is another file")
        if self.sha256 is not None:
            found = sha256_of(self.part)
            if found != self.sha256.lower():
                raise DownloadError(
                    f"the file has the sha256 {found} instead of {self.sha256}; it was damaged on the way, or changed "
                    "on the server"
                )


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects, but never from https to http, and notes the checksum that a hub gives with one."""

    sha256: str | None = None

    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: Any, newurl: str
    ) -> urllib.request.Request | None:
        """The request to go on with."""
        if req.type == "https" and urlsplit(newurl).scheme != "https":
            raise DownloadError(f"{req.full_url} leads to {newurl}, which is not encrypted; give that address yourself")
        # Hugging Face: for a large file the tag of the linked file is its sha256.
        tag = (headers.get("X-Linked-Etag") or "").strip('"').lower()
        if re.fullmatch(r"[0-9a-f]{64}", tag):
            self.sha256 = tag
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def sha256_of(file: Path) -> str:
    """SHA-256 of a file's content."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _version(headers: Message) -> str | None:
    """What tells one version of a file from another: a strong tag, else the date of its last change."""
    tag = headers.get("ETag")
    return tag if tag and not tag.startswith("W/") else headers.get("Last-Modified")


def _append(stream: IO[bytes], block: bytes) -> None:
    """Write to our own disk, whose errors are no reason to ask the server again."""
    try:
        stream.write(block)
        stream.flush()
    except OSError as error:
        raise DownloadError(f"cannot write {stream.name}: {error.strerror}") from error


def _check_space(part: Path, total: int | None, start: int) -> None:
    free = shutil.disk_usage(part.parent).free
    if total is not None and total - start > free:
        raise DownloadError(f"{part.parent} has {free:,} bytes free, {part.stem} needs {total - start:,} more")


def _reason(error: Exception) -> str:
    cause = getattr(error, "reason", error)
    return str(cause) or type(cause).__name__
