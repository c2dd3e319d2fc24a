"""What a file or folder of weights is, which configuration fits it, and the first thing wrong with it.

Reads names and sizes, never the numbers, and needs no torch: a second is enough for 20 GB.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sat.cogvideox import presets
from sat.errors import CheckpointError, SatError
from sat.weights.archive import is_archive, list_archive
from sat.weights.describe import Finding, describe, listed
from sat.weights.headers import Header, TensorInfo, check_start, read_header, read_json
from sat.weights.whole import iteration_names

WEIGHTS_FILE = re.compile(r"mp_rank_(\d+)_model_states\.pt")
TEXT_ENCODER_FOLDER = "t5-v1_1-xxl"
TREE = {
    "transformer": ("transformer", "transformer_t2v", "transformer_i2v"),
    "vae": ("vae",),
    TEXT_ENCODER_FOLDER: (TEXT_ENCODER_FOLDER,),
}
"""Parts of a released tree -> the names that its folders have."""
COMFY_FOLDER = "diffusion_models"
"""Where ComfyUI looks for transformers."""


def survey(path: str | Path) -> Finding:
    """What there is at a path. Raises CheckpointError where there is nothing."""
    path = Path(path)
    try:
        if path.is_dir():
            return _survey_folder(path)
        if not path.exists():
            raise CheckpointError(f"there is no file or folder {path}")
        return _survey_file(path)
    except OSError as error:
        raise CheckpointError(f"cannot read {error.filename or path}: {error.strerror}") from error


# --- files -----------------------------------------------------------------------------------------------------------


def _survey_file(path: Path) -> Finding:
    try:
        with path.open("rb") as stream:
            check_start(path, stream.read(64))
        if path.name.endswith(".index.json"):
            return _survey_shards(path.parent, path)
        if is_archive(path):
            return _survey_archive(path)
        finding = describe(path, read_header(path))
    except (SatError, OSError) as error:
        return Finding(path, "not a whole file of weights", problem=str(error))
    if re.match(r"zero_pp_rank_\d+_mp_rank", path.name):
        finding.what, finding.problem = "DeepSpeed's optimizer state, one shard of it", None
    if path.parent.name.endswith("-ema"):
        finding.facts.append("averaged weights (EMA)")
    return finding


def _survey_archive(path: Path) -> Finding:
    finding = Finding(path, "an archive; tools/fetch_weights.py NAME --from it unpacks and checks it")
    with path.open("rb") as stream:
        if not stream.read(2).startswith(b"PK"):
            return finding  # a tar archive has no list of its files
    names = list_archive(path)
    known = [name for name in names if name.endswith((".pt", ".safetensors", ".bin"))]
    finding.facts = [f"{len(names)} files, {sum(names.values()):,} bytes unpacked", f"weights: {listed(known)}"]
    return finding


# --- folders ---------------------------------------------------------------------------------------------------------


def _survey_folder(path: Path) -> Finding:
    names = {entry.name for entry in path.iterdir()}
    if not names:
        return Finding(path, "an empty folder", problem="there is nothing in it")
    if any(WEIGHTS_FILE.fullmatch(name) for name in names):
        return _survey_iteration(path)
    if "latest" in names or _iterations(path):
        return _survey_checkpoints(path)
    if "model_index.json" in names:
        return _survey_pipeline(path)
    if "spiece.model" in names or "tokenizer_config.json" in names or _config(path).get("model_type") == "t5":
        return survey_text_encoder(path)
    if "config.json" in names or _weight_files(path):
        return _survey_component(path)
    if COMFY_FOLDER in names:
        return _survey_comfy(path)
    found = {part: [path / name for name in folders if name in names] for part, folders in TREE.items()}
    if any(found.values()):
        return _survey_tree(path, found)
    return Finding(path, "a folder without weights", problem=f"it holds {listed(sorted(names))}")


def _survey_comfy(path: Path) -> Finding:
    """A folder of ComfyUI's, or what tools/convert.py writes for one."""
    parts = [survey(path / name) for name in (COMFY_FOLDER, "vae") if (path / name).is_dir()]
    what = f"{parts[0].what}, in a folder for ComfyUI"
    return Finding(path, what, config=parts[0].config, preset=parts[0].preset, parts=parts)


