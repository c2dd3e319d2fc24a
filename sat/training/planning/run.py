"""`train_video.py ... --plan`: compare layouts for a configuration and a device, and choose one."""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch

from sat.cogvideox.flops import Clip, TransformerFlops
from sat.cogvideox.padding import num_padding
from sat.config import ConfigNode, instantiate_from_config
from sat.errors import ConfigError
from sat.training.args import deepspeed_config, train_args
from sat.training.devices import DTYPES, GIB, Device, find_device, named_device
from sat.training.optim import freeze
from sat.training.plan import PlanArgs, take_plan
from sat.training.planning.layouts import (
    USABLE,
    Estimate,
    Job,
    Layout,
    choose,
    estimate_all,
    sensible_layouts,
    smallest_change,
)
from sat.training.planning.memory import Zero
from sat.training.planning.passes import Encoders, Work, pretend_ranks, run_encoders
from sat.training.preview import check_numbers, clip_sizes, derived_lines, model_parts, params_of

DEFAULT_DEVICE = "h200"
MOST_DEVICES = 64
"""How many devices are tried where fewer do not suffice."""


def plan(config: ConfigNode, device: str | None = None, world: int = 1) -> str:
    """The plan as a text. Raises ConfigError where nothing fits, with the smallest change that would help.

    device: a name of sat.training.devices; by default this machine's GPU, or an H200.
    """
    check_numbers(config)
    with _quiet():
        job, configured = describe_job(config, _device(device), world)
        estimates = _estimates(job, configured)
    own = next((one for one in estimates if one.layout == configured), None)
    chosen = choose(estimates)
    lines = [*derived_lines(config), *_work_lines(job, estimates), "", *_table(estimates), ""]
    if chosen is None:
        raise ConfigError("\n".join([*lines, _refusal(job, estimates, configured)]))
    return "\n".join([*lines, *_verdict(estimates, own, configured), *_reason(estimates, chosen, configured)])


def _device(name: str | None) -> Device:
    if name is not None:
        return named_device(name)
    own = find_device(torch.cuda.get_device_name()) if torch.cuda.is_available() else None
    return own or named_device(DEFAULT_DEVICE)


def describe_job(config: ConfigNode, device: Device, world: int) -> tuple[Job, Layout]:
    """What is to be planned, and the layout that the configuration has now."""
    clip = clip_sizes(config)
    parts = model_parts(config)
    if clip is None or "network_config" not in parts:
        raise ConfigError("--plan is for the video model, and the model section has no network_config with a clip size")
    args = train_args(config)
    section = deepspeed_config(config, replace(args, global_batch_size=None), 1, "cuda")
    precision, micro = section.precision, section.micro_batch_size
    _, kind, rows = take_plan(config["data"])
    samples = micro if kind != "pack" or rows is None else _clips_of_a_row(rows, clip.video_tokens + clip.text_length)
    network = params_of(parts, "network_config")
    modules, of_model = network["modules"], network.get("transformer_args") or {}
    work = Work(
        model=config["model"],
        clip=clip,
        text_width=params_of(modules, "patch_embed_config")["text_hidden_size"],
        samples=samples,
        dtype=DTYPES[precision],
        is_packed=kind == "pack",
        rows=micro,
        group_size=args.checkpoint_num_layers or of_model.get("checkpoint_num_layers", 1),
        skipped=of_model.get("checkpoint_skip_layers", 0),
    )
    zero = Zero.of(section)
    recompute = args.checkpoint_activations
    if recompute is None:
        recompute = of_model.get("checkpoint_activations", False)
    activations = args.activations or ("recompute" if recompute else "keep")
    configured = Layout(
        args.model_parallel_size, args.context_parallel_size, section.zero_stage, activations, zero.offload
    )
    job = Job(
        work=work,
        encoders=_without_cached(run_encoders(work), args.cache),
        zero=zero,
        device=device,
        world=world,
        global_batch=args.global_batch_size,
        accumulation=section.grad_accum_steps,
        mode=args.context_parallel_mode,
        precision=precision,
        clip_flops=_clip_flops(work),
    )
    if job.batches(configured) is None:
        raise ConfigError(
            f"{world} devices do not divide into model_parallel_size {args.model_parallel_size} x "
            f"context_parallel_size {args.context_parallel_size}, or the global batch {args.global_batch_size} not "
            "over what is left of them; change --world, or one of the three"
        )
    return job, configured


