"""Recordings of the VAE's parts: convolutions, norms, resamplers, residual blocks, the latent distribution."""

import re
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from sat.config import instantiate_from_config
from sat.vae import ConvCache, DiagonalGaussian
from sat.vae.context import ChunkContext
from sat.vae.decoder import SpatialNormSwish
from sat.vae.norms import NormSwish
from tools.golden.common import Case, Checks, Folder, Recording
from tools.golden.vae_networks import LOSS_TOLERANCE, OUTPUT_SHARE, compare, load_strictly, members, tensor_names, turn

NORM_GROUPS = 32


def build(name: str, weights: Mapping[str, Tensor], params: Mapping[str, Any], **supplied: Any) -> Any:
    """A part of the VAE with recorded weights. params as in YAML; supplied: what YAML cannot hold."""
    part = instantiate_from_config({"target": f"sat.vae.{name}", "params": dict(params)}, **supplied)
    load_strictly(part, weights)
    return part.eval()


def prefixes(recording: Recording, pattern: str) -> Iterator[tuple[str, re.Match[str]]]:
    """Beginnings of names before `/w/`, `/x` and the like, each once, and their matches."""
    found = {match[0]: match for name in recording.tensors if (match := re.match(pattern, name))}
    yield from sorted(found.items())


# --- convolutions ----------------------------------------------------------------------------------------------------

CONVOLUTION = r"[^/]+(?=/w/conv\.weight)"
CHUNKS = r"(?P<kernel>[^/]+)/chunks_(?P<sizes>\d+(_\d+)*)(?=/x)"


@torch.no_grad()
def replay_convolutions(path: Path, checks: Checks) -> None:
    recording = checks.open(path)
    for kernel, _ in prefixes(recording, CONVOLUTION):
        weights = recording.group(f"{kernel}/w/")
        width, channels, *size = weights["conv.weight"].shape
        sizes = {"in_channels": channels, "out_channels": width, "kernel_size": tuple(size)}
        conv = build("causal_conv.CausalConv3d", weights, sizes)
        for name, match in members(recording, rf"({kernel}/(?:t\d+/)?)x"):
            compare(checks, f"{match[1]}y", conv(recording[name]), recording[f"{match[1]}y"])
        for clip, match in prefixes(recording, CHUNKS):
            if match["kernel"] == kernel:
                replay_chunks(recording, clip, [int(size) for size in match["sizes"].split("_")], conv, checks)


def replay_chunks(recording: Recording, clip: str, sizes: list[int], conv: Any, checks: Checks) -> None:
    """A clip cut in time: outputs, and what the cache holds after every chunk but the last."""
    cache = ConvCache()
    for index, chunk in enumerate(recording[f"{clip}/x"].split(sizes, dim=2)):
        compare(checks, f"{clip}/y{index}", conv(chunk, cache), recording[f"{clip}/y{index}"])
        kept = cache.take(conv)
        expected = recording.optional(f"{clip}/cache{index}")
        if kept is not None and expected is not None:
            checks.close(f"{clip}/cache{index}", kept, expected)
            cache.put(conv, kept)


# --- norms -----------------------------------------------------------------------------------------------------------

NORM = r"[^/]+(?=/w/norm_layer\.weight)"


@torch.no_grad()
def replay_norms(path: Path, checks: Checks) -> None:
    """Recorded without the swish that follows every norm, and that ours has in it."""
    recording = checks.open(path)
    for kind, _ in prefixes(recording, NORM):
        weights = recording.group(f"{kind}/w/")
        channels, z_channels = weights["conv_y.conv.weight"].shape[:2]
        sizes = {"num_groups": NORM_GROUPS, "z_channels": z_channels, "channels": channels}
        options = {"add_conv": "conv.conv.weight" in weights, "init": "released"}
        norm = build("decoder.SpatialNormSwish", weights, {**sizes, **options})
        for name, match in members(recording, rf"({kind}/f\d+_z\d+_(split|nosplit))/f"):
            ctx = ChunkContext(first_frame=match[2], latents=recording[f"{match[1]}/zq"])  # type: ignore[arg-type]
            expected = F.silu(recording[f"{match[1]}/y"])
            compare(checks, f"{match[1]}/y", norm(recording[name], ctx), expected)
            in_slices = torch.empty_like(recording[name])
            norm.in_slices(recording[name], ctx)(recording[name], 0, in_slices)
            compare(checks, f"{match[1]}/y in slices", in_slices, expected)


# --- resamplers ------------------------------------------------------------------------------------------------------

RESAMPLER = r"(?P<way>down|up)_ct(?P<time>[01])_conv(?P<conv>[01])(?=/)"
RESAMPLERS = {"down": "encoder.Downsample", "up": "decoder.Upsample"}


