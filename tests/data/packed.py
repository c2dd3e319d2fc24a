"""Tar shards, and a server that sends parts of them."""

import io
import re
import tarfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from urllib.parse import urlsplit

from sat.data.video import write_mp4
from tests.data.numbered import numbered_frames
from tests.weights.server import listening


def write_shard(path: Path, members: Mapping[str, bytes | str]) -> Path:
    """A tar file of these members, in this order."""
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            content = content.encode() if isinstance(content, str) else content
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def mp4(folder: Path, num_frames: int = 20, fps: float = 8) -> bytes:
    """The bytes of a numbered clip."""
    path = folder / f"{num_frames}-{fps:g}.mp4"
    if not path.is_file():
        write_mp4(path, numbered_frames(num_frames), fps)
    return path.read_bytes()


class ShardServer:
    """Serves a folder, parts of its files where it is told so."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.address = ""
        self.ranges: list[str] = []
        """Range headers of all requests."""
        self.failures: list[int] = []
        """Statuses that the next requests get."""
        self.cuts = 0
        """So many of the next answers break off in the middle."""
        self.knows_ranges = True


@contextmanager
def shard_server(folder: Path) -> Iterator[ShardServer]:
    """A running server."""
    server = ShardServer(folder)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self.close_connection = True
            wanted = self.headers.get("Range", "")
            server.ranges.append(wanted)
            path = folder / urlsplit(self.path).path.removeprefix("/")
            if server.failures:
                self.send_error(server.failures.pop(0))
            elif not path.is_file():
                self.send_error(404)
            else:
                self.answer(path.read_bytes(), re.match(r"bytes=(\d+)-(\d*)$", wanted))

        def answer(self, data: bytes, place: re.Match[str] | None) -> None:
            is_part = place is not None and server.knows_ranges
            start = int(place[1]) if place and is_part else 0
            if is_part and start >= len(data):
                self.send_error(416)
                return
            body = data[start : int(place[2]) + 1 if place and is_part and place[2] else None]
            self.send_response(206 if is_part else 200)
            self.send_header("Content-Length", str(len(body)))
            if is_part:
                self.send_header("Content-Range", f"bytes {start}-{start + len(body) - 1}/{len(data)}")
            self.end_headers()
            if server.cuts:
                server.cuts, body = server.cuts - 1, body[: len(body) // 2]
            with suppress(OSError):  # the client may have had enough
                self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    with listening(Handler) as server.address:
        yield server
