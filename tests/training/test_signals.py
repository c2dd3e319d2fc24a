"""Being asked to stop: in one process, and as users and job schedulers ask real commands."""

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import Dataset

from sat.data.synthetic import SyntheticLatents
from sat.training.checkpoint import load_weights
from sat.training.signals import LAUNCHERS, STOPPED, StopRequest
from sat.weights.finding import find_checkpoint
from tests.launch import ROOT, STOPPING, Launched, start
from tests.ranks import run_ranks
from tests.tiny import SMALLER, only_run, records

WORDS = (
    *("--base", "configs/tiny.yaml", *SMALLER),
    *("args.train_iters=100000", "args.save_interval=100000", "args.global_batch_size=4"),
)


def wait_for(what: Callable[[], bool]) -> None:
    end = time.monotonic() + 10
    while not what():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_is_noted_and_its_echo_is_not_a_second_one(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with StopRequest() as stop:
        assert stop.name is None
        os.kill(os.getpid(), number)
        wait_for(lambda: stop.name is not None)
        assert stop.name == number.name
        os.kill(os.getpid(), signal.SIGTERM)  # would end this process if it counted
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.1)
        assert stop.name == number.name
    assert signal.getsignal(number) is before


def test_a_signal_after_a_time_limit_is_the_first_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """A job scheduler's, while the run saves: it must not end the save."""
    monkeypatch.setattr(StopRequest, "ECHO_SECONDS", 0.0)
    with StopRequest() as stop:
        stop.ask("the time is up")
        os.kill(os.getpid(), signal.SIGTERM)  # would end this process if it were taken for a second one
        wait_for(lambda: stop._signalled_at is not None)
        assert stop.name == "the time is up"


def test_other_signals_are_not_taken_for_a_request() -> None:
    """A data worker's end comes as SIGCHLD, for which torch has a handler too."""
    before = signal.signal(signal.SIGUSR2, lambda *_: None)
    try:
        with StopRequest() as stop:
            os.kill(os.getpid(), signal.SIGUSR2)
            time.sleep(0.1)
            assert stop.name is None
    finally:
        signal.signal(signal.SIGUSR2, before)


@pytest.mark.parametrize("name", LAUNCHERS)
def test_a_process_whose_launcher_has_died_stops(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(StopRequest, "LOOK_SECONDS", 0.01)
    parents = iter([7, 7, 7])
    monkeypatch.setattr(os, "getppid", lambda: next(parents, 1))
    for other in LAUNCHERS:
        monkeypatch.delenv(other, raising=False)
    with StopRequest() as stop:  # started by hand, from a shell that may go
        time.sleep(0.1)
        assert stop.name is None
    monkeypatch.setenv(name, "1")
    with StopRequest() as stop:
        wait_for(lambda: stop.name == "the launcher of this process has died")


def stop_one_rank(rank: int) -> list[bool]:
    with StopRequest() as stop:
        answers = [stop.agreed(torch.device("cpu"))]
        if rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)
            wait_for(lambda: stop.name is not None)
        answers.append(stop.agreed(torch.device("cpu")))
    return answers


def test_all_ranks_stop_where_one_is_asked() -> None:
    assert run_ranks(stop_one_rank, 2) == [[False, True], [False, True]]


def has_trained(folder: Path) -> bool:
    """Whether a run in the folder has made a few steps."""
    return any(file.read_text().count("\n") >= 3 for file in folder.glob("*/metrics.jsonl"))


