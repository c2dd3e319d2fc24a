"""One job to a run directory."""

import json
import os
import socket
import time
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest

from sat.errors import ConfigError
from sat.training import lock as module
from sat.training.lock import LOCK, LockLost, RunLock


def hold(folder: Path, ready: Any, done: Any) -> None:
    lock = RunLock(folder, beat_seconds=0.02)
    ready.put(os.getpid())
    done.wait(30)
    lock.release()


class Holder:
    """Another process that holds a run."""

    def __init__(self, folder: Path) -> None:
        context = get_context("fork")
        ready, self.done = context.Queue(), context.Event()
        self.process = context.Process(target=hold, args=(folder, ready, self.done))
        self.process.start()
        assert ready.get(timeout=30) == self.process.pid

    def end(self) -> None:
        self.done.set()
        self.process.join()

    def kill(self) -> None:
        self.process.kill()
        self.process.join()


def refusal(pid: Any, host: str = socket.gethostname()) -> str:
    return rf"is in use by process {pid} on {host}; end that job first, or start a new run with args.resume=never"


def test_a_second_job_is_refused_by_name_until_the_first_ends(tmp_path: Path) -> None:
    holder = Holder(tmp_path)
    try:
        for _ in range(2):
            with pytest.raises(ConfigError, match=refusal(holder.process.pid)):
                RunLock(tmp_path)
    finally:
        holder.end()
    assert (tmp_path / LOCK).read_text() == ""  # it went in good order
    lock = RunLock(tmp_path)
    lock.check()
    lock.release()


def test_a_killed_holder_is_known_for_dead_at_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    holder = Holder(tmp_path)
    holder.kill()
    started = time.monotonic()
    lock = RunLock(tmp_path)
    assert time.monotonic() - started < 1.0
    assert f"process {holder.process.pid} on {socket.gethostname()}, which held it, is dead; taking over" in caplog.text
    lock.release()


def no_record_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    def lockf(*_: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(module.fcntl, "lockf", lockf)


def test_without_record_locks_the_process_itself_is_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    no_record_locks(monkeypatch)
    holder = Holder(tmp_path)
    with pytest.raises(ConfigError, match=refusal(holder.process.pid)):
        RunLock(tmp_path)
    holder.kill()
    RunLock(tmp_path).release()


@pytest.mark.parametrize("change", [{"started": "1"}, {"boot": "of before"}])
def test_a_number_that_another_process_has_now_is_not_the_holder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, str]
) -> None:
    """After a restart of the machine, or when process numbers come round."""
    no_record_locks(monkeypatch)
    lock = RunLock(tmp_path)
    mine = json.loads((tmp_path / LOCK).read_text())
    lock.release()
    (tmp_path / LOCK).write_text(json.dumps({**mine, **change}))
    RunLock(tmp_path).release()
    (tmp_path / LOCK).write_text(json.dumps(mine))
    with pytest.raises(ConfigError, match=refusal(os.getpid())):
        RunLock(tmp_path)


def other_host(folder: Path, beats: int) -> None:
    content = {"host": "elsewhere", "boot": "x", "pid": 7, "started": "1", "beats": beats}
    (folder / LOCK).write_text(json.dumps(content).ljust(512))


def beat_elsewhere(folder: Path) -> None:
    for beats in range(200):
        other_host(folder, beats)
        time.sleep(0.02)


def test_a_holder_elsewhere_is_known_by_its_signs_of_life(tmp_path: Path) -> None:
    """As where a file system keeps record locks to one host."""
    other_host(tmp_path, 0)
    RunLock(tmp_path, silence_seconds=0.3).release()  # silent: dead
    process = get_context("fork").Process(target=beat_elsewhere, args=(tmp_path,))
    process.start()
    try:
        time.sleep(0.1)
        with pytest.raises(ConfigError, match=refusal(7, "elsewhere")):
            RunLock(tmp_path, silence_seconds=3.0)
    finally:
        process.kill()
        process.join()


def test_a_holder_that_was_taken_for_dead_writes_nothing_more(tmp_path: Path) -> None:
    lock = RunLock(tmp_path, beat_seconds=0.01)
    other_host(tmp_path, 3)
    time.sleep(0.1)  # its own beats do not take the lock back
    with pytest.raises(LockLost, match=r"was taken over by process 7 on elsewhere, to which this job seemed dead"):
        lock.check()
    lock.release()
    assert json.loads((tmp_path / LOCK).read_text())["host"] == "elsewhere"


@pytest.mark.parametrize("content", ["", "{", "[1]", "\0" * 512])
def test_a_lock_that_says_nothing_is_free(tmp_path: Path, content: str) -> None:
    (tmp_path / LOCK).write_text(content)
    RunLock(tmp_path).release()


def test_data_workers_do_not_keep_a_dead_jobs_lock(tmp_path: Path) -> None:
    """A forked child that outlives its parent holds nothing."""
    context = get_context("fork")
    ready = context.Queue()
    job = context.Process(target=hold_with_child, args=(tmp_path, ready))
    job.start()
    child = ready.get(timeout=30)
    job.kill()
    job.join()
    try:
        RunLock(tmp_path).release()
    finally:
        os.kill(child, 9)


def hold_with_child(folder: Path, ready: Any) -> None:
    lock = RunLock(folder)
    child = os.fork()
    if child == 0:
        time.sleep(30)
        os._exit(0)
    ready.put(child)
    time.sleep(30)
    lock.release()
