"""The real commands, as a user types them."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

import psutil

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
STOPPING = "--signals_to_handle SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 --shutdown_timeout 600"
"""Of torchrun, as docs/multi_node.md gives it: pass SIGUSR1 on, too, and wait for a checkpoint."""
TORCHRUN = [str(BIN / "torchrun"), "--standalone", "--nproc_per_node", "2"]
LAUNCHERS = {
    "python": [sys.executable],
    "torchrun": TORCHRUN,
    "torchrun-stopping": [*TORCHRUN, *STOPPING.split()],
    "deepspeed": [str(BIN / "deepspeed"), "--num_gpus", "2"],
}
ENVIRONMENT = {
    **os.environ,
    "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
    "OMP_NUM_THREADS": "1",
    "TORCHDYNAMO_DISABLE": "1",  # DeepSpeed's import of an optimizer compiles otherwise: a second and more
    "HF_HUB_OFFLINE": "1",
}


class Launched:
    """A running command in a process group of its own; leaving the `with` block leaves no process behind."""

    def __init__(self, words: list[str], log: Path) -> None:
        self.log = log
        self.stream = log.open("w")
        self.process = subprocess.Popen(
            words, cwd=ROOT, env=ENVIRONMENT, stdout=self.stream, stderr=subprocess.STDOUT, start_new_session=True
        )

    def __enter__(self) -> "Launched":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for process in self.everyone():
            process.kill()
        self.process.wait()
        self.stream.close()

    @property
    def output(self) -> str:
        """What it has printed so far, to both streams."""
        return self.log.read_text()

    def everyone(self) -> list[psutil.Process]:
        """Its processes that still run, those included whose launcher is gone or that have a session of their own."""
        found = []
        for process in psutil.process_iter():
            try:
                if process.status() != psutil.STATUS_ZOMBIE and str(self.log.parent) in " ".join(process.cmdline()):
                    found.append(process)
            except psutil.NoSuchProcess:
                continue
        return found

    def wait_until(self, what: Callable[[], bool], timeout: float = 120.0) -> None:
        """Wait for something that it does; fails with its output where it does not."""
        end = time.monotonic() + timeout
        while not what():
            assert time.monotonic() < end, self.output
            time.sleep(0.05)

    def signal_group(self, number: signal.Signals) -> None:
        """What a terminal's Ctrl-C does: the whole foreground group gets it."""
        os.killpg(self.process.pid, number)

    def wait(self, timeout: float = 120.0) -> int:
        """Its exit code, once it and all that it started are gone."""
        self.wait_until(lambda: self.process.poll() is not None and not self.everyone(), timeout)
        return self.process.returncode


def start(launcher: str, script: str, folder: Path, *words: str) -> Launched:
    """`torchrun ... train_video.py WORDS`; `folder` must be named among the words, its processes are known by it."""
    assert any(str(folder) in word for word in words)
    return Launched([*LAUNCHERS[launcher], script, *words], folder / f"{launcher}.log")


def run(launcher: str, script: str, folder: Path, *words: str) -> str:
    """Run a command to its end, which must be a good one; returns its output."""
    with start(launcher, script, folder, *words) as launched:
        code = launched.wait(300.0)
        assert code == 0, launched.output
        return launched.output
