"""Recordings of the VAE as a whole: encoding, decoding, chunks, files of weights.

Letters as in `sat.vae`; recordings are (b c t h w), this project's doors (b t c h w). The weights of most networks are
too large to store: a recipe makes them from their names. A recording belongs to the `configs/NAME.json` whose name
ends its own (`encode_NAME`).
"""

import json
import math
import re
import zlib
from collections.abc import Callable, Iterator, Mapping
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from sat.cogvideox.engine import VideoDiffusionEngine
from sat.config import instantiate_from_config
from sat.vae import VideoAutoencoder
from sat.vae.chunks import DECODE_PRESETS
from tools.golden.common import CannotReplay, Case, Checks, Folder, Recording, RecordingError

OUTPUT_SHARE = 5e-5
"""Of the largest recorded value, or of 1 where that is smaller."""
LOSS_TOLERANCE = 1e-5
RECIPE_TOLERANCE = 1e-6
UNSTATED_SCALE = 0.7
"""The factor on latents in recordings that do not name one."""

TARGETS = "vae_modules"


# --- building --------------------------------------------------------------------------------------------------------


@cache
def recipe_weight(name: str, shape: tuple[int, ...], base_seed: int) -> Tensor:
    """The weight that the recipe makes of a name."""
    seed = (zlib.crc32(name.encode()) + base_seed) % 2**32
    drawn = np.random.RandomState(seed).standard_normal(math.prod(shape)).reshape(shape)
    conditions_norm = ".conv_y." in name or ".conv_b." in name
    if name.endswith("weight") and len(shape) > 1:
        value = (0.5 if conditions_norm else 1.2) * drawn / math.sqrt(math.prod(shape[1:]))
    elif name.endswith("weight") or ".conv_y." in name:
        value = 1 + 0.2 * drawn
    else:
        value = 0.1 * drawn
    return torch.from_numpy(value).float()


def build_vae(model: Mapping[str, Any], **params: Any) -> VideoAutoencoder:
    """The VAE of recorded options, under its released names."""
    halves = {
        f"{half.lower()}_config": {
            "target": f"{TARGETS}.cp_enc_dec.ContextParallel{half}3D",
            "params": dict(model),
        }
        for half in ("Encoder", "Decoder")
    }
    regularizer = {"target": f"{TARGETS}.regularizers.DiagonalGaussianRegularizer"}
    node = {
        "target": f"{TARGETS}.autoencoder.VideoAutoencoderInferenceWrapper",
        "params": {**halves, "regularizer_config": regularizer, **params},
    }
    return instantiate_from_config(node)


