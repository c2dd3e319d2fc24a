"""Recordings of the video transformer: `forward/` (the network alone) and `checkpoints/` (files on disk).

Each case of `forward/` is a folder with `network_config.yaml`, `weights.safetensors`, `meta.json` and one file a run.
"""

import hashlib
import re
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sat.cogvideox.engine import NetworkWrapper
from sat.config import instantiate_from_config, load_yaml
from sat.mpu.shards import ShardRule, cut_state, shard_rules
from sat.ops.rotary import rotary_table_3d
from sat.training.checkpoint import load_pickle, load_weights
from tools.golden.common import (
    CannotReplay,
    Case,
    Checks,
    Folder,
    Recording,
    RecordingError,
    compare_checksums,
    compare_listing,
    read_tensors,
)

OUTPUT = {"atol": 1e-5, "rtol": 1e-5}
GRADIENT_SHARE = 2e-4
CHECKSUM_SHARE = 1e-3
ROUNDING = 1e-6
"""A gradient that is `zero up to rounding` stays below this."""

PREFIX = "model.diffusion_model."
INPUTS = ("concat_images", "ofs", "y")
"""Optional inputs of the network."""


# --- building --------------------------------------------------------------------------------------------------------


def build_network(file: Path, weights: Mapping[str, Tensor], without_lora: bool = False) -> Any:
    """The network of a YAML file, alone (`network_config`) or in a `model` section, with weights loaded strictly."""
    config = load_yaml(file)
    node = config.get("model", config)["network_config"]
    if without_lora:
        node["params"]["modules"].pop("lora_config")
    network = instantiate_from_config(node)
    try:
        network.load_state_dict(dict(weights), strict=True)
    except RuntimeError as error:
        raise RecordingError(f"the recorded weights do not fit: {error}") from error
    return network.train()


# --- gradients -------------------------------------------------------------------------------------------------------


def compare_gradient_checksums(checks: Checks, network: nn.Module, recorded: Mapping[str, Any]) -> None:
    """The recorded sums of the gradient of every parameter; null: no gradient."""
    parameters = dict(network.named_parameters())
    checks.equal("parameters", sorted(parameters), sorted(recorded))
    for name in set(parameters) & set(recorded):
        grad, sums = parameters[name].grad, recorded[name]
        if sums is None:
            checks.equal(f"{name} has a gradient", grad is not None, False)
        elif grad is None:
            checks.equal(f"{name} has a gradient", False, True)
        elif isinstance(sums, str):
            checks.close(f"gradient of {name} ({sums})", grad, torch.zeros_like(grad), atol=ROUNDING)
        else:
            compare_checksums(checks, f"the gradient of {name}", grad, sums, CHECKSUM_SHARE)


def compare_gradient_tensors(
    checks: Checks, network: nn.Module, recorded: Mapping[str, Tensor], sums: Mapping[str, Any]
) -> None:
    """Recorded gradients of parameters, whole."""
    parameters = dict(network.named_parameters())
    for name, expected in recorded.items():
        grad = parameters[name].grad if name in parameters else None
        if grad is None:
            checks.equal(f"{name} has a gradient", False, True)
        elif isinstance(sums.get(name), str):
            checks.close(f"grad.{name} ({sums[name]})", grad, expected, atol=ROUNDING)
        else:
            checks.close_to_largest(f"grad.{name}", grad, expected, GRADIENT_SHARE)


# --- forward ---------------------------------------------------------------------------------------------------------


def network_inputs(recording: Recording) -> dict[str, Tensor]:
    """The recorded inputs, by the names of the network's arguments."""
    names = ("x", "timesteps", "context", *(name for name in INPUTS if name in recording))
    return {name: recording[name] for name in names}