def _survey_tree(path: Path, found: Mapping[str, list[Path]]) -> Finding:
    """A folder with the parts of a released model; the repository of 1.5 has two transformers."""
    parts = [survey(folder) for folders in found.values() for folder in folders]
    finding = Finding(path, "a released tree", parts=parts)
    missing = [part for part, folders in found.items() if not folders]
    finding.facts = [f"without {', '.join(missing)}"] if missing else []
    if len(found["transformer"]) == 1:
        finding.what = f"{parts[0].what}, a released tree"
        finding.config, finding.preset = parts[0].config, parts[0].preset
        if (path / "model.yaml").is_file():
            finding.config = str(path / "model.yaml")
    return finding


def _iterations(path: Path) -> list[str]:
    """Names of the folders of a run or release that hold weights, the latest last."""
    found = [entry.parent.name for entry in path.glob("*/mp_rank_00_model_states.pt")]
    return sorted(found, key=lambda name: (int(re.sub(r"\D", "", name) or 0), name))


def _survey_checkpoints(path: Path) -> Finding:
    """A folder with `latest`: a run directory, or a released transformer."""
    iterations, tracker = _iterations(path), path / "latest"
    newest = next((name for name in iteration_names(path) if name in iterations), None)  # averages are not among them
    instead = f"; write {newest} into it" if newest else ""
    described = (path / "training_config.yaml").is_file()
    finding = Finding(path, "SAT checkpoints", facts=[f"iterations {', '.join(iterations) or 'none'}"])
    name = tracker.read_text(encoding="utf-8", errors="replace").strip() if tracker.is_file() else None
    if name is None:
        finding.problem = f"it has no file 'latest'{instead and f'; write one that holds {newest}'}"
    elif name != "release" and not name.isdigit():
        finding.problem = f"'latest' holds '{name[:40]}'; it must hold the number of a folder, or 'release'"
    elif name not in iterations:
        finding.problem = f"'latest' names {name}, but {path / name} has no weights{instead}"
    else:
        finding.facts.append(f"latest {name}")
    chosen = name if name in iterations else newest or next(iter(iterations), None)
    if chosen is not None:
        weights = _survey_iteration(path / chosen)
        finding.what, finding.config, finding.preset = weights.what, weights.config, weights.preset
        finding.facts += weights.facts
        finding.problem = finding.problem or weights.problem
    if described:
        finding.facts.append("a run directory")
        finding.config = str(path / "training_config.yaml")
    return finding


def _survey_iteration(path: Path) -> Finding:
    """A folder of one iteration: one file of weights for each tensor-parallel rank, perhaps a manifest."""
    ranks = sorted(int(match[1]) for entry in path.iterdir() if (match := WEIGHTS_FILE.fullmatch(entry.name)))
    first = path / f"mp_rank_{ranks[0]:02d}_model_states.pt"
    finding = _survey_file(first)
    finding.path = path
    if ranks != list(range(len(ranks))):
        missing = next(rank for rank in range(len(ranks) + 1) if rank not in ranks)
        finding.problem = finding.problem or f"tensor-parallel rank {missing} is missing: it has ranks {ranks}"
    elif len(ranks) > 1:
        finding.facts.append(f"{len(ranks)} tensor-parallel shards")
        finding.problem = finding.problem or _shard_problem(path, ranks)
    model_class = read_json(path.parent / "model_config.json").get("model_class")
    if model_class:
        finding.facts.append(f"model class {model_class}")
    finding.problem = finding.problem or _manifest_problem(path)
    return finding


def _shard_problem(path: Path, ranks: Sequence[int]) -> str | None:
    """The first tensor-parallel shard that is damaged or holds other names than the first."""
    names: set[str] = set()
    for rank in ranks:
        try:
            header = read_header(path / f"mp_rank_{rank:02d}_model_states.pt")
        except CheckpointError as error:
            return str(error)
        if names and set(header.tensors) != names:
            return f"the shards of ranks {ranks[0]} and {rank} hold different names"
        names = set(header.tensors)
    return None


def _manifest_problem(path: Path) -> str | None:
    """The first file that is not as the manifest of a checkpoint of ours says."""
    for name, entry in read_json(path / "manifest.json").get("files", {}).items():
        if not (path / name).is_file():
            return f"{name} is missing, which its manifest.json lists"
        if (path / name).stat().st_size != entry.get("bytes"):
            return f"{name} has {(path / name).stat().st_size:,} bytes; its manifest.json says {entry.get('bytes'):,}"
    return None


