"""A VAE of a run leaves it in the layout of the released 3d-vae.pt."""

import subprocess
import sys
from pathlib import Path

import torch

from sat.vae import load_vae
from tests.vae.tiny import build_vae

SCRIPT = Path(__file__).parents[2] / "tools" / "export_vae.py"


def export(run: Path, out: Path) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, SCRIPT, run, out], capture_output=True, text=True, check=False)


def test_a_run_is_written_as_a_file_that_loads(tmp_path: Path) -> None:
    trained, out = build_vae(seed=3), tmp_path / "deep" / "3d-vae.pt"
    (tmp_path / "run" / "7").mkdir(parents=True)
    (tmp_path / "run" / "latest").write_text("7")
    torch.save({"module": trained.state_dict()}, tmp_path / "run" / "7" / "mp_rank_00_model_states.pt")
    done = export(tmp_path / "run", out)
    assert done.returncode == 0, done.stderr
    assert list(torch.load(out, weights_only=True)) == ["state_dict"]
    vae = build_vae()
    load_vae(vae, out)
    for name, value in trained.state_dict().items():
        assert torch.equal(vae.state_dict()[name], value)


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    done = export(tmp_path, tmp_path / "deep" / "3d-vae.pt")
    assert done.returncode == 2
    assert "has no weights at" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "deep").exists()