def _without_cached(encoders: Encoders, cache: str) -> Encoders:
    """What is left of the encoders where a cache stands for them: they are freed."""
    text_bytes = 0 if cache in ("text", "all") else encoders.text_bytes
    if cache in ("latents", "all"):
        return Encoders(text_bytes=text_bytes)
    return replace(encoders, text_bytes=text_bytes)


def _clips_of_a_row(rows: PlanArgs, length: int) -> int:
    return max(rows.max_tokens // length, 1)


def _clip_flops(work: Work) -> float:
    with torch.device("meta"):
        network = instantiate_from_config(model_parts({"model": work.model})["network_config"])
    prefixes = model_parts({"model": work.model}).get("not_trainable_prefixes") or []
    freeze(network, [prefix.removeprefix("model.diffusion_model.") for prefix in prefixes])
    leftover = getattr(network.transformer, "position_embeddings", None)
    if leftover is not None:
        leftover.requires_grad_(False)
    clip, (o, p, q) = work.clip, network.patch_size
    frames = clip.latent_frames + num_padding(clip.latent_frames, o)
    video = frames // o * (clip.latent_height // p) * (clip.latent_width // q)
    return TransformerFlops(network).training([Clip(clip.text_length, video)]).total


def _estimates(job: Job, configured: Layout) -> list[Estimate]:
    with pretend_ranks(job.world):
        return estimate_all(job, list(dict.fromkeys([configured, *sensible_layouts(job.world, configured)])))


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the remarks of building the model, which a run makes, too."""
    logger = logging.getLogger("sat")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


# --- what is printed -------------------------------------------------------------------------------------------------

HEADER = (
    " dp cp tp ZeRO       activations offload | weights optimizer  EMA grads buffers encoders activations |   peak GiB"
    "  at              |  s/step   MFU  sent GB"
)


def _work_lines(job: Job, estimates: Sequence[Estimate]) -> list[str]:
    device, batch = job.device, job.global_batch
    whole = job.clip_flops / 1e12
    return [
        f"operations of a clip, forward and backward: {whole:,.4g} T; encoding its frames {_encoding(job):,.4g} T",
        f"{job.world} x {device.name}: {device.memory_gib:g} GiB, {device.peak_tflops(job.precision):g} TFLOP/s in "
        f"{job.precision}; global batch {batch if batch is not None else 'as it comes'}, micro batch {job.work.rows}",
    ]


def _encoding(job: Job) -> float:
    return job.encoders.encoding.products / 1e12


def _table(estimates: Sequence[Estimate]) -> list[str]:
    """For each way to split and each choice of what layers keep, the best stage, and the best N of every N-th layer:
    the fastest that fits, else the smallest."""
    groups: dict[tuple[int, int, str], list[Estimate]] = {}
    for one in estimates:
        layout = one.layout
        key = (layout.model_parallel_size, layout.context_parallel_size, layout.activations.rstrip("0123456789"))
        groups.setdefault(key, []).append(one)
    best = [choose(group) or min(group, key=lambda one: one.memory.peak) for group in groups.values()]
    return [HEADER, *(row(one) for one in sorted(best, key=lambda one: (not one.fits, one.step_seconds)))]


def row(one: Estimate) -> str:
    """One layout in a line of the table."""
    layout, memory = one.layout, one.memory
    parts = (memory.weights, memory.optimizer, memory.average, memory.gradients, memory.buffers, memory.encoders)
    sizes = [value / GIB for value in (*parts, memory.activations, memory.peak)]
    return (
        f"{one.dp:3} {layout.context_parallel_size:2} {layout.model_parallel_size:2} {layout.stage:4} "
        f"{layout.activations:>17} {'cpu' if layout.offload_optimizer else '-':>7} | "
        "{:7.1f} {:9.1f} {:4.1f} {:5.1f} {:7.1f} {:8.1f} {:11.1f} | {:7.1f} ".format(*sizes)
        + f"{'   ' if one.fits else 'OVER'[:3]} {memory.peak_moment:<16} | {one.step_seconds:7.2f} {one.mfu:5.0%} "
        f"{one.sent_bytes / 1e9:8.1f}"
    )


def _verdict(estimates: Sequence[Estimate], own: Estimate | None, configured: Layout) -> list[str]:
    if own is None:
        return ["as configured: not compared (keys that go round a ring cannot be run without numbers)"]
    what = (
        f"as configured: {own.memory.peak / GIB:.1f} GiB at {own.memory.peak_moment}, {own.step_seconds:.2f} s a step"
    )
    if own.fits:
        return [f"{what}: fits"]
    change = smallest_change(estimates, configured)
    assert change is not None
    usable = USABLE * own.device.memory_gib
    return [
        f"{what}: DOES NOT FIT into {usable:.1f} GiB ({USABLE:.0%} of the device)",
        f"smallest change that makes it fit: {' '.join(change.layout.changes(configured))} "
        f"({change.memory.peak / GIB:.1f} GiB, {change.step_seconds:.2f} s a step)",
    ]


def _reason(estimates: Sequence[Estimate], chosen: Estimate, configured: Layout) -> list[str]:
    layout, fitting = chosen.layout, sum(one.fits for one in estimates)
    words = " ".join(layout.changes(configured)) or "as configured"
    parts = sorted(chosen.seconds.items(), key=lambda item: -item[1])
    spent = ", ".join(f"{name} {seconds / chosen.step_seconds:.0%}" for name, seconds in parts if seconds)
    lines = [
        f"chosen: {words}",
        f"  because: of {len(estimates)} layouts {fitting} fit; it is the plainest within 2 % of the fastest",
        f"  {chosen.step_seconds:.2f} s a step, MFU {chosen.mfu:.0%}, {chosen.memory.peak / GIB:.1f} GiB: {spent}",
    ]
    if chosen.host_bytes:
        lines.append(f"  besides, {chosen.host_bytes / GIB:.1f} GiB of the host's memory for each device")
    if layout.activations != "keep":
        kept = replace(layout, activations="keep")
        other = next(one for one in estimates if one.layout == kept)
        lines.append(f"  with activations kept it would hold {other.memory.peak / GIB:.1f} GiB")
    return lines


def _refusal(job: Job, estimates: Sequence[Estimate], configured: Layout) -> str:
    least = min(estimates, key=lambda one: one.memory.peak)
    text = (
        f"nothing fits: the least is {least.memory.peak / GIB:.1f} GiB (at {least.memory.peak_moment}) of "
        f"{USABLE * job.device.memory_gib:.1f} GiB, with {' '.join(least.layout.changes(configured)) or 'no change'}. "
    )
    if least.memory.peak_moment == "encoding":
        return text + "Keep what is encoded (args.cache=all), or train on smaller clips"
    world = 2 * job.world
    while world <= MOST_DEVICES:
        more = replace(job, world=world, global_batch=None)
        found = choose(_estimates(more, configured))
        if found is not None:
            return text + (
                f"Smallest change: {world} devices ({found.memory.peak / GIB:.1f} GiB with "
                f"{' '.join(found.layout.changes(configured)) or 'no other change'})"
            )
        world *= 2
    return text + "Train adapters (configs/lora.yaml), or shorter clips (data.params.max_num_frames)"
