"""What the README and the pages say to run is run here, in a small form."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.tiny import ROOT

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1"}
SMALL = ("args.train_iters=2", "args.eval_interval=null", "args.save_interval=2")


def blocks(page: Path, language: str) -> list[str]:
    """The fenced blocks of one language."""
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


def commands(page: Path) -> list[str]:
    """The lines of the bash blocks, without remarks; a line that ends in a backslash goes on."""
    lines = "\n".join(blocks(page, "bash")).replace("\\\n", " ").splitlines()
    return [line for line in (re.sub(r"\s+#.*", "", line).strip() for line in lines) if line]


def run(words: list[str], cwd: Path) -> str:
    """Run a command, with this interpreter for `python` and its module for `torchrun`."""
    starts = {"python": [sys.executable], "torchrun": [sys.executable, "-m", "torch.distributed.run"]}
    words = [*starts.get(words[0], words[:1]), *words[1:]]
    done = subprocess.run(words, cwd=cwd, env=ENVIRONMENT, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout + done.stderr


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A folder to start from, with the scripts and configurations."""
    for name in ("train_video.py", "sample_video.py"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    return tmp_path


SETUP = ("bash tools/quickstart.sh", "bash tools/test.sh")


def readme_commands() -> list[str]:
    return commands(ROOT / "README.md")


def test_the_readme_starts_with_the_two_commands() -> None:
    assert tuple(readme_commands()[:2]) == SETUP


@pytest.mark.parametrize("command", [command for command in readme_commands() if command not in SETUP])
def test_a_command_of_the_readme_runs(command: str, project: Path) -> None:
    small = [] if "--print-config" in command else SMALL
    printed = run([*command.split(), *small], project)
    if "--print-config" in command:
        assert "# 13 latent frames of 60x90, grid 13x30x45" in printed
        assert "# 17,550 + 226 tokens" in printed
    else:
        (checkpoint,) = project.glob("runs/*/latest")
        assert checkpoint.read_text() == "2"


def test_the_scripts_of_the_set_up_are_whole() -> None:
    """They are run whole by continuous integration (test.sh) and by whoever changes the demo (quickstart.sh)."""
    for command in SETUP:
        subprocess.run(["bash", "-n", command.split()[1]], cwd=ROOT, check=True)


@pytest.mark.slow
def test_the_demo_runs_in_a_small_form(tmp_path: Path) -> None:
    """Every step of the quickstart, too few of each to be good: the grades are there, and are below the bars."""
    steps = ("--vae-image-steps", "20", "--vae-clip-steps", "4", "--steps", "10", "--clips", "100")
    done = subprocess.run(
        [sys.executable, "tools/demo.py", "--out", str(tmp_path), *steps],
        cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 1
    assert "below the bar" in done.stdout
    assert (tmp_path / "report" / "sheet.png").is_file()
    assert (tmp_path / "report" / "loss.png").is_file()
    again = run(["python", str(ROOT / "tools" / "demo.py"), "--help"], ROOT)
    assert "--processes" in again


def test_the_first_mixin_is_what_the_page_says(project: Path) -> None:
    page = ROOT / "docs" / "first_mixin.md"
    mixin, look = blocks(page, "python")
    (project / "my_mixins.py").write_text(mixin)
    (project / "head_temperature.yaml").write_text(blocks(page, "yaml")[0])
    (command,) = commands(page)
    run([*command.split(), *SMALL[1:]], project)
    (project / "look.py").write_text(look)
    chain = "head_temperature -> adaln_layer -> pos_embed"
    assert re.search(rf"^attention_fn +{chain}$", run(["python", "look.py"], project), flags=re.MULTILINE)
    assert chain in page.read_text(encoding="utf-8")

    file = next(project.glob("runs/*/10/mp_rank_00_model_states.pt"))
    names = torch.load(file, weights_only=True)["module"]
    assert "model.diffusion_model.mixins.head_temperature.log_temperature" in names
