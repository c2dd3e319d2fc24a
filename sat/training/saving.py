"""Saving in the background: a copy in host memory, files written by a thread, publication when every rank's are whole.

Training waits for the copy alone. The thread touches neither the model nor any process group: ranks agree on what has
been written at their step boundaries, where they meet anyway.

    step boundary    every rank copies its state               start()
    thread           every rank writes its files into RUN/.1000.saving-...
    step boundary    all are written: rank 0 is told           poll()
    thread           rank 0 adds averages, state and manifest, renames, moves `latest`, deletes what is not kept
    step boundary    all ranks learn that it is done           poll()

Host memory: each rank's copy of what it writes (`HostMemory`), and on rank 0, while averages are written, the weights
of one tensor-parallel rank in their own precision besides, with one parameter in float32.
"""

import logging
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from threading import Thread
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from sat.errors import CheckpointError, SatError
from sat.mpu.launch import Launch
from sat.mpu.shards import ShardRule
from sat.mpu.state import ParallelState
from sat.training.adapters import write_adapters
from sat.training.ema import write_averages, write_consolidated
from sat.training.files import (
    SAVING,
    Entry,
    put_folder,
    remove_leftovers,
    sync_folder,
    write_json,
    write_text,
    write_torch,
)
from sat.training.lock import LockLost
from sat.training.optimizer_state import Fragment, optimizer_file, save_fragments
from sat.training.retention import Retention
from sat.weights.finding import model_file
from sat.weights.whole import AVERAGES, LATEST, MANIFEST, TRAINING_STATE

log = logging.getLogger(__name__)


class HostMemory:
    """Host memory for one copy of this rank's state. The next copy takes the place of the last, so it never grows."""

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}

    def keep(self, name: str, value: Tensor) -> Tensor:
        """A copy of a tensor that stays as it is until the next one of that name."""
        buffer = self._buffers.get(name)
        if buffer is None or buffer.shape != value.shape or buffer.dtype != value.dtype:
            buffer = self._buffers[name] = torch.empty(value.shape, dtype=value.dtype)
        buffer.copy_(value)
        return buffer

    def keep_fragments(self, fragments: Sequence[Fragment]) -> list[Fragment]:
        """Copies of optimizer state."""
        return [
            replace(
                fragment,
                tensors={kind: self.keep(f"{kind}|{fragment.name}", value) for kind, value in fragment.tensors.items()},
                numbers={kind: self.keep(f"{kind}|{fragment.name}", value) for kind, value in fragment.numbers.items()},
            )
            for fragment in fragments
        ]

    @property
    def num_bytes(self) -> int:
        """What it takes."""
        return sum(buffer.numel() * buffer.element_size() for buffer in self._buffers.values())


@dataclass
class Snapshot:
    """What one rank writes of a checkpoint, in host memory."""

    weights: Mapping[str, Tensor] | None
    """On the first of the replicas."""
    fragments: Sequence[Fragment] | None
    """Optimizer state, where this rank writes any."""


@dataclass(frozen=True)
class SaveOptions:
    """How a run's checkpoints are written."""

    retention: Retention = field(default_factory=Retention)
    max_failed: int = 3
    """Failed saves in a row at which the run stops."""
    consolidate: bool = False
    """Also write the whole weights as one safetensors file."""
    lora_alpha: float = 1.0
    """Of the model's adapters, which always have a file of their own."""
    rules: Mapping[str, ShardRule] = field(default_factory=dict)
    """How parameters are cut over tensor-parallel ranks."""
    aliases: Mapping[str, str] = field(default_factory=dict)
    """Further names of trained parameters."""
    before_publishing: Callable[[], None] = lambda: None
    """Called by rank 0; raises where the run directory is no longer this job's."""


_PENDING, _DONE, _FAILED = 0, 1, 2


