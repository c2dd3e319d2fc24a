"""Released SAT files from diffusers' folders of the same models: other names, the same numbers bit for bit."""

import json
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from sat.cogvideox.engine import NETWORK_PREFIX
from sat.cogvideox.mixins import sincos_table_3d
from sat.cogvideox.presets import count_layers
from sat.compat.diffusers_names import DIT_POSITIONS, dit_from_diffusers, vae_from_diffusers
from sat.errors import CheckpointError

ITERATION = "1"
WEIGHTS = "mp_rank_00_model_states.pt"
LEFTOVER_ROWS = 64
"""Rows of `transformer.position_embeddings`, a table in released files that nothing reads (max_sequence_length)."""
COMPONENT = "diffusion_pytorch_model.safetensors"
"""What diffusers calls a model's weights, or their index with `.index.json` after it."""


def write_transformer(source: Path, target: Path) -> None:
    """A folder with `latest` and weights in SAT's layout, of a folder with CogVideoXTransformer3DModel's."""
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    save_transformer(complete_transformer(dit_from_diffusers(read_component(source)), config), target)


def save_transformer(state: Mapping[str, Tensor], target: Path) -> None:
    """A folder with `latest` and the weights of a network, whose bare names get the released prefix."""
    (target / ITERATION).mkdir(parents=True)
    module = {f"{NETWORK_PREFIX}{name}": value.contiguous() for name, value in state.items()}
    torch.save({"module": module}, target / ITERATION / WEIGHTS)
    (target / "latest").write_text(f"{ITERATION}\n", encoding="utf-8")


def write_vae(source: Path, target: Path) -> None:
    """A folder with `3d-vae.pt`, of a folder with AutoencoderKLCogVideoX's weights."""
    target.mkdir(parents=True)
    torch.save({"state_dict": rename_vae(read_component(source))}, target / "3d-vae.pt")


def rename_vae(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """AutoencoderKLCogVideoX's weights under our names."""
    return vae_from_diffusers(state, count_layers(state, r"encoder\.down_blocks\.(\d+)\."))


def read_component(folder: Path) -> dict[str, Tensor]:
    """The state dict in a folder's safetensors files, one or several, memory-mapped."""
    state: dict[str, Tensor] = {}
    for file in component_files(folder):
        with safe_open(file, framework="pt") as reader:
            state |= {name: reader.get_tensor(name) for name in reader.keys()}  # noqa: SIM118 (not a mapping)
    return state


def component_files(folder: Path) -> list[Path]:
    """The files of a model's weights in a folder: what diffusers loads where there are variants, or the only ones.

    Raises CheckpointError where several files are no shards of one model.
    """
    index = folder / f"{COMPONENT}.index.json"
    if index.is_file():
        shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        return [folder / Path(name).name for name in sorted(shards)]
    if (folder / COMPONENT).is_file():
        return [folder / COMPONENT]
    files = sorted(folder.glob("*.safetensors"))
    if len(files) > 1 and not any(folder.glob("*.index.json")):
        raise CheckpointError(
            f"{folder} holds {len(files)} files of weights and no list of what is in which "
            f"({', '.join(file.name for file in files[:4])}); give one of them"
        )
    return files


def complete_transformer(
    state: dict[str, Tensor], config: Mapping[str, Any], leftover_rows: int = LEFTOVER_ROWS
) -> dict[str, Tensor]:
    """Add what SAT's files hold and diffusers' do not: the fixed position table, or a table that nothing reads.

    config: diffusers' config.json of the transformer. leftover_rows: of the latter, which are zero.
    """
    width, dtype = state["mixins.patch_embed.proj.bias"].shape[0], state["mixins.patch_embed.proj.bias"].dtype
    if config["use_rotary_positional_embeddings"]:
        return {**state, "transformer.position_embeddings.weight": torch.zeros(leftover_rows, width, dtype=dtype)}
    patch = config["patch_size"]
    frames = (config["sample_frames"] - 1) // config["temporal_compression_ratio"] + 1
    grid = (frames, config["sample_height"] // patch, config["sample_width"] // patch)
    scale = config["spatial_interpolation_scale"]
    table = torch.zeros(1, config["max_text_seq_length"] + prod(grid), width)
    table[0, config["max_text_seq_length"] :] = sincos_table_3d(
        grid, width, (config["temporal_interpolation_scale"], scale, scale)
    )
    return {**state, DIT_POSITIONS: table.to(dtype)}
