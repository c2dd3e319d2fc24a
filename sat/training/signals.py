"""Being asked to stop: at the next step boundary, with a checkpoint."""

import logging
import os
import select
import signal
import time
from pathlib import Path
from threading import Thread
from typing import Any

import torch
import torch.distributed as dist

log = logging.getLogger(__name__)

STOPPED = 75
"""Exit code of a job that was asked to stop and has saved: sysexits.h's "try again"."""

LAUNCHERS = ("TORCHELASTIC_RUN_ID", "CROSS_SIZE")
"""Variables that torchrun and deepspeed set for the processes that they start."""


def exit_code(is_finished: bool) -> int:
    """0 for a finished job, else STOPPED; also 0 under torchrun with --max-restarts, which would start it again."""
    return 0 if is_finished or int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")) > 0 else STOPPED


class StopRequest:
    """Notes SIGTERM, SIGINT and SIGUSR1 for the loop; a later one ends the process at once.

    Earlier checkpoints are whole then. A thread listens, so that the second one is heard while the main thread is
    inside a long operation. It also notes when torchrun or deepspeed, whichever started this process, is gone: nobody
    else would end it.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
    ECHO_SECONDS = 2.0
    """Launchers pass a signal on to processes that have had it already: what comes this soon is the same request."""
    LOOK_SECONDS = 1.0
    """How often it is looked whether the launcher lives."""

    def __init__(self) -> None:
        self.name: str | None = None
        self._signalled_at: float | None = None
        self._previous: dict[int, Any] = {}
        is_launched = any(name in os.environ for name in LAUNCHERS)
        self._launcher = os.getppid() if is_launched else None

    def __enter__(self) -> "StopRequest":
        reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)
        self._previous_writer = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        for number in self.SIGNALS:
            self._previous[number] = signal.signal(number, lambda *_: None)
        self._listener = Thread(target=self._listen, args=(reader,), daemon=True)
        self._listener.start()
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._previous_writer)
        os.write(self._writer, b"\0")  # the end; closing is not enough, as data workers hold the pipe too
        self._listener.join()
        os.close(self._writer)

    def _listen(self, reader: int) -> None:
        with open(reader, "rb", buffering=0) as received:
            while True:
                if not select.select([received], [], [], self.LOOK_SECONDS)[0]:
                    if self._launcher is not None and os.getppid() != self._launcher:
                        self.ask("the launcher of this process has died")
                elif not (number := received.read(1)[0]):
                    return
                elif number in self.SIGNALS:  # others come too, such as that of a data worker's end
                    self._note(number)

    def _note(self, number: int) -> None:
        name = signal.Signals(number).name
        if self._signalled_at is None:
            self._signalled_at = time.monotonic()
            self.name = self.name or name
            log.info("%s: stopping after this step, with a checkpoint; once more ends at once, without", name)
        elif time.monotonic() - self._signalled_at > self.ECHO_SECONDS:
            os._exit(128 + number)

    def ask(self, reason: str) -> None:
        """Stop at the next step boundary, as if a signal had come; the first that does come is not a second one."""
        if self.name is None:
            self.name = reason
            log.info("%s: stopping after this step, with a checkpoint", reason)

    def agreed(self, device: torch.device) -> bool:
        """Whether any rank was asked; the same answer on all, so that they stop at the same step."""
        flag = torch.tensor(float(self.name is not None), device=device)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return bool(flag.item())


def process_age() -> float:
    """Seconds since this process started; where the system does not tell, since it has used any time."""
    try:
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, AttributeError, ValueError):
        return time.process_time()
