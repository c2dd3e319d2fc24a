"""tools/invert.py as a user runs it: a picture becomes noise, and the noise the picture again."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from sat.cogvideox.engine import NETWORK_PREFIX, build_engine
from sat.cogvideox.output import to_frames
from sat.config import load_config
from sat.data.synthetic import SyntheticImages
from sat.data.video import write_png
from tests.tiny import ROOT
from tools import invert

CONFIG = ROOT / "configs" / "cogview3plus_tiny.yaml"


def test_a_picture_becomes_noise(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = build_engine(load_config([CONFIG])["model"]).network
    torch.save({"module": {f"{NETWORK_PREFIX}{k}": v for k, v in network.state_dict().items()}}, tmp_path / "w.pt")
    write_png(tmp_path / "a.png", to_frames(SyntheticImages(1, 64, 64)[0]["pixels"])[0])
    words = [tmp_path / "a.png", "--base", CONFIG, "--load", tmp_path / "w.pt", "--prompt", "a red disc"]
    words += ["--out", tmp_path / "noise.safetensors", "--iterations", 8, "model.sampler_config.params.num_steps=10"]
    done = subprocess.run(
        [sys.executable, ROOT / "tools" / "invert.py", *map(str, words)], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    error = re.search(r"ends (\S+) % of the latents' spread", done.stderr)
    assert error is not None and float(error[1]) < 1.0  # measured 0.6; 5.6 with 4 iterations
    with safe_open(tmp_path / "noise.safetensors", framework="pt") as file:
        assert file.get_tensor("noise").shape == (1, 16, 8, 8)
        assert file.metadata() == {"prompt": "a red disc", "clip": str(tmp_path / "a.png"), "steps": "10"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png", "noise.safetensors", "w.pt"]


def test_a_collective_that_fails_ends_with_its_rank(
    fresh_log: None, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("[gloo/transport/tcp/pair.cc] Connection closed by peer")

    monkeypatch.setattr(invert, "SamplingRun", broken)
    monkeypatch.setattr(invert, "prepare_environment", lambda: None)
    words = ["a.png", "--base", str(CONFIG), "--prompt", "a", "--out", str(tmp_path / "noise.safetensors")]
    monkeypatch.setattr(sys, "argv", ["invert.py", *words])
    with pytest.raises(SystemExit):
        invert.main()
    assert "error: a collective failed at rank 0" in capfd.readouterr().err
