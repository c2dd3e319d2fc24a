"""What the benchmarks against a peer share: alternating calls, medians, and peak memory in a process of its own."""

import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

Call = Callable[[], Any]


CLOCKS: Mapping[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}
"""`cpu` is the time of this process alone (all its threads together): for machines that others use, with one thread."""


def median_seconds(calls: Mapping[str, Call], repeats: int, clock: str = "wall") -> dict[str, float]:
    """Median seconds of each call; the calls take turns, so that a busy spell of the machine meets all of them."""
    now = CLOCKS[clock]
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            start = now()
            call()
            times[name].append(now() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def resident(field: str) -> float:
    """VmRSS or VmHWM of this process, MiB."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) / 1024
    raise KeyError(field)


def added_memory(call: Call) -> float:
    """MiB that a call adds at its peak to what this process holds."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # VmHWM starts anew
    before = resident("VmRSS")
    call()
    return resident("VmHWM") - before


def in_fresh_process(script: str, options: Sequence[str]) -> float:
    """The number that a script prints, run anew so that nothing earlier is counted."""
    done = subprocess.run([sys.executable, script, *options], check=True, capture_output=True, text=True)
    return float(done.stdout)
