"""Recordings of the video transformer at work: `loss/`, `training/`, `samplers/`.

Each case is NAME.yaml (the model section), NAME.json and NAME.safetensors; the weights are those of a `forward/` case.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sat.cogvideox.engine import NetworkWrapper
from sat.config import ConfigNode, instantiate_from_config, load_yaml
from sat.diffusion.scaling import DiscreteDenoiser, add_noise
from sat.training.optim import parameter_groups
from tools.golden.common import (
    CannotReplay,
    Case,
    Checks,
    Folder,
    Recording,
    compare_checksums,
    compare_listing,
    find_upwards,
    read_tensors,
    with_tensors,
)
from tools.golden.dit_forward import (
    OUTPUT,
    build_network,
    compare_gradient_checksums,
    compare_gradient_tensors,
)

SCHEDULE_TOLERANCE = 1e-6
SAMPLER_TOLERANCE = 1e-4
LOSS_TOLERANCE = 2e-5
TRAINING_LOSS_TOLERANCE = 1e-4
GRADIENT_NORM_TOLERANCE = 1e-3
WEIGHT_SUM_SHARE = 1e-4
WEIGHT_TOLERANCE = 1e-3


@dataclass(frozen=True)
class Pipeline:
    """The parts of a recorded model section."""

    section: ConfigNode
    network: NetworkWrapper
    denoiser: DiscreteDenoiser

    @classmethod
    def build(cls, path: Path, content: Mapping[str, Any]) -> "Pipeline":
        """Network, with the weights that the recording names, and denoiser."""
        config = path.with_suffix(".yaml")
        weights = read_tensors(find_upwards(path, content["weights"]))
        section = load_yaml(config)["model"]
        denoiser = instantiate_from_config(section["denoiser_config"])
        return cls(section, NetworkWrapper(build_network(config, weights)), denoiser)


def compare_draws(checks: Checks, recording: Recording, seed: int, order: Sequence[str]) -> None:
    """Recorded random numbers are those of torch's CPU generator, in the recorded order."""
    generator = torch.Generator().manual_seed(seed)
    batch = len(recording["latents"])
    for words in order:
        if match := re.fullmatch(r"torch\.randint\(0, (\d+), \(batch,\)\)", words):
            drawn = torch.randint(0, int(match[1]), (batch,), generator=generator)
            checks.close("idx is drawn from the seed", drawn, recording["idx"])
        elif words == "torch.randn_like(latents)":
            drawn = torch.randn(recording["latents"].shape, generator=generator)
            checks.close("noise is drawn from the seed", drawn, recording["noise"])
        elif words == "torch.randn(batch)":
            drawn = torch.randn(batch, generator=generator)
            checks.close("offset_noise is drawn from the seed", drawn, recording["offset_noise"])
        else:
            raise CannotReplay(f"the draw '{words}' is not known here")


# --- loss ------------------------------------------------------------------------------------------------------------


def replay_loss(path: Path, content: Mapping[str, Any], checks: Checks) -> None:
    recording = checks.open(path.with_suffix(".safetensors"))
    pipeline = Pipeline.build(path, content)
    loss_fn = instantiate_from_config(pipeline.section["loss_fn_config"])
    latents, timesteps, noise = (recording[name] for name in ("latents", "idx", "noise"))
    offset = recording.optional("offset_noise")
    cond = {"crossattn": recording["context"]}
    if "concat_images" in recording:
        cond["concat"] = recording["concat_images"]
    more = {"ofs": recording["ofs"]} if "ofs" in recording else {}

    per_sample = loss_fn(pipeline.network, pipeline.denoiser, latents, cond, timesteps, noise, offset, **more)
    checks.close("loss_per_sample", per_sample, recording["loss_per_sample"], rtol=LOSS_TOLERANCE)
    checks.close("loss_mean", per_sample.mean(), recording["loss_mean"], rtol=LOSS_TOLERANCE)
    per_sample.mean().backward()
    network = pipeline.network.diffusion_model
    sums = content["gradient_checksums"]
    compare_gradient_tensors(checks, network, recording.group("grad."), sums)
    compare_gradient_checksums(checks, network, sums)

    alpha = loss_fn.sigma_sampler.alphas[timesteps]
    checks.close("alphas_cumprod_sqrt", alpha, recording["alphas_cumprod_sqrt"], atol=SCHEDULE_TOLERANCE)
    checks.close("weight", loss_fn.weight(alpha), recording["weight"], rtol=LOSS_TOLERANCE)
    if offset is not None:
        noise = noise + loss_fn.offset_noise_level * offset.view(-1, 1, 1, 1, 1)
    noised = add_noise(latents, noise, alpha)
    checks.close("noised", noised, recording["noised"], **OUTPUT)
    with torch.no_grad():
        denoised = pipeline.denoiser(pipeline.network, noised, alpha, timesteps, cond, **more)
    checks.close("denoised_prediction", denoised, recording["denoised_prediction"], **OUTPUT)
    compare_draws(checks, recording, content["torch_seed"], content["drawing_order"])
    compare_listing(checks, path.stem, recording.tensors, content["tensors"])


