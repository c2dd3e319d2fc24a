"""Whether weights fit the network of a configuration, asked before either takes memory."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from sat.cogvideox.engine import NETWORK_PREFIX, TEXT_PREFIX, VAE_PREFIX
from sat.cogvideox.presets import TransformerKind, describe_weights, transformer_kind
from sat.cogvideox.start import start_from_text_to_video
from sat.config import ConfigNode, instantiate_from_config
from sat.errors import CheckpointError
from sat.mpu.state import get_parallel_state
from sat.training.checkpoint import fit_weights, weight_files
from sat.training.positions import TableChange, changed, table_changes
from sat.weights.finding import CheckpointPath
from sat.weights.headers import read_header

log = logging.getLogger(__name__)


def check_model(
    config: ConfigNode,
    checkpoint: CheckpointPath,
    may_miss: Callable[[str], bool],
    from_text_to_video: bool = False,
    former: ConfigNode | None = None,
) -> None:
    """Compare the weights' names and shapes with the network that the configuration builds, before either takes memory.

    may_miss: names that may be missing in the weights. from_text_to_video: they are to be completed for an
    image-to-video network. former: the network_config that they were trained with, where it may be another.
    Raises CheckpointError that names the YAML that fits.
    """
    node = config["model"].get("network_config")
    network = build_on_meta(node) if node is not None else None
    if network is None:
        return
    parts = [_network_shapes(file) for file in weight_files(checkpoint)]
    if from_text_to_video:
        own = network.state_dict()
        parts = [start_from_text_to_video(part, own, str(checkpoint.path)) for part in parts]
    changes = changes_from(former, network)
    parts = [changed(part, changes, str(checkpoint.path)) for part in parts]
    found = transformer_kind({name: value.shape for name, value in parts[0].items()})
    built = transformer_kind({name: value.shape for name, value in network.state_dict().items()})
    try:
        fit_weights(network, parts, str(checkpoint.path), describe_weights, may_miss, get_parallel_state())
    except CheckpointError as error:
        raise CheckpointError(f"{error}{_advice(config, found, built)}") from error


def build_on_meta(node: ConfigNode) -> Any:
    """The network without memory; None where a user's own part cannot be built so."""
    try:
        with torch.device("meta"):
            return instantiate_from_config(node)
    except (
        NotImplementedError,
        RuntimeError,
    ) as error:  # what torch raises where a meta tensor's numbers are asked for
        log.debug("the network is not checked against the weights beforehand: %s", error)
        return None


def changes_from(former: ConfigNode | None, network: Any) -> dict[str, TableChange]:
    """What of a network's position tables is stored otherwise in weights that were trained with `former`."""
    old = build_on_meta(former) if former is not None else None
    return {} if old is None else table_changes(network, old)


def _network_shapes(file: Path) -> dict[str, torch.Tensor]:
    """The network's weights in a file, as tensors without memory."""
    return {
        name.removeprefix(NETWORK_PREFIX): torch.empty(shape, device="meta")
        for name, shape in read_header(file).shapes.items()
        if not name.startswith((VAE_PREFIX, TEXT_PREFIX))
    }


def _size(kind: TransformerKind) -> tuple[Any, ...]:
    return kind.preset, kind.hidden_size, kind.num_layers, kind.patch_inputs


def _advice(config: ConfigNode, found: TransformerKind | None, built: TransformerKind | None) -> str:
    """How to mend a misfit of weights and configuration, where that is known."""
    if found is None or found.preset is None:
        return ""
    if built is None or _size(found) != _size(built):
        if not found.has_released_size:
            return ""
        where = config["model"].where("network_config")
        advice = (
            f"\n  {where} describes another model; use --base configs/{found.preset.config}, or leave the model's YAML "
        )
        advice += "out: it is found by the weights"
        if built is not None and built.patch_inputs == 2 * found.patch_inputs:
            advice += "\n  to start an image-to-video model from them, set args.from_text_to_video=true"
        return advice
    if found.has_lora and not built.has_lora:
        return "\n  the weights hold LoRA adapters; add modules.lora_config to the network's configuration"
    return ""
