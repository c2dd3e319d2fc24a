"""The record of a run survives breaks and stays valid JSON."""

import json
import os
from pathlib import Path

import pytest
import torch

from sat.training.metrics import MetricsWriter, Rates, peak_memory_gb, speed_figures


def lines(folder: Path) -> list[dict]:
    def no_constant(word: str) -> None:
        raise AssertionError(f"{word} is not JSON")

    text = (folder / "metrics.jsonl").read_text()
    return [json.loads(line, parse_constant=no_constant) for line in text.splitlines()]


def test_full_precision(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path)
    writer.write({"kind": "train", "step": 1, "loss": 0.1 + 0.2})
    assert lines(tmp_path)[0]["loss"] == 0.1 + 0.2  # on disk as soon as it is written
    writer.close()


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_json_has_no_word_for_infinity(tmp_path: Path, value: float) -> None:
    writer = MetricsWriter(tmp_path)
    writer.write({"kind": "train", "step": 1, "loss": 1.0, "grad_norm": value})
    writer.close()
    assert lines(tmp_path) == [{"kind": "train", "step": 1, "loss": 1.0, "grad_norm": None}]


def test_a_continued_run_has_each_step_once(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path)
    for step in range(1, 6):
        writer.write({"kind": "train", "step": step, "loss": 0.0})
    writer.write({"kind": "valid", "step": 3, "loss": 0.0})
    writer.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "tra')  # what a killed run was writing
    writer = MetricsWriter(tmp_path, start_step=3)
    writer.write({"kind": "train", "step": 4, "loss": 1.0})
    writer.close()
    assert [(line["kind"], line["step"], line["loss"]) for line in lines(tmp_path)] == [
        *[("train", step, 0.0) for step in (1, 2, 3)],
        ("valid", 3, 0.0),
        ("train", 4, 1.0),
    ]


@pytest.mark.parametrize(
    "damaged", ["", "\0\0\0", '{"kind": "tr', "[1]", "7", "null", "{}", '{"step": "2"}', "\ufffd\x85"]
)
def test_a_damaged_line_is_named_and_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture, damaged: str) -> None:
    file = tmp_path / "metrics.jsonl"
    first, third = '{"kind": "train", "step": 1, "loss": 0.5}', '{"kind": "train", "step": 3, "loss": 0.25}'
    file.write_text(f"{first}\n{damaged}\n{third}\n{third[:9]}")
    MetricsWriter(tmp_path, start_step=3).close()
    assert file.read_text() == f"{first}\n{third}\n"
    assert [record.getMessage() for record in caplog.records if "damaged" in record.getMessage()] == [
        f"{file}: line 2 is damaged and is left out: {damaged}"
    ]


def test_the_record_is_on_disk_before_it_takes_the_place_of_the_old(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"kind": "train", "step": 1}\n')
    done: list[str] = []
    fsync, replace = os.fsync, Path.replace
    monkeypatch.setattr(os, "fsync", lambda file: (done.append("fsync"), fsync(file)))
    monkeypatch.setattr(Path, "replace", lambda *paths: (done.append("replace"), replace(*paths)))
    MetricsWriter(tmp_path, start_step=1).close()
    assert done == ["fsync", "replace", "fsync"]  # the last is the folder's


def test_other_ranks_write_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    writer = MetricsWriter(None)
    writer.write({"kind": "train", "step": 1, "loss": 0.0})
    writer.close()
    assert list(tmp_path.iterdir()) == []


def test_speed_is_that_of_one_device() -> None:
    figures = speed_figures(2.0, 100, 4e12, 6e12, 2, Rates(peak=10.0, measured=4.0))
    assert figures == {"tokens_per_s": 50.0, "tflops": 1.0, "mfu": 0.1, "hfu": 0.15, "mfu_measured": 0.25}


def test_an_unknown_device_has_no_share() -> None:
    figures = speed_figures(1.0, 1, 1e12, 1e12, 1, Rates())
    assert figures["mfu"] is None and figures["hfu"] is None and "mfu_measured" not in figures


def test_memory_is_that_of_the_process() -> None:
    assert 0.01 < peak_memory_gb(torch.device("cpu")) < 1000
