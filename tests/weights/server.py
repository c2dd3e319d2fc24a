"""A local HTTP server that is as unreliable as a test asks for."""

import hashlib
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Answer = Callable[["Request"], None]
PAGE = b"<!DOCTYPE html><html><head><title>Link expired</title></head></html>"


class HostileServer:
    """Serves `files` (path -> bytes), except where `answers` (path -> functions used up one a request) says else."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.answers: dict[str, list[Answer]] = {}
        self.requests: list[tuple[str, str | None]] = []
        """(path, Range header) of all requests."""
        self.sent = 0
        """Bytes of all bodies."""
        self.knows_ranges = True
        self.address = ""

    def url(self, path: str) -> str:
        """The address of a file."""
        return f"{self.address}{path}"

    def always(self, path: str, answer: Answer) -> None:
        """Answer every request for a path in one way."""
        self.answers[path] = [answer] * 1000


class Request:
    """One request, with what an answer needs."""

    def __init__(self, handler: Any, server: HostileServer) -> None:
        self.handler, self.server = handler, server
        self.path: str = handler.path.removeprefix("/")
        self.data = server.files.get(self.path, b"")
        self.tag = tag_of(self.data)

    def start(self) -> int:
        """Where the client wants to go on, if the server goes along."""
        wanted, condition = self.handler.headers.get("Range"), self.handler.headers.get("If-Range", self.tag)
        if wanted is None or not self.server.knows_ranges or condition != self.tag:
            return 0
        return int(wanted.removeprefix("bytes=").rstrip("-"))

    def send(self, status: int, body: bytes, **headers: str | int) -> None:
        """An answer with exactly this body, whatever its headers promise."""
        self.handler.send_response(status)
        for name, value in {"Content_Length": len(body), **headers}.items():
            self.handler.send_header(name.replace("_", "-"), str(value))
        self.handler.end_headers()
        self.server.sent += len(body)
        self.handler.wfile.write(body)


def tag_of(data: bytes) -> str:
    """The ETag of a file."""
    return f'"{hashlib.md5(data).hexdigest()}"'


def honest(request: Request, stop: int | None = None, promise: int | None = None) -> None:
    """The file from where the client asks; only its bytes up to `stop`, and `promise` bytes by the header."""
    if request.path not in request.server.files:
        return request.send(404, b"no such file")
    start, size = request.start(), len(request.data)
    if start >= size > 0:
        return request.send(416, b"", Content_Range=f"bytes */{size}")
    headers: dict[str, str | int] = {"ETag": request.tag, "Content_Length": (promise or size) - start}
    if start:
        headers["Content_Range"] = f"bytes {start}-{size - 1}/{size}"
    return request.send(206 if start else 200, request.data[start:stop], **headers)


def careless(request: Request) -> None:
    """The file from where the client asks, whatever version of it the client has begun with."""
    del request.handler.headers["If-Range"]
    honest(request)


def drops(after: int) -> Answer:
    """The connection ends `after` bytes into the file."""
    return lambda request: honest(request, stop=after)


def promises(size: int) -> Answer:
    """The header gives another size than the file has; what exceeds it is not sent."""
    return lambda request: honest(request, stop=min(size, len(request.data)), promise=size)


def web_page(request: Request) -> None:
    """A page that says that the link has expired, with status 200."""
    request.send(200, PAGE, Content_Type="text/html")


def fails(status: int, **headers: str) -> Answer:
    """An error status."""
    return lambda request: request.send(status, b"sorry", **headers)


@contextmanager
def listening(handler: type[BaseHTTPRequestHandler]) -> Iterator[str]:
    """A running server of this machine that answers so, by its address."""
    httpd = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{httpd.server_port}/"
    finally:
        httpd.shutdown()
        thread.join()
        httpd.server_close()


@contextmanager
def hostile_server() -> Iterator[HostileServer]:
    """A running server."""
    server = HostileServer()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self.close_connection = True
            request = Request(self, server)
            server.requests.append((request.path, self.headers.get("Range")))
            queue = server.answers.get(request.path, [])
            (queue.pop(0) if queue else honest)(request)

        def log_message(self, *_: Any) -> None:
            pass

    with listening(Handler) as server.address:
        yield server
