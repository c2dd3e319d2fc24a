"""Downloads from a server that does all that servers do wrong."""

import hashlib
import json
import os
import shutil
import urllib.request
from pathlib import Path
from types import SimpleNamespace

import pytest

from sat.errors import CheckpointError, DownloadError
from sat.weights import download as module
from sat.weights.download import AbsentError, Expected, Patience, _Redirects, download
from tests.weights.server import HostileServer, Request, careless, drops, fails, promises, tag_of, web_page

DATA = os.urandom(300_000)
HASTY = Patience(attempts=3, pause=0.001, timeout=5.0)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "weights.bin"


@pytest.fixture
def url(server: HostileServer) -> str:
    server.files["weights.bin"] = DATA
    return server.url("weights.bin")


def nothing_is_left(file: Path) -> bool:
    return list(file.parent.iterdir()) == []


def test_a_file_arrives_and_a_second_call_asks_for_nothing(server, url, file):
    download(url, file, patience=HASTY)
    assert file.read_bytes() == DATA
    assert [path.name for path in file.parent.iterdir()] == ["weights.bin"]
    download(url, file, patience=HASTY)
    assert len(server.requests) == 1


def test_a_dropped_connection_goes_on_where_it_stopped(server, url, file):
    server.answers["weights.bin"] = [drops(1000), drops(1001), drops(200_000), drops(200_000)]
    download(url, file, Expected(len(DATA), hashlib.sha256(DATA).hexdigest()), patience=HASTY)
    assert file.read_bytes() == DATA
    assert [wanted for _, wanted in server.requests] == [
        None,
        "bytes=1000-",
        "bytes=1001-",
        "bytes=200000-",
        "bytes=200000-",
    ]
    assert server.sent == len(DATA)  # no byte came twice


def test_more_drops_than_attempts_do_no_harm_while_bytes_arrive(server, url, file):
    server.answers["weights.bin"] = [drops(stop) for stop in range(1000, 11_000, 1000)]
    download(url, file, patience=HASTY)
    assert file.read_bytes() == DATA and len(server.requests) == 11 > HASTY.attempts


def test_a_server_without_ranges_starts_anew(server, url, file):
    server.knows_ranges = False
    server.answers["weights.bin"] = [drops(1000), drops(2000)]
    download(url, file, patience=HASTY)
    assert file.read_bytes() == DATA


def test_giving_up_keeps_what_has_arrived_and_a_second_call_goes_on(server, url, file):
    server.always("weights.bin", drops(1000))
    with pytest.raises(DownloadError, match=r"ended after 1,000 of 300,000 bytes \(the last of 3 tries.*kept, run the"):
        download(url, file, patience=HASTY)
    assert not file.exists()
    server.answers.clear()
    server.requests.clear()
    download(url, file, patience=HASTY)
    assert file.read_bytes() == DATA and server.requests == [("weights.bin", "bytes=1000-")]


def test_a_file_that_has_changed_meanwhile_is_fetched_whole(server, url, file):
    server.always("weights.bin", drops(1000))
    with pytest.raises(DownloadError):
        download(url, file, patience=HASTY)
    server.answers.clear()
    server.files["weights.bin"] = DATA[::-1]
    download(url, file, patience=HASTY)
    assert file.read_bytes() == DATA[::-1]


def test_what_came_from_another_address_is_not_gone_on_with(server, url, file):
    server.always("weights.bin", drops(1000))
    with pytest.raises(DownloadError):
        download(url, file, patience=HASTY)
    server.files["mirror.bin"] = DATA[::-1]
    server.always("mirror.bin", careless)
    download(server.url("mirror.bin"), file, patience=HASTY)
    assert file.read_bytes() == DATA[::-1]


def test_a_web_page_is_told_by_its_first_bytes(server, url, file):
    server.answers["weights.bin"] = [web_page]
    with pytest.raises(DownloadError, match=r"gives a web page, .* \('Link expired'\), not weights\.bin"):
        download(url, file, patience=HASTY)
    assert nothing_is_left(file)
    download(url, file, patience=HASTY)
    assert file.read_bytes() == DATA


