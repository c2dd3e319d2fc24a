"""Where a step's time and memory go: `train_video.py --profile` and `--memory-profile`.

A few steps after the first ones are watched, and what is seen is written below RUN/profile:

    trace-rank0.json.gz    for chrome://tracing or https://ui.perfetto.dev, one file for each rank
    time.txt               where the time goes, by kind of work and by operation
    memory-rank0.pickle    on a GPU, for https://pytorch.org/memory_viz
    memory.txt             on a CPU, what operations allocate
"""

import logging
import time
from collections import defaultdict
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from sat.errors import ConfigError
from sat.mpu.launch import Launch

log = logging.getLogger(__name__)

SKIPPED, WATCHED = 2, 3
"""Steps that warm up, and steps that are watched after them; fewer where the run has fewer."""
MOST_EVENTS = 1_000_000
"""Allocations that a snapshot of a GPU's memory holds."""

KINDS = (
    ("attention", ("attention", "fmha", "flash")),
    ("matrix products", ("mm", "matmul", "linear", "gemm")),
    ("convolutions", ("conv",)),
    ("collectives", ("c10d::", "nccl", "gloo")),
    ("norms", ("norm",)),
    ("copies and casts", ("copy", "cat", "clone", "_to", "contiguous", "memcpy", "memset")),
)
"""Kind of work, and parts of the names of its operations; the first that fits counts."""
OTHER = "other operations"
OPTIMIZER, UPDATE = "optimizer", "Optimizer.step#"
"""What runs within a range of torch's, whatever it is."""


@dataclass(frozen=True)
class Profiling:
    """What of a run's first steps is to be watched."""

    times: bool = False
    memory: bool = False

    def check(self, save: str | None) -> None:
        """Raise ConfigError where there is no place to write to."""
        if (self.times or self.memory) and save is None:
            option = "--profile" if self.times else "--memory-profile"
            raise ConfigError(f"{option} writes into the run directory, and args.save is not set; set it")


class StepProfiler:
    """Watches the steps from `first` to `last` of a run."""

    def __init__(self, what: Profiling, folder: Path | None, launch: Launch, start_step: int, last_step: int) -> None:
        self.what, self.launch = what, launch
        self.folder = None if folder is None else folder / "profile"
        self.first = min(start_step + SKIPPED, last_step - 1) + 1
        self.last = min(self.first + WATCHED - 1, last_step)
        self._watching = ExitStack()
        self._profile: profile | None = None
        self._started = 0.0

    @property
    def _is_cuda(self) -> bool:
        return self.launch.device.type == "cuda"

    def before(self, step: int) -> None:
        """To be called before each step."""
        if self.folder is None or step != self.first or not (self.what.times or self.what.memory):
            return
        self.folder.mkdir(exist_ok=True)
        if self.what.memory and self._is_cuda:
            torch.cuda.memory._record_memory_history(max_entries=MOST_EVENTS)
        if self.what.times or not self._is_cuda:
            activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self._is_cuda else [])]
            memory = self.what.memory and not self._is_cuda
            self._profile = self._watching.enter_context(profile(activities=activities, profile_memory=memory))
        self._started = time.perf_counter()

    def after(self, step: int) -> None:
        """To be called after each step."""
        if self._started == 0.0 or step != self.last:
            return
        assert self.folder is not None
        seconds, self._started = time.perf_counter() - self._started, 0.0
        self._watching.close()
        if self._profile is not None:
            self._write(self._profile, seconds, self.folder)
        if self.what.memory and self._is_cuda:
            torch.cuda.memory._dump_snapshot(str(self.folder / f"memory-rank{self.launch.rank}.pickle"))
            torch.cuda.memory._record_memory_history(enabled=None)
        log.info("steps %d to %d were watched, see %s", self.first, self.last, self.folder)

    def _write(self, seen: profile, seconds: float, folder: Path) -> None:
        averages: Any = seen.key_averages()
        if self.what.times:
            seen.export_chrome_trace(str(folder / f"trace-rank{self.launch.rank}.json.gz"))
        if not self.launch.is_main:
            return
        if self.what.times:
            place = "cuda" if self._is_cuda else "cpu"
            kinds = time_table(seen.events() or [], seconds, self.last - self.first + 1, place)
            details = averages.table(sort_by=f"self_{place}_time_total", row_limit=40, max_name_column_width=60)
            (folder / "time.txt").write_text(f"{kinds}\n\n{details}\n", encoding="utf-8")
            log.info("where the time goes:\n%s", kinds)
        if self.what.memory and not self._is_cuda:
            table = averages.table(sort_by="self_cpu_memory_usage", row_limit=40, max_name_column_width=60)
            (folder / "memory.txt").write_text(f"{table}\n", encoding="utf-8")
            log.info("snapshots of memory are a GPU's; what operations allocate on this CPU is in %s", folder)


def kind_of(event: Any) -> str:
    """The kind of work that the name of an event tells, or that of one around it."""
    outer = event
    while outer is not None:
        if outer.name.startswith(UPDATE):
            return OPTIMIZER
        outer = outer.cpu_parent
    name = event.name.lower()
    return next((kind for kind, parts in KINDS if any(part in name for part in parts)), OTHER)


def time_table(events: Iterable[Any], seconds: float, steps: int, place: str) -> str:
    """Milliseconds of a step by kind of work, on `cpu` or `cuda`; the rest is Python, reading data, and waiting."""
    field = "self_device_time_total" if place == "cuda" else "self_cpu_time_total"
    spent: dict[str, float] = defaultdict(float)
    for event in events:
        if not event.is_user_annotation:
            spent[kind_of(event)] += getattr(event, field) / 1e6
    rest = "idle" if place == "cuda" else "outside operations"
    spent[rest] = max(seconds - sum(spent.values()), 0.0)
    lines = [f"{'':<20} {'ms a step':>10} {'share':>7}"]
    for kind, own in sorted(spent.items(), key=lambda item: -item[1]):
        lines.append(f"{kind:<20} {1e3 * own / steps:>10.1f} {own / seconds:>7.1%}")
    lines.append(f"{'step':<20} {1e3 * seconds / steps:>10.1f} {1:>7.1%}")
    return "\n".join(lines)
