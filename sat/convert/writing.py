"""Files and folders of each layout, written beside the target and moved to their place when all is right."""

import json
import logging
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from sat.compat.comfy_names import comfy_from_diffusers
from sat.compat.diffusers_names import vae_to_diffusers
from sat.config import dump_config
from sat.convert import descriptions
from sat.convert.models import LEFTOVERS, Transformer
from sat.errors import CheckpointError
from sat.vae.checkpoint import save_vae_state
from sat.weights.from_diffusers import COMPONENT, save_transformer
from sat.weights.lora import LoraFile, write_lora
from sat.weights.survey import TEXT_ENCODER_FOLDER

log = logging.getLogger(__name__)

SHARD_BYTES = 10_000_000_000
"""Of diffusers' files of weights, as it writes them itself."""
ENCODER_FILES = ("config.json", "generation_config.json", "*.safetensors", "*.bin", "*.index.json")
TOKENIZER_FILES = ("spiece.model", "*token*.json")


@contextmanager
def staged(target: Path) -> Iterator[Path]:
    """A path to write a file or folder to, which becomes `target` if nothing fails, and else is removed."""
    if target.exists():
        raise CheckpointError(f"{target} is there already; move it away, or give another place")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".converting", dir=target.parent))
    except OSError as error:
        raise CheckpointError(f"cannot write to {target.parent}: {error.strerror}") from error
    try:
        yield folder / target.name
        (folder / target.name).rename(target)
    except OSError as error:
        raise CheckpointError(f"cannot write {target}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def progress(total: int) -> Iterator[Any]:
    """A bar of bytes written, where stderr is a terminal."""
    with tqdm(total=total, unit="B", unit_scale=True, disable=not sys.stderr.isatty(), leave=False) as bar:
        yield bar


def num_bytes(state: Mapping[str, Tensor]) -> int:
    """Bytes of all tensors."""
    return sum(value.nbytes for value in state.values())


# --- SAT -------------------------------------------------------------------------------------------------------------


def write_sat_transformer(transformer: Transformer, folder: Path, bar: Any) -> None:
    """`latest` and one file of weights."""
    state = transformer.to_file()
    save_transformer({name: _own(value) for name, value in state.items()}, folder)
    bar.update(num_bytes(state))


def write_sat_vae(state: Mapping[str, Tensor], file: Path, bar: Any) -> None:
    """A `3d-vae.pt`."""
    file.parent.mkdir(parents=True, exist_ok=True)
    save_vae_state({name: _own(value) for name, value in state.items()}, file)
    bar.update(num_bytes(state))


def write_model_yaml(section: Mapping[str, Any], released: Mapping[str, Any], tree: Path, file: Path) -> None:
    """The model section, with the VAE and T5 that a tree will hold; for models that are not as released.

    released: what the released model of the same size says besides, of clips and precision.
    """
    section = descriptions.of_tree(section, tree / "vae" / "3d-vae.pt", tree / TEXT_ENCODER_FOLDER)
    file.write_text(dump_config({**released, "model": section}), encoding="utf-8")


def write_sat_text_encoder(encoder: Path, tokenizer: Path, folder: Path, bar: Any) -> None:
    """T5's encoder and tokenizer in one folder."""
    _copy(encoder, folder, ENCODER_FILES, bar)
    _copy(tokenizer, folder, TOKENIZER_FILES, bar)


# --- diffusers -------------------------------------------------------------------------------------------------------


def write_diffusers_transformer(transformer: Transformer, folder: Path, bar: Any) -> None:
    """config.json and weights, in shards where they are large."""
    _write_json(folder / "config.json", descriptions.transformer_config(transformer.section))
    _write_shards(transformer.to_diffusers(), folder, bar)


def write_diffusers_vae(
    state: Mapping[str, Tensor], sizes: Mapping[str, Any], section: Mapping[str, Any], folder: Path, bar: Any
) -> None:
    """config.json and weights."""
    _write_json(folder / "config.json", descriptions.vae_config(section, sizes))
    _write_shards(vae_to_diffusers(state, len(sizes["ch_mult"])), folder, bar)


def write_diffusers_text_encoder(encoder: Path, tokenizer: Path, folder: Path, bar: Any) -> None:
    """T5's encoder and tokenizer in a folder each."""
    _copy(encoder, folder / "text_encoder", ENCODER_FILES, bar)
    _copy(tokenizer, folder / "tokenizer", TOKENIZER_FILES, bar)


def write_pipeline(transformer: Transformer, folder: Path) -> None:
    """What makes a folder of parts a pipeline: scheduler, model_index.json, and what only SAT has a place for."""
    _write_json(folder / "scheduler" / "scheduler_config.json", descriptions.scheduler_config(transformer.section))
    parts = [entry.name for entry in folder.iterdir() if entry.is_dir()]
    _write_json(folder / "model_index.json", descriptions.model_index(transformer.section, parts))
    leftovers, metadata = transformer.leftovers()
    if leftovers or metadata:
        _save_file(leftovers, folder / LEFTOVERS, metadata)


def _write_shards(state: Mapping[str, Tensor], folder: Path, bar: Any) -> None:
    shards = _shards(state)
    if len(shards) == 1:
        _save(state, folder / COMPONENT, bar)
        return
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        file = f"{Path(COMPONENT).stem}-{number:05d}-of-{len(shards):05d}.safetensors"
        weight_map |= dict.fromkeys(names, file)
        _save({name: state[name] for name in names}, folder / file, bar)
    index = {"metadata": {"total_size": num_bytes(state)}, "weight_map": dict(sorted(weight_map.items()))}
    _write_json(folder / f"{COMPONENT}.index.json", index)


def _shards(state: Mapping[str, Tensor]) -> list[list[str]]:
    """Names dealt in order to files of at most SHARD_BYTES."""
    shards: list[list[str]] = [[]]
    size = 0
    for name, value in state.items():
        if shards[-1] and size + value.nbytes > SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += value.nbytes
    return shards


# --- ComfyUI, and adapters -------------------------------------------------------------------------------------------


def write_comfy_transformer(transformer: Transformer, file: Path, has_comfy_names: bool, bar: Any) -> None:
    """One file, under ComfyUI's names or under diffusers'."""
    state = transformer.to_diffusers()
    _save(comfy_from_diffusers(state) if has_comfy_names else state, file, bar)


def write_comfy_vae(state: Mapping[str, Tensor], num_levels: int, file: Path, bar: Any) -> None:
    """One file, under diffusers' names."""
    _save(vae_to_diffusers(state, num_levels), file, bar)


def write_sat_adapters(lora: LoraFile, file: Path) -> None:
    """One file, as training writes it beside a run's weights."""
    file.parent.mkdir(parents=True, exist_ok=True)
    write_lora(file, lora)
    _open_to_others(file)


def write_adapters(state: Mapping[str, Tensor], metadata: Mapping[str, str], file: Path) -> None:
    """One file of adapters."""
    _save_file(state, file, metadata)


# --- files -----------------------------------------------------------------------------------------------------------


def _save(state: Mapping[str, Tensor], file: Path, bar: Any) -> None:
    _save_file(state, file, {})
    bar.update(num_bytes(state))


def _save_file(state: Mapping[str, Tensor], file: Path, metadata: Mapping[str, str]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: _own(value) for name, value in state.items()}, file, {"format": "pt", **metadata})
    _open_to_others(file)


def _open_to_others(file: Path) -> None:
    """Give a file the usual permissions: safetensors makes files that none but their owner may read."""
    mask = os.umask(0)
    os.umask(mask)
    file.chmod(0o666 & ~mask)


def _own(value: Tensor) -> Tensor:
    """The tensor with memory of its own and no more of it: writers store, or refuse, what it shares."""
    is_whole = value.is_contiguous() and value.untyped_storage().nbytes() == value.nbytes
    return value if is_whole else value.clone(memory_format=torch.contiguous_format)


def _write_json(file: Path, content: Mapping[str, Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(f"{json.dumps(content, indent=2, sort_keys=True)}\n", encoding="utf-8")


def _copy(source: Path, folder: Path, patterns: tuple[str, ...], bar: Any) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for pattern in patterns:
        for file in sorted(source.glob(pattern)):
            shutil.copyfile(file, folder / file.name)
            bar.update(file.stat().st_size)
