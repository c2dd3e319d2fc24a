"""LoRA adapters of a training run: found by the path of a file, an iteration or a run, put together of its ranks."""

import logging
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from torch import Tensor

from sat.cogvideox.engine import NETWORK_PREFIX
from sat.config import load_yaml
from sat.training.checkpoint import load_parts
from sat.training.ema import choose_weights
from sat.training.files import Entry, LazyTensor, write_safetensors
from sat.training.preview import model_parts, params_of
from sat.training.run_dir import TRAINING_CONFIG
from sat.weights.finding import CheckpointPath, is_iteration_folder, open_checkpoint
from sat.weights.lora import LORA_FILE, MATRIX, LoraFile, join_adapters, lora_of, read_lora

log = logging.getLogger(__name__)


def load_lora(path: str | Path, weights: str = "auto") -> LoraFile:
    """The adapter of a file of adapters, or of a checkpoint that holds them beside the whole model, as SAT's do.

    weights: of a run or an iteration, the averaged ones or the last ones, see `choose_weights`. Raises CheckpointError
    where there is no adapter, or where it is not what the manifest says.
    """
    path = Path(path)
    if (path / LORA_FILE).is_file() and not is_iteration_folder(path):
        path = path / LORA_FILE
    with ExitStack() as opened:
        found = opened.enter_context(open_checkpoint(path))
        if found.is_file and path.suffix == ".safetensors":
            return read_lora(path)
        checkpoint = choose_weights(found, weights)
        if checkpoint != found:
            opened.enter_context(open_checkpoint(checkpoint.path))
        if not checkpoint.is_file and (checkpoint.path / LORA_FILE).is_file():
            return read_lora(checkpoint.path / LORA_FILE)
        return _of_checkpoint(checkpoint, str(path))


def _of_checkpoint(checkpoint: CheckpointPath, source: str) -> LoraFile:
    parts = load_parts(checkpoint)
    whole = {**parts[0], **join_adapters([_matrices(part) for part in parts])}
    return _of_network(whole, alpha_of(checkpoint), source)


def _matrices(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in state.items() if MATRIX.match(name)}


def _of_network(state: Mapping[str, Tensor], alpha: float, source: str) -> LoraFile:
    has_prefix = any(name.startswith(NETWORK_PREFIX) for name in state)
    return lora_of(state, alpha, source, NETWORK_PREFIX if has_prefix else "")


def alpha_of(checkpoint: CheckpointPath) -> float:
    """The alpha of a whole checkpoint's adapters: what the configuration beside it says, else SAT's default of 1."""
    for folder in checkpoint.path.absolute().parents[:2]:
        if (folder / TRAINING_CONFIG).is_file():
            return lora_alpha(load_yaml(folder / TRAINING_CONFIG))
    log.info("alpha of the adapters in %s is SAT's default, 1: nothing beside it says another", checkpoint.path)
    return 1.0


def lora_alpha(config: Mapping[str, Any]) -> float:
    """The alpha that a configuration gives its adapters."""
    modules = params_of(model_parts(config), "network_config").get("modules") or {}
    return float(params_of(modules, "lora_config").get("lora_alpha", 1.0))


def write_adapters(folder: Path, alpha: float) -> dict[str, Entry]:
    """Write the adapters among a checkpoint's weights, of all tensor-parallel ranks, to a file beside them.

    Returns the manifest's entries: none where there are no adapters.
    """
    parts = load_parts(CheckpointPath(folder, 0))
    adapters = join_adapters([_matrices(part) for part in parts])
    if not adapters:
        return {}
    lora = _of_network({**parts[0], **adapters}, alpha, str(folder))
    tensors = {name: LazyTensor.of(value) for name, value in lora.weights.items()}
    return {LORA_FILE: write_safetensors(folder / LORA_FILE, tensors, lora.metadata)}
