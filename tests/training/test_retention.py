"""Which checkpoints of a run are kept."""

import json
import os
from multiprocessing import get_context
from multiprocessing.synchronize import Event
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sat.config import load_config
from sat.errors import CheckpointError, ConfigError
from sat.training.args import train_args
from sat.training.retention import Retention, unread
from sat.weights.finding import reading

STEPS = st.dictionaries(st.integers(1, 60), st.none() | st.floats(0, 1, allow_nan=False), min_size=1)


def test_all_are_kept_unless_a_number_is_given() -> None:
    assert Retention().doomed({1: 0.1, 2: None}, 2) == []


def test_the_last_the_nth_and_the_best_are_kept() -> None:
    losses: dict[int, float | None] = dict(zip(range(100, 1100, 100), [9, 3, 8, 7, 1, 6, 5, 4, 8, 8]))
    assert Retention(2).doomed(losses, 1000) == [100, 200, 300, 400, 500, 600, 700, 800]
    assert Retention(2, keep_every=400).doomed(losses, 1000) == [100, 200, 300, 500, 600, 700]
    assert Retention(2, keep_every=400, keep_best=2).doomed(losses, 1000) == [100, 300, 600, 700]


@given(STEPS, st.integers(1, 5), st.none() | st.integers(1, 10), st.integers(0, 3), st.data())
def test_what_is_promised_is_kept(
    losses: dict[int, float | None], last: int, every: int | None, best: int, data: st.DataObject
) -> None:
    latest = data.draw(st.sampled_from(sorted(losses)))
    doomed = Retention(last, every, best).doomed(losses, latest)
    past = [step for step in sorted(losses) if step <= latest]
    kept = set(past) - set(doomed)
    assert latest in kept and set(past[-last:]) <= kept
    assert all(step <= latest for step in doomed)  # a branch that was left is not touched
    assert not every or all(step in kept for step in past if step % every == 0)
    measured = sorted((loss, step) for step in past if (loss := losses[step]) is not None)
    assert all(step in kept for _, step in measured[:best])
    if not every and not best:
        assert len(kept) == min(last, len(past))


def make_run(run: Path, steps: dict[int, float | None], latest: str) -> Path:
    for step, loss in steps.items():
        for name in (str(step), f"{step}-ema"):
            (run / name).mkdir()
            (run / name / "manifest.json").write_text('{"files": {}}')
        validation = None if loss is None else {"step": step, "loss": loss}
        (run / str(step) / "training_state.json").write_text(json.dumps({"validation": validation}))
    (run / "latest").write_text(latest)
    return run


def names(run: Path) -> set[str]:
    return {path.name for path in run.iterdir() if path.is_dir()}


def with_averages(*steps: int) -> set[str]:
    return {str(step) for step in steps} | {f"{step}-ema" for step in steps}


def test_averages_go_with_their_iteration(tmp_path: Path) -> None:
    run = make_run(tmp_path, {1: 0.5, 2: 0.1, 3: None, 4: 0.3, 5: 0.9}, "4")
    assert Retention(1, keep_best=1).tidy(run) == [1, 3]
    assert names(run) == with_averages(2, 4, 5)


def test_a_validation_of_earlier_weights_does_not_count(tmp_path: Path) -> None:
    """Step 2 was saved when the last validation was that of step 1."""
    run = make_run(tmp_path, {1: 0.1, 2: None, 3: 0.5, 4: None}, "4")
    state = {"validation": {"step": 1, "loss": 0.1}}
    (run / "2" / "training_state.json").write_text(json.dumps(state))
    assert Retention(1, keep_best=2).tidy(run) == [2]


def test_averages_that_a_killed_deletion_left_go_too(tmp_path: Path) -> None:
    run = make_run(tmp_path, {1: None, 2: None, 3: None}, "2")
    (run / "1" / "manifest.json").unlink()
    (run / "1" / "training_state.json").unlink()
    (run / "1").rmdir()
    Retention(2).tidy(run)
    assert names(run) == with_averages(2, 3)


@pytest.mark.parametrize("latest", ["7", "", "release", "2-ema"])
def test_nothing_is_deleted_while_latest_is_in_doubt(tmp_path: Path, latest: str) -> None:
    run = make_run(tmp_path, {1: None, 2: None}, latest)
    assert Retention(1).tidy(run) == []
    assert names(run) == with_averages(1, 2)


@pytest.mark.parametrize(
    ("states", "deleted"),
    [
        ([(True, None), (True, None), (True, None)], [1, 2]),
        ([(True, None), (True, None), (True, 3)], [1]),  # saved in a row of skipped steps, its batch being well
        ([(True, None), (False, 2), (False, 2)], [2]),
        ([(True, None), (False, None), (False, 3)], [2]),  # an update that spoiled the weights
        ([(False, 1), (False, 1), (False, 1)], [1, 2]),
    ],
)
def test_the_newest_good_one_stays_while_steps_are_bad(
    tmp_path: Path, states: list[tuple[bool, int | None]], deleted: list[int]
) -> None:
    """states: of steps 1, 2, 3 whether their loss was finite, and the first of the skipped steps before them."""
    run = make_run(tmp_path, {1: None, 2: None, 3: None}, "3")
    for step, (is_finite, first) in enumerate(states, 1):
        state = {"check": {} if is_finite else None, "health": {"first_skipped": first}}
        (run / str(step) / "training_state.json").write_text(json.dumps(state))
    assert Retention(1).tidy(run) == deleted


def read_until(folder: Path, reads: Event, done: Event) -> None:
    with reading(folder):
        reads.set()
        done.wait(30)


@pytest.mark.parametrize("name", ["1", "1-ema"])
def test_what_is_being_read_stays(tmp_path: Path, name: str) -> None:
    run = make_run(tmp_path, {1: None, 2: None}, "2")
    context = get_context("fork")
    reads, done = context.Event(), context.Event()
    reader = context.Process(target=read_until, args=(run / name, reads, done))
    reader.start()
    assert reads.wait(30)
    with unread(run / name) as is_free:
        assert not is_free
    assert Retention(1).tidy(run) == [] and names(run) == with_averages(1, 2)
    os.kill(reader.pid or 0, 9)  # a reader that dies reads no more
    reader.join()
    assert Retention(1).tidy(run) == [1] and names(run) == with_averages(2)


def test_folders_that_nobody_deletes_need_no_lock(tmp_path: Path) -> None:
    with reading(tmp_path), unread(tmp_path) as is_free:
        assert is_free
    with unread(tmp_path / "nowhere") as is_free:
        assert is_free


def test_what_is_being_deleted_is_not_read(tmp_path: Path) -> None:
    run = make_run(tmp_path, {1: None, 2: None}, "2")
    refusal = pytest.raises(CheckpointError, match="2 is being deleted; give another iteration")
    with unread(run / "2"), refusal, reading(run / "2"):
        pass
    with reading(run / "2"):
        pass


@pytest.mark.parametrize("word", ["args.keep_every=10", "args.keep_best=1"])
def test_keeping_more_than_all_is_refused(word: str) -> None:
    with pytest.raises(ConfigError, match=r"without args.keep_last every checkpoint is kept; set args.keep_last"):
        train_args(load_config([], [word]))