# --- training --------------------------------------------------------------------------------------------------------


def recorded_optimizer(network: nn.Module, content: Mapping[str, Any], checks: Checks) -> torch.optim.AdamW:
    """AdamW over the recorded groups, which must be those that this project makes."""
    options = dict(content["optimizer"])
    kind, decay = options.pop("kind"), options.pop("weight_decay", None)
    if not kind.startswith("AdamW"):
        raise CannotReplay(f"the optimizer '{kind}' is not known here")
    trained = set(content["trained_parameters"])
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(name in trained)
    recorded = content["parameter_groups"]
    if recorded is None:
        trained_parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
        return torch.optim.AdamW(trained_parameters, weight_decay=decay, **options)
    own = parameter_groups(network)
    names = [sorted(group["names"]) for group in own]
    checks.equal("groups", names, [sorted(group["parameters"]) for group in recorded])
    by_decay = [
        {"params": group["params"], "weight_decay": group.get("weight_decay", expected["weight_decay"])}
        for group, expected in zip(own, recorded, strict=True)
    ]
    for group, expected in zip(by_decay, recorded, strict=True):
        checks.equal("weight_decay", group["weight_decay"], expected["weight_decay"])
    return torch.optim.AdamW(by_decay, **options)


def compare_training_draws(checks: Checks, recording: Recording, content: Mapping[str, Any]) -> None:
    """Each step drew its timesteps, then its noise, from one generator."""
    generator = torch.Generator().manual_seed(content["torch_seed"])
    for index in range(len(content["steps"])):
        timesteps, noise = recording[f"step{index}.idx"], recording[f"step{index}.noise"]
        drawn = torch.randint(0, 1000, timesteps.shape, generator=generator)
        checks.close(f"step{index}.idx is drawn from the seed", drawn, timesteps)
        drawn = torch.randn(noise.shape, generator=generator)
        checks.close(f"step{index}.noise is drawn from the seed", drawn, noise)


def compare_final_weights(
    network: nn.Module,
    initial: Mapping[str, Tensor],
    recording: Recording,
    sums: Mapping[str, Mapping[str, Any]],
    checks: Checks,
) -> None:
    """Checksums of all parameters, the recorded slices of them, and the ones recorded whole."""
    state = network.state_dict()
    checks.equal("parameters", sorted(dict(network.named_parameters())), sorted(sums))
    for name in set(state) & set(sums):
        compare_checksums(checks, f"final {name}", state[name], sums[name], WEIGHT_SUM_SHARE)
        change = float((state[name] - initial[name]).double().abs().sum())
        tolerance = WEIGHT_SUM_SHARE * sums[name]["abs_sum"]
        checks.close(f"abs_change_sum of {name}", change, sums[name]["abs_change_sum"], atol=tolerance)
        checks.equal(f"{name} is trained", network.get_parameter(name).requires_grad, sums[name]["trained"])
    for prefix, part in (("final_first16.", slice(None, 16)), ("final_last16.", slice(-16, None))):
        for name, expected in recording.group(prefix).items():
            checks.close(f"{prefix}{name}", state[name].flatten()[part], expected, atol=WEIGHT_TOLERANCE)
    for name, expected in recording.group("final_full.").items():
        checks.close(f"final_full.{name}", state[name], expected, atol=WEIGHT_TOLERANCE)


def replay_training(path: Path, content: Mapping[str, Any], checks: Checks) -> None:
    recording = checks.open(path.with_suffix(".safetensors"))
    compare_training_draws(checks, recording, content)
    compare_listing(checks, path.stem, recording.tensors, content["tensors"])
    pipeline = Pipeline.build(path, content)
    loss_fn = instantiate_from_config(pipeline.section["loss_fn_config"])
    network = pipeline.network.diffusion_model
    initial = {name: value.clone() for name, value in network.state_dict().items()}
    optimizer = recorded_optimizer(network, content, checks)
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    for index in range(len(content["steps"])):
        inputs = {name: recording[f"step{index}.{name}"] for name in ("latents", "idx", "noise")}
        cond = {"crossattn": recording[f"step{index}.context"]}
        if f"step{index}.concat_images" in recording:
            cond["concat"] = recording[f"step{index}.concat_images"]
        more = {"ofs": recording[f"step{index}.ofs"]} if f"step{index}.ofs" in recording else {}
        arguments = (inputs["latents"], cond, inputs["idx"], inputs["noise"])
        loss = loss_fn(pipeline.network, pipeline.denoiser, *arguments, **more).mean()
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.get_total_norm([p.grad for p in trained if p.grad is not None])
        optimizer.step()
        for source in ("steps", "steps_in_fp64"):
            if source in content:
                expected = content[source][index]
                label = f"{source} {index}"
                checks.close(f"loss of {label}", loss, expected["loss"], rtol=TRAINING_LOSS_TOLERANCE)
                norm_label = f"gradient_norm of {label}"
                checks.close(norm_label, norm, expected["gradient_norm"], rtol=GRADIENT_NORM_TOLERANCE)
                checks.equal(f"number of {label}", expected["step"], index)
    compare_final_weights(network, initial, recording, content["final_weight_checksums"], checks)


