"""The checkpoints of a run one by one: what each holds, at which layout it was written, whether it is whole."""

from pathlib import Path
from typing import Any

from sat.weights.describe import Finding
from sat.weights.run_file import RUN_FILE, run_file_problem
from sat.weights.survey import read_json
from sat.weights.whole import (
    AVERAGES,
    LATEST,
    MANIFEST,
    TRAINING_STATE,
    WEIGHTS,
    damage_of,
    is_iteration,
    problem_of,
    read_latest,
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


def checkpoints(path: Path, reads_files: bool = False) -> list[Finding]:
    """The checkpoints of a run directory, or the one that a folder is, the oldest first; none where none is ours.

    Before them comes run.json, where something is wrong with it.

    Names and sizes tell what is wrong; with reads_files, checksums too: all files are then read, a second a gigabyte.
    """
    if (path / MANIFEST).exists():
        return [_checkpoint(path, reads_files)]
    folders = {file.parent for pattern in (WEIGHTS, MANIFEST, TRAINING_STATE) for file in path.glob(f"*/{pattern}")}
    ours = [folder for folder in folders if is_iteration(folder.name.removesuffix(AVERAGES))]
    if not any((folder / MANIFEST).exists() for folder in ours):
        return []
    latest, _ = read_latest(path)
    problem = run_file_problem(path)
    found = [Finding(path / RUN_FILE, f"not whole: {problem}", problem=problem)] if problem else []
    for folder in sorted(ours, key=lambda folder: (step_of(folder.name), folder.name)):
        found.append(_checkpoint(folder, reads_files))
        if folder.name == latest:
            found[-1].facts.append(LATEST)
    return found


def _checkpoint(folder: Path, reads_files: bool) -> Finding:
    problem = problem_of(folder)
    if problem is None and reads_files:
        problem = damage_of(folder)
    held = [what for what, pattern in HELD.items() if any(folder.glob(pattern))]
    state = f"not whole: {problem}" if problem else "whole, its checksums are right" if reads_files else "whole"
    facts = [("averaged " if folder.name.endswith(AVERAGES) else "") + (", ".join(held) or "nothing")]
    return Finding(folder, state, facts=[*facts, *_written_by(read_json(folder / TRAINING_STATE))], problem=problem)


def _written_by(state: dict[str, Any]) -> list[str]:
    """Stage and layout of the job that saved."""
    told = [f"stage {state['stage']}"] if state.get("stage") else []
    if "layout" in state:
        layout = " x ".join(f"{axis} {state['layout'].get(axis, 1)}" for axis in ("dp", "cp", "tp"))
        told.append(f"{layout}, ZeRO {state.get('zero_stage')}, {state.get('precision')}")
    return told
