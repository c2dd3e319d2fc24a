"""The model of a configuration that names none: that of the weights which it loads, found by their shapes."""

import logging
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from sat.cogvideox.presets import describe_weights, transformer_kind
from sat.config import ConfigNode, Origin, load_config, load_yaml
from sat.errors import ConfigError
from sat.weights.finding import find_checkpoint
from sat.weights.headers import read_header

log = logging.getLogger(__name__)

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
"""Where the presets' YAML files are: beside the package, in the project's folder."""
RUN_YAML = "training_config.yaml"
MODEL_YAML = "model.yaml"
"""In the folder of a released tree: the model section of one that is not as released."""


def load_run_config(paths: Sequence[str | Path], overrides: Iterable[str] = ()) -> ConfigNode:
    """`load_config`; where it names no model, the model is that of the weights in args.load."""
    overrides = list(overrides)
    config = load_config(paths, overrides)
    load = config["args"].get("load")
    if load is None or "target" in config["model"] or "network_config" in config["model"]:
        return config

    weights = find_checkpoint(load).weights()
    file = model_file(weights)
    if os.environ.get("RANK", "0") == "0":
        log.info("the configuration names no model: taking that of %s, by the weights in %s", file, load)
    below = load_yaml(file)
    if file.name == RUN_YAML:  # what it was trained on and how is no affair of this one
        below = _only_model(below)
    config = load_config(paths, overrides, below)
    if file.name != RUN_YAML:
        _use_own_tree(config, weights, str(file))
        _add_adapters(config, weights)
    return config


def _only_model(config: ConfigNode) -> ConfigNode:
    result = ConfigNode()
    result["model"], result.origins["model"] = config["model"], config.origins["model"]
    return result


def _add_adapters(config: ConfigNode, weights: Path) -> None:
    """Give the model the adapters that are among its weights, with SAT's alpha."""
    shapes = read_header(weights).shapes
    ranks = {shape[0] for name, shape in shapes.items() if ".matrix_A." in name}
    modules = config["model"]["network_config"]["params"]["modules"]
    if not ranks or "lora_config" in modules:
        return
    from sat.model.finetune.lora2 import TARGETS  # it loads torch, as above

    found = [name for name in shapes if ".matrix_A." in name]
    targets = [name for name, parts in TARGETS.items() if any(f".{part}." in own for own in found for part in parts)]
    log.info("the weights hold LoRA adapters of rank %d; their alpha is taken as 1, SAT's default", max(ranks))
    params = {"r": max(ranks), "targets": targets}
    modules["lora_config"] = {"target": "sat.model.finetune.lora2.LoraMixin", "params": params}


def model_file(weights: Path) -> Path:
    """The YAML of the model in a file of weights: its run's or tree's own, else the released one that it fits."""
    for folder in weights.parents[:2]:
        if (folder / RUN_YAML).is_file():
            return folder / RUN_YAML
        if folder.name.startswith("transformer") and (folder.parent / MODEL_YAML).is_file():
            return folder.parent / MODEL_YAML
    shapes = read_header(weights).shapes
    kind = transformer_kind(shapes)
    if kind is None or kind.preset is None or not kind.has_released_size:
        raise ConfigError(
            f"the configuration names no model, and {weights} is no released one but {describe_weights(shapes)}; "
            "give its model section with --base"
        )
    return CONFIGS / kind.preset.config


def _use_own_tree(config: ConfigNode, weights: Path, file: str) -> None:
    """Take VAE and T5 from beside the weights, where they are there and the user names no others."""
    model = config["model"]
    entries = [(_params(model.get("first_stage_config")), "ckpt_path", "vae/3d-vae.pt")]
    for embedder in _params(model.get("conditioner_config")).get("emb_models", []):
        entries.append((_params(embedder), "model_dir", "t5-v1_1-xxl"))
    for params, key, place in entries:
        own = next((folder / place for folder in weights.parents[:3] if (folder / place).exists()), None)
        if own is not None and key in params and params.origins[key].file == file:
            params[key] = str(own)
            params.origins[key] = Origin(f"the tree of {weights}")


def _params(target: ConfigNode | None) -> ConfigNode:
    return (target or ConfigNode()).get("params") or ConfigNode()
