"""Averaged and joined weights of a checkpoint, made from its own files: no rank waits for another, nor training."""

import logging
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from sat.errors import CheckpointError, ConfigError
from sat.mpu.shards import ShardRule
from sat.training.checkpoint import load_parts, load_pickle, weight_files
from sat.training.files import Entry, LazyTensor, write_safetensors, write_torch
from sat.training.optimizer_state import StoredState
from sat.weights.finding import CheckpointPath
from sat.weights.whole import AVERAGES, problem_of

log = logging.getLogger(__name__)

AVERAGED_KIND = "shadow"
"""Kind of optimizer state that is an average of the weights (see FusedEmaAdam)."""

CONSOLIDATED = "model.safetensors"
"""Whole weights of all tensor-parallel ranks in one file."""


def write_averages(iteration: Path, folder: Path, aliases: Mapping[str, str]) -> dict[str, Entry]:
    """Write into `folder` the weights of an iteration with the averages in the place of what is trained.

    The same names, precisions and number of files as the iteration's own. aliases: further names of trained parameters.
    Holds the weights of one tensor-parallel rank in memory at a time. Returns the manifest's entries; none where the
    optimizer keeps no averages.
    """
    stored = StoredState(iteration)
    if AVERAGED_KIND not in stored.tensor_kinds():
        return {}
    files = weight_files(CheckpointPath(iteration, 0))
    return {file.name: _write_average(stored, tp_rank, file, folder, aliases) for tp_rank, file in enumerate(files)}


def _write_average(stored: StoredState, tp_rank: int, file: Path, folder: Path, aliases: Mapping[str, str]) -> Entry:
    """The file of one tensor-parallel rank; what it takes of memory goes with this call."""
    content = load_pickle(file)
    weights = {
        name: _average(stored, aliases.get(name, name), tp_rank, value) for name, value in content["module"].items()
    }
    return write_torch(folder / file.name, {**content, "module": weights, "weights": "ema"})


def _average(stored: StoredState, name: str, tp_rank: int, value: Tensor) -> Tensor:
    average = stored.whole(name, AVERAGED_KIND, tp_rank)
    return value if average is None else average.view(value.shape).to(value.dtype)


def write_consolidated(folder: Path, rules: Mapping[str, ShardRule]) -> dict[str, Entry]:
    """Write the whole weights of a folder's files beside them, as one safetensors file. rules: how they were cut."""
    parts = load_parts(CheckpointPath(folder, 0))
    tensors = {name: _joined([part[name] for part in parts], rules.get(name)) for name in parts[0]}
    return {CONSOLIDATED: write_safetensors(folder / CONSOLIDATED, tensors, {"format": "pt"})}


def _joined(parts: list[Tensor], rule: ShardRule | None) -> LazyTensor:
    if rule is None:
        return LazyTensor.of(parts[0])
    whole = rule.join([torch.empty_like(part, device="meta") for part in parts])
    return LazyTensor(whole.shape, whole.dtype, lambda: rule.join(parts))


def choose_weights(checkpoint: CheckpointPath, wanted: str) -> CheckpointPath:
    """The averaged weights of a checkpoint (`ema`), its own (`raw`), or the averaged ones where there are any (`auto`).

    A path that names the averages themselves is taken as it is, unless `raw` contradicts. Raises CheckpointError where
    `ema` is wanted and there are none.
    """
    path = checkpoint.path
    if checkpoint.is_average:
        if wanted == "raw":
            raise ConfigError(
                f"args.load names {path}, averaged weights, and args.weights is raw; give one or the other"
            )
        return checkpoint
    if wanted == "raw":
        return checkpoint
    averages = path.with_name(f"{path.name}{AVERAGES}")
    problem = "there are none" if checkpoint.is_file or not averages.is_dir() else problem_of(averages)
    if problem is None:
        return CheckpointPath(averages, checkpoint.step)
    if wanted == "ema":
        raise CheckpointError(
            f"args.weights is ema, and {averages} cannot be taken: {problem}; use args.weights=raw, or train with "
            "deepspeed.optimizer.type=sat.ops.FusedEmaAdam"
        )
    if not checkpoint.is_file and averages.is_dir():
        log.warning("%s is not taken (%s): using the weights themselves", averages, problem)
    return checkpoint