def _survey_pipeline(path: Path) -> Finding:
    index = read_json(path / "model_index.json")
    components = [name for name, value in index.items() if isinstance(value, list) and value[0]]
    folders = [path / name for name in components if (path / name).is_dir()]
    parts = [_survey_folder(folder) for folder in folders if folder.name != "scheduler"]
    finding = Finding(path, f"a diffusers pipeline ({index.get('_class_name', 'of no named class')})", parts=parts)
    for part in parts:
        if part.path.name == "transformer":
            finding.config, finding.preset = part.config, part.preset
            finding.what = f"{part.what}, in a diffusers pipeline"
        if part.path.name in ("text_encoder", "tokenizer"):
            part.problem = _half_text_problem(part.path)
    missing = sorted({*components} - {folder.name for folder in folders})
    if missing:
        finding.problem = f"it lacks {', '.join(missing)}, which its model_index.json lists"
    return finding


def _half_text_problem(path: Path) -> str | None:
    """What is wrong with the encoder or the tokenizer of T5 where each has a folder of its own."""
    return tokenizer_problem(path) if path.name == "tokenizer" else _survey_component(path).problem


def survey_text_encoder(path: Path) -> Finding:
    """A folder with T5's encoder and tokenizer, as `model_dir` of FrozenT5Embedder takes it."""
    has_weights = bool(_weight_files(path))
    finding = _survey_component(path) if has_weights else Finding(path, f"{presets.TEXT_ENCODER}'s tokenizer")
    if not has_weights:
        finding.problem = "the encoder is missing: config.json and model*.safetensors belong beside the tokenizer"
    elif not (path / "config.json").is_file():
        finding.problem = finding.problem or "config.json is missing"
    finding.problem = finding.problem or tokenizer_problem(path)
    return finding


def tokenizer_problem(path: Path) -> str | None:
    """What is wrong with T5's tokenizer in a folder."""
    for name in ("spiece.model", "tokenizer_config.json"):
        if not (path / name).is_file():
            return f"the tokenizer is missing: there is no {name}"
        try:
            with (path / name).open("rb") as stream:
                check_start(path / name, stream.read(64))
        except CheckpointError as error:
            return str(error)
    return None


def _survey_component(path: Path) -> Finding:
    """A folder with one model: diffusers', T5's, a VAE file, or bare files of weights."""
    index = next(iter(sorted(path.glob("*.index.json"))), None)
    if index is not None:
        return _survey_shards(path, index)
    files = _weight_files(path)
    if not files:
        return Finding(path, "a folder without weights", problem=f"{path} has a config.json, but no weights")
    shard = next((match for file in files if (match := re.search(r"-(\d+)-of-(\d+)\.", file.name))), None)
    if shard is not None:
        problem = f"the index of its {int(shard[2])} shards is missing (a file *.index.json)"
        return Finding(path, "shards of weights", facts=[f"{len(files)} files"], problem=problem)
    finding = _describe_file(files[0], _config(path))
    finding.path = path if len(files) == 1 else files[0]
    if len(files) > 1:
        return Finding(
            path, f"a folder of {len(files)} files of weights", parts=[finding, *map(_survey_file, files[1:])]
        )
    return finding


def _describe_file(file: Path, config: Mapping[str, Any]) -> Finding:
    try:
        return describe(file, read_header(file), config)
    except CheckpointError as error:
        return Finding(file, "not a whole file of weights", problem=str(error))


def _survey_shards(path: Path, index: Path) -> Finding:
    """Weights in several files with an index of names."""
    files: dict[str, set[str]] = {}
    for name, file in read_json(index).get("weight_map", {}).items():
        files.setdefault(Path(file).name, set()).add(name)
    if not files:
        return Finding(path, "shards of weights", problem=f"{index} lists no files; copy or download it again")
    tensors: dict[str, TensorInfo] = {}
    problem = None
    for file, names in sorted(files.items()):
        try:
            if not (path / file).is_file():
                raise CheckpointError(f"the shard {file} is missing, one of the {len(files)} that {index.name} lists")
            header = read_header(path / file)
            if names - set(header.tensors):
                raise CheckpointError(f"{path / file} lacks {listed(sorted(names - set(header.tensors)))}")
            tensors |= {name: header.tensors[name] for name in names}
        except CheckpointError as error:
            problem = problem or str(error)
    finding = describe(path, Header(tensors), _config(path))
    finding.facts.append(f"{len(files)} shards")
    finding.problem = problem or finding.problem
    return finding


def _weight_files(path: Path) -> list[Path]:
    """Files of weights right in a folder."""
    return sorted(file for pattern in ("*.safetensors", "*.pt", "*.bin") for file in path.glob(pattern))


def _config(path: Path) -> dict[str, Any]:
    return read_json(path / "config.json")
