"""Recordings of the diffusion mathematics: `schedules/`."""

import re
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sat.config import instantiate_from_config
from sat.diffusion.guidance import DynamicCFG, combine, double_batch
from sat.diffusion.scaling import DiscreteDenoiser, EpsWeighting
from sat.diffusion.schedules import DiscreteSampling, ZeroSNRDDPMDiscretization
from sat.training.lr import LearningRate
from tools.golden.common import CannotReplay, Case, Checks, Folder, Recording, with_tensors

TOLERANCE = 1e-6
COMBINED_TOLERANCE = 5e-6
"""Guided results are of the size of scale · latents, about 20, so that float32 rounds them to 2e-6."""

RATE_TOLERANCE = 1e-12
SGM = "sgm.modules.diffusionmodules"


def build_discretization(params: Mapping[str, Any]) -> ZeroSNRDDPMDiscretization:
    """The noise schedule of the released models, with recorded options."""
    return instantiate_from_config({"target": f"{SGM}.discretizer.ZeroSNRDDPMDiscretization", "params": dict(params)})


# --- noise levels ----------------------------------------------------------------------------------------------------


def levels_of(discretization: ZeroSNRDDPMDiscretization, num_steps: int) -> tuple[Tensor, Tensor]:
    """Levels from pure noise up, and their training timesteps, ascending as recorded."""
    levels, timesteps = discretization.steps(num_steps)
    return levels, timesteps.flip(0)


def replay_levels(path: Path, content: Mapping[str, Any], checks: Checks) -> None:
    recording = checks.open(path.with_suffix(".safetensors"))
    options = {}
    for entry in content["entries"]:
        key, options[entry["key"].split("_")[0]] = entry["key"], entry["params"]
        levels, timesteps = levels_of(build_discretization(entry["params"]), entry["n"])
        checks.close(f"{key}.alphas_cumprod_sqrt", levels, recording[f"{key}.alphas_cumprod_sqrt"], atol=TOLERANCE)
        if entry["has_idx"]:
            checks.close(f"{key}.idx", timesteps, recording[f"{key}.idx"])
    for variant, params in options.items():
        name = f"{variant}_flip_append"
        if name in recording:
            expected = recording[name]
            levels, _ = levels_of(build_discretization(params), len(expected) - 1)
            checks.close(name, torch.cat([levels, torch.zeros(1)]).flip(0), expected, atol=TOLERANCE)


# --- denoiser --------------------------------------------------------------------------------------------------------

TOY_NETWORK = re.compile(r"([\d.]+)\*x \+ ([\d.]+)\*t \+ ([\d.]+)")


def toy_network(words: str) -> Callable[..., Tensor]:
    """The recorded stand-in for a network: linear in the noisy input and the time."""
    match = TOY_NETWORK.fullmatch(words)
    if match is None:
        raise CannotReplay(f"the toy network '{words}' is not known here")
    of_x, of_t, constant = map(float, match.groups())
    return lambda x, t, _: of_x * x + of_t * t.view(-1, *[1] * (x.dim() - 1)) + constant


def build_denoiser(num_idx: int, shift_scale: float) -> DiscreteDenoiser:
    """The released denoiser at a schedule's shift."""
    discretization = {"target": f"{SGM}.discretizer.ZeroSNRDDPMDiscretization", "params": {"shift_scale": shift_scale}}
    params = {
        "num_idx": num_idx,
        "weighting_config": {"target": f"{SGM}.denoiser_weighting.EpsWeighting"},
        "scaling_config": {"target": f"{SGM}.denoiser_scaling.VideoScaling"},
        "discretization_config": discretization,
    }
    return instantiate_from_config({"target": f"{SGM}.denoiser.DiscreteDenoiser", "params": params})


