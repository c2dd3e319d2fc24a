"""The benchmark of packing: every way takes each clip once, and the bars that do not depend on the machine hold."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.packing import computed_tokens, draw_sizes, make_rows, num_tokens, parse_arguments
from tests.tiny import ROOT

SMALL = ("--clips", "12", "--hidden-size", "32", "--heads", "2", "--layers", "1", "--repeats", "1", "--threads", "1")


def test_every_way_takes_each_clip_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["packing.py"])
    args, sizes = parse_arguments(), draw_sizes(50)
    ways = make_rows(sizes, args)
    for way, rows in ways.items():
        assert sorted(index for row in rows for index in row) == list(range(50))
        tokens = [computed_tokens(way, row, sizes, args.text) for row in rows]
        assert way == "padded" or max(tokens) <= args.max_tokens
    useful = sum(num_tokens(size, args.text) for size in sizes)
    assert sum(computed_tokens("packed", row, sizes, args.text) for row in ways["packed"]) == useful
    assert sum(computed_tokens("padded", row, sizes, args.text) for row in ways["padded"]) > 1.5 * useful


def test_the_tables(tmp_path: Path) -> None:
    file = tmp_path / "packing.json"
    command = [sys.executable, "benchmarks/packing.py", *SMALL, "--planned-clips", "5000", "--json", str(file)]
    done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    found = json.loads(file.read_text())
    assert found["plan"]["padding"] <= 0.05 and found["plan"]["cost_spread"] <= 0.05
    assert [row["way"] for row in found["ways"]] == ["packed", "bucketed", "padded"]
    assert found["ways"][0]["padding"] == found["ways"][1]["padding"] == 0 and found["ways"][2]["padding"] > 0.3
    assert found["attention"] and f"{found['plan']['padding']:.1%} padding" in done.stdout