# --- samplers --------------------------------------------------------------------------------------------------------


class RecordedNoise:
    """The draws of a recorded run. Where a step drew twice, the second draw was used."""

    def __init__(self, recording: Recording) -> None:
        self.recording = recording

    def __call__(self, kind: str, step: int, like: Tensor) -> Tensor:
        if kind == "prefix":
            return self.recording[f"noise.before_step{step}.draw0"]
        second = f"noise.step{step}.draw1"
        return self.recording[second if second in self.recording else f"noise.step{step}.draw0"]


def compare_noise(checks: Checks, recording: Recording, seed: int, num_steps: int) -> None:
    """Every recorded draw, used or not, is the next one of torch's CPU generator."""
    generator = torch.Generator().manual_seed(seed)
    names = ["noise.initial"]
    for step in range(num_steps):
        names += [f"noise.before_step{step}.draw0", f"noise.step{step}.draw0", f"noise.step{step}.draw1"]
    for name in (name for name in names if name in recording):
        drawn = torch.randn(recording[name].shape, generator=generator)
        checks.close(f"{name} is drawn from the seed", drawn, recording[name])


def compare_steps(checks: Checks, sampler: Any, recorded: Sequence[Mapping[str, Any]]) -> None:
    """Timesteps, levels and guidance scales."""
    steps = sampler.steps()
    checks.equal("number of steps", len(steps), len(recorded))
    for step, expected in zip(steps, recorded):
        checks.equal("step", step.index, expected["step"])
        checks.equal(f"timestep of step {step.index}", step.timestep, expected["timestep"])
        level, scale = expected["alpha_cumprod_sqrt"], expected["guidance_scale"]
        checks.close(f"level of step {step.index}", step.alpha, level, atol=SCHEDULE_TOLERANCE)
        own = sampler.guider.scale_at(step.index, step.timestep)
        checks.close(f"guidance of step {step.index}", own, scale, atol=SCHEDULE_TOLERANCE)


def replay_sampler(path: Path, content: Mapping[str, Any], checks: Checks) -> None:
    recording = checks.open(path.with_suffix(".safetensors"))
    pipeline = Pipeline.build(path, content)
    sampler = instantiate_from_config(pipeline.section["sampler_config"])
    compare_steps(checks, sampler, content["steps"])
    compare_noise(checks, recording, content["torch_seed"], len(content["steps"]))
    compare_listing(checks, path.stem, recording.tensors, content["tensors"])
    shape = [content["batch"], *content["shape_per_sample"]]
    checks.equal("shape of the latents", list(recording["noise.initial"].shape), shape)
    cond = recording.group("cond.")
    uncond = {**cond, **recording.group("uncond.")}
    prefix = recording.optional("prefix")
    more = {"ofs": recording["ofs"]} if "ofs" in recording else {}
    before: list[Tensor] = []

    def denoise(noisy: Tensor, *arguments: Any, **values: Any) -> Tensor:
        before.append(noisy[: len(recording["noise.initial"])])
        return pipeline.denoiser(pipeline.network, noisy, *arguments, **values)

    initial, noise = recording["noise.initial"], RecordedNoise(recording)
    latents = initial
    with torch.no_grad():
        for step, denoised, latents in sampler.run(denoise, initial, cond, uncond, noise, prefix, **more):
            fixed = sampler.fixed_frames if step.is_last else 0
            # Recorded before the fixed frames were put back; the last step of every sampler returns the estimate.
            after = torch.cat([denoised[:, :fixed], latents[:, fixed:]], dim=1)
            own = {"x_before": before[-1], "denoised": denoised, "x_after": after}
            for kind, value in own.items():
                name = f"{kind}.step{step.index}"
                if kind != "x_before" or name in recording:
                    checks.close(name, value, recording[name], atol=SAMPLER_TOLERANCE)
    checks.close("final", latents, recording["final"], atol=SAMPLER_TOLERANCE)
    if "final_rms" in content:
        rms = latents.double().square().mean().sqrt()
        checks.close("final_rms", rms, content["final_rms"], atol=SAMPLER_TOLERANCE)


# --- all -------------------------------------------------------------------------------------------------------------


def find(folder: Folder) -> Iterator[Case]:
    """The cases of `loss/`, `training/` and `samplers/`."""
    kinds = (
        (("weights", "drawing_order", "gradient_checksums"), replay_loss),
        (("weights", "optimizer", "final_weight_checksums"), replay_training),
        (("weights", "steps", "shape_per_sample"), replay_sampler),
    )
    for keys, replay in kinds:
        for path, content in folder.with_keys(*keys):
            yield Case(folder.name(path), with_tensors(path), partial(replay, path, content))