def assert_saved(launched: Launched, folder: Path) -> None:
    """It left on its own, with a whole checkpoint of its last step, and said so once."""
    launched.wait()
    run = only_run(folder)
    last = records(run)[-1]["step"]
    checkpoint = find_checkpoint(run)
    assert checkpoint.step == last < 100000
    assert all(value.isfinite().all() for value in load_weights(run).values())
    assert launched.output.count("stopping after this step, with a checkpoint") == 1
    assert launched.output.count(f"saved {checkpoint.path}") == 1
    assert not list(run.glob(".*.saving"))


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("launcher", "number", "to_group", "num_workers"),
    [
        ("python", signal.SIGTERM, True, 2),  # job schedulers reach the data workers too
        ("torchrun-stopping", signal.SIGUSR1, False, 0),
        pytest.param("torchrun", signal.SIGINT, True, 0, marks=SLOW),
        pytest.param("torchrun", signal.SIGKILL, False, 0, marks=SLOW),  # it cannot tell its processes; they notice
        pytest.param("torchrun", signal.SIGUSR1, False, 2, marks=SLOW),  # without the flags it dies of it
        pytest.param("python", signal.SIGINT, True, 2, marks=SLOW),
        pytest.param("python", signal.SIGTERM, False, 0, marks=SLOW),
        pytest.param("torchrun", signal.SIGTERM, False, 2, marks=SLOW),
        pytest.param("torchrun", signal.SIGINT, True, 2, marks=SLOW),
        pytest.param("deepspeed", signal.SIGTERM, True, 2, marks=SLOW),
        pytest.param("deepspeed", signal.SIGINT, True, 2, marks=SLOW),  # its launcher adds a SIGTERM
    ],
)
def test_a_run_saves_and_leaves(
    tmp_path: Path, launcher: str, number: signal.Signals, to_group: bool, num_workers: int
) -> None:
    words = (*WORDS, f"args.num_workers={num_workers}", f"args.save={tmp_path}")
    with start(launcher, "train_video.py", tmp_path, *words) as launched:
        launched.wait_until(lambda: has_trained(tmp_path))
        if to_group:
            launched.signal_group(number)
        else:
            launched.process.send_signal(number)
        assert_saved(launched, tmp_path)
    if launcher == "python":
        assert launched.process.returncode == STOPPED


def test_the_pages_give_the_options_that_are_tested() -> None:
    assert (ROOT / "docs" / "multi_node.md").read_text(encoding="utf-8").count(f"{STOPPING} ") == 3


def test_a_time_limit_saves_and_leaves(tmp_path: Path) -> None:
    """A minute is what a first save may take: the limit is near at once."""
    with start(
        "python", "train_video.py", tmp_path, *WORDS, "args.time_limit_minutes=1", f"args.save={tmp_path}"
    ) as job:
        assert_saved(job, tmp_path)
    assert job.process.returncode == STOPPED == 75
    assert "args.time_limit_minutes 1: stopping after this step, with a checkpoint" in job.output
    assert find_checkpoint(only_run(tmp_path)).step == 1


class Stuck(Dataset):
    """Latents of which all but the first few are never ready."""

    def __init__(self, ready: int) -> None:
        self.inner = SyntheticLatents(1000, 3, 16, 4, 4)
        self.ready = ready
        self.given = 0

    def __len__(self) -> int:
        return len(self.inner)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if self.given >= self.ready:
            time.sleep(600)
        self.given += 1
        return self.inner[index]


def test_a_second_signal_ends_at_once(tmp_path: Path) -> None:
    """Also where the step that it would finish does not end; what was saved before stays."""
    stuck = "data={target: tests.training.test_signals.Stuck, params: {ready: 12}}"
    words = (*WORDS, "args.save_interval=2", stuck, f"args.save={tmp_path}")
    with start("python", "train_video.py", tmp_path, *words) as launched:
        launched.wait_until(lambda: has_trained(tmp_path))
        launched.wait_until(lambda: (only_run(tmp_path) / "latest").is_file())  # a thread writes step 2
        launched.process.terminate()
        launched.wait_until(lambda: "SIGTERM: stopping after this step" in launched.output)
        time.sleep(StopRequest.ECHO_SECONDS + 0.2)
        assert launched.process.poll() is None
        asked = time.monotonic()
        launched.process.terminate()
        assert launched.process.wait(10) == 128 + signal.SIGTERM
        assert time.monotonic() - asked < 2
    assert find_checkpoint(only_run(tmp_path)).step == 2
