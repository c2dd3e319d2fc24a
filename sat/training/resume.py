"""Where a run starts: anew, or from the newest whole checkpoint of the run that the same command line began."""

import json
import logging
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from sat.errors import CheckpointError, ConfigError, SatError
from sat.mpu.launch import Launch
from sat.training.args import TrainArgs
from sat.training.ema import choose_weights
from sat.training.files import remove_leftovers, write_text
from sat.training.identity import differences, runs_called
from sat.training.lock import RunLock
from sat.weights.finding import (
    CheckpointPath,
    choose_iteration,
    find_checkpoint,
    is_iteration_folder,
    iterations_to_try,
    reading,
)
from sat.weights.run_file import RUN_FILE, RunRecord, read_run
from sat.weights.whole import AVERAGES, LATEST, TRAINING_STATE, damage_of, is_iteration, problem_of, read_manifest

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Start:
    """Where a run starts. Equal on all ranks but for the lock, which rank 0 has."""

    run_dir: Path | None = None
    """That of the run which goes on; None for a new run."""
    checkpoint: CheckpointPath | None = None
    """What it goes on from; None where it was ended before its first checkpoint."""
    state: Mapping[str, Any] | None = None
    """The checkpoint's training_state.json."""
    lock: RunLock | None = None

    @property
    def step(self) -> int:
        """Steps that are done."""
        return 0 if self.state is None else self.state["step"]


def find_start(args: TrainArgs, decides: Mapping[str, Any], launch: Launch, resources: ExitStack) -> Start:
    """Decide where the run starts, as args.resume says; every rank must call it.

    decides: see `deciding_values`. The run directory that goes on is locked until `resources` closes.
    """
    plan: list[Any] = [None, None]
    lock = None
    if launch.is_main:
        try:
            plan[0] = _plan(args, decides)
            if plan[0] is not None:
                lock = lock_run(Path(plan[0][0]), resources)
                remove_leftovers(Path(plan[0][0]))
        except SatError as error:
            plan[1] = error
    dist.broadcast_object_list(plan, src=0)
    if plan[1] is not None:
        raise plan[1]
    if plan[0] is None:
        return Start()
    run_dir, names = Path(plan[0][0]), plan[0][1]
    if not names:
        log.info("%s has no checkpoint yet: starting it from its first step", run_dir)
        return Start(run_dir, lock=lock)
    checkpoint = choose_iteration(run_dir, _state_problem_together, names)
    return Start(run_dir, checkpoint, read_training_state(checkpoint), lock)


def lock_run(run_dir: Path, resources: ExitStack) -> RunLock:
    """Hold a run directory until `resources` closes."""
    try:
        lock = RunLock(run_dir)
    except OSError as error:
        raise ConfigError(f"cannot write to {run_dir}: {error.strerror}; give a run that can be written to") from error
    resources.callback(lock.release)
    return lock


def _plan(args: TrainArgs, decides: Mapping[str, Any]) -> tuple[str, list[str]] | None:
    """(run directory, iterations to try), or None for a new run. On rank 0."""
    path = _named(args)
    if path is not None:
        return _plan_named(path, decides)
    if args.resume == "never" or args.save is None:
        return None
    found = _find_run(Path(args.save), args.experiment_name, decides)
    return None if found is None else (str(found), iterations_to_try(found))


def _named(args: TrainArgs) -> Path | None:
    """The run that the configuration names: by args.resume, or by args.load where that says what is continued."""
    continued = args.load if args.mode == "pretrain" else None
    if args.resume == "never" and continued is not None:
        raise ConfigError(
            f"args.load {continued} with args.mode pretrain continues that run, and args.resume is never; set "
            "args.mode=finetune to start a new run from its weights"
        )
    if args.resume in ("auto", "never"):
        return Path(continued) if continued is not None else None
    if continued is not None and Path(continued) != Path(args.resume):
        raise ConfigError(f"args.resume names {args.resume} and args.load {continued}; give the one to continue")
    return Path(args.resume)


def _plan_named(path: Path, decides: Mapping[str, Any]) -> tuple[str, list[str]]:
    if path.is_dir() and path.name.endswith(AVERAGES):
        raise CheckpointError(
            f"{path} holds averaged weights, no training state; give {path.name.removesuffix(AVERAGES)} beside it, "
            "or set args.mode=finetune to start a new run from them"
        )
    if path.is_file():
        raise _only_weights(path)
    if not path.is_dir():
        raise CheckpointError(f"there is no run {path}; give a run directory, or one of its iterations")
    if is_iteration_folder(path):
        run_dir, names = path.parent, [path.name]
    else:
        run_dir, names = path, iterations_to_try(path)
    before, problem = _run_of(run_dir)
    if problem:
        log.warning("%s; %s goes on all the same, as args.resume or args.load names it", problem, run_dir)
    if before is not None and not before.is_of(decides):
        log.warning("%s goes on with another configuration: %s", run_dir, _changes(before, decides, 8))
    if names and not any(_has_state(run_dir / name) for name in names) and (run_dir / names[0]).is_dir():
        raise _only_weights(run_dir / names[0])
    if not names and before is None:
        raise CheckpointError(f"{path} is no run: it holds neither a checkpoint nor a {RUN_FILE} that is whole")
    return str(run_dir), names


def _run_of(run_dir: Path) -> tuple[RunRecord | None, str]:
    """What a run directory says of its run, and what is wrong with that."""
    try:
        run = read_run(run_dir)
    except CheckpointError as error:
        return None, str(error).split(";")[0]
    return run, run.problem if run is not None else ""


