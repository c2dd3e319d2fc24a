"""Weights read from any layout into one form: SAT's names, bare, beside the `model:` section that describes them."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from sat.cogvideox import presets
from sat.cogvideox.engine import NETWORK_PREFIX, TEXT_PREFIX, VAE_PREFIX
from sat.compat.comfy_names import comfy_to_diffusers
from sat.compat.diffusers_names import DIT_LEFT_OUT, DIT_POSITIONS, dit_from_diffusers, dit_to_diffusers
from sat.compat.file_types import vae_sizes
from sat.config import ConfigNode, load_config
from sat.convert import descriptions
from sat.convert.adapters import Adapters, adapters_from_names, adapters_from_sat, is_sat_adapter
from sat.convert.places import Place
from sat.errors import CheckpointError, ConfigError
from sat.training.checkpoint import fit_weights, join_parts, load_weights, weight_files
from sat.training.fit import build_on_meta
from sat.training.preset import CONFIGS, model_file
from sat.vae.checkpoint import load_vae_state
from sat.weights.describe import diffusers_preset
from sat.weights.finding import find_checkpoint
from sat.weights.from_diffusers import LEFTOVER_ROWS, complete_transformer, component_files, rename_vae
from sat.weights.headers import read_json
from sat.weights.lora import lora_of

log = logging.getLogger(__name__)

LEFTOVERS = "sat_leftovers.safetensors"
"""Beside model_index.json: the weights of a SAT file that diffusers has no place for and that nothing else gives."""
KERNEL = "patch_kernel"
"""The entry in that file's metadata with the sides of the patch, where the file had the layout of release 1.0."""
IMAGE_SCALING = "image_scaling"
"""The entry with the rule that diffusers does not have, see `scale_image_latents`."""
PATCH_WEIGHT = "mixins.patch_embed.proj.weight"
LORA_MIXIN = "sat.model.finetune.lora2.LoraMixin"
SAT_LORA_ALPHA = 1.0
"""What SAT takes where its configuration says nothing."""


@dataclass
class Transformer:
    """A whole transformer."""

    state: dict[str, Tensor]
    """SAT's names, bare, in today's layout; adapters apart."""
    section: ConfigNode
    adapters: Adapters = field(default_factory=dict)
    tables: dict[str, Tensor] = field(default_factory=dict)
    """Rotary tables that release 1.0 stored."""
    kernel: tuple[int, int] | None = None
    """Sides of the patch, where its projection was stored as a convolution kernel, as release 1.0 did."""

    def to_diffusers(self) -> dict[str, Tensor]:
        """The state dict of CogVideoXTransformer3DModel."""
        has_table = descriptions.has_learned_positions(self.section)
        return dit_to_diffusers(self.state, descriptions.patch_of(self.section), has_table)

    def leftovers(self) -> tuple[dict[str, Tensor], dict[str, str]]:
        """What the way back from diffusers would not give, and metadata."""
        given = _tables_for(self.state["mixins.patch_embed.proj.bias"], self.section)
        has_table = descriptions.has_learned_positions(self.section)
        dropped = DIT_LEFT_OUT if has_table else (*DIT_LEFT_OUT, DIT_POSITIONS)
        lost = {
            name: self.state[name]
            for name in dropped
            if name in self.state and not _is_same(self.state[name], given.get(name))
        }
        metadata = {} if self.kernel is None else {KERNEL: "x".join(map(str, self.kernel))}
        if descriptions.takes_image(self.section) and descriptions.image_scaling(self.section) == "none":
            metadata[IMAGE_SCALING] = "none"
        return {**lost, **self.tables}, metadata

    def to_file(self) -> dict[str, Tensor]:
        """SAT's names, bare, in the layout that the file had which it came from."""
        state = {**self.state, **self.tables}
        if self.kernel is not None:
            state[PATCH_WEIGHT] = state[PATCH_WEIGHT].unflatten(1, (-1, *self.kernel))
        return state


def _tables_for(bias: Tensor, section: ConfigNode) -> dict[str, Tensor]:
    """The tables that SAT's files hold and diffusers' do not, as they are made anew; bias gives width and precision."""
    rows = descriptions.look_up(
        section, "network_config", "params", "transformer_args", "max_sequence_length", default=LEFTOVER_ROWS
    )
    config = descriptions.transformer_config(section)
    made = complete_transformer({"mixins.patch_embed.proj.bias": bias}, config, rows)
    return {name: value for name, value in made.items() if value is not bias}


