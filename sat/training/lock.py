"""One job to a run directory.

The lock is a file that names its holder, and a record lock on it, which the kernel drops when the process dies. Where a
file system keeps record locks to one host, or has none, the holder's heartbeat in the file tells whether it lives.
"""

import fcntl
import json
import logging
import os
import socket
import time
from pathlib import Path
from threading import Event, Thread
from typing import Any

from sat.errors import CheckpointError, ConfigError

log = logging.getLogger(__name__)

LOCK = ".lock"
BEAT_SECONDS = 5.0
"""How often a holder says that it is alive."""
SILENCE_SECONDS = 30.0
"""A holder on another host that says nothing for so long is dead."""


class LockLost(CheckpointError):
    """Another job has taken the run directory."""


def _boot() -> str:
    """What changes when the machine starts anew."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def _started(pid: int) -> str | None:
    """When a process of this machine started, in ticks since boot; None where there is no such process."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
        return stat.rpartition(")")[2].split()[19]  # the name in brackets may hold anything
    except FileNotFoundError:
        return None if Path("/proc").is_dir() else _started_without_proc(pid)
    except (OSError, IndexError):
        return ""


def _started_without_proc(pid: int) -> str | None:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        pass
    return ""


class RunLock:
    """Holds a run directory for this process, from construction to `release`.

    Raises ConfigError, naming host and process, where another living job holds it.
    """

    def __init__(self, run_dir: Path, beat_seconds: float = BEAT_SECONDS, silence_seconds: float = SILENCE_SECONDS):
        self.path = run_dir / LOCK
        self._me = {
            "host": socket.gethostname(),
            "boot": _boot(),
            "pid": os.getpid(),
            "started": _started(os.getpid()),
        }
        self._file = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            self._take(silence_seconds)
        except BaseException:
            os.close(self._file)
            raise
        self._beats = 0
        self._write()
        self._done = Event()
        self._thread = Thread(target=self._beat, args=(beat_seconds,), daemon=True)
        self._thread.start()

    def _take(self, silence_seconds: float) -> None:
        kernel_says_free = True
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):  # POSIX allows both for a lock that is held
            raise self._refusal(self._read()) from None
        except OSError as error:
            kernel_says_free = False
            log.debug("%s: no record locks (%s)", self.path, error)
        holder = self._read()
        if holder is None:
            return
        if self._is_alive(holder, kernel_says_free, silence_seconds):
            raise self._refusal(holder)
        log.warning(
            "%s: process %s on %s, which held it, is dead; taking over",
            self.path.parent,
            holder.get("pid"),
            holder.get("host"),
        )

    def _is_alive(self, holder: dict[str, Any], kernel_says_free: bool, silence_seconds: float) -> bool:
        if holder.get("boot") == self._me["boot"] and holder.get("host") == self._me["host"]:
            return not kernel_says_free and _started(int(holder.get("pid", 0))) == holder.get("started")
        if holder.get("host") == self._me["host"]:
            return False  # the machine has started anew since
        log.info("%s is held by a process on %s: waiting for a sign of life", self.path.parent, holder.get("host"))
        deadline = time.monotonic() + silence_seconds
        while time.monotonic() < deadline:
            time.sleep(min(0.5, silence_seconds / 10))
            if (now := self._read()) != holder:
                return now is not None
        return False

    def _refusal(self, holder: dict[str, Any] | None) -> ConfigError:
        who = f"process {holder.get('pid')} on {holder.get('host')}" if holder else "another process"
        return ConfigError(
            f"{self.path.parent} is in use by {who}; end that job first, or start a new run with args.resume=never"
        )

    def _read(self) -> dict[str, Any] | None:
        try:
            content = json.loads(os.pread(self._file, 4096, 0) or b"null")
        except ValueError:  # half written when its holder died
            return None
        return content if isinstance(content, dict) else None

    def _write(self) -> None:
        text = json.dumps({**self._me, "beats": self._beats}).encode()
        os.pwrite(self._file, text.ljust(512), 0)

    def _beat(self, seconds: float) -> None:
        while not self._done.wait(seconds):
            self._beats += 1
            try:
                if self._is_mine():
                    self._write()
            except OSError as error:  # a full disk must not end the run; silence may
                log.debug("%s: %s", self.path, error)

    def _is_mine(self) -> bool:
        holder = self._read() or self._me
        return all(holder.get(key) == value for key, value in self._me.items())

    def check(self) -> None:
        """Raise LockLost where another job has taken the run, believing this one dead."""
        if not self._is_mine():
            holder = self._read() or {}
            raise LockLost(
                f"{self.path.parent} was taken over by process {holder.get('pid')} on {holder.get('host')}, to which "
                "this job seemed dead; it writes nothing more there"
            )

    def release(self) -> None:
        """Give the run directory back."""
        self._done.set()
        self._thread.join()
        if self._is_mine():
            os.ftruncate(self._file, 0)
        os.close(self._file)