def test_a_git_lfs_pointer_is_told_by_its_first_bytes(server, url, file):
    server.files["weights.bin"] = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"
    with pytest.raises(DownloadError, match="Git LFS pointer"):
        download(url, file, patience=HASTY)
    assert nothing_is_left(file)


def whole(part: Path) -> None:
    if part.stat().st_size != len(DATA):
        raise CheckpointError(f"{part.name} is half a file")


def test_a_server_that_promises_too_little_is_found_out_by_the_check(server, url, file):
    server.answers["weights.bin"] = [promises(1000)]
    with pytest.raises(DownloadError, match=r"weights\.bin did not give what it should: .* half a file"):
        download(url, file, check=whole, patience=HASTY)
    assert nothing_is_left(file)
    download(url, file, check=whole, patience=HASTY)
    assert file.read_bytes() == DATA


def test_a_server_that_promises_too_much_is_asked_again(server, url, file):
    server.answers["weights.bin"] = [promises(400_000)]
    download(url, file, check=whole, patience=HASTY)  # the second answer, 416, tells the true size
    assert file.read_bytes() == DATA
    file.unlink()
    server.knows_ranges = False
    server.always("weights.bin", promises(400_000))
    with pytest.raises(DownloadError, match="ended after 300,000 of 400,000 bytes"):
        download(url, file, check=whole, patience=HASTY)
    assert not file.exists()


def test_a_part_longer_than_the_file_is_thrown_away(server, url, file):
    server.always("weights.bin", drops(200_000))
    with pytest.raises(DownloadError):
        download(url, file, patience=HASTY)
    server.answers.clear()
    server.files["weights.bin"] = DATA[:1000]
    file.with_name("weights.bin.part.json").write_text(json.dumps({"url": url, "version": tag_of(DATA[:1000])}))
    download(url, file, patience=HASTY)
    assert file.read_bytes() == DATA[:1000] and server.requests[-2:] == [
        ("weights.bin", "bytes=200000-"),
        ("weights.bin", None),
    ]


def test_another_part_than_was_asked_for_is_not_taken(server, url, file):
    def shifted(request: Request) -> None:
        request.send(206, request.data[5000:], Content_Range=f"bytes 5000-{len(DATA) - 1}/{len(DATA)}")

    server.answers["weights.bin"] = [drops(1000), shifted]
    download(url, file, patience=HASTY)
    assert file.read_bytes() == DATA


def test_a_body_without_a_size_that_breaks_off_is_not_taken_for_whole(server, url, file):
    def chunked(request: Request) -> None:
        request.handler.send_response(200)
        request.handler.send_header("Transfer-Encoding", "chunked")
        request.handler.end_headers()
        request.handler.wfile.write(b"3e8\r\n" + request.data[:500])

    server.answers["weights.bin"] = [chunked]
    download(url, file, patience=HASTY)
    assert file.read_bytes() == DATA


@pytest.mark.parametrize("status", [429, 500, 503])
def test_errors_that_pass_are_waited_for(server, url, file, status):
    server.answers["weights.bin"] = [fails(status, Retry_After="0")] * 2
    download(url, file, patience=HASTY)
    assert file.read_bytes() == DATA


def test_errors_that_stay_are_told(server, url, file):
    server.always("weights.bin", fails(503))
    with pytest.raises(DownloadError, match=r"HTTP 503 Service Unavailable \(the last of 3 tries"):
        download(url, file, patience=HASTY)
    server.always("weights.bin", fails(400))
    with pytest.raises(DownloadError, match="HTTP 400"):
        download(url, file, patience=HASTY)
    for status in (401, 403, 404, 410):
        server.always("weights.bin", fails(status))
        with pytest.raises(AbsentError, match=f"is not there .HTTP {status}"):
            download(url, file, patience=HASTY)
    assert nothing_is_left(file)


