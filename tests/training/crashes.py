"""Training that is killed: at any change that a save makes on disk, or at any moment; and what must hold afterwards."""

import json
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sat.logs import setup_logging
from sat.weights.whole import damage_of, iteration_names, problem_of, read_latest, read_manifest
from tests.ranks import _context
from tests.tiny import train_on_rank

STEPS, INTERVAL = 16, 2
OPTIONS = (
    f"args.train_iters={STEPS}",
    f"args.save_interval={INTERVAL}",
    "args.global_batch_size=4",
    "args.keep_last=2",
    "args.save_safetensors=true",
    "args.eval_interval=4",
    "args.eval_timesteps=[500]",
    "deepspeed.optimizer.type=sat.ops.FusedEmaAdam",
)
"""A run that uses all of saving: averages, a joined file, validation, deletion of old checkpoints."""


@dataclass(frozen=True)
class Plan:
    """Where a process kills itself: around its nth change on disk."""

    number: int
    when: str
    """before, after, or half: in the middle of a write."""
    in_save: bool = True
    """Count the changes that saving makes, or those of the start."""


class Killer:
    """Counts the changes on disk that this process makes, and kills it at one of them."""

    CHANGES = ("mkdir", "rename", "replace", "unlink", "rmdir", "fsync")

    def __init__(self, plan: Plan | None) -> None:
        self.plan = plan
        self.seen: list[str] = []
        self._lock = threading.Lock()

    def install(self) -> None:
        """Stand in for what changes something on disk, for good: the process is a test's own."""
        from sat.training.files import HashedFile

        for name in self.CHANGES:
            setattr(os, name, self._around(name, getattr(os, name)))
        write, made = HashedFile.write, HashedFile.__init__

        def writing(file: Any, data: Any) -> int:
            file.calls += 1
            if file.calls not in (1, 20):  # the first write of a file, and one in its middle
                return write(file, data)
            view = memoryview(data).cast("B")

            def half() -> None:
                write(file, view[: len(view) // 2])
                file._stream.flush()

            return self._around(f"write {file.path.name}", write, half)(file, data)

        def making(file: Any, path: Path) -> None:
            file.calls = 0
            self._around(f"open {path.name}", made)(file, path)

        HashedFile.write, HashedFile.__init__ = writing, making  # type: ignore[method-assign]

    def _around(self, name: str, function: Callable, half: Callable[[], None] | None = None) -> Callable:
        def changed(*args: Any, **kwargs: Any) -> Any:
            number = self._count(name)
            self._die_if(number, "before")
            if half is not None and self._is_here(number, "half"):
                half()
                self._die()
            try:
                return function(*args, **kwargs)
            finally:
                self._die_if(number, "after")

        return changed

    def _count(self, name: str) -> int | None:
        """The number of a change, if its thread's are counted."""
        in_save = threading.current_thread().name.startswith("save-")
        in_main = threading.current_thread() is threading.main_thread()
        wanted = in_save if self.plan is None or self.plan.in_save else in_main
        if not wanted:
            return None
        with self._lock:
            self.seen.append(name)
            return len(self.seen) - 1

    def _is_here(self, number: int | None, when: str) -> bool:
        return self.plan is not None and number == self.plan.number and when == self.plan.when

    def _die_if(self, number: int | None, when: str) -> None:
        if self._is_here(number, when):
            self._die()

    @staticmethod
    def _die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(60)


def _child(
    rank: int, world: int, store: str, log: Path, options: tuple[str, ...], plan: Plan | None, notes: str
) -> None:
    """One rank of a job that may be killed. It leaves the names of the changes that it made in `notes`."""
    import datetime

    import torch
    import torch.distributed as dist

    stream = log.open("a")
    os.dup2(stream.fileno(), 2)
    os.dup2(stream.fileno(), 1)
    sys.stderr = sys.stdout = stream
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world))
    setup_logging(rank)  # it says when a save begins
    killer = Killer(plan)
    killer.install()
    timeout = datetime.timedelta(seconds=60)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world, timeout=timeout)
    train_on_rank(rank, options)
    Path(notes).write_text(json.dumps(killer.seen))
    dist.destroy_process_group()


_POLLING = threading.Lock()
"""multiprocessing polls the children of all threads when one starts a child; polls of one child must not overlap."""


