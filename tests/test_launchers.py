"""python, torchrun and deepspeed start the same run: the commands of the README on configs/tiny.yaml, loss by loss."""

import re
from pathlib import Path

import pytest

from tests.launch import run
from tests.tiny import only_run, records

STEPS = 20
LOSS_RTOL = 1e-5  # measured 5e-8


def train(launcher: str, folder: Path, *words: str) -> tuple[str, Path]:
    """The smoke test of a new machine; returns what it printed and the run directory."""
    folder.mkdir()
    output = run(
        *(launcher, "train_video.py", folder, "--base", "configs/tiny.yaml", "--seed", "7"),
        *(f"args.train_iters={STEPS}", "args.global_batch_size=4", f"args.save={folder}", "args.split=1", *words),
    )
    return output, only_run(folder)


def losses(folder: Path, kind: str = "train") -> list[float]:
    return [record["loss"] for record in records(folder, kind)]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One process at ZeRO 0, the plainest run there is."""
    return train("python", tmp_path_factory.mktemp("alone") / "runs", "deepspeed.zero_optimization.stage=0")[1]


@pytest.mark.parametrize(
    ("launcher", "stage"),
    [
        ("torchrun", 1),
        *(pytest.param("torchrun", stage, marks=pytest.mark.slow) for stage in (0, 2)),
        *(pytest.param("deepspeed", stage, marks=pytest.mark.slow) for stage in (0, 1, 2)),
        *(pytest.param("python", stage, marks=pytest.mark.slow) for stage in (1, 2)),
    ],
)
def test_every_launcher_gives_the_same_losses(alone: Path, tmp_path: Path, launcher: str, stage: int) -> None:
    output, folder = train(launcher, tmp_path / "runs", f"deepspeed.zero_optimization.stage={stage}")
    assert len(losses(folder)) == len(losses(alone)) == STEPS
    assert losses(folder) == pytest.approx(losses(alone), rel=LOSS_RTOL)
    assert losses(folder, "valid") == pytest.approx(losses(alone, "valid"), rel=LOSS_RTOL)
    world = 1 if launcher == "python" else 2
    assert f"{world} processes = dp {world} x cp 1 x tp 1 on cpu" in output
    assert_rank_0_speaks(output, folder)


def assert_rank_0_speaks(output: str, folder: Path) -> None:
    """Each line of the run stands once, with the numbers of metrics.jsonl; no other rank says a word or warns again."""
    steps = re.findall(rf"step (\d+)/{STEPS}  loss (\S+)", output)
    assert steps == [(str(record["step"]), f"{record['loss']:.5f}") for record in records(folder)]
    for line in (
        "parameters trained of",
        "global batch 4 = ",
        "3 latent frames of 8x8, grid 3x4x4",
        "48 + 16 tokens",
        "args.split (the command line) has no effect here: name train_data and valid_data instead",
    ):
        assert output.count(line) == 1, line
    assert output.count("validation at step 20: loss") == 1
    assert output.count(f"saved {folder / str(STEPS)} (") == 1
    assert "rank 1" not in output and "Warning:" not in output


def test_the_loss_falls(alone: Path) -> None:
    assert sum(losses(alone)[-5:]) < sum(losses(alone)[:5])
