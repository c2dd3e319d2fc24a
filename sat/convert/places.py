"""What a path holds for converting, found by names and shapes alone: transformer, VAE, adapters, text encoder."""

import logging
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from sat.cogvideox import presets
from sat.errors import CheckpointError
from sat.weights.describe import NO_ALPHA, listed
from sat.weights.finding import find_checkpoint, hold, iterations_to_try, model_file, open_checkpoint
from sat.weights.from_diffusers import component_files
from sat.weights.headers import Header, read_header, read_json
from sat.weights.survey import TEXT_ENCODER_FOLDER, survey
from sat.weights.whole import AVERAGES, LATEST, iteration_names

log = logging.getLogger(__name__)

Weights = Literal["auto", "raw", "ema"]

TRANSFORMERS = (presets.TRANSFORMER, presets.DIFFUSERS_TRANSFORMER, presets.COMFY_TRANSFORMER)
VAES = (presets.VAE, presets.DIFFUSERS_VAE)
ADAPTERS = (presets.ADAPTERS, presets.DIFFUSERS_ADAPTERS)

FOLDERS = {
    "transformer": ("transformer", "transformer_t2v", "transformer_i2v", "diffusion_models"),
    "vae": ("vae",),
}
"""Parts, and the folders in which trees of SAT, diffusers and ComfyUI keep them."""

TOKENIZER_MARK = "spiece.model"


@dataclass(frozen=True)
class Place:
    """A file, a folder of one iteration, or a folder of one model of diffusers'."""

    path: Path
    family: str
    """Of `presets.FAMILIES`."""

    @property
    def file(self) -> Path:
        """The (first) file of weights."""
        return _files(self.path)[0]

    def header(self) -> Header:
        """Names and shapes in it; of the first shard where tensor-parallel ranks have one each."""
        headers = [read_header(file) for file in _files(self.path)]
        tensors = {name: info for header in headers for name, info in header.tensors.items()}
        return Header(tensors, metadata=headers[0].metadata)

    def config(self, name: str = "config.json") -> dict[str, Any]:
        """The JSON file of diffusers' beside the weights; an empty mapping if there is none."""
        folder = self.path if self.path.is_dir() else self.path.parent
        return read_json(folder / name)


@dataclass(frozen=True)
class Places:
    """The parts that a path holds."""

    root: Path
    transformer: Place | None = None
    vae: Place | None = None
    adapters: Place | None = None
    encoder: Path | None = None
    """The folder of T5's weights."""
    tokenizer: Path | None = None

    def words(self) -> str:
        """The parts, for people."""
        named = {
            "a transformer": self.transformer,
            "a VAE": self.vae,
            "adapters": self.adapters,
            "a text encoder": self.encoder,
        }
        return ", ".join(word for word, part in named.items() if part is not None) or "nothing"


def find_places(path: Path, leases: ExitStack, weights: Weights = "auto") -> Places:
    """The parts of a file or folder in any of the layouts. Names and shapes tell; where there is a manifest the content
    is compared with it.

    leases: what was found is held against deletion until it closes. weights: of a run, its averaged weights (ema), or
    those that were trained (raw); auto takes the averaged ones where there are some. Raises CheckpointError where there
    is nothing to convert, or where a part is not whole.
    """
    if not path.exists():
        raise CheckpointError(f"there is no file or folder {path}")
    path = path.parent if path.name.endswith(".index.json") else path
    find = _of_tree if path.is_dir() and not _has_weights(path) else _of_one
    places = find(path, leases, weights)
    if places.transformer is None and places.vae is None and places.adapters is None:
        held = listed(sorted(entry.name for entry in path.iterdir())) if path.is_dir() else "something else"
        more = "; a text encoder needs no converting" if places.encoder is not None else ""
        raise CheckpointError(f"{path} holds no transformer, VAE or adapters to convert, but {held}{more}")
    return places


def find_vae(path: Path, leases: ExitStack) -> Place:
    """The VAE at a path."""
    place = find_places(path, leases).vae
    if place is None:
        raise CheckpointError(f"there is no VAE in {path}")
    return place


def find_text_encoder(path: Path) -> tuple[Path, Path]:
    """T5's folders of weights and of the tokenizer, which may be one and the same."""
    folders = [path, *(path / name for name in (TEXT_ENCODER_FOLDER, "text_encoder", "tokenizer"))]
    encoder = next((folder for folder in folders if read_json(folder / "config.json").get("model_type") == "t5"), None)
    tokenizer = next((folder for folder in folders if (folder / TOKENIZER_MARK).is_file()), None)
    if encoder is None or tokenizer is None:
        missing = "config.json of a T5 model" if encoder is None else TOKENIZER_MARK
        raise CheckpointError(
            f"{path} is no folder of T5 v1.1: there is no {missing} in it or in text_encoder/, tokenizer/"
        )
    return encoder, tokenizer


# --- finding ---------------------------------------------------------------------------------------------------------