def _is_same(value: Tensor, other: Tensor | None) -> bool:
    return other is not None and value.dtype == other.dtype and torch.equal(value, other)


# --- the description -------------------------------------------------------------------------------------------------


def find_section(place: Place, base: Sequence[Path]) -> ConfigNode:
    """The model section of a transformer: the user's, its run's, its config.json's, or that of the released model.

    Raises ConfigError where the weights are of no released size and nothing describes them.
    """
    if base:
        section = load_config(base)["model"]
    elif place.family == presets.TRANSFORMER:
        section = load_config([model_file(place.file)])["model"]
    elif place.config().get("_class_name") == "CogVideoXTransformer3DModel":
        vae, scheduler = (
            read_json(place.path.parent / folder / name)
            for folder, name in (("vae", "config.json"), ("scheduler", "scheduler_config.json"))
        )
        section = descriptions.section_from_diffusers(place.config(), vae, scheduler, CONFIGS)
        if IMAGE_SCALING in (metadata := _read_leftovers(place)[1]):
            descriptions.set_image_scaling(section, metadata[IMAGE_SCALING])
    else:
        section = load_config([CONFIGS / _released(place).config])["model"]
    descriptions.network_params(section)  # a CogVideoX transformer, or an error
    return section


def _released(place: Place) -> presets.Preset:
    """The released model of a file under diffusers' or ComfyUI's names that nothing else describes."""
    shapes: Mapping[str, Sequence[int]] = place.header().shapes
    if place.family == presets.COMFY_TRANSFORMER:
        shapes = comfy_to_diffusers(shapes)
    preset = diffusers_preset(shapes, {})
    size = (shapes["patch_embed.proj.weight"][0], presets.count_layers(shapes, r"transformer_blocks\.(\d+)\."))
    if preset is None or size != (preset.hidden_size, preset.num_layers):
        raise ConfigError(
            f"nothing describes {place.path}: there is no config.json beside it, and a hidden size of {size[0]} in "
            f"{size[1]} layers is no released model's; give its model section with --base"
        )
    return preset


# --- the transformer -------------------------------------------------------------------------------------------------


def read_transformer(place: Place, section: ConfigNode, alpha: float | None = None) -> Transformer:
    """The weights at a place, checked name by name and shape by shape against the network that the section describes.

    alpha: of adapters among them; that of the section, or SAT's 1, unless given. Raises CheckpointError.
    """
    if place.family == presets.TRANSFORMER:
        return _read_sat(place, section, alpha)
    state = dit_from_diffusers(read_diffusers(place))
    state |= _tables_for(state["mixins.patch_embed.proj.bias"], section)
    extra, metadata = _read_leftovers(place)
    tables = {name: extra.pop(name) for name in DIT_LEFT_OUT[1:] if name in extra}
    state.update(extra)
    _check(state, section, place)
    kernel = tuple(map(int, metadata[KERNEL].split("x"))) if KERNEL in metadata else None
    return Transformer(state, section, tables=tables, kernel=kernel)  # type: ignore[arg-type]


def read_diffusers(place: Place) -> dict[str, Tensor]:
    """The weights at a place under diffusers' or ComfyUI's names, under diffusers'."""
    state = read_files(place)
    return comfy_to_diffusers(state) if place.family == presets.COMFY_TRANSFORMER else state


def read_files(place: Place) -> dict[str, Tensor]:
    """The state dict at a place, memory-mapped."""
    files = [place.path] if place.path.is_file() else component_files(place.path) or [place.file]
    return {name: value for file in files for name, value in load_weights(file).items()}


def _read_leftovers(place: Place) -> tuple[dict[str, Tensor], dict[str, str]]:
    file = place.path.parent / LEFTOVERS
    if not file.is_file():
        return {}, {}
    with safe_open(file, framework="pt") as reader:
        return {name: reader.get_tensor(name) for name in reader.keys()}, reader.metadata() or {}  # noqa: SIM118


