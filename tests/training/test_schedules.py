"""Any schedule of saves, kills, resumes and changes of size: each sample is seen exactly once an epoch.

At the level of what decides that: the saver with its real files, the search for the checkpoint to go on from, and the
data's order at any number of data-parallel ranks and steps of accumulation. Whole runs: test_commands.py and
test_oracle.py.
"""

import tempfile
from collections import Counter
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sat.config import ConfigNode
from sat.mpu.launch import read_launch
from sat.mpu.state import ParallelState
from sat.training.args import train_args
from sat.training.checkpoint import CheckpointPath
from sat.training.data import TrainingData
from sat.training.optimizer_state import Fragment
from sat.training.resume import read_training_state
from sat.training.retention import Retention
from sat.training.saving import HostMemory, SaveOptions, Saver, Snapshot
from sat.weights.finding import choose_iteration, weights_problem
from sat.weights.whole import iteration_names
from tests.ranks import run_ranks
from tests.tiny import tiny_config
from tests.training.crashes import memory_folder

GLOBAL_BATCH, SEED = 4, 7


@dataclass(frozen=True)
class Leg:
    """One start of a job, until it is killed."""

    dp_size: int
    micro_batch_size: int
    steps: int
    interval: int
    polls: int
    """How far the last save came: 0, its files were written; 1, it was being published; 2, it was published."""


LEGS = st.builds(
    Leg,
    dp_size=st.sampled_from([1, 2]),
    micro_batch_size=st.sampled_from([1, 2]),
    steps=st.integers(1, 7),
    interval=st.integers(1, 4),
    polls=st.integers(0, 2),
)


@cache
def config_of(num_samples: int) -> ConfigNode:
    return tiny_config(f"data.params.num_samples={num_samples}", "args.train_iters=1000")


def seen_in(leg: Leg, num_samples: int, first: int, last: int) -> list[list[str]]:
    """Of each step after `first` up to `last`, the samples that all ranks read, in the order of the run's counter."""
    config = config_of(num_samples)
    steps: list[list[tuple[int, str]]] = [[] for _ in range(first, last)]
    accumulation = GLOBAL_BATCH // (leg.dp_size * leg.micro_batch_size)
    for rank in range(leg.dp_size):
        sizes = (GLOBAL_BATCH, leg.micro_batch_size, rank, leg.dp_size)
        batches = TrainingData(config, train_args(config), SEED, *sizes).batches(first)
        for step in steps:
            for _ in range(accumulation):
                batch = next(batches)
                step += zip(batch["counters"].tolist(), batch["key"])
    return [[key for _, key in sorted(step)] for step in steps]


def run_leg(leg: Leg, run_dir: Path, first: int) -> None:
    """Save as a job would that goes on after `first`, and leave the last save where the kill found it."""
    options = SaveOptions(retention=Retention(keep_last=2))
    saver = Saver(run_dir, ParallelState(), read_launch(), options)
    weight = torch.zeros(3)

    def copy(memory: HostMemory) -> Snapshot:
        kept = memory.keep("w", weight)
        return Snapshot({"w": kept}, [Fragment("w", 0, weight.shape, {"master": kept}, {})])

    saves = [step for step in range(first + 1, first + leg.steps + 1) if step % leg.interval == 0]
    for step in saves:
        saver.start(step, copy, {"step": step, "samples": step * GLOBAL_BATCH})
        if step != saves[-1]:
            saver.finish()
    for _ in range(leg.polls):
        saver.close()
        saver.poll()
    saver.close()


def resumed_step(run_dir: Path) -> int:
    if not iteration_names(run_dir):
        return 0
    found = choose_iteration(run_dir, weights_problem)
    state = read_training_state(CheckpointPath(found.path, found.step))
    assert state["samples"] == state["step"] * GLOBAL_BATCH
    return state["step"]


def check_schedule(num_samples: int, legs: list[Leg]) -> None:
    history: list[list[str]] = []  # of each step that was not lost
    with tempfile.TemporaryDirectory() as folder:
        run_dir = Path(folder)
        for leg in legs:
            first = resumed_step(run_dir)
            assert first <= len(history)
            history = history[:first] + seen_in(leg, num_samples, first, first + leg.steps)
            run_leg(leg, run_dir, first)
            lost = len(history) - resumed_step(run_dir)
            assert lost < 2 * leg.interval or lost == len(history) - first
    seen = [key for step in history for key in step]
    assert all(len(step) == GLOBAL_BATCH for step in history)
    for start in range(0, len(seen) - num_samples + 1, num_samples):
        assert set(Counter(seen[start : start + num_samples]).values()) == {1}, f"epoch {start // num_samples}"


def check_many(rank: int, folder: str, examples: int) -> None:
    tempfile.tempdir = folder

    @settings(max_examples=examples, deadline=None, derandomize=True, database=None)
    @given(num_samples=st.integers(3, 11), legs=st.lists(LEGS, min_size=2, max_size=5))
    def check(num_samples: int, legs: list[Leg]) -> None:
        check_schedule(num_samples, legs)

    check()


@pytest.mark.parametrize("examples", [8, pytest.param(400, marks=pytest.mark.faults)])
def test_each_sample_is_seen_once_an_epoch(tmp_path: Path, examples: int) -> None:
    with memory_folder(tmp_path) as folder:
        run_ranks(check_many, 1, str(folder), examples, timeout=280.0)