class Job:
    """Ranks that train. Leaving the `with` block kills what is left of them."""

    def __init__(self, options: tuple[str, ...], world: int, log: Path, plans: dict[int, Plan] | None = None) -> None:
        self._folder = tempfile.TemporaryDirectory()
        self.log = log
        self.notes = Path(self._folder.name) / "notes"
        store, context = f"{self._folder.name}/store", _context()
        plans = plans or {}
        self.ranks = [
            context.Process(
                target=_child, args=(rank, world, store, log, options, plans.get(rank), f"{self.notes}{rank}")
            )
            for rank in range(world)
        ]

    def __enter__(self) -> "Job":
        with _POLLING:
            for process in self.ranks:
                process.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        self._folder.cleanup()

    def kill(self, rank: int | None = None) -> None:
        """SIGKILL to a rank, or to all."""
        with _POLLING:
            for process in self.ranks if rank is None else [self.ranks[rank]]:
                if process.is_alive():
                    process.kill()

    def codes(self) -> list[int | None]:
        """Exit codes of all ranks, None where one still runs."""
        with _POLLING:
            return [process.exitcode for process in self.ranks]

    def wait(self, timeout: float = 120.0) -> list[int]:
        """Exit codes of all ranks. When one dies the others get a moment to notice, then they are killed too."""
        end = time.monotonic() + timeout
        is_dying = False
        while None in (codes := self.codes()):
            if any(codes) and not is_dying:
                end, is_dying = time.monotonic() + 5, True
            if time.monotonic() > end:
                assert is_dying, self.log.read_text()
                self.kill()
            time.sleep(0.005)
        return [code or 0 for code in codes]

    def changes(self, rank: int) -> list[str]:
        """Names of the changes on disk that a rank made, once it has come to its end."""
        return json.loads(Path(f"{self.notes}{rank}").read_text())


@dataclass(frozen=True)
class Reference:
    """What an uninterrupted run leaves."""

    manifests: dict[int, dict[str, Any]]
    """Step -> the files' sizes and checksums; of averages under -step."""
    losses: list[dict[str, Any]]
    """Its metrics, without what depends on the clock."""
    changes: list[list[str]]
    """Of each rank, the names of the changes on disk that one save makes which also deletes an old checkpoint."""
    begun: Path
    """A run that was killed after three of its saves: the next one deletes one."""
    told: str
    """What that one has said."""


CLOCK = ("step_time", "data_wait", "comm_wait", "tokens_per_s", "tflops", "mem_gb", "mfu", "hfu")


def numbers_of(run: Path) -> list[dict[str, Any]]:
    """Metrics of a run without what depends on the clock."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in CLOCK} for line in lines]


def run_in(save: Path) -> Path | None:
    """The run directory in a folder, if there is one yet."""
    found = [path for path in save.iterdir() if (path / "run.json").is_file()] if save.is_dir() else []
    assert len(found) <= 1
    return found[0] if found else None


def make_reference(folder: Path, world: int, options: tuple[str, ...] = ()) -> Reference:
    """Run to the end without a break, keeping every checkpoint for its checksums; and a run that is broken off."""
    options, log = (*OPTIONS, *options), folder.with_suffix(".log")
    with Job((*options, f"args.save={folder}", "args.keep_last=null"), world, log) as job:
        assert job.wait() == [0] * world, job.log.read_text()
    run = run_in(folder)
    assert run is not None
    manifests = {}
    for step in range(INTERVAL, STEPS + 1, INTERVAL):
        manifests[step] = read_manifest(run / str(step)) or {}
        manifests[-step] = read_manifest(run / f"{step}-ema") or {}
    whole, begun = folder.with_name(f"{folder.name}-whole"), folder.with_name(f"{folder.name}-begun")
    with Job((*options, f"args.save={whole}"), world, log) as job:
        assert job.wait() == [0] * world, job.log.read_text()
        changes = [job.changes(rank) for rank in range(world)]
    starts = [save_starts(of_rank, folders=2 if rank == 0 else 1) for rank, of_rank in enumerate(changes)]
    log.write_text("")
    with Job((*options, f"args.save={begun}"), world, log, {0: Plan(starts[0][3], "before")}) as job:
        assert any(job.wait())
    of_one = [of_rank[start[3] : start[4]] for of_rank, start in zip(changes, starts)]
    return Reference(manifests, numbers_of(run), of_one, begun, log.read_text())


def save_starts(changes: list[str], folders: int) -> list[int]:
    """Where each save starts in a rank's changes: with the first of the folders that it makes."""
    return [place for place, name in enumerate(changes) if name == "mkdir"][::folders]