@torch.no_grad()
def replay_resamplers(path: Path, checks: Checks) -> None:
    recording = checks.open(path)
    for kind, match in prefixes(recording, RESAMPLER):
        clips = list(members(recording, rf"({kind}/t\d+_(split|nosplit))/x"))
        channels = recording[clips[0][0]].shape[1]
        options = {"channels": channels, "compress_time": match["time"] == "1", "with_conv": match["conv"] == "1"}
        resample = build(RESAMPLERS[match["way"]], recording.group(f"{kind}/w/"), options)
        for name, clip in clips:
            ctx = ChunkContext(first_frame=clip[2])  # type: ignore[arg-type]
            compare(checks, f"{clip[1]}/y", resample(recording[name], ctx), recording[f"{clip[1]}/y"])


# --- residual blocks -------------------------------------------------------------------------------------------------

BLOCK = r"[^/]+(?=/w/conv1\.conv\.weight)"
BLOCK_RUNS = (("y", "split", ""), ("y_split", "split", "zq"), ("y_nosplit", "nosplit", "zq_nosplit"))
"""Output, first-frame rule, and the latents of its norms."""


def norms_of(weights: Mapping[str, Tensor]) -> Callable[[int], Any]:
    """What makes the norms of a recorded block: plain ones, or conditioned on latents."""
    conditioning = weights.get("norm1.conv_y.conv.weight")
    if conditioning is None:
        return partial(NormSwish, NORM_GROUPS)
    has_conv = "norm1.conv.conv.weight" in weights
    return partial(SpatialNormSwish, NORM_GROUPS, conditioning.shape[1], has_conv, "released")


@torch.no_grad()
def replay_blocks(path: Path, checks: Checks) -> None:
    recording = checks.open(path)
    for kind, _ in prefixes(recording, BLOCK):
        weights = recording.group(f"{kind}/w/")
        width, channels = weights["conv1.conv.weight"].shape[:2]
        sizes = {"in_channels": channels, "out_channels": width}
        block = build("blocks.ResidualBlock", weights, sizes, make_norm=norms_of(weights))
        for output, rule, latents in BLOCK_RUNS:
            if f"{kind}/{output}" in recording:
                ctx = ChunkContext(rule, latents=recording.optional(f"{kind}/{latents}"))  # type: ignore[arg-type]
                got = block(recording[f"{kind}/x"], ctx)
                compare(checks, f"{kind}/{output}", got, recording[f"{kind}/{output}"])


# --- the latent distribution -----------------------------------------------------------------------------------------


def replay_distribution(path: Path, checks: Checks) -> None:
    recording = checks.open(path)
    own, other, fixed = (
        DiagonalGaussian(turn(recording[name]), deterministic=is_fixed)
        for name, is_fixed in (("parameters", False), ("other_parameters", False), ("parameters", True))
    )
    noise = turn(recording["noise"])
    regularizer = instantiate_from_config({"target": "vae_modules.regularizers.DiagonalGaussianRegularizer"})
    sample = regularizer(own, noise)
    values = {
        "mean": own.mean,
        "logvar": own.logvar,
        "std": own.std,
        "var": own.var,
        "mode": own.mean,
        "sample": sample,
        "deterministic_sample": fixed.sample(noise),
        "deterministic_std": fixed.std,
    }
    for name, value in values.items():
        checks.close(name, turn(value), recording[name], atol=OUTPUT_SHARE, rtol=OUTPUT_SHARE)  # from 1e-7 to 1e8
    sums = {
        "kl_loss": own.kl_loss(),
        "kl_loss_other": other.kl_loss(),
        "kl_per_batch_and_width": own.kl(),
        "kl_vs_other": other.kl(own),
        "nll_of_sample": own.nll(sample),
        "deterministic_kl": fixed.kl(),
    }
    for name, value in sums.items():
        checks.close(name, value, recording[name], rtol=LOSS_TOLERANCE)


# --- all -------------------------------------------------------------------------------------------------------------

KINDS = (
    (rf"{RESAMPLER}/t.*/x", replay_resamplers),
    (rf"{CONVOLUTION}/w/conv\.weight", replay_convolutions),
    (rf"{NORM}/w/norm_layer\.weight", replay_norms),
    (rf"{BLOCK}/w/conv1\.conv\.weight", replay_blocks),
    (r"kl_per_batch_and_width", replay_distribution),
)
"""What names of a recording's tensors look like -> how it is replayed."""


def find(folder: Folder) -> Iterator[Case]:
    """The cases of the VAE's parts."""
    for path in folder.with_suffix(".safetensors"):
        names = tensor_names(path)
        for pattern, replay in KINDS:
            if any(re.fullmatch(pattern, name) for name in names):
                yield Case(folder.name(path), (path,), partial(replay, path))
                break