@dataclass
class _Flight:
    """A save that is under way. The thread of each rank fills in the last three fields."""

    step: int
    state: Mapping[str, Any]
    started: float
    is_publishing: bool = False
    thread: Thread | None = None
    status: int = _PENDING
    entries: dict[str, Entry] = field(default_factory=dict)
    problem: str = ""
    is_final: bool = False
    """Whether trying again is of no use."""


class Saver:
    """Writes a run's checkpoints, one at a time; every rank must make the same calls."""

    def __init__(self, run_dir: Path, parallel: ParallelState, launch: Launch, options: SaveOptions) -> None:
        self.run_dir, self.parallel, self.launch, self.options = run_dir, parallel, launch, options
        self.memory = HostMemory()
        self.failed_in_a_row = 0
        self.published: int | None = None
        """The last step that this job has saved."""
        self.last_duration: float | None = None
        """Seconds from start to publication of the last save that succeeded."""
        self._flight: _Flight | None = None
        if launch.is_main:
            remove_leftovers(run_dir)
        job = [f"{os.getpid()}-{time.time_ns():x}"]  # a rank of an earlier job may still be writing
        dist.broadcast_object_list(job, src=0)  # after the leftovers: no rank has begun to write
        self._job = job[0]

    # --- on the main thread ------------------------------------------------------------------------------------------

    def start(self, step: int, copy: Callable[[HostMemory], Snapshot], state: Mapping[str, Any]) -> None:
        """Begin to save a step; waits for an earlier save first.

        copy: puts this rank's state into host memory. state: what training_state.json says.
        """
        if self._flight is not None:
            log.info("waiting for the save of step %d", self._flight.step)
            self.finish()
        snapshot = copy(self.memory)
        flight = self._flight = _Flight(step, state, time.monotonic())
        self._run(flight, lambda: self._write(flight, snapshot))

    def poll(self) -> None:
        """Take a save one phase further if every rank has done its part, without waiting for it.

        Raises CheckpointError on all ranks when too many saves in a row have failed.
        """
        flight = self._flight
        if flight is None:
            return
        own = _DONE if flight.is_publishing and not self.launch.is_main else flight.status
        statuses = torch.tensor([own, -own], device=self.launch.device)
        dist.all_reduce(statuses, op=dist.ReduceOp.MAX)
        highest, lowest = int(statuses[0]), -int(statuses[1])
        if lowest == _PENDING:
            return
        if highest == _FAILED:
            self._fail(flight)
        elif not flight.is_publishing:
            self._begin_to_publish(flight)
        else:
            self._complete(flight)

    def finish(self) -> None:
        """Wait until no save is under way. Raises like `poll`."""
        while self._flight is not None:
            if self._flight.thread is not None:
                self._flight.thread.join()
            self.poll()

    def close(self) -> None:
        """Let this rank's thread come to its end, when the run does in any way: nothing is written after that."""
        if self._flight is not None and self._flight.thread is not None:
            self._flight.thread.join()

    def _begin_to_publish(self, flight: _Flight) -> None:
        gathered: list[Any] = [None] * self.launch.world_size
        dist.all_gather_object(gathered, flight.entries)
        flight.is_publishing = True
        if self.launch.is_main:
            entries = {name: entry for own in gathered for name, entry in own.items()}
            flight.status = _PENDING
            self._run(flight, lambda: self._publish(flight, entries))

    def _complete(self, flight: _Flight) -> None:
        self._flight = None
        self.published, self.failed_in_a_row = flight.step, 0
        self.last_duration = time.monotonic() - flight.started
        log.info("saved %s (%.1f s in the background)", self.run_dir / str(flight.step), self.last_duration)

    def _fail(self, flight: _Flight) -> None:
        told: list[Any] = [None] * self.launch.world_size
        dist.all_gather_object(told, (flight.problem, flight.is_final))
        problem = next(f"rank {rank}: {problem}" for rank, (problem, _) in enumerate(told) if problem)
        self._flight = None
        self.failed_in_a_row += 1
        if self.launch.is_main:
            for name in self._folders(flight.step):
                shutil.rmtree(name, ignore_errors=True)
        dist.barrier()  # nobody writes into a folder that is being deleted
        message = f"the checkpoint of step {flight.step} was not saved to {self.run_dir} ({problem})"
        if any(is_final for _, is_final in told):
            raise CheckpointError(message)
        if self.failed_in_a_row >= self.options.max_failed:
            raise CheckpointError(
                f"{message}; that was number {self.failed_in_a_row} in a row (args.max_failed_saves), and nothing "
                "saved earlier was harmed"
            )
        if self.launch.is_main:
            log.error("%s; the run goes on and tries again at the next save", message)

    # --- in the background -------------------------------------------------------------------------------------------

    def _run(self, flight: _Flight, work: Callable[[], None]) -> None:
        def run() -> None:
            try:
                work()
                flight.status = _DONE
            except (OSError, RuntimeError, SatError) as error:
                flight.problem, flight.is_final = str(error), isinstance(error, LockLost)
                flight.status = _FAILED
            except Exception as error:
                log.exception("saving step %d", flight.step)
                flight.problem = f"{type(error).__name__}: {error}"
                flight.status = _FAILED

        flight.thread = Thread(target=run, name=f"save-{flight.step}", daemon=True)
        flight.thread.start()

    def _folders(self, step: int) -> tuple[Path, Path]:
        """Where an iteration and its averages are made."""
        first, second = (f".{name}{SAVING}-{self._job}" for name in (str(step), f"{step}{AVERAGES}"))
        return self.run_dir / first, self.run_dir / second

    def _write(self, flight: _Flight, snapshot: Snapshot) -> None:
        """This rank's files."""
        folder, _ = self._folders(flight.step)
        folder.mkdir(exist_ok=True)
        place = self.parallel.rank("tp"), self.parallel.size("tp")
        if snapshot.weights is not None:
            name = model_file(place[0])
            content = {"module": dict(snapshot.weights), "iteration": flight.step}
            flight.entries[name] = write_torch(folder / name, content)
        if snapshot.fragments is not None:
            name = optimizer_file(self.launch.rank)
            flight.entries[name] = save_fragments(folder / name, snapshot.fragments, *place)
        sync_folder(folder)

    def _publish(self, flight: _Flight, entries: dict[str, Entry]) -> None:
        """What rank 0 does when all files of all ranks are whole."""
        folder, averages = self._folders(flight.step)
        averages.mkdir()
        averaged = write_averages(folder, averages, self.options.aliases)
        for place, files in ((averages, averaged), (folder, entries)):
            if files and self.options.consolidate:
                files |= write_consolidated(place, self.options.rules)
            if files:
                files |= write_adapters(place, self.options.lora_alpha)
        if averaged:
            write_json(averages / MANIFEST, {"files": averaged})
        state = {**flight.state, "averages": bool(averaged)}
        entries[TRAINING_STATE] = write_json(folder / TRAINING_STATE, state)
        write_json(folder / MANIFEST, {"files": entries})
        self.options.before_publishing()
        # The averages first: `latest` never names a step that lacks its own.
        if averaged:
            put_folder(averages, self.run_dir / f"{flight.step}{AVERAGES}")
        else:
            averages.rmdir()
        put_folder(folder, self.run_dir / str(flight.step))
        sync_folder(self.run_dir)
        write_text(self.run_dir / LATEST, str(flight.step))
        self._tidy()

    def _tidy(self) -> None:
        """Delete what is not kept. What cannot be deleted is no reason to call a save failed."""
        try:
            deleted = self.options.retention.tidy(self.run_dir)
        except OSError as error:
            log.warning("%s: old checkpoints were not deleted (%s)", self.run_dir, error)
            return
        if deleted:
            log.info("deleted the checkpoints of steps %s", ", ".join(map(str, deleted)))