def check_disk(save: Path, reference: Reference, told: str) -> int:
    """What must hold at every instant; returns the step that `latest` names, 0 where nothing was saved yet.

    told: what the run's starts have said. A save begins when the one before is published, at each INTERVAL of steps.
    So what is lost is one interval and the steps that were made since the last save began, which was under way.
    """
    run = run_in(save)
    if run is None:
        return 0
    for name in iteration_names(run):
        assert problem_of(run / name) is None and damage_of(run / name) is None, (name, list((run / name).iterdir()))
        assert read_manifest(run / name) == reference.manifests[int(name)], f"step {name} is not that of the reference"
    latest, problem = read_latest(run)
    trained = max((line["step"] for line in _whole_lines(run / "metrics.jsonl")), default=0)
    begun, published = last_begun(told), int(latest or 0)
    assert published >= begun - INTERVAL, f"{latest} is published although the save of {begun} began"
    since = max(trained - begun, 0)
    assert since <= INTERVAL and trained - published <= INTERVAL + since, (
        f"{latest} of {trained} trained, {begun} begun"
    )
    if latest is None:
        assert problem.startswith("there is no file"), problem
        return 0
    assert read_manifest(run / latest) == reference.manifests[int(latest)]
    averages = run / f"{latest}-ema"
    assert read_manifest(averages) == reference.manifests[-int(latest)]
    assert problem_of(averages) is None and damage_of(averages) is None
    return published


def last_begun(told: str) -> int:
    """The step of the last save that a run has begun, by what it said; 0 where it has not."""
    return int(([0, *re.findall(r"saving step (\d+):", told)])[-1])


def _whole_lines(file: Path) -> Iterator[dict[str, Any]]:
    for line in file.read_text().splitlines() if file.is_file() else []:
        try:
            yield json.loads(line)
        except ValueError:
            continue


def check_end(save: Path, reference: Reference, told: str) -> None:
    """A run that was broken off any number of times has come to the same end."""
    run = run_in(save)
    assert run is not None and check_disk(save, reference, told) == STEPS
    assert numbers_of(run) == reference.losses
    kept = {str(step) for step in (STEPS - INTERVAL, STEPS)}
    folders = {path.name for path in run.iterdir() if path.is_dir()}
    wanted = kept | {f"{name}-ema" for name in kept} | {"tensorboard"}
    assert folders == wanted, folders ^ wanted


class Chain:
    """Runs that are killed and started again by the same command until they are done; each then makes way for a new.

    is_begun: a new run is not quite new, but has saved three times.
    """

    def __init__(self, folder: Path, world: int, reference: Reference, is_begun: bool = True) -> None:
        self.folder, self.world, self.reference, self.is_begun = folder, world, reference, is_begun
        self.num_runs, self.num_kills, self.num_finished = 0, 0, 0
        self.told = ""

    @property
    def save(self) -> Path:
        """Where the present run is."""
        return self.folder / f"run{self.num_runs}"

    def go(self, plans: dict[int, Plan] | None = None, harm: Callable[[Job], None] = lambda job: None) -> list[int]:
        """One start: it ends killed, and everything is checked, or done, and the next one begins a new run."""
        if not self.save.exists():
            self.told = ""
            if self.is_begun:
                self.told = self.reference.told
                shutil.copytree(self.reference.begun, self.save)
        self.save.mkdir(parents=True, exist_ok=True)
        log = self.folder / "log"
        log.write_text("")  # what it says in a failure is of this start
        options = (*OPTIONS, f"args.save={self.save}")
        with Job(options, self.world, log, plans) as job:
            harm(job)
            codes = job.wait()
        self.told += log.read_text()
        if any(codes):
            assert any(code == -signal.SIGKILL for code in codes), log.read_text()
            self.num_kills += 1
            check_disk(self.save, self.reference, self.told)
        else:
            check_end(self.save, self.reference, self.told)
            shutil.rmtree(self.save)
            self.num_finished += 1
            self.num_runs += 1
        return codes

    def finish(self) -> None:
        """Let the present run come to its end."""
        if self.save.exists():
            codes = self.go()
            assert not any(codes), (self.folder / "log").read_text()


def at_random(chooser: random.Random, longest: float, rank: int | None = None) -> Callable[[Job], None]:
    """Kill a rank, or all, at a random instant."""

    def harm(job: Job) -> None:
        time.sleep(chooser.uniform(0.0, longest))
        job.kill(rank)

    return harm


@contextmanager
def memory_folder(fallback: Path) -> Iterator[Path]:
    """A folder in memory where there is one: a kill is a kill anywhere, and fsync takes no time there."""
    shm = Path("/dev/shm")
    if not os.access(shm, os.W_OK):
        yield fallback
        return
    with tempfile.TemporaryDirectory(dir=shm) as folder:
        yield Path(folder)
