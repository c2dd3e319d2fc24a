"""The benchmark of data: how many cores a step needs, and both tables."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.data_wait import cores_needed, planned_step_time, wait_share
from tests.tiny import ROOT

SMALL = ("--clips", "2", "--repeats", "1", "--frames", "5", "--height", "32", "--width", "48", "--workers", "1")
RATE = ("--steps", "5", "--step-time", "0.05", "--demo-clips", "48")


@pytest.mark.parametrize(
    ("seconds", "clips", "step_time", "cores"), [(0.1, 1, 1.0, 1), (1.0, 1, 1.0, 1), (1.1, 1, 1.0, 2)]
)
def test_cores_make_clips_as_fast_as_steps_take_them(seconds: float, clips: int, step_time: float, cores: int) -> None:
    assert cores_needed(seconds, clips, step_time) == cores
    assert cores_needed(seconds, 8 * clips, 8 * step_time) == cores
    paced = seconds * clips / cores  # of a step that waits for clips only
    assert 1.0 - step_time / max(paced, step_time) < 0.02


def test_the_first_steps_are_not_counted() -> None:
    assert wait_share([(9.0, 10.0)] * 3 + [(0.1, 1.0), (0.3, 3.0)]) == pytest.approx(0.1)


def test_the_step_of_a_device_is_planned() -> None:
    assert 1.0 < planned_step_time("h200") < 4.0


def tables(tmp_path: Path, *words: str) -> dict:
    file = tmp_path / "wait.json"
    command = [sys.executable, "benchmarks/data_wait.py", *SMALL, *RATE, *words, "--json", str(file)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=240)
    return json.loads(file.read_text())


@pytest.mark.slow
def test_the_tables(tmp_path: Path) -> None:
    found = tables(tmp_path, "--demo-steps", "0")
    assert [row["size"] for row in found["rates"]] == ["5x32x48", "9x32x32"]
    assert all(0.0 < row["decode"] < row["item"] and row["worker"] > 0.0 for row in found["rates"])
    (wait,) = found["waits"]
    assert wait["workers"] == 1 and wait["step_time"] == 0.05 and 0.0 <= wait["wait_share"] < 1.0


@pytest.mark.slow
def test_the_demo_is_trained(tmp_path: Path) -> None:
    waits = tables(tmp_path, "--demo-steps", "5")["waits"]
    assert [wait["consumer"] for wait in waits] == ["given step", "demo, cache: none", "demo, cache: all"]
    assert all(wait["clips"] == 24 and wait["step_time"] > 0.0 for wait in waits[1:])
