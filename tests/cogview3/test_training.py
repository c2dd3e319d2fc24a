"""The toy from the command line: train_video.py, then sample_video.py, then pictures of the colour asked for."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from sat.data.synthetic import COLOURS, SHAPES
from sat.data.video import read_frames
from tests.tiny import ROOT, only_run, records

CONFIG = "configs/cogview3plus_tiny.yaml"


def run(script: str, *words: str | Path) -> None:
    done = subprocess.run([sys.executable, script, *map(str, words)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def train(folder: Path, *overrides: str) -> Path:
    run("train_video.py", "--base", CONFIG, f"args.save={folder}", "args.log_interval=1", *overrides)
    return only_run(folder)


def sample(trained: Path, folder: Path, prompts: list[str], *overrides: str) -> list[Path]:
    words = [word for prompt in prompts for word in ("--prompt", prompt)]
    run("sample_video.py", "--load", trained, *words, f"args.output_dir={folder}", *overrides)
    return sorted(folder.iterdir())


@pytest.mark.slow
def test_the_toy_trains_and_its_samples_are_pictures(tmp_path: Path) -> None:
    trained = train(tmp_path / "runs", "args.train_iters=30", "args.eval_interval=null")
    losses = [record["loss"] for record in records(trained)]
    assert len(losses) == 30
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])  # measured 0.32
    pictures = sample(trained, tmp_path / "out", ["a red disc", "a blue square"], "args.sampling_image_size=[48,80]")
    assert [path.suffix for path in pictures] == [".png", ".png"]
    assert [read_frames(path, [0]).shape for path in pictures] == [(1, 48, 80, 3)] * 2


@pytest.mark.slow
def test_the_trained_toy_draws_the_colour_asked_for(tmp_path: Path) -> None:
    trained = train(tmp_path / "runs")
    losses = [record["loss"] for record in records(trained)]
    assert np.mean(losses[-50:]) < 0.17  # measured 0.142
    asked = [(colour, shape) for colour in COLOURS for shape in SHAPES]
    pictures = sample(trained, tmp_path / "out", [f"a {colour} {shape}" for colour, shape in asked])
    palette = np.array(list(COLOURS.values()))
    for (colour, _), path in zip(asked, pictures, strict=True):
        middle = read_frames(path, [0])[0, 28:36, 28:36].mean((0, 1)) / 127.5 - 1
        assert list(COLOURS)[np.square(palette - middle).sum(1).argmin()] == colour, path.name
