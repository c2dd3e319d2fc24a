"""The command: find the cases below a folder, replay each, print a line for each and a summary."""

import argparse
import logging
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from tools.golden import (
    core_forward,
    core_hooks,
    core_training,
    dit_forward,
    dit_schedules,
    dit_training,
    vae_networks,
    vae_shared,
    vae_training,
    vae_units,
)
from tools.golden.common import CannotReplay, Case, Checks, Finder, Folder, RecordingError, read_tensors

FINDERS: tuple[Finder, ...] = (
    core_forward.find,
    core_hooks.find,
    core_training.find,
    dit_forward.find,
    dit_schedules.find,
    dit_training.find,
    vae_networks.find,
    vae_shared.find,
    vae_training.find,
    vae_units.find,
)
DATA = (".safetensors", ".json", ".pt")
"""Files that must belong to some case."""


@dataclass(frozen=True)
class Result:
    """How one case went."""

    case: Case
    checks: Checks
    error: str = ""
    reason: str = ""
    """Why it, or a part of it, was not replayed."""

    @property
    def ran(self) -> bool:
        """Whether anything was compared, or went wrong before it could be."""
        return bool(self.error or self.checks.differences)

    @property
    def is_off(self) -> bool:
        return bool(self.error or self.checks.off)


def discover(folder: Folder) -> list[Case]:
    """All cases below a folder, in order of their names; what no rule knows becomes a case with a reason."""
    cases = [case for find in FINDERS for case in find(folder)]
    known = {path for case in cases for path in case.files}
    unknown = [path for path in folder.files if path.suffix in DATA and path not in known]
    cases.extend(_unknown_case(folder, path) for path in unknown)
    return sorted(cases, key=lambda case: case.name)


def _unknown_case(folder: Folder, path: Path) -> Case:
    """A file that no rule claims: broken, without the file that describes it, or of an unknown kind."""

    def fail(checks: Checks) -> None:
        raise RecordingError(problem)

    problem = f"{path.name} is not JSON: {folder.broken[path]}" if path in folder.broken else ""
    if path.suffix == ".safetensors":
        problem = _missing_description(path)
    if problem:
        return Case(folder.name(path), (path,), fail)
    return Case(folder.name(path), (path,), reason="no rule here knows this kind of recording")


def _missing_description(path: Path) -> str:
    """What is wrong with a recording that no rule claims: it is broken, or lacks its JSON file."""
    try:
        names = read_tensors(path)
    except RecordingError as error:
        return str(error)
    is_case = path.with_suffix(".yaml").is_file() or any(name.startswith(("in/", "param/")) for name in names)
    if is_case and not path.with_suffix(".json").is_file():
        return f"{path.stem}.json, which describes it, is missing"
    if (path.parent / "network_config.yaml").is_file() and not (path.parent / "meta.json").is_file():
        return "meta.json, which describes it, is missing"
    return ""


def replay(case: Case) -> Result:
    """Run one case. Whatever goes wrong in it is its result, so that the others still run."""
    checks = Checks()
    if case.replay is None:
        return Result(case, checks, reason=case.reason)
    try:
        case.replay(checks)
    except CannotReplay as unknown:
        return Result(case, checks, reason=str(unknown))
    except RecordingError as error:
        return Result(case, checks, error=str(error))
    except Exception as error:  # a case that cannot be built or run is off, and must not hide the cases after it
        return Result(case, checks, error=f"{type(error).__name__}: {error}")
    if not checks.differences:
        return Result(case, checks, error="nothing was compared")
    unused = checks.unused()
    return Result(case, checks, reason=f"tensors without a rule: {', '.join(unused)}" if unused else "")


def describe(result: Result, width: int) -> str:
    """One line: name, largest difference and its tolerance, verdict."""
    name = f"{result.case.name:<{width}}"
    if result.error:
        return f"{name}  OFF  {' '.join(result.error.split())}"
    worst = result.checks.worst
    numbers = f"{worst.difference:9.2e} of {worst.tolerance:8.1e}  {len(result.checks.differences):4d} compared"
    if not result.is_off:
        return f"{name}  {numbers}  ok"
    others = len(result.checks.off) - 1
    return f"{name}  {numbers}  OFF  {worst.what}{f' and {others} more' if others else ''}"


def run(root: Path, emit: Callable[[str], None]) -> int:
    """Replay everything below `root`, a line at a time; returns the exit code."""
    cases = discover(Folder(root))
    width = max((len(case.name) for case in cases), default=0)
    results = []
    for case in cases:
        results.append(replay(case))
        if results[-1].ran:
            emit(describe(results[-1], width))
    skipped = [result for result in results if result.reason]
    if skipped:
        emit("\nnot replayed:")
    for result in skipped:
        emit(f"{result.case.name:<{width}}  {result.reason}")
    ran = [result for result in results if result.ran]
    off = [result for result in ran if result.is_off]
    if not ran:
        emit(f"error: nothing below {root} is a recording that can be replayed")
        return 1
    emit(f"\n{len(ran)} replayed, {len(off)} off, {len(skipped)} not replayed")
    return 1 if off else 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description="Replay recorded reference numbers through this project's code.")
    parser.add_argument("folder", type=Path, help="a folder of recordings, or one above several")
    parser.add_argument("--threads", type=int, default=1, help="torch threads; recordings were made with one")
    options = parser.parse_args(arguments)
    if not options.folder.is_dir():
        print(f"error: {options.folder} is no folder", file=sys.stderr)
        return 1
    torch.set_num_threads(options.threads)
    logging.getLogger("sat").addHandler(logging.NullHandler())  # warnings about the recordings' YAML are of no interest
    return run(options.folder, lambda line: print(line, flush=True))
