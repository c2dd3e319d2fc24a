"""The benchmark of the VAE runs, and both sides of it give the same numbers."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

import benchmarks.vae as benchmark

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "vae.py"
SMALL = ("--ch=32", "--z-channels=4", "--frames=9", "--size=16", "--repeats=1", "--threads=1")


def run(*options: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, SCRIPT, *options], capture_output=True, text=True, check=False)


def test_help(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["vae.py", "--help"])
    with pytest.raises(SystemExit) as stopped:
        benchmark.parse_arguments()
    assert stopped.value.code == 0
    assert "diffusers" in capsys.readouterr().out


def test_an_even_number_of_latents_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["vae.py", "--frames=13"])
    with pytest.raises(SystemExit):
        benchmark.parse_arguments()
    assert "--frames is 13; give 8k + 1: the two cut an even number of latents differently" in capsys.readouterr().err


def test_memory_of_one_case() -> None:
    done = run(*SMALL, "--size=64", "--memory-of", "ours", "decode whole + backward")
    assert done.returncode == 0, done.stderr
    assert 1.0 < float(done.stdout) < 500.0


def test_both_sides_agree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In this process, with memory left out: each of its numbers takes a process of its own."""
    monkeypatch.setattr(benchmark, "in_fresh_process", lambda script, options: 2.0)
    monkeypatch.setattr(sys, "argv", ["vae.py", *SMALL, "--json", str(tmp_path / "vae.json")])
    benchmark.main()
    written = json.loads((tmp_path / "vae.json").read_text())
    assert [row["case"] for row in written["rows"]] == list(benchmark.CASES)
    for row in written["rows"]:
        assert row["relative_difference"] < 1e-5
        assert row["ours_seconds"] > 0 and row["diffusers_seconds"] > 0
        assert row["memory_ratio"] == 1.0