def replay_denoiser(path: Path, content: Mapping[str, Any], checks: Checks) -> None:
    recording = checks.open(path.with_suffix(".safetensors"))
    for name, entry in content["entries"].items():
        denoiser = build_denoiser(entry["num_idx"], entry["shift_scale"])
        levels, timesteps = build_discretization({"shift_scale": entry["shift_scale"]}).steps(entry["n"])
        nearest = denoiser.nearest(levels)
        snapped = denoiser.alphas[nearest]
        c_skip, c_out, c_in, c_noise = denoiser.scaling(snapped, timesteps)
        own = {
            "table": denoiser.alphas,
            "step_values": levels,
            "nearest_table_index": nearest,
            "quantised": snapped,
            "c_skip": c_skip,
            "c_out": c_out,
            "c_in": c_in,
            "c_noise": c_noise,
        }
        for key, value in own.items():
            checks.close(f"{name}.{key}", value, recording[f"{name}.{key}"], atol=TOLERANCE)
        weights, expected = EpsWeighting()(snapped[snapped > 0]), recording[f"{name}.eps_weighting"]
        checks.close(f"{name}.eps_weighting", weights, expected, atol=TOLERANCE, rtol=TOLERANCE)
        noisy, level, index = (recording[f"{name}.toy_{part}"] for part in ("x", "sigma", "idx"))
        output = denoiser(toy_network(content["toy_network"]), noisy, level, index, cond=None)
        checks.close(f"{name}.toy_out", output, recording[f"{name}.toy_out"], atol=TOLERANCE)
        change = float((snapped - levels).abs().max())
        checks.close(f"{name}: largest change", change, entry["max_abs_quantisation_change"], atol=TOLERANCE)
        moved = int((nearest != timesteps).sum())
        checks.equal(f"{name}: steps moved", moved, entry["steps_whose_nearest_index_differs_from_the_sampling_index"])


# --- guidance --------------------------------------------------------------------------------------------------------


def solve_scale(unconditional: Tensor, conditional: Tensor, guided: Tensor) -> float:
    """The scale of u + scale · (c - u) that one entry of a recorded result tells: that of the widest difference."""
    gap = (conditional - unconditional).double().flatten()
    place = int(gap.abs().argmax())
    return float((guided.double().flatten()[place] - unconditional.double().flatten()[place]) / gap[place])


def replay_guidance_tensors(recording: Recording, checks: Checks) -> None:
    """The scales were not recorded: one entry of each result gives its scale, and all the others must follow."""
    noisy = recording["x"]
    unconditional, conditional = noisy.chunk(2)
    for name in ("vanilla", "vanilla_override", "dynamic"):
        scale = solve_scale(unconditional, conditional, recording[name])
        own = combine(unconditional, conditional, scale)
        checks.close(f"{name} (scale {scale:.5f})", own, recording[name], atol=COMBINED_TOLERANCE)
    checks.close("prepared_x", torch.cat([noisy, noisy]), recording["prepared_x"])
    level = recording["prepared_s"].chunk(2)[0]
    checks.close("prepared_s", torch.cat([level, level]), recording["prepared_s"])
    halves = [
        {name: recording[f"prepared_{name}"].chunk(2)[half] for name in ("crossattn", "concat")} for half in (0, 1)
    ]
    for name, value in double_batch(cond=halves[1], uncond=halves[0]).items():
        constant = torch.cat([if_constant(half[name]) for half in halves])
        checks.close(f"prepared_{name}", value, constant)


def if_constant(half: Tensor) -> Tensor:
    """One half of a recorded condition; where most of its entries are one number, it was recorded from a constant."""
    usual = half.flatten().mode().values
    return torch.full_like(half, float(usual)) if (half == usual).sum() > half.numel() / 2 else half


def replay_guidance(path: Path, content: Mapping[str, Any], checks: Checks) -> None:
    for entry in content["dynamic"]:
        params = entry["params"]
        label = ", ".join(f"{key} {value}" for key, value in params.items())
        guider: DynamicCFG = instantiate_from_config({"target": f"{SGM}.guiders.DynamicCFG", "params": params})
        for step in entry["steps"]:
            own = guider.scale_at(0, step["timestep"])
            checks.close(f"{label}: timestep {step['timestep']}", own, step["scale"], atol=TOLERANCE)
            checks.equal(f"{label}: step_index", params["num_steps"] - step["timestep"], step["step_index"])
        by_step = DynamicCFG(**params, schedule="step_index")
        own_scales = [by_step.scale_at(index, 0) for index in range(params["num_steps"] + 1)]
        checks.close(f"{label}: by step", own_scales, entry["for_step_index_0_to_num_steps"], atol=TOLERANCE)
    for entry in content["vanilla"]:
        raise CannotReplay(f"the vanilla entry {entry} is not known here")
    replay_guidance_tensors(checks.open(path.with_suffix(".safetensors")), checks)


