"""Finding a checkpoint that is whole, and holding it while it is read: one way for all that read weights.

A folder is held first and looked at then, so that what was found whole stays until it has been read.
"""

import fcntl
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from sat.errors import CheckpointError
from sat.logs import SAME_ON_EVERY_RANK
from sat.weights.headers import read_json
from sat.weights.whole import (
    AVERAGES,
    LATEST,
    MANIFEST,
    damage_of,
    iteration_names,
    problem_of,
    read_latest,
    step_of,
)

log = logging.getLogger(__name__)

READ_FILES = ("mp_rank_*_model_states.pt", "lora.safetensors")
"""What is read of a checkpoint for its weights."""


def model_file(mp_rank: int) -> str:
    """Name of the weights of one tensor-parallel rank."""
    return f"mp_rank_{mp_rank:02d}_model_states.pt"


@dataclass(frozen=True)
class CheckpointPath:
    """A checkpoint on disk: a folder of one iteration, or a single file of weights."""

    path: Path
    step: int
    """0 for `release` and for single files."""

    @property
    def is_file(self) -> bool:
        """Whether it is one file, with no training state beside it."""
        return self.path.is_file()

    @property
    def is_average(self) -> bool:
        """Whether it holds averaged weights."""
        return self.path.name.endswith(AVERAGES) or self.path.parent.name.endswith(AVERAGES)

    def weights(self, mp_rank: int = 0) -> Path:
        """The file of weights."""
        return self.path if self.is_file else self.path / model_file(mp_rank)


def find_checkpoint(path: str | Path, check: Callable[[Path], str | None] = problem_of) -> CheckpointPath:
    """The checkpoint that a file, an iteration folder or a run directory names.

    check: says why a folder is not whole; by default by names and sizes (see `sat.weights.whole`). Of a run directory
    it is the iteration that `latest` names, or the newest whole one if that is not.
    """
    path = Path(path)
    if path.is_file():
        return CheckpointPath(path, 0)
    if not path.is_dir():
        raise CheckpointError(f"there is no checkpoint {path}; give a file, an iteration folder or a run directory")
    if is_iteration_folder(path):
        problem = check(path)
        if problem is not None:
            raise _not_whole(path, problem)
        return CheckpointPath(path, step_of(path.name))
    return choose_iteration(path, check)


def _not_whole(path: Path, problem: str) -> CheckpointError:
    return CheckpointError(f"{path} is not whole: {problem}; give another iteration, or the run directory")


def is_iteration_folder(path: Path) -> bool:
    """Whether a path is the folder of one iteration, rather than a run directory."""
    return (path / model_file(0)).is_file() or (path / MANIFEST).is_file()


def choose_iteration(
    run_dir: Path, check: Callable[[Path], str | None], names: Sequence[str] | None = None
) -> CheckpointPath:
    """The iteration that `latest` names, or the newest other one, with which `check` finds nothing wrong.

    names: the iterations to try, in order, as `iterations_to_try` gives them. Raises CheckpointError if none is left.
    """
    problems: list[str] = []
    for name in iterations_to_try(run_dir) if names is None else names:
        problem = check(run_dir / name)
        if problem is None:
            if problems:
                log.warning(
                    "%s: %s; taking iteration %s", run_dir, "; ".join(problems), name, extra={SAME_ON_EVERY_RANK: True}
                )
            return CheckpointPath(run_dir / name, step_of(name))
        problems.append(f"iteration {name} is not whole ({problem})")
    if problems:
        raise CheckpointError(f"{run_dir} holds no whole checkpoint: {'; '.join(problems)}")
    inside = ", ".join(sorted(entry.name for entry in run_dir.iterdir())[:8]) or "nothing"
    raise CheckpointError(
        f"{run_dir} is no checkpoint: it has neither {model_file(0)} nor '{LATEST}'; it holds {inside}"
        f"{_conversion(run_dir)}"
    )


def _conversion(folder: Path) -> str:
    """How to make a checkpoint of a folder of diffusers'; nothing for others."""
    whole = next((one for one in (folder, folder.absolute().parent) if (one / "model_index.json").is_file()), folder)
    if whole == folder and not (folder / "model_index.json").is_file() and not _is_diffusers(folder / "config.json"):
        return ""
    made = whole.with_name(f"{whole.name}-sat")
    return (
        f". It is a diffusers folder: convert it with `python tools/convert.py {whole} {made} --to sat` and give "
        f"{made / 'transformer'}"
    )


def _is_diffusers(config: Path) -> bool:
    """Whether a config.json is that of a transformer of diffusers'."""
    return "Transformer" in str(read_json(config).get("_class_name", ""))


def iterations_to_try(run_dir: Path) -> list[str]:
    """Names of a run's iterations: that of `latest` first (it may be an earlier one on purpose), then the newest."""
    names = iteration_names(run_dir)
    latest, problem = read_latest(run_dir)
    if latest is None:
        if names:
            log.warning("%s: %s; trying iteration %s", run_dir, problem, names[0], extra={SAME_ON_EVERY_RANK: True})
        return names
    return [latest, *(name for name in names if name != latest)]


# --- reading ---------------------------------------------------------------------------------------------------------


@contextmanager
def reading(folder: Path) -> Iterator[None]:
    """Keep a checkpoint from being deleted for the time of a `with` block, by any host where the file system locks.

    Raises CheckpointError where it is being deleted.
    """
    try:
        stream = (folder / MANIFEST).open("rb")
    except OSError:  # none of our runs deletes a folder without a manifest
        yield
        return
    with stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CheckpointError(f"{folder} is being deleted; give another iteration, or the run directory") from None
        except OSError as error:
            log.debug("%s: no lock (%s)", folder, error)
        yield


def weights_problem(folder: Path) -> str | None:
    """Why a folder's weights cannot be trusted: names and sizes of all its files, the content of those of weights."""
    files = (file.name for pattern in READ_FILES for file in folder.glob(pattern))
    return problem_of(folder) or damage_of(folder, files)


def _file_problem(file: Path) -> str | None:
    """Why a file is not what the manifest beside it says, where there is one."""
    try:
        return damage_of(file.parent, [file.name])
    except CheckpointError as error:
        return str(error)


def hold(folder: Path, leases: ExitStack) -> str | None:
    """Be `reading` a folder until `leases` closes; returns why its weights cannot be trusted, if so."""
    try:
        leases.enter_context(reading(folder))
    except CheckpointError:
        return "it is being deleted"
    return weights_problem(folder)


@contextmanager
def open_checkpoint(path: str | Path) -> Iterator[CheckpointPath]:
    """`find_checkpoint` for a process that goes on to read it: checksums compared, deletion held off until the end.

    A file is compared with the manifest beside it, where there is one.
    """
    path = Path(path)
    with ExitStack() as leases:
        found = find_checkpoint(path, lambda folder: hold(folder, leases))
        if found.is_file:
            leases.enter_context(reading(path.parent))
            problem = _file_problem(path)
            if problem is not None:
                raise _not_whole(path, problem)
        yield found