def _has_weights(folder: Path) -> bool:
    """Whether a folder is one part: a run, an iteration, or a model of diffusers'; not a tree of parts."""
    is_run = (folder / LATEST).is_file() or any(folder.glob("*/mp_rank_*_model_states.pt"))
    has_files = any(folder.glob("*.safetensors")) or any(folder.glob("*.pt")) or any(folder.glob("*.index.json"))
    return (is_run or has_files) and not _is_tree(folder)


def _is_tree(folder: Path) -> bool:
    known = {name for names in FOLDERS.values() for name in names}
    return (folder / "model_index.json").is_file() or any((folder / name).is_dir() for name in known)


def _of_tree(path: Path, leases: ExitStack, weights: Weights) -> Places:
    parts: dict[str, Any] = {}
    for part, names in FOLDERS.items():
        found = [path / name for name in names if (path / name).is_dir()]
        if len(found) > 1:
            raise CheckpointError(
                f"{path} holds {len(found)} models, in {' and '.join(folder.name for folder in found)}; give one of "
                "these folders (the VAE and T5 beside it are found)"
            )
        if found:
            parts[part] = getattr(_of_one(found[0], leases, weights), part)
            if parts[part] is None:
                raise CheckpointError(f"{found[0]} holds no {part}")
    try:
        encoder, tokenizer = find_text_encoder(path)
    except CheckpointError:
        return Places(path, **parts)
    return Places(path, **parts, encoder=encoder, tokenizer=tokenizer)


def _of_one(path: Path, leases: ExitStack, weights: Weights) -> Places:
    """The places where a path is one part, or a file."""
    path = _chosen_iteration(path, leases, weights)
    finding = survey(path)
    problems = [found for found in finding.problems() if found[1] != NO_ALPHA]
    if problems:
        where, problem = problems[0]
        raise CheckpointError(f"{where}: {problem}")
    files = _files(path)
    if not files:
        return Places(path, encoder=path if read_json(path / "config.json").get("model_type") == "t5" else None)
    names = [name for file in files for name in read_header(file).tensors]
    family = presets.family_of(names)
    place = Place(path, family or "")
    if any("mixins.adaln." in name for name in names):
        raise CheckpointError(f"{path} is a CogView3-Plus transformer; only CogVideoX is converted")
    if family in TRANSFORMERS:
        return Places(path, transformer=place)
    if family in VAES:
        return Places(path, vae=place)
    if family in ADAPTERS:
        return Places(path, adapters=place)
    raise CheckpointError(f"{path} holds no transformer, VAE or adapters to convert, but {finding.what}")


def _chosen_iteration(path: Path, leases: ExitStack, weights: Weights) -> Path:
    """A run's iteration, averaged or not, whole and held; what is no run is left as it is."""
    if path.is_file():
        if weights != "auto":
            raise CheckpointError(f"--weights {weights} chooses between a run's folders; {path} is one file")
        return leases.enter_context(open_checkpoint(path)).path
    is_iteration = (path / model_file(0)).is_file()
    if not is_iteration and not (path / LATEST).is_file() and not iteration_names(path):
        return path
    if is_iteration and weights == "auto":
        return leases.enter_context(open_checkpoint(path)).path
    run_dir, names = (path.parent, [path.name]) if is_iteration else (path, iterations_to_try(path))
    averages = [_averages_of(run_dir / name) for name in names]
    if weights == "ema" and not any(_is_there(folder) for folder in averages):
        raise CheckpointError(f"{run_dir} has no averaged weights: there is no {averages[0].name}/{model_file(0)}")
    step = find_checkpoint(path, lambda folder: _chosen_problem(folder, leases, weights)).path
    chosen = _chosen(step, weights)
    if _is_there(_averages_of(step)):
        kind = "averaged" if chosen == _averages_of(step) else "trained"
        log.info("taking the %s weights of iteration %s", kind, step.name.removesuffix(AVERAGES))
    return chosen


def _averages_of(step: Path) -> Path:
    return step.with_name(f"{step.name.removesuffix(AVERAGES)}{AVERAGES}")


def _is_there(folder: Path) -> bool:
    return (folder / model_file(0)).is_file()


def _chosen(step: Path, weights: Weights) -> Path:
    """Which of an iteration's folders is wanted."""
    averages = _averages_of(step)
    is_averaged = weights == "ema" or (weights == "auto" and _is_there(averages))
    return averages if is_averaged else step.with_name(step.name.removesuffix(AVERAGES))


def _chosen_problem(step: Path, leases: ExitStack, weights: Weights) -> str | None:
    """Why what is wanted of an iteration cannot be taken; it is held."""
    chosen = _chosen(step, weights)
    if not _is_there(chosen):
        return f"there is no {chosen.name}/{model_file(0)}"
    return hold(chosen, leases)


def _files(path: Path) -> Sequence[Path]:
    """The files of weights of one part, tensor-parallel ranks by their first."""
    if path.is_file():
        return [path]
    if (path / model_file(0)).is_file():
        return [path / model_file(0)]
    return component_files(path) or sorted(path.glob("*.pt")) or sorted(path.glob("*.bin"))
