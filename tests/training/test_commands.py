"""The real command, killed with SIGKILL and typed again until the run is done: each step once, nothing else moved."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from sat.weights.whole import TRAINING_STATE, read_manifest
from tests.launch import Launched, start
from tests.ranks import run_ranks
from tests.tiny import SMALLER, only_run, records, train_on_rank
from tests.training.crashes import memory_folder, numbers_of

STEPS = 60
OPTIONS = (f"args.train_iters={STEPS}", "args.save_interval=5", "args.keep_last=2", "args.global_batch_size=4")
TP = "args.model_parallel_size=2"
SEED = 42
"""That of the command by default."""


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    with memory_folder(tmp_path) as found:
        yield found


def num_lines(folder: Path) -> int:
    return sum(file.read_text().count("\n") for file in folder.glob("*/metrics.jsonl"))


def kill(launched: Launched) -> None:
    """kill -9 to the launcher and all that it has started, at once."""
    for process in launched.everyone():
        process.kill()
    assert launched.wait() == -9, launched.output


def train(launcher: str, folder: Path, *words: str, until: int = 0) -> None:
    """Type the command; kill it when the run has that many lines of metrics, or let it come to its end."""
    command = ("--base", "configs/tiny.yaml", *SMALLER, *OPTIONS, *words, f"args.save={folder}")
    with start(launcher, "train_video.py", folder, *command) as launched:
        if until:
            launched.wait_until(lambda: num_lines(folder) >= until)
            kill(launched)
        else:
            assert launched.wait() == 0, launched.output


def uninterrupted(folder: Path, world: int) -> Path:
    run_ranks(train_on_rank, world, (*OPTIONS, f"args.save={folder}"), SEED, timeout=240.0)
    return only_run(folder)


def run_of(folder: Path) -> Path:
    return next(folder.glob("*/metrics.jsonl")).parent


def check_killed_twice(folder: Path, launcher: str, world: int) -> None:
    whole, save = uninterrupted(folder / "whole", world), folder / "broken"
    save.mkdir()
    for until in (8, 30):
        train(launcher, save, until=until)
        assert num_lines(save) < STEPS
    train(launcher, save)
    broken = run_of(save)
    assert [record["step"] for record in records(broken)] == list(range(1, STEPS + 1))
    assert numbers_of(broken) == numbers_of(whole)
    assert read_manifest(broken / str(STEPS)) == read_manifest(whole / str(STEPS))


@pytest.mark.timeout(600)  # three starts of the command, on a machine that may be busy
def test_a_command_killed_and_typed_again(folder: Path) -> None:
    check_killed_twice(folder, "python", 1)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_command_under_torchrun_killed_and_typed_again(folder: Path) -> None:
    check_killed_twice(folder, "torchrun", 2)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_processes_then_one_then_tensor_parallel(folder: Path) -> None:
    """Killed in between: one smooth curve, that of a run of one process."""
    whole, save = uninterrupted(folder / "whole", 1), folder / "moving"
    save.mkdir()
    train("torchrun", save, until=8)
    train("python", save, until=30)
    train("torchrun", save, TP)
    moved = run_of(save)
    assert [record["step"] for record in records(moved)] == list(range(1, STEPS + 1))
    expected, got = (torch.tensor([record["loss"] for record in records(run)]) for run in (whole, moved))
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=0.0)
    assert [record["lr"] for record in records(moved)] == [record["lr"] for record in records(whole)]


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_half_precision_on_a_gpu_goes_on_where_it_was(folder: Path, precision: str) -> None:
    """To the last bit, the loss scale and its counters among them."""
    words = (f"deepspeed.{precision}.enabled=true", "deepspeed.optimizer.type=sat.ops.FusedEmaAdam")
    for name in ("whole", "broken"):
        (folder / name).mkdir()
    train("python", folder / "whole", *words)
    for until in (8, 30, 0):
        train("python", folder / "broken", *words, until=until)
    whole, broken = run_of(folder / "whole"), run_of(folder / "broken")
    assert numbers_of(broken) == numbers_of(whole)
    for step in (str(STEPS), f"{STEPS}-ema"):
        assert read_manifest(broken / step) == read_manifest(whole / step)
    state = json.loads((broken / str(STEPS) / TRAINING_STATE).read_text())
    assert precision == "bf16" or state["loss_scaler"]["cur_iter"] == STEPS
