"""Run directories: where a run writes, and how it is found again."""

import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist

from sat.config import STAGES, ConfigNode, dump_config
from sat.errors import CheckpointError, ConfigError
from sat.training.files import write_json, write_text

T = TypeVar("T")

TRAINING_CONFIG = "training_config.yaml"
MODEL_CONFIG = "model_config.json"
STAGES_CONFIG = "stages.yaml"


def check_writable(folder: Path, key: str) -> None:
    """Raise ConfigError, naming the key that gives the folder, where no file can be made in it; makes the folder."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ConfigError(
            f"cannot write to {key} {folder}: {error.strerror or error}; give a folder that can be written"
        ) from error


def make_run_dir(save: str, experiment_name: str) -> Path:
    """A new folder SAVE/NAME-MM-DD-HH-MM, the same on every rank; every rank must call it."""
    outcome: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            outcome[0] = str(_claim(Path(save), f"{experiment_name}-{time.strftime('%m-%d-%H-%M')}"))
        except OSError as error:
            outcome[1] = (
                f"cannot write to args.save {save}: {error.strerror or error}; give a folder that can be written"
            )
    dist.broadcast_object_list(outcome, src=0)
    if outcome[1] is not None:
        raise ConfigError(outcome[1])
    return Path(outcome[0])


def _claim(parent: Path, name: str) -> Path:
    """The first of NAME, NAME-2, NAME-3 .. that is not there yet: two runs may start in the same minute."""
    parent.mkdir(parents=True, exist_ok=True)
    for number in range(1, 1000):
        folder = parent / (name if number == 1 else f"{name}-{number}")
        try:
            folder.mkdir()
        except FileExistsError:
            continue
        return folder
    raise OSError(f"{parent} already holds 999 runs called {name}")


def on_main(work: Callable[[], T]) -> T | None:
    """What rank 0 alone does in a run directory; None on the others. Every rank must call it.

    Raises CheckpointError on all ranks where rank 0 meets an OSError or raises one: a full disk, a file that cannot be
    read.
    """
    result: T | None = None
    problem: list[str | None] = [None]
    if dist.get_rank() == 0:
        try:
            result = work()
        except OSError as error:
            place = error.filename2 or error.filename or "its folder"  # of a rename, where it was to go
            problem = [f"the run cannot start: {place}: {error.strerror or error}"]
        except CheckpointError as error:
            problem = [str(error)]
    dist.broadcast_object_list(problem, src=0)
    if problem[0] is not None:
        raise CheckpointError(problem[0])
    return result


def write_description(run_dir: Path, job: ConfigNode, current: ConfigNode, model: Mapping[str, Any]) -> None:
    """What rebuilds the model with no other file: the configuration of the stage that runs, and the model's sizes.

    Where the job has stages, its own configuration is written beside it.
    """
    write_text(run_dir / TRAINING_CONFIG, dump_config(current))
    write_json(run_dir / MODEL_CONFIG, model)
    if STAGES in job:
        write_text(run_dir / STAGES_CONFIG, dump_config(job))


def configuration_file(run_dir: Path, job: ConfigNode) -> Path:
    """Where the whole job's configuration is written."""
    return run_dir / (STAGES_CONFIG if STAGES in job else TRAINING_CONFIG)
