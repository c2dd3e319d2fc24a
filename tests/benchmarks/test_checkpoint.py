"""The benchmark of saving: its sums, and a small form of it."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.checkpoint import TINY, lines, measure, parse_arguments, run_words, summary
from sat.config import load_config
from sat.mpu.launch import read_launch
from tests.launch import ENVIRONMENT
from tests.ranks import run_ranks
from tests.tiny import ROOT

SMALL = ("--hidden-size", "64", "--layers", "1", "--side", "4", "--saves", "2", "--interval", "6", "--threads", "1")


def test_what_saves_cost() -> None:
    """Steps of a second; saves after steps 4, 8 and 12 pause them 5, 2 and 2 s, then two steps take 0.5 s more."""
    seconds = dict.fromkeys(range(1, 15), 1.0) | {4: 6.0, 8: 3.0, 12: 3.0}
    under_way = [step in (5, 6, 9, 10, 13, 14) for step in range(1, 16)]
    seconds |= dict.fromkeys((5, 6, 9, 10, 13, 14), 1.5) | {1: 9.0}
    begins = [sum(seconds[earlier] for earlier in range(1, step)) for step in range(1, 16)]
    row = summary(begins, under_way, interval=4)
    assert (row["step_seconds"], row["first_pause_steps"]) == (1.0, 5.0)
    assert (row["pause_seconds"], row["pause_steps"], row["slowed_steps"]) == (2.0, 2.0, 1.0)


def measure_small(rank: int, save: str) -> dict[str, Any]:
    args = parse_arguments([*SMALL, "--save", save])
    return measure(load_config([TINY], run_words(args)), read_launch())


def check_row(row: dict[str, Any], save: Path) -> None:
    # Weights, averages, and of the optimizer master weights, two moments and averages, in float32.
    assert row["bytes"] == pytest.approx(4 * 6 * row["parameters"], rel=0.2)
    assert row["step_seconds"] > 0 and row["write_rate"] > 0 and row["disk_rate"] > 0
    assert f"{row['pause_steps']:.2f} steps" in lines(row)[1]
    assert list(save.iterdir()) == []


def test_a_small_form(tmp_path: Path) -> None:
    (row,) = run_ranks(measure_small, 1, str(tmp_path))
    check_row(row, tmp_path)


@pytest.mark.slow
def test_the_command(tmp_path: Path) -> None:
    file = tmp_path / "checkpoint.json"
    command = [
        sys.executable,
        "benchmarks/checkpoint.py",
        *SMALL,
        "--save",
        str(tmp_path / "runs"),
        "--json",
        str(file),
    ]
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    row = json.loads(file.read_text())["row"]
    check_row(row, tmp_path / "runs")
    assert lines(row) == done.stdout.splitlines()[1:]