def replay_run(folder: Path, meta: Mapping[str, Any], run: Mapping[str, Any], checks: Checks) -> None:
    """Output, loss and all gradients of one run."""
    recording = checks.open(folder / run["file"])
    weights = read_tensors(folder / "weights.safetensors")
    compare_listing(checks, run["file"], recording.tensors, run["tensors"])
    compare_listing(checks, "weights.safetensors", weights, meta["weights"])
    network = build_network(folder / "network_config.yaml", weights)
    inputs = network_inputs(recording)
    for name in ("x", "context"):
        inputs[name].requires_grad_()
    output = network(**inputs)
    checks.close("output", output, recording["output"], **OUTPUT)
    loss = (output * recording["cotangent"]).mean()
    checks.close("loss", loss, recording["loss"], **OUTPUT)
    loss.backward()

    gradients = recording.group("grad.")
    for name in ("x", "context"):
        expected = gradients.pop(name, None)
        if expected is not None:
            checks.close_to_largest(f"grad.{name}", inputs[name].grad, expected, GRADIENT_SHARE)
    compare_gradient_tensors(checks, network, gradients, run.get("gradient_checksums", {}))
    if "gradient_checksums" in run:
        compare_gradient_checksums(checks, network, run["gradient_checksums"])
    for key, value in (("output_rms", output.double().square().mean().sqrt()), ("output_abs_max", output.abs().max())):
        if key in run:
            checks.close(key, value, run[key], **OUTPUT)


def replay_merged_run(folder: Path, meta: Mapping[str, Any], run: Mapping[str, Any], checks: Checks) -> None:
    """Adapters folded into the weights, by our own folding and as recorded."""
    source = re.search(r"run '(\w+)'", run.get("note", ""))
    if source is None or source[1] not in meta["runs"]:
        raise CannotReplay("the run has no inputs of its own and does not name the run that has them")
    inputs = network_inputs(Recording(folder / meta["runs"][source[1]]["file"]))
    weights = read_tensors(folder / "weights.safetensors")
    merged = checks.open(folder / "weights_merged.safetensors").group("")
    expected = checks.open(folder / run["file"])["output"]
    compare_listing(checks, run["file"], {"output": expected}, run["tensors"])
    compare_listing(checks, "weights_merged.safetensors", merged, meta["weights_merged"])
    config = folder / "network_config.yaml"

    network = build_network(config, weights)
    network.get_mixin("lora").merge_lora()
    own = network.state_dict()
    for name, value in merged.items():
        checks.close(name, own[name], value, **OUTPUT)
    kept = {name: value for name, value in weights.items() if ".original." not in name and ".matrix_" not in name}
    checks.equal("names after folding", sorted(own), sorted([*kept, *merged]))
    checks.close("output after folding", network(**inputs), expected, **OUTPUT)
    plain = build_network(config, {**kept, **merged}, without_lora=True)
    checks.close("output with the folded weights", plain(**inputs), expected, **OUTPUT)


# --- forward: release 1.0 --------------------------------------------------------------------------------------------


def release_1_weights(folder: Path, content: Mapping[str, Any], checks: Checks) -> dict[str, Tensor]:
    """The weights in the layout of release 1.0: as recorded, or today's in the shapes that `meta_v1_0.json` lists."""
    file = folder / "weights_v1_0_layout.safetensors"
    if file.is_file():
        weights = checks.open(file).group("")
        shapes = content.get("weights_v1_0_layout", {})
    else:
        weights = read_tensors(folder / "weights.safetensors")
        shapes = content["tensors_that_differ_in_presence_or_shape_from_weights_safetensors"]
        for name, entry in shapes.items():
            source = weights.get(name)
            weights[name] = torch.zeros(entry["shape"]) if source is None else source.view(entry["shape"])
    for name, entry in shapes.items():
        checks.equal(f"shape of {name}", list(weights[name].shape), entry["shape"])
    return weights


