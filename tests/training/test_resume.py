"""Continuing a run: found by the same command, on the newest whole checkpoint, to the same numbers."""

import errno
import json
import re
import resource
import shutil
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from sat.data.synthetic import SyntheticLatents
from sat.errors import CheckpointError
from sat.training.checkpoint import load_weights
from sat.training.retention import unread
from sat.weights.finding import model_file
from sat.weights.whole import checksum, damage_of, problem_of
from tests.ranks import run_ranks
from tests.tiny import only_run, records, train_on_rank
from tests.training.crashes import Job
from tests.training.test_identity import HARMS as RUN_FILE_HARMS

COMMON = (
    "args.train_iters=8",
    "args.global_batch_size=4",
    "args.save_interval=4",
    "deepspeed.optimizer.type=sat.ops.FusedEmaAdam",
)


def options(stage: int, *more: str) -> tuple[str, ...]:
    return (*COMMON, f"deepspeed.zero_optimization.stage={stage}", *more)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run of 8 steps on one process at stage 1."""
    folder = tmp_path_factory.mktemp("whole")
    run_ranks(train_on_rank, 1, options(1, f"args.save={folder}", "args.save_safetensors=true"))
    return only_run(folder)


def broken_off(whole: Path, folder: Path) -> Path:
    """The run as it was after step 4, with some metrics of step 5 already written."""
    run = folder / whole.name
    shutil.copytree(whole, run)
    for name in ("8", "8-ema"):
        shutil.rmtree(run / name)
    (run / "latest").write_text("4")
    lines = (run / "metrics.jsonl").read_text().splitlines()
    (run / "metrics.jsonl").write_text("\n".join(lines[:5]) + '\n{"kind": "tra')
    return run


def start(folder: Path, *words: str, world: int = 1) -> str:
    """Train as a command would; returns what it says. Fails as the command would."""
    log = folder.with_suffix(".log")
    log.write_text("")
    with Job(words, world, log) as job:
        codes = job.wait()
    assert not any(codes), log.read_text()
    return log.read_text()


@pytest.mark.parametrize(("world", "stage"), [(1, 1), (1, 0), (1, 2), (2, 1), (2, 2)])
def test_continued_run_equals_the_whole(whole: Path, tmp_path: Path, world: int, stage: int) -> None:
    run = broken_off(whole, tmp_path)
    run_ranks(train_on_rank, world, options(stage, f"args.load={run}", "args.mode=pretrain"))
    assert [record["step"] for record in records(run)] == list(range(1, 9))
    rtol = 0.0 if (world, stage) == (1, 1) else 1e-6
    for expected, got in zip(records(whole), records(run)):
        assert got["loss"] == pytest.approx(expected["loss"], rel=rtol, abs=0.0)
        assert got["lr"] == expected["lr"]
    for folder in ("8", "8-ema"):
        weights = load_weights(run / folder)
        for name, value in load_weights(whole / folder).items():
            if (world, stage) == (1, 1):
                assert torch.equal(weights[name], value), name
            elif "query_key_value.bias" not in name:  # the key's bias has no gradient but rounding
                torch.testing.assert_close(weights[name], value, rtol=0.0, atol=1e-5)


def test_finetune_starts_anew_from_the_weights(whole: Path, tmp_path: Path) -> None:
    run_ranks(
        train_on_rank,
        1,
        options(1, f"args.load={whole}", "args.mode=finetune", f"args.save={tmp_path}", "args.auto_warmup_steps=3"),
    )
    found = records(only_run(tmp_path))
    assert [record["step"] for record in found] == list(range(1, 9))
    peak = 1e-3
    assert all(record["lr"] <= 0.05 * peak for record in found[:3])
    assert found[3]["lr"] > 0.05 * peak
    assert found[0]["loss"] < records(whole)[0]["loss"]  # it has learned something before


def test_state_file_says_where_the_run_was(whole: Path) -> None:
    state = json.loads((whole / "4" / "training_state.json").read_text())
    assert (state["step"], state["samples"], state["global_batch_size"]) == (4, 16, 4)
    assert state["layout"] == {"dp": 1, "cp": 1, "tp": 1}
    assert state["configuration"] == json.loads((whole / "run.json").read_text())["configuration"]
    assert state["check"]["counters"] == [14, 15]  # the last micro batch


# --- auto ------------------------------------------------------------------------------------------------------------


def test_the_same_command_continues_its_run(whole: Path, tmp_path: Path) -> None:
    run = broken_off(whole, tmp_path / "runs")
    log = tmp_path / "log"
    start(log, *options(1, f"args.save={run.parent}"))
    assert only_run(run.parent) == run
    assert [(r["step"], r["loss"]) for r in records(run)] == [(r["step"], r["loss"]) for r in records(whole)]
    assert (run / "latest").read_text() == "8"


def test_a_finished_run_says_so(whole: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run_ranks(train_twice, 1, options(1, f"args.save={whole.parent}"))
    assert only_run(whole.parent) == whole


def train_twice(rank: int, words: tuple[str, ...]) -> None:
    """What a finished run answers."""
    import logging

    from sat.training.loop import train_joined
    from tests.tiny import tiny_config

    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("sat").addHandler(handler)
    logging.getLogger("sat").setLevel(logging.INFO)
    assert train_joined(tiny_config(*words), 7) is True
    assert re.search(r"is finished: it is at step 8 of 8; args.resume=never starts a new run", lines[-1]), lines


def test_never_starts_a_new_run(whole: Path, tmp_path: Path) -> None:
    run = broken_off(whole, tmp_path / "runs")
    run_ranks(train_on_rank, 1, options(1, f"args.save={run.parent}", "args.resume=never"))
    (other,) = (path for path in run.parent.iterdir() if path != run)
    assert [record["step"] for record in records(other)] == list(range(1, 9))
    assert (run / "latest").read_text() == "4"
    assert json.loads((other / "run.json").read_text())["number"] == 2


def test_another_configuration_starts_a_new_run_and_says_what_differs(whole: Path, tmp_path: Path) -> None:
    run = broken_off(whole, tmp_path / "runs")
    words = options(1, f"args.save={run.parent}", "args.lr_decay_style=constant")
    assert told(words) == [
        f"a new run: {run} had another configuration (args.lr_decay_style cosine, now constant); args.resume={run} "
        "would continue it"
    ]
    assert len(list(run.parent.iterdir())) == 2


def told(words: tuple[str, ...], world: int = 1) -> list[str]:
    """What finding the start says."""
    return run_ranks(say_start, world, words)[0]


def say_start(rank: int, words: tuple[str, ...]) -> list[str]:
    import logging

    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    for name in ("training.resume", "training.lock", "weights.finding"):
        logger = logging.getLogger(f"sat.{name}")
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
    train_on_rank(rank, words)
    return lines


def test_the_last_of_several_runs_goes_on(whole: Path, tmp_path: Path) -> None:
    first = broken_off(whole, tmp_path / "runs")
    second = first.with_name("tiny-01-01-00-00")  # by its name and time it would be the first
    shutil.copytree(first, second)
    content = json.loads((second / "run.json").read_text())
    (second / "run.json").write_text(json.dumps({**content, "number": 2}))
    run_ranks(train_on_rank, 1, options(1, f"args.save={first.parent}"))
    assert ((first / "latest").read_text(), (second / "latest").read_text()) == ("4", "8")


def test_a_run_that_saved_nothing_is_begun_again_in_its_folder(whole: Path, tmp_path: Path) -> None:
    run = broken_off(whole, tmp_path / "runs")
    shutil.rmtree(run / "4")
    (run / "latest").unlink()
    assert told(options(1, f"args.save={run.parent}"))[-1] == (
        f"{run} has no checkpoint yet: starting it from its first step"
    )
    assert only_run(run.parent) == run
    assert [(r["step"], r["loss"]) for r in records(run)] == [(r["step"], r["loss"]) for r in records(whole)]


def test_finetuning_goes_on_before_it_starts_from_weights(whole: Path, tmp_path: Path) -> None:
    words = options(1, f"args.load={whole}", "args.mode=finetune", f"args.save={tmp_path}", "args.weights=raw")
    run_ranks(train_on_rank, 1, words)
    run = only_run(tmp_path)
    expected = records(run)
    shutil.rmtree(run / "8")
    (run / "latest").write_text("4")
    run_ranks(train_on_rank, 1, words)
    assert only_run(tmp_path) == run
    assert [(r["step"], r["loss"]) for r in records(run)] == [(r["step"], r["loss"]) for r in expected]


def test_fewer_processes_keep_the_global_batch_of_the_run(tmp_path: Path) -> None:
    """As after an elastic restart: the command names no global batch, which two processes made twice as large."""
    words = ("args.train_iters=4", "args.save_interval=2", "args.global_batch_size=null", f"args.save={tmp_path}")
    run_ranks(train_on_rank, 2, words)
    run = only_run(tmp_path)
    expected = records(run)
    assert [record["samples"] for record in expected] == [4] * 4
    shutil.rmtree(run / "4")
    (run / "latest").write_text("2")
    run_ranks(train_on_rank, 1, words)
    assert only_run(tmp_path) == run
    for one, other in zip(expected, records(run)):
        assert other["samples"] == 4 and other["loss"] == pytest.approx(one["loss"], rel=1e-6)


# --- which checkpoint ------------------------------------------------------------------------------------------------


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(bytes(content))


FILES = (model_file(0), "optimizer_rank_00000.safetensors", "training_state.json", "manifest.json")
HARMS: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated": (lambda file: file.write_bytes(file.read_bytes()[:-3]), r"has [\d,]+ bytes of|is damaged"),
    "flipped": (flip, "is damaged"),
    "emptied": (lambda file: file.write_bytes(b""), r"has 0 bytes of|is damaged"),
    "deleted": (Path.unlink, "is missing"),
    "unreadable": (
        lambda file: (file.unlink(), file.mkdir()),
        r"has [\d,]+ bytes of|cannot be read \(Is a directory\)",
    ),
}
ALL_FILES = (*FILES, "model.safetensors", "8-ema/mp_rank_00_model_states.pt", "8-ema/model.safetensors")
"""Of a checkpoint with averages and joined weights."""


@pytest.mark.parametrize("harm", HARMS)
@pytest.mark.parametrize("name", ALL_FILES)
def test_no_harm_to_a_file_goes_unseen(whole: Path, tmp_path: Path, name: str, harm: str) -> None:
    """By names and sizes, or by checksums."""
    folder = whole / "8-ema" if name.startswith("8-ema") else whole / "8"
    shutil.copytree(folder, tmp_path / "copy")
    name = name.removeprefix("8-ema/")
    HARMS[harm][0](tmp_path / "copy" / name)
    problem = problem_of(tmp_path / "copy") or damage_of(tmp_path / "copy")
    assert problem is not None and re.match(rf"{re.escape(name)} ({HARMS[harm][1]})", problem), problem


def test_a_file_that_may_not_be_read_is_told(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For any user but root, whom no mode keeps out."""
    opened = Path.open

    def forbidding(path: Path, *args: Any, **kwargs: Any) -> Any:
        if path.name == model_file(0):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return opened(path, *args, **kwargs)

    monkeypatch.setattr(Path, "open", forbidding)
    assert damage_of(whole / "8") == f"{model_file(0)} cannot be read (Permission denied)"


