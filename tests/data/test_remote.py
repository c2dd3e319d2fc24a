"""Bytes behind HTTP: any part, as of a file on disk, from servers that fail."""

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sat.data import remote
from sat.data.remote import ChangedError, Window, open_at, read_part
from sat.errors import DownloadError
from tests.data.packed import ShardServer, shard_server

DATA = bytes(range(251)) * 1000


@pytest.fixture
def server(tmp_path, monkeypatch):
    monkeypatch.setattr(remote, "PAUSES", (0.0, 0.0))
    (tmp_path / "file").write_bytes(DATA)
    (tmp_path / "nothing").write_bytes(b"")
    with shard_server(tmp_path) as running:
        yield running


def url(server: ShardServer, name: str = "file") -> str:
    return server.address + name


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(reads=st.lists(st.tuples(st.integers(0, len(DATA)), st.integers(0, 3000)), min_size=1, max_size=4))
def test_any_part_is_that_of_the_file(server: ShardServer, reads: list[tuple[int, int]]) -> None:
    with open_at(url(server)) as file:
        assert file.seek(0, 2) == len(DATA)
        for start, size in reads:
            file.seek(start)
            assert file.read(size) == DATA[start : start + size]
    start, size = reads[0]
    assert read_part(url(server), start, size) == DATA[start : start + size]


def test_a_part_is_asked_for_alone(server: ShardServer) -> None:
    assert read_part(url(server), 1000, 50, expected_size=len(DATA)) == DATA[1000:1050]
    assert server.ranges == ["bytes=1000-1049"]


def test_a_file_without_bytes(server: ShardServer) -> None:
    with open_at(url(server, "nothing")) as file:
        assert file.read() == b""


def test_what_fails_in_passing_is_tried_again(server: ShardServer) -> None:
    server.failures, server.cuts = [503, 429], 0
    assert read_part(url(server), 7, 40_000) == DATA[7:40_007]
    server.cuts = 2
    assert read_part(url(server), 7, 200_000, len(DATA)) == DATA[7:200_007]


def test_what_does_not_pass(server: ShardServer) -> None:
    server.failures = [500] * 9
    with pytest.raises(DownloadError, match=r"cannot be read: HTTP 500 .* \(the last of 3 tries\); check the address"):
        open_at(url(server))
    server.failures = []
    with pytest.raises(DownloadError, match=r"/other cannot be read: HTTP 404 Not Found; check the address$"):
        open_at(url(server, "other"))
    with pytest.raises(ChangedError, match=r"/file has 251,000 bytes, and had 7 before"):
        read_part(url(server), 0, 5, expected_size=7)
    server.knows_ranges = False
    with pytest.raises(DownloadError, match=r"the server does not send parts of a file .HTTP range requests"):
        open_at(url(server))
    with pytest.raises(DownloadError, match=r"s3://bucket/file is not a web address; give http:// or https://"):
        open_at("s3://bucket/file")


def test_a_server_that_is_not_there(server: ShardServer) -> None:
    with pytest.raises(DownloadError, match=r"cannot be read: .*refused.* \(the last of 3 tries\)"):
        open_at("http://127.0.0.1:9/file")


def test_a_window_ends_where_its_part_does(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(DATA)
    with Window(path.open("rb"), 100, 10) as window:
        assert window.read() == DATA[100:110] and window.read() == b""
        assert window.seek(-3, 2) == 7 and window.read(9) == DATA[107:110]
        assert window.seek(50) == 50 and window.read(1) == b""