def load_strictly(module: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Load recorded weights; every name must fit."""
    try:
        module.load_state_dict(dict(weights), strict=True)
    except RuntimeError as error:
        raise RecordingError(f"the recorded weights do not fit: {error}") from error


def build_from_recipe(model: Mapping[str, Any], shapes: Mapping[str, list[int]], seed: int, **params: Any) -> Any:
    """A VAE with the weights that the recipe makes of recorded names."""
    vae = build_vae(model, **params)
    load_strictly(vae, {name: recipe_weight(name, tuple(shape), seed) for name, shape in shapes.items()})
    return vae


def build_recorded(content: Mapping[str, Any], **params: Any) -> VideoAutoencoder:
    """The VAE of one `configs/NAME.json`."""
    if content.get("rounded_to_bf16"):
        raise CannotReplay("weights that were rounded to bfloat16 are not known here")
    shapes = {name: check["shape"] for name, check in content["checks"].items()}
    return build_from_recipe(content["model"], shapes, content["base_seed"], **params).eval()


# --- comparing -------------------------------------------------------------------------------------------------------


def compare(checks: Checks, name: str, got: Tensor, expected: Tensor) -> None:
    """A tensor of values, to the recording's share of its largest."""
    largest = float(expected.abs().max()) if expected.numel() else 0.0
    checks.close(name, got, expected, atol=OUTPUT_SHARE * max(1.0, largest))


def turn(video: Tensor) -> Tensor:
    """(b c t h w) <-> (b t c h w)."""
    return video.transpose(1, 2)


def members(recording: Recording, pattern: str) -> Iterator[tuple[str, re.Match[str]]]:
    """Names of tensors that match a pattern, and the matches."""
    for name in sorted(recording.tensors):
        if match := re.fullmatch(pattern, name):
            yield name, match


# --- whole networks --------------------------------------------------------------------------------------------------


def replay_recipe(content: Mapping[str, Any], checks: Checks) -> None:
    """The recipe gives the recorded weights, and they fit the network."""
    state = build_recorded(content).state_dict()
    checks.equal("names", sorted(state), sorted(content["checks"]))
    for name, check in content["checks"].items():
        value = state[name].double()
        for key, own in (("sum", value.sum()), ("abs_sum", value.abs().sum())):
            checks.close(f"{key} of {name}", own, check[key], atol=RECIPE_TOLERANCE * check["abs_sum"])
        first = value.flatten()[: len(check["first"])]
        checks.close(f"first of {name}", first, check["first"], atol=RECIPE_TOLERANCE)


ENCODED = r"(?P<clip>.+)/n(?P<count>\d+)/moments"


@torch.no_grad()
def replay_encode(path: Path, content: Mapping[str, Any], checks: Checks) -> None:
    recording, vae = checks.open(path), build_recorded(content)
    for name, match in members(recording, ENCODED):
        place = name.removesuffix("/moments")
        pixels = turn(recording[f"{match['clip']}/x"][:, :, : int(match["count"])])
        posterior = vae.posterior(pixels)
        compare(checks, name, turn(posterior.moments), recording[name])
        compare(checks, f"{place}/mode", turn(posterior.mean), recording[f"{place}/mode"])
        sample = vae.regularizer(posterior, noise=turn(recording[f"{place}/noise"]))
        compare(checks, f"{place}/sample", turn(sample), recording[f"{place}/sample"])
        loss = recording[f"{place}/kl_loss"]
        checks.close(f"{place}/kl_loss", posterior.kl_loss(), loss, rtol=LOSS_TOLERANCE)


DECODED = r"(?P<clip>.+)/t(?P<count>\d+)/(?P<rule>split|nosplit)"


@torch.no_grad()
def replay_decode(path: Path, content: Mapping[str, Any], checks: Checks) -> None:
    recording, vae = checks.open(path), build_recorded(content)
    for name, match in members(recording, DECODED):
        latents = turn(recording[f"{match['clip']}/z"][:, :, : int(match["count"])])
        compare(checks, name, turn(vae.decode(latents, first_frame=match["rule"])), recording[name])  # type: ignore[arg-type]


CHUNKED = rf"((?P<clip>.+)/)?t(?P<count>\d+)/(?P<preset>{'|'.join(DECODE_PRESETS)})"


@torch.no_grad()
def replay_chunks(path: Path, content: Mapping[str, Any], checks: Checks) -> None:
    recording, vae = checks.open(path), build_recorded(content)
    for name, match in members(recording, CHUNKED):
        clip = match["clip"] or f"t{match['count']}"
        scale = recording.optional(f"{clip}/scale_factor")
        latents = turn(recording[f"{clip}/z"][:, :, : int(match["count"])])
        scaled = latents / (UNSTATED_SCALE if scale is None else float(scale))
        compare(checks, name, turn(vae.decode_chunked(scaled, match["preset"])), recording[name])


# --- in the engine ---------------------------------------------------------------------------------------------------


class NoNetwork(nn.Module):
    """Stands in for the transformer in an engine that only encodes and decodes."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.device_marker = nn.Parameter(torch.zeros(()))
        self.out_channels = channels

    def get_mixin(self, name: str) -> None:
        """It has no mixins."""


def build_engine(vae: VideoAutoencoder, **options: Any) -> VideoDiffusionEngine:
    """An engine around a VAE alone."""
    network = NoNetwork(vae.decoder.z_channels)
    parts = {"network": network, "denoiser": None, "first_stage": vae, "scale_factor": UNSTATED_SCALE, **options}
    return instantiate_from_config({"target": "diffusion_video.SATVideoDiffusionEngine"}, **parts)


GROUPED = r"(?P<way>encode|decode)/n(?P<group>\d+)/(?:z|y_(?P<preset>\w+))"


@torch.no_grad()
def replay_first_stage(path: Path, content: Mapping[str, Any], checks: Checks) -> None:
    recording = checks.open(path)
    for name, match in members(recording, GROUPED):
        group = int(match["group"]) or None
        if match["way"] == "encode":
            engine = build_engine(build_recorded(content), en_and_decode_n_samples_a_time=group)
            noise = turn(recording[name.replace("/z", "/noise")])
            compare(checks, name, turn(engine.encode_first_stage(turn(recording["x"]), noise)), recording[name])
            continue
        engine = build_engine(build_recorded(content, decode_preset=match["preset"]))
        latents = turn(recording["decode/z"])
        if match["preset"] != "v1":  # the released script's surplus latent, which our sampling takes off
            latents = latents[:, 1:]
        groups = [torch.cat(list(engine.decode_first_stage(part)), 1) for part in latents.split(group or len(latents))]
        compare(checks, name, turn(torch.cat(groups)), recording[name])
    if "latent_input/out" in recording:
        engine = build_engine(build_recorded(content), latent_input=True)
        batch = {"pixels": turn(recording["latent_input/in_bcthw"])}
        compare(checks, "latent_input/out", engine._latents(batch, 0, "", []), recording["latent_input/out"])


# --- layer by layer --------------------------------------------------------------------------------------------------


def record_outputs(network: nn.Module, names: list[str]) -> dict[str, Tensor]:
    """A mapping that the outputs of named modules will stand in after the network has run."""
    outputs: dict[str, Tensor] = {}
    for name in names:
        network.get_submodule(name).register_forward_hook(
            lambda module, arguments, output, name=name: outputs.update({name: output.detach().clone()})
        )
    return outputs


def replay_trace(path: Path, content: Mapping[str, Any], checks: Checks) -> None:
    """The output of every recorded module. Norms here have the swish in them that follows."""
    recording, vae = checks.open(path), build_recorded(content)
    names = [name for name in recording.tensors if name != "input"]
    network = vae.encoder if any(name.startswith("down.") for name in names) else vae.decoder
    outputs = record_outputs(network, names)
    network(recording["input"])  # with gradients: without, norms are not called as modules
    for name in names:
        expected = recording[name]
        is_norm = name.rsplit(".", 1)[-1].startswith("norm")
        compare(checks, name, outputs[name], nn.functional.silu(expected) if is_norm else expected)


# --- files of weights ------------------------------------------------------------------------------------------------


@torch.no_grad()
def replay_file(path: Path, content: Mapping[str, Any], checks: Checks) -> None:
    """A file in the layout of the released 3d-vae.pt, through `ckpt_path`, and what the loaded VAE gives."""
    file, recording = _checkpoint_of(path), checks.open(_outputs_of(path))
    vae = build_vae(content["model"], ckpt_path=str(file), ignore_keys=content["ignore_keys"]).eval()
    shapes = {name: list(value.shape) for name, value in vae.state_dict().items()}
    recorded = {name: shape for name, shape in content["keys"].items() if not name.startswith("loss")}
    checks.equal("names and shapes", shapes, recorded)
    posterior = vae.posterior(turn(recording["x"]))
    compare(checks, "moments", turn(posterior.moments), recording["moments"])
    compare(checks, "z", turn(posterior.mean), recording["z"])
    for rule in ("split", "nosplit"):
        decoded = vae.decode(turn(recording["z"]), first_frame=rule)
        compare(checks, f"decode_{rule}", turn(decoded), recording[f"decode_{rule}"])


def _checkpoint_of(path: Path) -> Path:
    return path.with_name(path.stem.removesuffix("_config") + ".pt")


def _outputs_of(path: Path) -> Path:
    return path.with_name(path.stem.removesuffix("_config") + "_io.safetensors")


def replay_names(content: Mapping[str, Any], checks: Checks) -> None:
    """Every name and shape of the released network, and how many parameters it has."""
    with torch.device("meta"):
        vae = build_vae(content["config"])
    shapes = {name: list(value.shape) for name, value in vae.state_dict().items()}
    checks.equal("names", sorted(shapes), sorted(content["keys"]))
    for name in set(shapes) & set(content["keys"]):
        checks.equal(f"shape of {name}", shapes[name], content["keys"][name])
    checks.equal("parameters", sum(parameter.numel() for parameter in vae.parameters()), content["parameters"])


# --- all -------------------------------------------------------------------------------------------------------------

Replay = Callable[[Path, Mapping[str, Any], Checks], None]

KINDS: tuple[tuple[str, Replay], ...] = (
    (ENCODED, replay_encode),
    (DECODED, replay_decode),
    (CHUNKED, replay_chunks),
    (GROUPED, replay_first_stage),
    (r"(down|up)\.\d+\.block\.\d+", replay_trace),
)
"""What names of a recording's tensors look like -> how it is replayed."""


def tensor_names(path: Path) -> list[str]:
    """The names in a recording's header; none of a file that cannot be read, which then is no rule's."""
    try:
        with safe_open(path, framework="pt") as reader:
            return list(reader.keys())
    except (SafetensorError, OSError):
        return []


def find_config(folder: Folder, path: Path) -> Mapping[str, Any]:
    """The configuration whose name ends a recording's; the nearest of several."""
    below = [config for config, _ in folder.with_keys("model", "checks", "base_seed")]
    above = [config for parent in path.parents for config in parent.glob("configs/*.json")]
    fitting = [config for config in (*below, *above) if path.stem.endswith(f"_{config.stem}")]
    if not fitting:
        raise RecordingError(f"there is no configs/NAME.json whose name ends '{path.stem}'")
    nearest = max(fitting, key=lambda config: (len(config.stem), len(set(config.parents) & set(path.parents))))
    return json.loads(nearest.read_text(encoding="utf-8"))


def _replay_with_config(replay: Replay, folder: Folder, path: Path, checks: Checks) -> None:
    replay(path, find_config(folder, path), checks)


def find_tensors(folder: Folder) -> Iterator[Case]:
    """The recordings that belong to a `configs/NAME.json`."""
    for path in folder.with_suffix(".safetensors"):
        names, title = tensor_names(path), folder.name(path)
        for pattern, replay in KINDS:
            if any(re.fullmatch(pattern, name) for name in names):
                yield Case(title, (path,), partial(_replay_with_config, replay, folder, path))


def find(folder: Folder) -> Iterator[Case]:
    """The cases of whole networks."""
    for path, content in folder.with_keys("model", "checks", "base_seed"):
        yield Case(folder.name(path), (path,), partial(replay_recipe, content))
    for path, content in folder.with_keys("config", "keys", "parameters"):
        yield Case(folder.name(path), (path,), partial(replay_names, content))
    for path, content in folder.with_keys("model", "keys", "ignore_keys"):
        files = (path, _checkpoint_of(path), _outputs_of(path))
        yield Case(folder.name(path), files, partial(replay_file, path, content))
    yield from find_tensors(folder)
