"""run.json: by what a run directory is found again. Needs no torch."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sat.config import warn_once
from sat.errors import CheckpointError
from sat.weights.whole import TRAINING_STATE, iteration_names

RUN_FILE = "run.json"


@dataclass(frozen=True)
class RunRecord:
    """Which of the runs of one name it is, and what it trains."""

    number: int
    """Runs of a name count from 1 in the order of their start."""
    configuration: str
    """`digest` of what decides the run's numbers."""
    decides: Mapping[str, Any] | None
    """Dotted key -> value of what does; None where a checkpoint had to tell, which keeps the digest alone."""
    problem: str = ""
    """Why a checkpoint had to tell."""

    def is_of(self, decides: Mapping[str, Any]) -> bool:
        """Whether the run was begun with these values."""
        return self.configuration == digest(decides)


def digest(values: Mapping[str, Any]) -> str:
    """A short name for deciding values: the configuration's hash."""
    return hashlib.blake2b(json.dumps(values, sort_keys=True).encode(), digest_size=8).hexdigest()


def read_run_file(run_dir: Path) -> RunRecord | None:
    """What run.json says; None where there is none. Raises CheckpointError where it is damaged or cannot be read."""
    file = run_dir / RUN_FILE
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        record = RunRecord(content["number"], content["configuration"], content["decides"])
        is_whole = isinstance(record.number, int) and record.configuration == digest(content["decides"])
    except FileNotFoundError:
        return None
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read ({error.strerror})") from error
    except (ValueError, KeyError, TypeError):
        is_whole = False
    if not is_whole:
        raise CheckpointError(f"{file} is damaged")
    return record


def read_run(run_dir: Path) -> RunRecord | None:
    """What run.json says or, where it is damaged or gone, what the newest checkpoint says that can be read.

    None where the folder holds no run: no checkpoint with training state, and no run.json that is whole. Raises
    CheckpointError where there are such checkpoints and none says to which run they belong.
    """
    try:
        record, problem = read_run_file(run_dir), f"there is no {run_dir / RUN_FILE}"
    except CheckpointError as error:
        record, problem = None, str(error)
    if record is not None:
        return record
    names = [name for name in iteration_names(run_dir) if (run_dir / name / TRAINING_STATE).exists()]
    for name in names:
        try:
            state = json.loads((run_dir / name / TRAINING_STATE).read_text(encoding="utf-8"))
            return RunRecord(state["run"], state["configuration"], None, f"{problem}; checkpoint {name} tells its run")
        except (OSError, ValueError, KeyError, TypeError):
            continue
    if names:
        raise CheckpointError(
            f"{problem}, and its checkpoints do not tell which run they belong to; args.resume={run_dir} continues it, "
            "args.resume=never starts a new run"
        )
    if (run_dir / RUN_FILE).exists():
        warn_once(f"{problem}, and {run_dir} holds no checkpoint to continue from: it is left as it is")
    return None


def run_file_problem(run_dir: Path) -> str | None:
    """What is wrong with the run.json of a run directory; None where none is, and no checkpoint says there was one."""
    try:
        if read_run_file(run_dir) is not None:
            return None
    except CheckpointError as error:
        return str(error).removeprefix(f"{run_dir}/")
    try:
        return f"{RUN_FILE} is missing" if read_run(run_dir) is not None else None
    except CheckpointError:
        return None
