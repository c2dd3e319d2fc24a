"""The last collectives of this process: what a job says when its ranks stop hearing from each other.

A collective that gloo gives up, for its timeout or a broken connection, ends in one CommunicationError with rank, step,
operation and shapes. Under nccl torch ends the process itself and writes the last operations of the GPU to a file; what
is said there comes from the warning at half of the timeout.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist

from sat.errors import CommunicationError
from sat.mpu.collectives import Collective, watch
from sat.mpu.launch import NETWORK_HINT, Launch
from sat.mpu.rollcall import name_ranks, report_failure

log = logging.getLogger(__name__)

KEPT = 4
REPORT_SECONDS = 5.0
"""How long a rank that has failed waits for the others to say so, too."""


class Recorder:
    """The step that the process is at, and its last collectives."""

    def __init__(self, launch: Launch) -> None:
        self.launch = launch
        self.step: int | None = None
        """Set by the training loop."""
        self._last: deque[Collective] = deque(maxlen=KEPT)
        self._in_call = False
        self._last_start = time.monotonic()
        self._in_calls = 0.0

    def started(self, collective: Collective) -> None:
        self._last.append(collective)
        self._in_call = True
        self._last_start = time.monotonic()

    def returned(self, collective: Collective) -> None:
        self._in_call = False
        self._in_calls += time.monotonic() - self._last_start

    def take_wait(self) -> float | None:
        """Seconds in collectives since the last time it was asked; None on a GPU, where calls return at once."""
        seconds, self._in_calls = self._in_calls, 0.0
        return None if self.launch.device.type == "cuda" else seconds

    @property
    def idle_seconds(self) -> float:
        """Since the last collective began."""
        return time.monotonic() - self._last_start

    def describe(self) -> str:
        """Rank, machine, step and the last collectives, the latest first."""
        host = f" on {self.launch.hosts[self.launch.rank]}" if self.launch.hosts else ""
        step = "before the first step" if self.step is None else f"step {self.step}"
        if not self._last:
            return f"rank {self.launch.rank}{host}, {step}, before any collective"
        *earlier, latest = self._last
        state = "in" if self._in_call else "after"
        text = f"rank {self.launch.rank}{host}, {step}, {state} {latest}"
        return text + "".join(f"\n  before it {collective}" for collective in reversed(earlier))


@contextmanager
def recorded(launch: Launch, timeout_minutes: float) -> Iterator[Recorder]:
    """Record the collectives of a `with` block, and end it with CommunicationError where one fails.

    When no collective has begun for half of the timeout, a warning says where this rank is.
    """
    recorder = Recorder(launch)
    with watch(recorder), _warned_when_idle(recorder, 30.0 * timeout_minutes):
        try:
            yield recorder
        except RuntimeError as error:
            if not is_communication_failure(error):
                raise
            raise CommunicationError(_explain(recorder, error)) from error


def is_communication_failure(error: RuntimeError) -> bool:
    """Whether an error comes from the connection between ranks, and not from this one."""
    text = str(error)
    return isinstance(error, dist.DistError) or "gloo/transport" in text or "NCCL" in text


def _explain(recorder: Recorder, error: RuntimeError) -> str:
    launch = recorder.launch
    text = f"a collective failed at {recorder.describe()}\n  because {str(error).splitlines()[0]}"
    if launch.store is not None and launch.world_size > 1:
        silent = _find_silent(launch)
        if silent:
            hosts = ", ".join(sorted({launch.hosts[rank] for rank in silent}))
            text += f"\n  {name_ranks(silent)} on {hosts} did not fail with the others: look there first"
    return f"{text}\n  if ranks never meet: {NETWORK_HINT}" if recorder.step is None else text


def _find_silent(launch: Launch) -> list[int]:
    """The ranks that do not report a failure: they hang, or have ended for a reason of their own."""
    assert launch.store is not None
    dist.destroy_process_group()  # who waits for this rank need not wait for the timeout
    return report_failure(launch.store, launch.rank, launch.world_size, REPORT_SECONDS)


@contextmanager
def _warned_when_idle(recorder: Recorder, seconds: float) -> Iterator[None]:
    """Watch the clock in a thread; a single process waits for nobody."""
    if recorder.launch.world_size == 1:
        yield
        return
    is_over = threading.Event()
    thread = threading.Thread(target=_watch_clock, args=(recorder, seconds, is_over), daemon=True)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()


def _watch_clock(recorder: Recorder, seconds: float, is_over: threading.Event) -> None:
    has_warned = False
    while not is_over.wait(min(seconds / 10, 10.0)):
        is_idle = recorder.idle_seconds > seconds
        if is_idle and not has_warned:
            log.warning("no collective has begun for %.0f s: %s", recorder.idle_seconds, recorder.describe())
        has_warned = is_idle