def choose_averages(rank: int, run: Path) -> dict[str, list[str]]:
    """Each harm to the averaged weights in turn: what is said when weights are opened, and what is taken."""
    import logging

    from sat.training.resume import open_weights

    file, said = run / "8-ema" / model_file(0), {}
    handler = logging.Handler()
    handler.emit = lambda record: said[harm].append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("sat.training.ema").addHandler(handler)
    content = file.read_bytes()
    for harm, (break_it, _) in HARMS.items():
        said[harm] = []
        break_it(file)
        try:
            with ExitStack() as leases:
                said[harm].append(str(open_weights(run, "auto", leases).path))
        except CheckpointError as error:
            said[harm].append(str(error))
        if file.is_dir():
            file.rmdir()
        file.write_bytes(content)
    return said


def test_a_run_killed_after_its_last_save_deletes_what_is_not_kept(whole: Path, tmp_path: Path) -> None:
    """Which is done once `latest` names the new checkpoint; there is no next save that would."""
    run = tmp_path / whole.name
    shutil.copytree(whole, run)
    words = (*options(1, f"args.save={tmp_path}", "args.save_safetensors=true"), "args.keep_last=1")
    run_ranks(train_on_rank, 1, words)
    assert only_run(tmp_path) == run and load_weights(run)
    assert sorted(path.name for path in run.iterdir() if path.name[0].isdigit()) == ["8", "8-ema"]


