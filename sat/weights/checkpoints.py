"""The checkpoints of a run one by one: what each holds, at which layout it was written, whether it is whole."""

from pathlib import Path
from typing import Any

from sat.weights.describe import Finding
from sat.weights.headers import read_json
from sat.weights.run_file import RUN_FILE, run_file_problem
from sat.weights.whole import (
    AVERAGES,
    LATEST,
    MANIFEST,
    TRAINING_STATE,
    WEIGHTS,
    Progress,
    damage_of,
    is_iteration,
    problem_of,
    read_latest,
    read_manifest,
    step_of,
)

HELD = {
    "weights": "mp_rank_*_model_states.pt",
    "optimizer": "optimizer_rank_*.safetensors",
    "adapters": "lora.safetensors",
    "training state": TRAINING_STATE,
    "weights as one file": "model.safetensors",
}
"""What a checkpoint may hold -> the files that it is in."""


def checkpoints(path: Path, progress: Progress | None = None) -> list[Finding]:
    """The checkpoints of a run directory, or the one that a folder is, the oldest first; none where none is ours.

    Before them comes run.json, where something is wrong with it. All files are read and their checksums compared, a
    second or two a gigabyte, and progress is told of their bytes; with None for it, names and sizes alone tell what is
    wrong.
    """
    if (path / MANIFEST).exists():
        return [_checkpoint(path, progress)]
    ours = _folders(path)
    latest, _ = read_latest(path)
    if not ours:
        return []
    problem = run_file_problem(path)
    found = [Finding(path / RUN_FILE, f"not whole: {problem}", problem=problem)] if problem else []
    for folder in ours:
        found.append(_checkpoint(folder, progress))
        if folder.name == latest:
            found[-1].facts.append(LATEST)
    return found


def bytes_to_read(path: Path) -> int:
    """The bytes of all files of a run's checkpoints, or of one checkpoint, that have a checksum."""
    folders = [path] if (path / MANIFEST).exists() else _folders(path)
    whole = [folder for folder in folders if problem_of(folder) is None]
    return sum(entry["bytes"] for folder in whole for entry in (read_manifest(folder) or {}).values())


def _folders(run_dir: Path) -> list[Path]:
    """The folders of a run's iterations and averages, the oldest first; none where none is ours."""
    patterns = (WEIGHTS, MANIFEST, TRAINING_STATE)
    folders = {file.parent for pattern in patterns for file in run_dir.glob(f"*/{pattern}")}
    ours = [folder for folder in folders if is_iteration(folder.name.removesuffix(AVERAGES))]
    if not any((folder / MANIFEST).exists() for folder in ours):
        return []
    return sorted(ours, key=lambda folder: (step_of(folder.name), folder.name))


def _checkpoint(folder: Path, progress: Progress | None) -> Finding:
    problem = problem_of(folder)
    if problem is None and progress is not None:
        problem = damage_of(folder, progress=progress)
    held = [what for what, pattern in HELD.items() if any(folder.glob(pattern))]
    state = (
        f"not whole: {problem}" if problem else "whole, its checksums are right" if progress is not None else "whole"
    )
    facts = [("averaged " if folder.name.endswith(AVERAGES) else "") + (", ".join(held) or "nothing")]
    return Finding(folder, state, facts=[*facts, *_written_by(read_json(folder / TRAINING_STATE))], problem=problem)


def _written_by(state: dict[str, Any]) -> list[str]:
    """Stage and layout of the job that saved."""
    told = [f"stage {state['stage']}"] if state.get("stage") else []
    if "layout" in state:
        layout = " x ".join(f"{axis} {state['layout'].get(axis, 1)}" for axis in ("dp", "cp", "tp"))
        told.append(f"{layout}, ZeRO {state.get('zero_stage')}, {state.get('precision')}")
    return told