def _read_sat(place: Place, section: ConfigNode, alpha: float | None) -> Transformer:
    parts = [
        {name.removeprefix(NETWORK_PREFIX): value for name, value in load_weights(file).items() if _is_networks(name)}
        for file in weight_files(find_checkpoint(place.path))
    ]
    lora = descriptions.network_params(section)["modules"].get("lora_config")
    has_adapters = any(map(is_sat_adapter, parts[0]))
    network = _network_for(section, parts[0] if has_adapters else {}, lora)
    _fit(network, parts, place)
    state = join_parts(network, parts)
    alpha = alpha if alpha is not None else descriptions.look_up(lora, "params", "lora_alpha", default=SAT_LORA_ALPHA)
    kernel = parts[0][PATCH_WEIGHT].shape[2:] if parts[0][PATCH_WEIGHT].dim() == 4 else None
    return Transformer(
        {name.replace(".original.", "."): value for name, value in state.items() if not is_sat_adapter(name)},
        section,
        adapters_from_sat(state, float(alpha)),
        tables={name: parts[0][name] for name in DIT_LEFT_OUT[1:] if name in parts[0]},
        kernel=None if kernel is None else (kernel[0], kernel[1]),
    )


def _is_networks(name: str) -> bool:
    return not name.startswith((VAE_PREFIX, TEXT_PREFIX))


def _network_for(section: ConfigNode, with_adapters: Mapping[str, Tensor], lora: Mapping | None) -> Any:
    """The network without memory; with adapters where the weights have some."""
    if with_adapters and lora is None:
        rank = next(len(value) for name, value in with_adapters.items() if ".matrix_A." in name)
        targets = lora_of(with_adapters, SAT_LORA_ALPHA, "").targets
        lora = {"target": LORA_MIXIN, "params": {"r": rank, "targets": list(targets)}}
    modules = {"lora_config": lora if with_adapters else None}
    network = build_on_meta(descriptions.changed(section["network_config"], modules))
    if network is None:
        raise ConfigError("the model section has parts of your own that cannot be built without memory")
    return network


def _check(state: Mapping[str, Tensor], section: ConfigNode, place: Place) -> None:
    _fit(_network_for(section, {}, None), [state], place)


def _fit(network: Any, parts: Sequence[Mapping[str, Tensor]], place: Place) -> None:
    shapes = [{name: torch.empty(value.shape, device="meta") for name, value in part.items()} for part in parts]
    fit_weights(network, shapes, str(place.path), presets.describe_weights)


# --- adapters and the VAE --------------------------------------------------------------------------------------------


def read_adapters(place: Place, alpha: float | None = None) -> Adapters:
    """The adapters in a file of nothing else; alpha is what the file says of it unless given."""
    state, metadata = read_files(place), place.header().metadata
    if place.family == presets.ADAPTERS:
        if alpha is None and "alpha" not in metadata:
            raise CheckpointError(
                f"{place.path} does not say its alpha, without which its strength is unknown; give --lora-alpha "
                f"({SAT_LORA_ALPHA:g} is SAT's default)"
            )
        return adapters_from_sat(state, float(metadata["alpha"]) if alpha is None else alpha)
    beside = place.config("adapter_config.json").get("lora_alpha")  # PEFT's own folder
    return adapters_from_names(state, metadata, beside if alpha is None else alpha)


def read_vae(place: Place) -> dict[str, Tensor]:
    """A VAE's weights under our names, without those of its training loss."""
    state = load_vae_state(place.file) if place.family == presets.VAE else rename_vae(read_files(place))
    return {name: value for name, value in state.items() if not name.startswith("loss.")}


def sizes_of_vae(state: Mapping[str, Tensor], where: Path) -> dict[str, Any]:
    """ch, ch_mult, num_res_blocks, z_channels. Raises CheckpointError for half a VAE and for one of images."""
    sizes = vae_sizes({name: value.shape for name, value in state.items()})
    if sizes is None:
        raise CheckpointError(f"{where} is half a VAE: it needs encoder.* and decoder.*")
    if state["encoder.conv_in.conv.weight"].shape[2] != 3:
        raise CheckpointError(f"{where} is a VAE of images (time_kernel 1); diffusers has only the video VAE")
    return sizes