def test_a_finished_run_deletes_nothing_for_a_damaged_checkpoint(whole: Path, tmp_path: Path) -> None:
    run = tmp_path / whole.name
    shutil.copytree(whole, run)
    (run / "8" / model_file(0)).write_bytes(b"")
    words = (f"args.load={run}", "args.mode=pretrain", "args.train_iters=4", "args.keep_last=1")
    run_ranks(train_on_rank, 1, (*options(1), *words))
    assert problem_of(run / "4") is None and damage_of(run / "4") is None


def lock_while_opened(rank: int, run: Path) -> tuple[list[bool], str]:
    """Whether folders are free to be deleted as their content is compared, and what is said where one is not."""
    from sat.training import resume

    compared, are_free = resume.damage_of, []

    def compare(folder: Path, names: Iterable[str]) -> str | None:
        with unread(folder) as is_free:
            are_free.append(is_free)
        return compared(folder, names)

    resume.damage_of = compare  # in a process of the test's own
    for path in (run, run / "8", run / "8" / model_file(0)):
        with ExitStack() as leases:
            resume.open_weights(path, "auto", leases)
            with unread(run / "8") as is_free:
                are_free.append(is_free)
    dist.barrier()
    with unread(run / "8") if rank == 0 else nullcontext(True) as is_free, ExitStack() as leases:
        assert is_free
        dist.barrier()
        with pytest.raises(CheckpointError) as error:
            resume.open_weights(run / "8", "raw", leases)
        dist.barrier()
    return are_free, str(error.value)