def replay_release_1(folder: Path, meta: Mapping[str, Any], content: Mapping[str, Any], checks: Checks) -> None:
    """Today's recorded outputs from the configuration and weights of release 1.0."""
    weights = release_1_weights(folder, content, checks)
    network = build_network(folder / "network_config_v1_0.yaml", weights)
    positions = network.get_mixin("pos_embed")
    if "mixins.pos_embed.freqs_cos" in weights:
        cos, sin = rotary_table_3d(network.stored_grid, positions.head_dim, positions.theta)
        for name, own in (("freqs_cos", cos), ("freqs_sin", sin)):
            recorded = weights[f"mixins.pos_embed.{name}"]
            is_known = (folder / "weights_v1_0_layout.safetensors").is_file()
            checks.close(name, own if is_known else torch.zeros_like(own), recorded, **OUTPUT)
    runs = content.get("max_abs_difference_of_v1_0_output_to_stored_output", meta["runs"])
    for name in runs:
        recording = Recording(folder / meta["runs"][name]["file"])
        checks.close(f"output of {name}", network(**network_inputs(recording)), recording["output"], **OUTPUT)


def find_forward(folder: Folder) -> Iterator[Case]:
    """A case for each run of each network."""
    for path, meta in folder.with_keys("case", "runs"):
        home, name = path.parent, folder.name(path.parent)
        shared: tuple[Path, ...] = (path, home / "weights.safetensors")
        for run_name, run in meta["runs"].items():
            title = f"{name}/{run_name}"
            files = (*shared, home / run["file"])
            if "x" in run.get("tensors", {}):
                yield Case(title, files, partial(replay_run, home, meta, run))
            else:
                merged = (*files, home / "weights_merged.safetensors")
                yield Case(title, merged, partial(replay_merged_run, home, meta, run))
        release_1 = home / "meta_v1_0.json"
        if release_1 in folder.documents:
            files = (*shared, release_1, home / "weights_v1_0_layout.safetensors")
            yield Case(f"{name}/v1_0", files, partial(replay_release_1, home, meta, folder.documents[release_1]))


# --- checkpoints -----------------------------------------------------------------------------------------------------


def network_weights(folder: Path, mp_rank: int = 0) -> dict[str, Tensor]:
    """The network's part of a checkpoint folder, names without the prefix of a whole pipeline."""
    weights = load_weights(folder, mp_rank)
    return {name.removeprefix(PREFIX): value for name, value in weights.items() if name.startswith(PREFIX)}


def replay_single(home: Path, folder: Path, checks: Checks) -> None:
    """A folder of one rank: the recorded output comes from its weights."""
    recording = checks.open(home / "inputs_and_output.safetensors")
    network = NetworkWrapper(build_network(home / "config.yaml", network_weights(folder)))
    cond = {"crossattn": recording["context"]}
    output = network(recording["x"], recording["timesteps"], cond)
    checks.close("output", output, recording["output"], **OUTPUT)
    checks.equal("shape of the cotangent", recording["cotangent"].shape, recording["output"].shape)


def sat_rules(network: nn.Module) -> dict[str, ShardRule]:
    """What SAT splits: not the modulations, which here are split too."""
    return {name: rule for name, rule in shard_rules(network).items() if "adaLN_modulation" not in name}


def replay_ranks(home: Path, folder: Path, ranks: int, whole_folder: Path, checks: Checks) -> None:
    """A folder of several ranks: each holds its slices of the weights that the one-rank folder holds whole."""
    whole = network_weights(whole_folder)
    rules = sat_rules(build_network(home / "config.yaml", whole))
    for rank in range(ranks):
        weights = network_weights(folder, rank)
        checks.equal(f"rank {rank}: names", sorted(weights), sorted(whole))
        own = cut_state(whole, rules, rank, ranks)
        for name in set(weights) & set(whole):
            checks.close(f"rank {rank}: {name}", weights[name], own[name])


def replay_shapes(home: Path, content: Mapping[str, Any], whole_folder: Path, ranks: int, checks: Checks) -> None:
    """The listed shapes of whole and split parameters."""
    network = build_network(home / "config.yaml", network_weights(whole_folder))
    rules, state = sat_rules(network), network.state_dict()
    checks.equal("names", sorted(state), sorted(content))
    own = cut_state(state, rules, 0, ranks)
    for name in set(state) & set(content):
        checks.equal(f"full shape of {name}", list(state[name].shape), content[name]["full"])
        checks.equal(f"shape of {name} on a rank", list(own[name].shape), content[name]["per_rank"])
        checks.equal(f"{name} is replicated", name not in rules, content[name]["rule"] == "replicated")


