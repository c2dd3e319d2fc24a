"""What --profile and --memory-profile leave in the run directory."""

import gzip
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sat.errors import ConfigError
from sat.training.loop import train_joined
from sat.training.profiling import OTHER, Profiling, kind_of, time_table
from tests.ranks import run_ranks
from tests.tiny import ROOT, only_run, tiny_config


def train(rank: int, save: str, times: bool, memory: bool) -> None:
    words = ("args.train_iters=6", f"args.save={save}", "args.global_batch_size=4")
    train_joined(tiny_config(*words), 7, profiling=Profiling(times, memory))


def test_a_trace_of_every_rank_and_one_table(tmp_path: Path) -> None:
    run_ranks(train, 2, str(tmp_path), True, False)
    folder = only_run(tmp_path) / "profile"
    assert {path.name for path in folder.iterdir()} == {"time.txt", "trace-rank0.json.gz", "trace-rank1.json.gz"}
    with gzip.open(folder / "trace-rank1.json.gz") as file:
        names = {event.get("name") for event in json.load(file)["traceEvents"]}
    assert {"aten::addmm", "aten::scaled_dot_product_attention"} <= names
    table = (folder / "time.txt").read_text()
    for kind in ("matrix products", "attention", "collectives", "optimizer", "outside operations", "step"):
        assert f"\n{kind} " in table


def test_memory_on_a_cpu_is_a_table(tmp_path: Path) -> None:
    run_ranks(train, 1, str(tmp_path), False, True)
    folder = only_run(tmp_path) / "profile"
    assert [path.name for path in folder.iterdir()] == ["memory.txt"]
    assert "CPU Mem" in (folder / "memory.txt").read_text()


def test_without_a_place_to_write_it_stops() -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "train_video.py", "--base", ROOT / "configs" / "tiny.yaml", "--memory-profile"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert "error: --memory-profile writes into the run directory, and args.save is not set; set it" in done.stderr
    with pytest.raises(ConfigError, match="--profile writes"):
        Profiling(times=True).check(None)
    Profiling().check(None)


def event(name: str, microseconds: float = 0.0, parent: Any = None) -> Any:
    return SimpleNamespace(name=name, self_cpu_time_total=microseconds, is_user_annotation=False, cpu_parent=parent)


@pytest.mark.parametrize(
    ("operation", "kind"),
    [
        ("aten::addmm", "matrix products"),
        ("aten::_scaled_dot_product_flash_attention_for_cpu_backward", "attention"),
        ("aten::native_layer_norm", "norms"),
        ("c10d::allreduce_", "collectives"),
        ("aten::mul", OTHER),
    ],
)
def test_kinds_of_work(operation: str, kind: str) -> None:
    assert kind_of(event(operation)) == kind


def test_what_runs_within_an_update_is_the_optimizer() -> None:
    step = event("Optimizer.step#AdamW.step")
    assert kind_of(event("aten::mul", parent=event("aten::outer", parent=step))) == "optimizer"


def test_what_is_in_no_operation_is_the_rest() -> None:
    events = [
        event("aten::mm", 1.5e6),
        event("aten::mul", 0.3e6),
        SimpleNamespace(name="a range of a user", self_cpu_time_total=9e6, is_user_annotation=True),
    ]
    assert time_table(events, 2.0, 2, "cpu").splitlines()[1:] == [
        "matrix products           750.0   75.0%",
        "other operations          150.0   15.0%",
        "outside operations        100.0   10.0%",
        "step                     1000.0  100.0%",
    ]