def test_weights_are_held_from_before_they_are_compared(whole: Path) -> None:
    for are_free, said in run_ranks(lock_while_opened, 2, whole):
        assert len(are_free) >= 6 and not any(are_free)
        assert said == f"{whole / '8'} is not whole: it is being deleted; give another iteration, or the run directory"


def test_broken_averages_are_told_and_never_taken(whole: Path, tmp_path: Path) -> None:
    """What names and sizes tell gives way to the weights themselves; what checksums tell is refused."""
    run = tmp_path / whole.name
    shutil.copytree(whole, run)
    (said,) = run_ranks(choose_averages, 1, run)
    (refusal,) = said.pop("flipped")
    message = rf"{run}/8-ema is not whole: {model_file(0)} is damaged.*; args.weights=raw takes {run}/8 itself"
    assert re.match(message, refusal), refusal
    for warning, taken in said.values():
        assert taken == str(run / "8") and warning.startswith(f"{run / '8-ema'} is not taken ({model_file(0)} "), (
            warning
        )


# --- disks that fail -------------------------------------------------------------------------------------------------


def train_with_small_files(rank: int, words: tuple[str, ...], limit: int) -> None:
    """As under `ulimit -f`: no file may grow past so many bytes."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    train_on_rank(rank, words)


FAILED = r"that was number 2 in a row \(args.max_failed_saves\), and nothing saved earlier was harmed"


def test_a_file_size_limit_harms_nothing(whole: Path, tmp_path: Path) -> None:
    run = broken_off(whole, tmp_path / "runs")
    before = {path: path.read_bytes() for path in (run / "4").iterdir()}
    words = options(1, f"args.save={run.parent}", "args.save_interval=2", "args.max_failed_saves=2")
    with pytest.raises(AssertionError, match=rf"the checkpoint of step 8 was not saved .*File too large.*{FAILED}"):
        run_ranks(train_with_small_files, 1, words, 50_000)
    assert {path: path.read_bytes() for path in (run / "4").iterdir()} == before
    assert (run / "latest").read_text() == "4" and not (run / "8").exists()
    assert [(r["step"], r["loss"]) for r in records(run)] == [(r["step"], r["loss"]) for r in records(whole)]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[tuple[Path, Callable[[str], None]]]:
    """A file system of its own and a way to mount it anew; where that is not allowed the test is skipped."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(options: str) -> None:
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], capture_output=True)
        if done.returncode:
            pytest.skip("no file system may be mounted here")

    mount("size=16m")
    yield folder, mount
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_and_a_read_only_disk_harm_nothing(whole: Path, small_disk: tuple[Path, Callable[[str], None]]) -> None:
    folder, mount = small_disk
    run = broken_off(whole, folder / "runs")
    before = {path: path.read_bytes() for path in (run / "4").iterdir()}
    words = options(1, f"args.save={run.parent}", "args.save_interval=2", "args.max_failed_saves=2")
    used = shutil.disk_usage(folder).used
    mount(f"remount,size={used + 100_000}")
    with pytest.raises(AssertionError, match=rf"the checkpoint of step 8 was not saved .*No space left.*{FAILED}"):
        run_ranks(train_on_rank, 1, words)
    mount("remount,ro")
    with pytest.raises(AssertionError, match=rf"cannot write to {run}: Read-only file system; give a run that can be"):
        run_ranks(train_on_rank, 1, words)
    assert {path: path.read_bytes() for path in (run / "4").iterdir()} == before
    mount("remount,rw,size=16m")
    run_ranks(train_on_rank, 1, words)
    assert (run / "latest").read_text() == "8"
    assert [(r["step"], r["loss"]) for r in records(run)] == [(r["step"], r["loss"]) for r in records(whole)]