def replay_listing(home: Path, content: Mapping[str, Any], checks: Checks) -> None:
    """What the files hold beside the weights, and every key with its shape."""
    single = content["single_process_file"]
    file = load_pickle(next(home.glob("single_process/**/mp_rank_00_model_states.pt")))
    checks.equal("top-level keys", sorted(file), sorted(single["top_level_keys"]))
    checks.equal("module keys", sorted(file["module"]), sorted(single["module_keys"]))
    for name, entry in single["module_keys"].items():
        value = file["module"].get(name)
        own = None if value is None else {"shape": list(value.shape), "dtype": str(value.dtype).removeprefix("torch.")}
        checks.equal(name, own, entry)
    training = load_pickle(next(home.glob("training_run/**/mp_rank_00_model_states.pt")))
    types = {name: type(value).__name__ for name, value in training.items()}
    checks.equal("types in a training run's file", types, content["training_run_file_top_level_keys"])


def find_checkpoints(folder: Folder) -> Iterator[Case]:
    """The folders with `latest` below one that has `inputs_and_output.safetensors`, and the listings beside it."""
    for inputs in (path for path in folder.files if path.name == "inputs_and_output.safetensors"):
        home = inputs.parent
        roots = sorted(latest.parent for latest in home.rglob("latest"))
        ranks = {root: len(list(root.glob("*/mp_rank_*_model_states.pt"))) for root in roots}
        if any(count == 0 for count in ranks.values()) or not roots:
            yield Case(folder.name(home), (inputs,), partial(_no_weights, ranks))
            continue
        whole = next((root for root in roots if ranks[root] == 1), roots[0])
        for root in roots:
            files = (inputs, *(path for path in folder.files if root in path.parents))
            replay = partial(replay_single, home, root)
            if ranks[root] > 1:
                replay = partial(replay_ranks, home, root, ranks[root], whole)
            yield Case(folder.name(root), files, replay)
        for path, content in folder.with_keys("single_process_file"):
            if path.parent == home:
                yield Case(folder.name(path), (path,), partial(replay_listing, home, content))
        for path, content in folder.documents.items():
            match = re.fullmatch(r"model_parallel_(\d+)_shapes", path.stem)
            if path.parent == home and match:
                replay = partial(replay_shapes, home, content, whole, int(match[1]))
                yield Case(folder.name(path), (path,), replay)


def _no_weights(ranks: Mapping[Path, int], checks: Checks) -> None:
    empty = ", ".join(root.name for root, count in ranks.items() if count == 0) or "no folder with 'latest'"
    raise RecordingError(f"checkpoint folders without a file of weights: {empty}")


# --- what is listed --------------------------------------------------------------------------------------------------


def replay_manifest(path: Path, content: Mapping[str, Any], checks: Checks) -> None:
    """Every listed file is there, is the one that was recorded, and holds the listed tensors."""
    for name, entry in content.items():
        file = path.parent / name
        if not file.is_file():
            raise RecordingError(f"{path.name} lists {name}, which is missing")
        data = file.read_bytes()
        checks.equal(f"size of {name}", len(data), entry["bytes"])
        checks.equal(f"checksum of {name}", hashlib.sha256(data).hexdigest(), entry["sha256"])
        if "tensors" in entry and file.suffix == ".safetensors":
            compare_listing(checks, name, read_tensors(file), entry["tensors"])


def find(folder: Folder) -> Iterator[Case]:
    """The cases of `forward/` and `checkpoints/`, and the manifest of a set."""
    yield from find_forward(folder)
    yield from find_checkpoints(folder)
    for path, content in folder.documents.items():
        if path.name == "manifest.json":
            yield Case(folder.name(path), (path,), partial(replay_manifest, path, content))
    for path, _ in folder.with_keys("max_abs_diff", "key_mapping"):
        reason = "it records how another library compares; tests/cogvideox/test_diffusers.py compares anew"
        yield Case(folder.name(path), (path,), reason=reason)
