"""Saving in the background: whole or not at all, on all ranks alike."""

import json
import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from sat.errors import CheckpointError
from sat.mpu.launch import read_launch
from sat.mpu.shards import make_rule
from sat.mpu.state import ParallelState
from sat.training import saving
from sat.training.checkpoint import load_weights
from sat.training.ema import write_averages
from sat.training.lock import LockLost
from sat.training.optimizer_state import Fragment, save_fragments
from sat.training.planning.dry import Watch
from sat.training.retention import Retention
from sat.training.saving import HostMemory, SaveOptions, Saver, Snapshot
from sat.weights.finding import find_checkpoint
from sat.weights.whole import damage_of, problem_of
from tests.ranks import run_ranks


def snapshot(memory: HostMemory, rank: int, world: int, value: float, shadow: bool = False) -> Snapshot:
    """Weights of a matrix that is cut over tensor-parallel ranks, and their state."""
    weight = torch.full((3, 8 // world), value + rank)
    kinds = {"master": weight.flatten(), **({"shadow": weight.flatten() + 0.5} if shadow else {})}
    fragment = Fragment("w", 0, weight.shape, kinds, {"step": torch.tensor(value)})
    weights = {
        "w": memory.keep("w", weight),
        "alias": memory.keep("alias", weight),
        "bias": memory.keep("b", weight[0]),
    }
    return Snapshot(weights, memory.keep_fragments([fragment]))


def make_saver(run: Path, **options: Any) -> Saver:
    launch = read_launch()
    parallel = ParallelState.build(tp=launch.world_size)
    rule = make_rule(1, 8)
    return Saver(
        run, parallel, launch, SaveOptions(rules={"w": rule, "alias": rule}, aliases={"alias": "w"}, **options)
    )


def save(saver: Saver, step: int, value: float | None = None, shadow: bool = False) -> None:
    rank, world = saver.launch.rank, saver.launch.world_size
    number = float(step) if value is None else value
    saver.start(step, lambda memory: snapshot(memory, rank, world, number, shadow), {"step": step})


def contents(run: Path) -> dict[str, bytes]:
    """Everything in a run directory, by relative path."""
    return {str(path.relative_to(run)): path.read_bytes() for path in run.rglob("*") if path.is_file()}


def save_two(rank: int, run: str) -> None:
    saver = make_saver(Path(run), consolidate=True)
    for step in (1, 2):
        save(saver, step, shadow=True)
    saver.finish()
    assert saver.published == 2


def test_files_of_all_ranks_averages_and_a_joined_file(tmp_path: Path) -> None:
    run_ranks(save_two, 2, str(tmp_path))
    assert {path.name for path in tmp_path.iterdir()} == {"1", "1-ema", "2", "2-ema", "latest"}
    assert (tmp_path / "latest").read_text() == "2"
    for name in ("1", "1-ema", "2", "2-ema"):
        assert problem_of(tmp_path / name) is None and damage_of(tmp_path / name) is None
    weights = {"mp_rank_00_model_states.pt", "mp_rank_01_model_states.pt", "model.safetensors", "manifest.json"}
    state = {"optimizer_rank_00000.safetensors", "optimizer_rank_00001.safetensors", "training_state.json"}
    assert {path.name for path in (tmp_path / "2").iterdir()} == weights | state
    assert {path.name for path in (tmp_path / "2-ema").iterdir()} == weights
    listed = json.loads((tmp_path / "2" / "manifest.json").read_text())["files"]
    assert set(listed) == (weights | state) - {"manifest.json"}
    assert json.loads((tmp_path / "2" / "training_state.json").read_text()) == {"step": 2, "averages": True}
    joined, averaged = (load_file(tmp_path / name / "model.safetensors") for name in ("2", "2-ema"))
    expected = torch.cat([torch.full((3, 4), 2.0), torch.full((3, 4), 3.0)], dim=1)
    assert torch.equal(joined["w"], expected) and torch.equal(joined["bias"], torch.full((4,), 2.0))
    for name, difference in (("w", 0.5), ("alias", 0.5), ("bias", 0.0)):  # a second name has the same average
        assert torch.equal(averaged[name] - joined[name], torch.full_like(joined[name], difference))
    content = torch.load(tmp_path / "2-ema" / "mp_rank_01_model_states.pt", weights_only=True)
    assert (content["weights"], content["iteration"]) == ("ema", 2)


def save_averages(rank: int, run: str) -> tuple[int, int]:
    """Bytes that the averages of two tensor-parallel ranks take at most, and those of one rank's weights."""
    folder, shape, count = Path(run), (64, 256), 8
    for tp_rank in range(2):
        weights = {f"w{number}": torch.randn(shape, dtype=torch.bfloat16) for number in range(count)}
        torch.save({"module": weights, "iteration": 1}, folder / f"mp_rank_{tp_rank:02d}_model_states.pt")
        fragments = [
            Fragment(name, 0, value.shape, {"shadow": value.float().flatten()}, {}) for name, value in weights.items()
        ]
        save_fragments(folder / f"optimizer_rank_{tp_rank:05d}.safetensors", fragments, tp_rank, 2)
    (folder / "averages").mkdir()
    sizes = [weights[name].nbytes for name in weights]
    del fragments, weights
    with Watch("cpu") as watch:
        assert len(write_averages(folder, folder / "averages", {})) == 2
    return watch.peak, sum(sizes)


def test_averages_take_the_memory_of_one_rank_s_weights(tmp_path: Path) -> None:
    """Beside one of 8 parameters in float32, twice its bytes."""
    ((peak, weights),) = run_ranks(save_averages, 1, str(tmp_path))
    assert peak <= weights + 2 * weights / 8


# --- in the background -----------------------------------------------------------------------------------------------


class Gate:
    """Holds the writing of weights up until it is opened."""

    def __init__(self) -> None:
        self.open = threading.Event()
        self.write = saving.write_torch
        saving.write_torch = self  # type: ignore[assignment]

    def __call__(self, path: Path, content: Any) -> Any:
        assert self.open.wait(30)
        return self.write(path, content)


def train_on_while_saving(rank: int, run: str) -> None:
    folder, gate = Path(run), Gate()
    saver = make_saver(folder)
    live = torch.ones(3, 4)
    fragment = Fragment("w", 0, live.shape, {"master": live.flatten()}, {})

    def copy(memory: HostMemory) -> Snapshot:
        return Snapshot({"w": memory.keep("w", live)}, memory.keep_fragments([fragment]))

    saver.start(1, copy, {})
    live.fill_(7.0)  # training goes on
    for _ in range(3):
        saver.poll()
        assert not (folder / "1").exists() and saver.published is None
    gate.open.set()
    saver.finish()
    assert torch.equal(load_weights(folder)["w"], torch.ones(3, 4))
    stored = load_file(folder / "1" / "optimizer_rank_00000.safetensors")
    assert torch.equal(stored["master|w|0|12"], torch.ones(12))
    before = saver.memory.num_bytes
    saver.start(2, copy, {})
    saver.finish()
    assert saver.memory.num_bytes == before == 2 * live.nbytes  # one copy, used again
    assert torch.equal(load_weights(folder)["w"], live)


def test_what_is_saved_is_the_moment_of_the_save(tmp_path: Path) -> None:
    run_ranks(train_on_while_saving, 1, str(tmp_path))


def save_twice_at_once(rank: int, run: str) -> list[str]:
    folder, gate = Path(run), Gate()
    saver = make_saver(folder)
    save(saver, 1)
    threading.Timer(0.2, gate.open.set).start()
    save(saver, 2)
    at_start = sorted(path.name for path in folder.iterdir() if path.name.isdigit())
    saver.finish()
    return at_start


def test_one_save_at_a_time(tmp_path: Path) -> None:
    assert run_ranks(save_twice_at_once, 2, str(tmp_path)) == [["1"], ["1"]]
    assert find_checkpoint(tmp_path).step == 2


# --- failures --------------------------------------------------------------------------------------------------------


def break_rank(rank: int, broken: int) -> None:
    """One rank's disk is full."""

    def full(path: Path, content: Any) -> Any:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device", str(path))

    if rank == broken:
        saving.write_torch = full  # type: ignore[assignment]


def fail_and_go_on(rank: int, run: str, broken: int) -> list[str]:
    folder, write = Path(run), saving.write_torch
    saver = make_saver(folder, max_failed=3)
    save(saver, 1)
    saver.finish()
    before = contents(folder) if rank == 0 else {}
    dist.barrier()
    messages = []
    break_rank(rank, broken)
    for step in (2, 3):
        save(saver, step)
        saver.finish()  # says so, and goes on
        messages.append(saver.failed_in_a_row)
    if rank == 0:
        assert contents(folder) == before, "something else was touched, or left behind"
    dist.barrier()  # the others write nothing while that is looked at
    saving.write_torch = write
    save(saver, 4)
    saver.finish()
    messages.append(saver.failed_in_a_row)
    break_rank(rank, broken)
    try:
        for step in (5, 6, 7):
            save(saver, step)
            saver.finish()
    except CheckpointError as error:
        messages.append(str(error))
    return messages


@pytest.mark.parametrize("broken", [0, 1])
def test_failed_saves_are_told_and_harm_nothing_until_there_are_too_many(tmp_path: Path, broken: int) -> None:
    for first, second, third, message in run_ranks(fail_and_go_on, 2, str(tmp_path), broken):
        assert (first, second, third) == (1, 2, 0)
        assert (
            f"the checkpoint of step 7 was not saved to {tmp_path} (rank {broken}: [Errno 28] No space left" in message
        )
        assert "that was number 3 in a row (args.max_failed_saves), and nothing saved earlier was harmed" in message
    assert {path.name for path in tmp_path.iterdir()} == {"1", "4", "latest"}
    assert find_checkpoint(tmp_path).step == 4


def publish_badly(rank: int, run: str, kind: str) -> str:
    folder = Path(run)

    def before_publishing() -> None:
        raise LockLost("taken over") if kind == "lock" else ValueError("a bug")

    saver = make_saver(folder, before_publishing=before_publishing)
    save(saver, 1, shadow=True)
    try:
        saver.finish()
    except CheckpointError as error:
        return str(error)
    return ""


def test_a_lost_lock_ends_the_job_at_once(tmp_path: Path) -> None:
    for message in run_ranks(publish_badly, 2, str(tmp_path), "lock"):
        assert message == f"the checkpoint of step 1 was not saved to {tmp_path} (rank 0: taken over)"
    assert list(tmp_path.iterdir()) == []


def test_a_bug_in_the_background_does_not_pass_for_a_save(tmp_path: Path) -> None:
    assert run_ranks(publish_badly, 2, str(tmp_path), "bug") == ["", ""]
    assert list(tmp_path.iterdir()) == []


def test_old_checkpoints_that_cannot_be_deleted_do_not_fail_a_save(tmp_path: Path) -> None:
    run_ranks(delete_badly, 1, str(tmp_path))
    assert (tmp_path / "latest").read_text() == "3"


def delete_badly(rank: int, run: str) -> None:
    saver = make_saver(Path(run), retention=Retention(1))
    for step in (1, 2):
        save(saver, step)
    saver.finish()
    assert not (Path(run) / "1").exists()
    unlink = os.unlink

    def refuse(path: Any, *args: Any, **kwargs: Any) -> None:
        if str(path).endswith(".pt"):
            raise PermissionError(13, "Permission denied", str(path))
        unlink(path, *args, **kwargs)

    os.unlink = refuse  # type: ignore[assignment]
    save(saver, 3)
    saver.finish()
    assert saver.failed_in_a_row == 0 and saver.published == 3


# --- other jobs ------------------------------------------------------------------------------------------------------


def save_beside_leftovers(rank: int, run: str) -> None:
    folder = Path(run)
    saver = make_saver(folder)
    late = folder / ".1.saving-99-abc"  # a rank of an earlier job that has not noticed its end
    late.mkdir()
    save(saver, 1)
    (late / "mp_rank_00_model_states.pt").write_text("of the earlier job")
    saver.finish()


def test_ranks_of_an_earlier_job_write_elsewhere(tmp_path: Path) -> None:
    (tmp_path / ".1.saving-98-abc").mkdir()
    (tmp_path / ".0.deleting").mkdir()
    run_ranks(save_beside_leftovers, 1, str(tmp_path))
    assert damage_of(tmp_path / "1") is None
    assert {path.name for path in tmp_path.iterdir()} == {"1", "latest", ".1.saving-99-abc"}


def end_while_saving(rank: int, run: str) -> None:
    gate = Gate()
    saver = make_saver(Path(run))
    save(saver, 1)
    threading.Timer(0.2, gate.open.set).start()
    saver.close()
    files = contents(Path(run))
    time.sleep(0.1)
    assert contents(Path(run)) == files and len(files) == 2  # its own two files are written, nothing afterwards


def test_nothing_is_written_after_the_end(tmp_path: Path) -> None:
    run_ranks(end_while_saving, 1, str(tmp_path))