def test_a_probe_passes_a_dead_server_and_a_web_page_over(server, url, file):
    with pytest.raises(AbsentError, match=r"does not answer: the connection failed \(.*refused"):
        download("http://127.0.0.1:9/weights.bin", file, patience=HASTY, is_probe=True)
    server.answers["weights.bin"] = [web_page]
    with pytest.raises(AbsentError, match="Link expired"):
        download(url, file, patience=HASTY, is_probe=True)
    server.always("weights.bin", drops(1000))
    with pytest.raises(DownloadError, match="the last of 3 tries") as error:
        download(url, file, patience=HASTY, is_probe=True)
    assert not isinstance(error.value, AbsentError)  # it has begun to send, so it has the file


def test_known_sizes_and_checksums_are_held(server, url, file):
    with pytest.raises(DownloadError, match=r"has 300,000 bytes and should have 7; it is another file"):
        download(url, file, Expected(size=7), patience=HASTY)
    with pytest.raises(DownloadError, match=r"the sha256 [0-9a-f]{64} instead of 00;"):
        download(url, file, Expected(sha256="00"), patience=HASTY)
    assert nothing_is_left(file)
    download(url, file, Expected(len(DATA), hashlib.sha256(DATA).hexdigest().upper()), patience=HASTY)
    assert file.read_bytes() == DATA


@pytest.mark.parametrize("is_true", [True, False])
def test_the_checksum_that_a_hub_sends_is_used(server, url, file, is_true):
    checksum = hashlib.sha256(DATA if is_true else b"").hexdigest()
    server.always("resolve/w", fails(302, Location=url, X_Linked_Etag=f'"{checksum}"'))
    if not is_true:
        with pytest.raises(DownloadError, match="damaged on the way, or changed on the server"):
            download(server.url("resolve/w"), file, patience=HASTY)
        assert nothing_is_left(file)
        return
    server.answers["weights.bin"] = [drops(1000)]
    download(server.url("resolve/w"), file, patience=HASTY)
    assert file.read_bytes() == DATA and ("weights.bin", "bytes=1000-") in server.requests


def test_a_redirect_must_not_lose_encryption():
    request = urllib.request.Request("https://hub.example/file")
    with pytest.raises(DownloadError, match=r"leads to http://cdn\.example/file, which is not encrypted"):
        _Redirects().redirect_request(request, None, 302, "Found", {}, "http://cdn.example/file")  # type: ignore[arg-type]


@pytest.mark.parametrize("address", ["file:///etc/passwd", "ftp://host/file", "weights.bin"])
def test_only_web_addresses_are_fetched(file, address):
    with pytest.raises(DownloadError, match="is not a web address"):
        download(address, file)


def test_an_empty_answer_is_an_error(server, url, file):
    server.files["weights.bin"] = b""
    with pytest.raises(DownloadError, match="the file is empty"):
        download(url, file, patience=HASTY)
    assert nothing_is_left(file)


def test_a_full_disk_is_told_before_the_download(server, url, file, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(DownloadError, match=r"has 1,000 bytes free, weights\.bin needs 300,000 more"):
        download(url, file, patience=HASTY)


def test_a_server_that_falls_silent_is_left(server, url, file):
    def silent(request: Request) -> None:
        request.send(200, request.data[:1000], Content_Length=len(DATA), ETag=request.tag)
        request.handler.wfile.flush()
        request.handler.connection.recv(1)  # until the client goes away

    server.answers["weights.bin"] = [silent]
    download(url, file, patience=Patience(attempts=2, pause=0.001, timeout=0.2))
    assert file.read_bytes() == DATA and server.requests[1] == ("weights.bin", "bytes=1000-")


def test_an_error_of_our_own_disk_is_not_the_servers(server, url, file, monkeypatch):
    def full(stream, block):
        raise module.DownloadError("cannot write weights.bin.part: No space left on device")

    monkeypatch.setattr(module, "_append", full)
    with pytest.raises(DownloadError, match="No space left"):
        download(url, file, patience=HASTY)
    assert len(server.requests) == 1
