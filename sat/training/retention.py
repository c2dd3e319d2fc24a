"""Which checkpoints of a run are kept, and who is reading one."""

import fcntl
import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sat.training.files import remove_folder
from sat.weights.whole import AVERAGES, MANIFEST, TRAINING_STATE, iteration_names, read_latest, step_of

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Retention:
    """What is kept beside the checkpoint that `latest` names; with keep_last None, everything."""

    keep_last: int | None = None
    keep_every: int | None = None
    """Steps that are multiples of it are kept for good."""
    keep_best: int = 0
    """So many with the lowest validation loss are kept, of those whose own step was validated."""
    always: frozenset[int] = frozenset()
    """Steps that are kept for good."""

    def doomed(self, losses: Mapping[int, float | None], latest: int, good: int | None = None) -> list[int]:
        """The steps to delete, of those in `losses` (step -> validation loss, where there was a validation).

        good: the step to go back to if those after it turn out to be bad; it is kept. Steps after `latest` belong to a
        branch that was left when the run was set back; they are not counted.
        """
        if self.keep_last is None:
            return []
        steps = sorted(step for step in losses if step <= latest)
        kept = {latest, good, *steps[-self.keep_last :], *self.always}
        kept |= {step for step in steps if self.keep_every and step % self.keep_every == 0}
        measured = [(loss, step) for step in steps if (loss := losses[step]) is not None]
        kept |= {step for _, step in sorted(measured)[: self.keep_best]}
        return [step for step in steps if step not in kept]

    def tidy(self, run_dir: Path) -> list[int]:
        """Delete what is not kept, with its averages; returns the steps. What is being read stays until the next time.

        Nothing is deleted while `latest` does not name a checkpoint.
        """
        latest, _ = read_latest(run_dir)
        names = iteration_names(run_dir)
        if latest not in names or not latest.isdecimal():
            return []
        states = {step_of(name): read_state(run_dir / name) for name in names if name.isdecimal()}
        losses = {step: _validation_loss(state, step) for step, state in states.items()}
        good = max((step for step in states if step <= step_of(latest) and is_good(states[step])), default=None)
        deleted = []
        for step in self.doomed(losses, step_of(latest), good):
            folder = run_dir / str(step)
            with unread(folder) as is_free, unread(run_dir / f"{step}{AVERAGES}") as averages_are_free:
                if not is_free or not averages_are_free:
                    log.info("%s is being read: it is kept for now", folder)
                    continue
                remove_folder(folder)
            deleted.append(step)
        for folder in run_dir.glob(f"*{AVERAGES}"):  # those of what was just deleted, now or when a job was killed
            if step_of(folder.name) < step_of(latest) and not (run_dir / folder.name.removesuffix(AVERAGES)).exists():
                remove_folder(folder)
        return deleted


def read_state(folder: Path) -> dict[str, Any]:
    """A checkpoint's training_state.json; nothing where it cannot be read."""
    try:
        state = json.loads((folder / TRAINING_STATE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return state if isinstance(state, dict) else {}


def is_good(state: Mapping[str, Any]) -> bool:
    """Whether a checkpoint was saved while all was well: after a step that was not skipped, its loss being finite.

    One that was saved in a row of skipped steps holds the weights from before them, but nothing has shown that these
    are good: they may be why the steps are skipped.
    """
    return state.get("check") is not None and (state.get("health") or {}).get("first_skipped") is None


def _validation_loss(state: Mapping[str, Any], step: int) -> float | None:
    """The loss of the very weights that a checkpoint holds; the last validation may have been of earlier ones."""
    try:
        validation = state["validation"]
        return float(validation["loss"]) if validation["step"] == step else None
    except (KeyError, TypeError, ValueError):
        return None


@contextmanager
def unread(folder: Path) -> Iterator[bool]:
    """Whether no process is inside `reading(folder)`; if so none comes in for the time of a `with` block."""
    with ExitStack() as opened:
        try:
            stream = opened.enter_context((folder / MANIFEST).open("rb+"))
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        except OSError:  # no such folder, or no locks here
            pass
        yield True