def _changes(run: RunRecord, decides: Mapping[str, Any], most: int) -> str:
    """How a configuration differs from a run's, in words."""
    if run.decides is None:
        return f"which keys is not known without its {RUN_FILE}"
    return "; ".join(differences(run.decides, decides)[:most])


def _has_state(folder: Path) -> bool:
    try:
        return (folder / TRAINING_STATE).exists() or TRAINING_STATE in (read_manifest(folder) or {})
    except CheckpointError:  # a damaged manifest is ours
        return True


def _only_weights(path: Path) -> CheckpointError:
    return CheckpointError(
        f"{path} holds weights only, no training state to continue from; "
        "set args.mode=finetune to start a new run from them"
    )


def _find_run(save: Path, experiment_name: str, decides: Mapping[str, Any]) -> Path | None:
    """The last run that this configuration began. Raises CheckpointError where one cannot be told to be another's."""
    runs, unknown = runs_called(save, experiment_name)
    if unknown:
        raise CheckpointError("; ".join(unknown.values()))
    for run in runs.values():
        if run.problem:
            log.warning("%s", run.problem)
    for folder, run in runs.items():
        if run.is_of(decides):
            log.info("continuing %s, begun with this configuration (args.resume=never starts a new run)", folder)
            return folder
    for folder, run in list(runs.items())[:1]:
        log.info(
            "a new run: %s had another configuration (%s); args.resume=%s would continue it",
            folder,
            _changes(run, decides, 3),
            folder,
        )
    return None


# --- checkpoints to continue from ------------------------------------------------------------------------------------


def damage_together(folder: Path, names: Sequence[str] | None = None) -> str | None:
    """`damage_of` with a folder's files shared out over all processes, which must all call it; one answer."""
    own: str | None = None
    files: dict[str, Any] = {}
    try:
        files = read_manifest(folder) or {}
    except CheckpointError as error:
        own = str(error)
    chosen = sorted(files if names is None else set(names) & set(files), key=lambda name: -files[name]["bytes"])
    rank, world_size = dist.get_rank(), dist.get_world_size()
    return _first_told(own or damage_of(folder, chosen[rank::world_size]))


def _first_told(own: str | None) -> str | None:
    """The first of all ranks' problems, in their order."""
    found: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(found, own)
    return next((problem for problem in found if problem is not None), None)


def _problem_together(folder: Path, names: Sequence[str] | None = None) -> str | None:
    """Why a folder is not whole, the content of its files (or those named) included; the same answer on all ranks."""
    told: list[str | None] = [problem_of(folder)]
    dist.broadcast_object_list(told, src=0)
    return told[0] or damage_together(folder, names)


def _state_problem_together(folder: Path) -> str | None:
    """Why a run cannot go on from a folder; the same answer on all ranks."""
    problem = _problem_together(folder)
    return "it holds weights only" if problem is None and not _has_state(folder) else problem


def _hold_together(folder: Path, leases: ExitStack) -> str | None:
    """Be `reading` a folder on all ranks until `leases` closes; returns why one cannot, if so."""
    own: str | None = None
    try:
        leases.enter_context(reading(folder))
    except CheckpointError:
        own = "it is being deleted"
    return _first_told(own)


def open_weights(path: str | Path, wanted: str, leases: ExitStack) -> CheckpointPath:
    """The weights that a file, an iteration folder or a run directory names, found whole; every rank must call it.

    wanted: see `choose_weights`. Where there is a manifest the content is compared with it. What was found is held
    against deletion until `leases` closes.
    """
    path = Path(path)

    def problem(folder: Path) -> str | None:
        names = [entry.name for entry in folder.glob("mp_rank_*_model_states.pt")] if folder.is_dir() else []
        return _hold_together(folder, leases) or _problem_together(folder, names)

    def file_problem() -> str | None:
        return _hold_together(path.parent, leases) or damage_together(path.parent, [path.name])

    if path.is_dir() and not is_iteration_folder(path):
        found = choose_iteration(path, problem)
    else:
        found = find_checkpoint(path)
        damage = file_problem() if found.is_file else problem(path)
        if damage is not None:
            raise CheckpointError(f"{path} is not whole: {damage}; give another iteration, or the run directory")
    chosen = choose_weights(found, wanted)
    damage = problem(chosen.path) if chosen != found else None
    if damage is not None:
        raise CheckpointError(f"{chosen.path} is not whole: {damage}; args.weights=raw takes {found.path} itself")
    return chosen


def read_training_state(checkpoint: CheckpointPath) -> dict[str, Any]:
    """Step, data position and layout of a checkpoint that a run can continue from."""
    file = checkpoint.path / TRAINING_STATE
    if checkpoint.is_file or not file.is_file():
        raise _only_weights(checkpoint.path)
    return json.loads(file.read_text(encoding="utf-8"))


def set_back(run_dir: Path, checkpoint: CheckpointPath) -> None:
    """Make `latest` name the checkpoint that a run goes on from. On rank 0."""
    tracker = run_dir / LATEST
    before = tracker.read_text(encoding="utf-8", errors="replace").strip() if tracker.is_file() else ""
    if before == checkpoint.path.name:
        return
    if is_iteration(before) and (run_dir / before).is_dir():
        log.warning("%s is set back from step %s to %s", run_dir, before, checkpoint.path.name)
    write_text(tracker, checkpoint.path.name)