@pytest.mark.parametrize(
    ("name", "harm"),
    [
        pytest.param(name, harm, marks=[] if name == model_file(0) or harm == "flipped" else pytest.mark.slow)
        for name in FILES
        for harm in HARMS
        if harm != "unreadable" or name == model_file(0)
    ],
)
def test_a_broken_newest_checkpoint_gives_way_to_the_one_before(
    whole: Path, tmp_path: Path, name: str, harm: str
) -> None:
    """On two ranks, of which each reads its share of the files."""
    run = tmp_path / "runs" / whole.name
    shutil.copytree(whole, run)
    break_it, reason = HARMS[harm]
    break_it(run / "8" / name)
    before = {path: path.read_bytes() for path in (run / "4").iterdir()}
    (line,) = [line for line in told(options(1, f"args.save={run.parent}"), 2) if "taking" in line]
    assert re.fullmatch(rf"{run}: iteration 8 is not whole \({name} ({reason}).*\); taking iteration 4", line), line
    assert {path: path.read_bytes() for path in (run / "4").iterdir()} == before
    assert (run / "latest").read_text() == "8"  # and the broken one was made again
    assert all(value.isfinite().all() for value in load_weights(run).values())


@pytest.mark.parametrize("content", ["", "7", "8-ema", "garbage\0", None])
def test_latest_is_a_hint(whole: Path, tmp_path: Path, content: str | None) -> None:
    run = broken_off(whole, tmp_path / "runs")
    if content is None:
        (run / "latest").unlink()
    else:
        (run / "latest").write_text(content)
    lines = told(options(1, f"args.save={run.parent}"))
    assert any(("trying iteration 4" in line) or ("taking iteration 4" in line) for line in lines), lines
    assert [(r["step"], r["loss"]) for r in records(run)] == [(r["step"], r["loss"]) for r in records(whole)]


def test_nothing_whole_is_refused_and_left_alone(whole: Path, tmp_path: Path) -> None:
    run = broken_off(whole, tmp_path / "runs")
    flip(run / "4" / model_file(0))
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and path.name != ".lock"}
    with pytest.raises(
        AssertionError, match=rf"{run} holds no whole checkpoint: iteration 4 is not whole \(mp_rank_00"
    ):
        run_ranks(train_on_rank, 1, options(1, f"args.save={run.parent}"))
    assert {path: path.read_bytes() for path in before} == before
    assert only_run(run.parent) == run


# --- a run.json that cannot be read ----------------------------------------------------------------------------------


@pytest.mark.parametrize("harm", ["truncated", "deleted", "unreadable"])
def test_a_broken_run_file_starts_nothing_over(whole: Path, tmp_path: Path, harm: str) -> None:
    """The newest checkpoint tells the run, and run.json is written anew."""
    run = broken_off(whole, tmp_path / "runs")
    before = json.loads((run / "run.json").read_text())
    break_it, what = RUN_FILE_HARMS[harm]
    break_it(run / "run.json")
    words = options(1, f"args.save={run.parent}")
    told_of = f"{what.replace('FILE', str(run / 'run.json'))}; checkpoint 4 tells its run"
    if harm == "unreadable":  # what lies in its place is not ours to delete
        with pytest.raises(AssertionError, match=re.escape(f"the run cannot start: {run / 'run.json'}: Is a dir")):
            run_ranks(train_on_rank, 2, words)
        assert only_run(run.parent) == run and (run / "latest").read_text() == "4"
        return
    assert told_of in told(words)
    assert only_run(run.parent) == run and json.loads((run / "run.json").read_text()) == before
    assert [(r["step"], r["loss"]) for r in records(run)] == [(r["step"], r["loss"]) for r in records(whole)]