# --- drawn timesteps -------------------------------------------------------------------------------------------------


def released_index_range(
    num_idx: int, group_num: int, uniform_sampling: bool, rank: int, world_size: int
) -> tuple[int, int]:
    """The timesteps [low, high) that one data-parallel rank of the released code draws from.

    There stratification is off up to eight ranks, and a width that does not divide loses the noisiest timesteps.
    """
    if not uniform_sampling or world_size <= 8:
        return 0, num_idx
    width = num_idx // group_num
    group = rank // (world_size // group_num)
    return group * width, (group + 1) * width


def replay_index_sampling(path: Path, content: Mapping[str, Any], checks: Checks) -> None:
    recording = checks.open(path.with_suffix(".safetensors"))
    discretization = build_discretization({"shift_scale": content["shift_scale"]})
    table = DiscreteSampling(discretization, num_idx=content["num_idx"]).alphas
    for entry in content["entries"]:
        key, world = entry["key"], entry["data_parallel_world_size"]
        low, high = released_index_range(
            content["num_idx"],
            entry["group_num"],
            entry["uniform_sampling_requested"],
            entry["data_parallel_rank"],
            world,
        )
        checks.equal(f"{key}: range", [low, high], [entry["low_inclusive"], entry["high_exclusive"]])
        effective = entry["uniform_sampling_requested"] and world > 8
        checks.equal(f"{key}: effective", effective, entry["uniform_sampling_effective"])
        generator = torch.Generator().manual_seed(entry["torch_seed"])
        drawn = torch.randint(low, high, (entry["n_samples"],), generator=generator)
        checks.close(f"{key}.idx", drawn, recording[f"{key}.idx"])
        expected = recording[f"{key}.alphas_cumprod_sqrt"]
        checks.close(f"{key}.alphas_cumprod_sqrt", table[drawn], expected, atol=TOLERANCE)


# --- learning rate ---------------------------------------------------------------------------------------------------


def replay_learning_rate(content: Mapping[str, Any], checks: Checks) -> None:
    for entry in content["entries"]:
        params = entry["params"]
        auto = params["auto_warmup_steps"]
        rate = LearningRate(
            peak=params["start_lr"],
            total_steps=params["num_iters"],
            warmup_steps=params["warmup_iter"],
            style=params["decay_style"],
            decay_ratio=params["decay_ratio"],
            auto_warmup_until=params["last_iter"] + auto if auto else 0,
            auto_warmup_rate=params["auto_warmup_rate"],
        )
        label = f"{params['decay_style']}, auto warm-up {auto}"
        for step, recorded in enumerate(entry["lr"], start=entry["first_recorded_iteration"]):
            own = [rate.at(step) * scale for scale in entry["param_group_scales"]]
            checks.close(f"{label}, step {step}", own, recorded, atol=1e-18, rtol=RATE_TOLERANCE)


# --- all -------------------------------------------------------------------------------------------------------------


def find(folder: Folder) -> Iterator[Case]:
    """The cases of `schedules/`."""
    for path, content in folder.with_keys("entries"):
        entries, replay = content["entries"], None
        if "toy_network" in content:
            replay = partial(replay_denoiser, path, content)
        elif "shift_scale" in content and "num_idx" in content:
            replay = partial(replay_index_sampling, path, content)
        elif str(content.get("class", "")).endswith("ZeroSNRDDPMDiscretization"):
            replay = partial(replay_levels, path, content)
        elif isinstance(entries, list) and all("param_group_scales" in entry for entry in entries):
            replay = partial(replay_learning_rate, content)
        if replay is not None:
            yield Case(folder.name(path), with_tensors(path), replay)
    for path, content in folder.with_keys("dynamic", "vanilla"):
        yield Case(folder.name(path), with_tensors(path), partial(replay_guidance, path, content))
