"""The benchmark of everything: its parts on tiny sizes, its files, and the comparison with an earlier run."""

import argparse
import json
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks import dit
from sat.cogvideox.flops import Clip, TransformerFlops
from tools import bench

CPU = torch.device("cpu")
TINY = ("--hidden-size=128", "--layers=1", "--heads=2", "--frames=1", "--rows=2", "--columns=4", "--text=4")


@pytest.fixture
def options(monkeypatch: pytest.MonkeyPatch) -> argparse.Namespace:
    for name, words in (("DIT", TINY), ("NARROW", TINY), ("VAE", ("--ch=32", "--frames=9", "--size=16"))):
        monkeypatch.setattr(bench, name, words)
    monkeypatch.setattr(bench, "COPIED_BYTES", 1 << 16)
    monkeypatch.setattr(bench, "LENGTHS", (32, 64))
    monkeypatch.setattr(bench, "DEMO", ("args.eval_interval=null", "args.global_batch_size=48"))
    monkeypatch.setattr(bench, "matrix_tflops", lambda device, precision, repeats, clock: 0.05)
    monkeypatch.setattr(bench.vae, "measure_memory", lambda args, case: {"memory_ratio": 0.5})
    made = bench.parse_arguments(["--quick", "--threads=1"])
    made.repeats = 1
    return made


@pytest.mark.slow
def test_the_whole_run_writes_figures_and_a_plot(
    options: argparse.Namespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        bench, "growth", lambda options, rates, lengths: {"500 tokens s": 1.0, "500 tokens, formula s": 2.0}
    )
    before = tmp_path / "before.json"
    before.write_text(json.dumps({"figures": {"matrix fp32 TFLOP/s": 0.1}}))
    options.against, options.json = before, tmp_path / "results" / "now.json"
    monkeypatch.setattr(bench, "parse_arguments", lambda: options)
    bench.main()
    written = json.loads(options.json.read_text())
    assert {"device", "torch", "diffusers", "date", "cores", "threads", "load"} <= written["facts"].keys()
    figures = written["figures"]
    assert (
        "matrix fp32 TFLOP/s                                              0.05   before 0.1, x 0.50"
        in capsys.readouterr().out
    )
    for name in ("512 wide, forward", "64 wide, forward + backward", "VAE, encode whole"):
        assert figures[f"{name}, time / diffusers"] == pytest.approx(
            figures[f"{name} s"] / figures[f"{name}, diffusers s"]
        )
    assert 0.1 < figures["demo, share of forward and backward"] < 1
    assert figures["growth, furthest from the formula"] == pytest.approx(0.0, abs=1e-12)  # one point fits itself
    assert options.json.with_suffix(".png").stat().st_size > 0


def test_the_ideal_is_the_formula_at_the_rates_of_the_machine() -> None:
    args = dit.parse_arguments(list(TINY))
    rates = {
        "matrix fp32 TFLOP/s": 0.5,
        "attention flash 10 tokens, forward TFLOP/s": 0.2,
        "attention math 10 tokens, forward TFLOP/s": 0.1,
        "attention flash 99 tokens, forward TFLOP/s": 7.0,
    }
    flops = TransformerFlops(dit.build_ours(args)).forward([Clip(4, 8)])
    assert bench.ideal(args, rates, backward=False) == flops.products / 0.5e12 + flops.attention / 0.2e12


def test_growth_is_compared_with_the_formula_up_to_a_factor(options: argparse.Namespace) -> None:
    figures = {"500 tokens s": 2.0, "1000 tokens s": 8.0, "500 tokens, formula s": 1.0, "1000 tokens, formula s": 1.0}
    assert bench.fitted(figures) == [(500, pytest.approx(4.0)), (1000, pytest.approx(4.0))]
    rates = {"matrix fp32 TFLOP/s": 1.0, "attention flash 500 tokens, both TFLOP/s": 1.0}
    found = bench.growth(options, rates, [60, 120])
    assert [tokens for tokens, _ in bench.points(found, "tokens s")] == [60, 120]


def test_a_preset_has_its_own_size() -> None:
    args = dit.parse_arguments(bench.preset_words("cogvideox_5b"))
    assert (args.hidden_size, args.layers, args.heads) == (3072, 42, 48)
    assert args.frames * args.rows * args.columns + args.text == 17776


def test_a_back_end_that_is_not_there_is_left_out(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(bench.BACKENDS, "cpu", (bench.SDPBackend.CUDNN_ATTENTION, bench.SDPBackend.MATH))
    figures = bench.attention(CPU, 32, 1, time.perf_counter)
    assert {name.split()[1] for name in figures} == {"math"}
    assert "attention cudnn 32 tokens: " in capsys.readouterr().err


def test_an_unknown_preset_is_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["bench.py", "--preset", "cogvideox_9b"])
    with pytest.raises(SystemExit):
        bench.parse_arguments()
    assert "invalid choice: 'cogvideox_9b'" in capsys.readouterr().err