def test_a_run_that_nothing_tells_is_refused_or_goes_on_by_name(whole: Path, tmp_path: Path) -> None:
    run = broken_off(whole, tmp_path / "runs")
    file = run / "4" / "training_state.json"
    state = json.loads(file.read_text())
    del state["run"], state["configuration"]
    write_whole(file, state)
    (run / "run.json").write_bytes(b"")
    problem = f"{run / 'run.json'} is damaged, and its checkpoints do not tell which run they belong to"
    words = options(1, f"args.save={run.parent}")
    with pytest.raises(
        AssertionError, match=re.escape(f"{problem}; args.resume={run} continues it, args.resume=never")
    ):
        run_ranks(train_on_rank, 1, words)
    assert only_run(run.parent) == run and (run / "latest").read_text() == "4"
    lines = told((*words, f"args.resume={run}"))
    assert f"{problem}; {run} goes on all the same, as args.resume or args.load names it" in lines
    assert (run / "latest").read_text() == "8" and json.loads((run / "run.json").read_text())["number"] == 1


def write_whole(file: Path, content: dict[str, Any]) -> None:
    """Change a JSON file of a checkpoint together with its manifest."""
    file.write_text(json.dumps(content))
    manifest = json.loads((file.parent / "manifest.json").read_text())
    manifest["files"][file.name] = {"bytes": file.stat().st_size, "blake2b": checksum(file)}
    (file.parent / "manifest.json").write_text(json.dumps(manifest))


# --- by name ---------------------------------------------------------------------------------------------------------


def test_a_named_iteration_sets_the_run_back(whole: Path, tmp_path: Path) -> None:
    run = tmp_path / whole.name
    shutil.copytree(whole, run)
    lines = told(options(1, f"args.resume={run / '4'}", "args.train_iters=6"))
    assert f"{run} goes on with another configuration: args.train_iters 8, now 6" in lines
    assert f"{run} is set back from step 8 to 4" in lines
    assert (run / "latest").read_text() == "6" and (run / "8").is_dir()
    assert [record["step"] for record in records(run)] == list(range(1, 7))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("args.resume=nowhere",), "there is no run nowhere; give a run directory, or one of its iterations"),
        (("args.resume=RUN/8-ema",), "RUN/8-ema holds averaged weights, no training state; give 8 beside it"),
        (("args.resume=RUN/8/mp_rank_00_model_states.pt",), "holds weights only, no training state to continue from"),
        (("args.resume=RUN/tensorboard",), "is no run: it holds neither a checkpoint nor a run.json that is whole"),
        (("args.resume=never", "args.load=RUN"), "args.mode pretrain continues that run, and args.resume is never"),
        (("args.resume=RUN", "args.load=RUN/4"), "args.resume names RUN and args.load RUN/4; give the one to continue"),
    ],
)
def test_what_cannot_be_continued_says_why(whole: Path, words: tuple[str, ...], message: str) -> None:
    words = tuple(word.replace("RUN", str(whole)) for word in words)
    with pytest.raises(AssertionError, match=re.escape(message.replace("RUN", str(whole)))):
        run_ranks(train_on_rank, 1, options(1, *words))


def test_another_batch_size_is_refused(whole: Path, tmp_path: Path) -> None:
    run = broken_off(whole, tmp_path)
    more = (f"args.load={run}", "args.mode=pretrain", "args.global_batch_size=8")
    with pytest.raises(AssertionError, match="global_batch_size 4, this run has 8"):
        run_ranks(train_on_rank, 1, options(1, *more))


def test_a_run_in_use_is_refused(whole: Path, tmp_path: Path) -> None:
    """The second job names the first one's host and process, and touches nothing."""
    run = broken_off(whole, tmp_path / "runs")
    (tmp_path / "log").touch()
    slow = f"data={{target: tests.training.test_resume.Slow, params: {json.dumps(SIZES)}}}"
    words = options(1, f"args.save={tmp_path / 'slow'}", slow)
    with Job(words, 1, tmp_path / "log") as job:
        while not list((tmp_path / "slow").glob("*/run.json")):
            assert job.codes() == [None], (tmp_path / "log").read_text()
        with pytest.raises(
            AssertionError, match=rf"is in use by process {job.ranks[0].pid} on \S+; end that job first"
        ):
            run_ranks(train_on_rank, 1, words)
    assert run.is_dir()


SIZES = {"num_samples": 1000, "num_frames": 3, "channels": 16, "height": 4, "width": 4}


class Slow(SyntheticLatents):
    """Latents that take their time."""

    def __getitem__(self, index: int) -> dict[str, Any]:
        time.sleep(2.0)
        return super().__getitem__(index)
