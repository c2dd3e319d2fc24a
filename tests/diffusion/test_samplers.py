"""Samplers: diffusers' steps, the order of the method on a problem with a known answer, guidance, fixed frames."""

import itertools
import math
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from diffusers import CogVideoXDDIMScheduler, CogVideoXDPMScheduler
from torch import Tensor

from sat.config import instantiate_from_config, resolve_target
from sat.diffusion.guidance import DynamicCFG, IdentityGuider, VanillaCFG
from sat.diffusion.samplers import (
    Step,
    VideoDDIMSampler,
    VPODEDPMPP2MSampler,
    VPSDEDPMPP2MSampler,
    ddim_step,
    dpmpp_ode_2m_step,
    log_snr_half,
    sigma,
)
from sat.diffusion.scaling import DiscreteDenoiser, VideoScaling
from sat.diffusion.schedules import ZeroSNRDDPMDiscretization, trailing_timesteps
from sat.errors import ConfigError

SAMPLERS = (VideoDDIMSampler, VPODEDPMPP2MSampler, VPSDEDPMPP2MSampler)
SHAPE = (2, 3, 4, 2, 2)


class WholeTableLevels(ZeroSNRDDPMDiscretization):
    """A sampler's levels as diffusers takes them: from the training table, not rescaled on their own."""

    def steps(self, num_steps: int) -> tuple[Tensor, Tensor]:
        timesteps = trailing_timesteps(self.num_timesteps, num_steps).flip(0)
        return self.table()[timesteps], timesteps


def network(noisy: Tensor, timesteps: Tensor) -> Tensor:
    """A smooth stand-in for a v-predicting network, which mixes positions and looks at the time."""
    phase = timesteps.view(-1, *[1] * (noisy.dim() - 1)) / 1000.0
    return torch.tanh(1.3 * noisy.roll(1, dims=2) - 0.7 * noisy + phase) - 0.4 * noisy * phase


def start(shape: tuple[int, ...] = SHAPE, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def no_noise(kind: str, step: int, like: Tensor) -> Tensor:
    raise AssertionError(f"noise of kind {kind} drawn in step {step}")


def seeded_noise(seed: int = 0) -> Callable[[str, int, Tensor], Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return lambda kind, step, like: torch.randn(like.shape, generator=generator, dtype=like.dtype)


# --- diffusers -------------------------------------------------------------------------------------------------------

THEIR_OPTIONS = {
    "rescale_betas_zero_snr": True,
    "timestep_spacing": "trailing",
    "prediction_type": "v_prediction",
    "clip_sample": False,
}
TRAJECTORY_TOLERANCE = 1e-5
"""Absolute, on latents of up to 4. Measured worst over steps, shifts and samplers: 3.3e-6."""

Trajectory = list[tuple[Tensor, Tensor, Tensor]]
"""(network output, estimate of the clean latents, latents after the step) for each step."""


def their_ddim_run(shift: float, num_steps: int) -> Trajectory:
    scheduler = CogVideoXDDIMScheduler(snr_shift_scale=shift, **THEIR_OPTIONS)
    scheduler.set_timesteps(num_steps)
    latents, result = start(), []
    for timestep in scheduler.timesteps:
        output = network(latents, timestep.expand(len(latents)))
        theirs = scheduler.step(output, timestep, latents)
        latents = theirs.prev_sample
        result.append((output, theirs.pred_original_sample, latents))
    return result


def their_sde_run(shift: float, num_steps: int, generator: torch.Generator) -> Trajectory:
    scheduler = CogVideoXDPMScheduler(snr_shift_scale=shift, **THEIR_OPTIONS)
    scheduler.set_timesteps(num_steps)
    latents, previous, before, result = start(), None, None, []
    for timestep in scheduler.timesteps:
        output = network(latents, timestep.expand(len(latents)))
        latents, previous = scheduler.step(
            output, previous, timestep, before, latents, generator=generator, return_dict=False
        )
        before = timestep
        result.append((output, previous, latents))
    return result


def check_against(theirs: Trajectory, sampler_class: Any, shift: float, noise: Any) -> None:
    """Ours, given the same outputs of the network."""
    discretization = WholeTableLevels(shift_scale=shift)
    denoiser = DiscreteDenoiser(discretization, VideoScaling())
    outputs = iter(theirs)

    def denoise(noisy: Tensor, alpha: Tensor, timesteps: Tensor, cond: Any) -> Tensor:
        output = next(outputs)[0]
        return denoiser(lambda *_: output, noisy, alpha, timesteps, cond)

    sampler = sampler_class(len(theirs), discretization, IdentityGuider())
    own = list(sampler.run(denoise, start(), {}, None, noise))
    for (_, their_estimate, their_latents), (_, estimate, latents) in zip(theirs, own, strict=True):
        torch.testing.assert_close(estimate, their_estimate, rtol=0.0, atol=TRAJECTORY_TOLERANCE)
        torch.testing.assert_close(latents, their_latents, rtol=0.0, atol=TRAJECTORY_TOLERANCE)


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("num_steps", [10, 50])
def test_ddim_steps_are_those_of_diffusers(shift: float, num_steps: int) -> None:
    check_against(their_ddim_run(shift, num_steps), VideoDDIMSampler, shift, no_noise)


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("num_steps", [10, 50])
def test_sde_steps_are_those_of_diffusers(shift: float, num_steps: int) -> None:
    """They draw twice in every step but the first and throw the first draw away."""
    draws = torch.Generator().manual_seed(1)

    def their_noise(kind: str, step: int, like: Tensor) -> Tensor:
        for _ in range(1 if step else 0):
            torch.randn(like.shape, generator=draws)
        return torch.randn(like.shape, generator=draws)

    theirs = their_sde_run(shift, num_steps, torch.Generator().manual_seed(1))
    check_against(theirs, VPSDEDPMPP2MSampler, shift, their_noise)


# --- a problem with a known answer -----------------------------------------------------------------------------------

MEAN, SPREAD = 0.7, 0.4
"""Clean data are normal with these. All that follows from it is exact."""


def marginal(alpha: float) -> tuple[float, float]:
    """Mean and standard deviation of noisy data at a level."""
    return alpha * MEAN, math.sqrt((alpha * SPREAD) ** 2 + 1 - alpha**2)


def best_estimate(noisy: Tensor, alpha: float) -> Tensor:
    """The expected clean value of noisy data."""
    mean, spread = marginal(alpha)
    return MEAN + alpha * SPREAD**2 / spread**2 * (noisy - mean)


def flow_error(method: Callable[[Tensor, Tensor, Tensor | None, Step], Tensor], num_steps: int) -> float:
    """How far a solver ends from where the probability-flow ODE goes, which keeps every quantile in its place."""
    low, high = log_snr_half(0.1), log_snr_half(0.95)
    grid = [low + (high - low) * i / num_steps for i in range(num_steps + 1)]
    alphas = [1 / math.sqrt(1 + math.exp(-2 * value)) for value in grid]
    quantiles = torch.linspace(-2, 2, 9, dtype=torch.float64)
    mean, spread = marginal(alphas[0])
    noisy, previous = mean + spread * quantiles, None
    for i in range(num_steps):
        step = Step(i, 0, alphas[i], alphas[i + 1], alphas[i - 1] if i else None)
        denoised = best_estimate(noisy, step.alpha)
        noisy, previous = method(noisy, denoised, previous, step), denoised
    mean, spread = marginal(alphas[-1])
    return (noisy - (mean + spread * quantiles)).abs().max().item()


@pytest.mark.parametrize(
    ("name", "method", "order"),
    [
        ("DDIM", lambda noisy, denoised, _, step: ddim_step(noisy, denoised, step), 1),
        ("DPM-Solver++(2M)", dpmpp_ode_2m_step, 2),
    ],
)
def test_order_of_convergence(name: str, method: Any, order: int) -> None:
    errors = [flow_error(method, num_steps) for num_steps in (64, 128, 256)]
    for coarse, fine in itertools.pairwise(errors):
        assert math.log2(coarse / fine) == pytest.approx(order, abs=0.1), name


def gaussian_run(sampler_class: Any, num_steps: int, latents: Tensor) -> Tensor:
    """From pure noise to data with the best estimate in the network's place, on the released levels."""
    discretization = ZeroSNRDDPMDiscretization()
    sampler = sampler_class(num_steps, discretization, IdentityGuider())

    def denoise(noisy: Tensor, alpha: Tensor, timesteps: Tensor, cond: Any) -> Tensor:
        return best_estimate(noisy, float(alpha[0]))

    return sampler(denoise, latents, {}, None, seeded_noise(5))


@pytest.mark.parametrize(
    ("sampler_class", "errors"),
    # A little above what was measured; the last step, which jumps to the estimate, makes the most of it.
    [(VideoDDIMSampler, (0.24, 0.07, 0.018)), (VPODEDPMPP2MSampler, (0.21, 0.04, 0.008))],
)
def test_ode_samplers_come_to_the_data(sampler_class: Any, errors: tuple[float, ...]) -> None:
    quantiles = torch.linspace(-2, 2, 9).view(1, 9, 1, 1, 1)
    for num_steps, allowed in zip((10, 50, 250), errors):
        got = gaussian_run(sampler_class, num_steps, quantiles)
        assert (got - (MEAN + SPREAD * quantiles)).abs().max().item() < allowed


def test_sde_sampler_comes_to_the_datas_mean_and_spread() -> None:
    noise = start((1, 40_000, 1, 1, 1))
    for num_steps, allowed in ((50, 0.02), (250, 0.005)):  # measured 0.013 and 0.0001, standard error 0.0014
        got = gaussian_run(VPSDEDPMPP2MSampler, num_steps, noise)
        assert got.mean().item() == pytest.approx(MEAN, abs=0.01)
        assert got.std().item() == pytest.approx(SPREAD, abs=allowed)


@pytest.mark.parametrize("sampler_class", SAMPLERS)
def test_one_step_returns_the_first_estimate(sampler_class: Any) -> None:
    """From pure noise the true v is minus the clean latents, so one step finds them."""
    discretization = ZeroSNRDDPMDiscretization()
    denoiser = DiscreteDenoiser(discretization, VideoScaling())
    clean = start(seed=9)

    def denoise(noisy: Tensor, alpha: Tensor, timesteps: Tensor, cond: Any) -> Tensor:
        assert timesteps.tolist() == [999.0] * len(noisy)
        return denoiser(lambda *_: -clean, noisy, alpha, timesteps, cond)

    got = sampler_class(1, discretization, IdentityGuider())(denoise, start(), {}, None, no_noise)
    torch.testing.assert_close(got, clean, rtol=0.0, atol=0.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("sampler_class", SAMPLERS)
def test_infinite_first_step_gives_no_nan(sampler_class: Any, shift: float, dtype: torch.dtype) -> None:
    """The first step leaves pure noise, whose log signal-to-noise ratio is minus infinity."""
    discretization = ZeroSNRDDPMDiscretization(shift_scale=shift)
    denoiser = DiscreteDenoiser(discretization, VideoScaling())

    def denoise(noisy: Tensor, alpha: Tensor, timesteps: Tensor, cond: Any) -> Tensor:
        return denoiser(lambda noisy, t, _: network(noisy.to(dtype), t).to(dtype), noisy, alpha, timesteps, cond)

    sampler = sampler_class(10, discretization, VanillaCFG(6.0))
    for step, denoised, latents in sampler.run(denoise, start(), {}, {}, seeded_noise()):
        assert denoised.isfinite().all(), step
        assert latents.isfinite().all(), step
        assert latents.dtype == torch.float32


# --- guidance --------------------------------------------------------------------------------------------------------


class TextNetwork:
    """An estimator whose answer depends on the condition; it remembers the sizes of its batches."""

    def __init__(self) -> None:
        self.batches: list[int] = []

    def __call__(self, noisy: Tensor, alpha: Tensor, timesteps: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
        self.batches.append(len(noisy))
        assert alpha.shape == timesteps.shape == (len(noisy),)
        text = cond["crossattn"].mean(dim=(1, 2)).view(-1, 1, 1, 1, 1)
        return torch.tanh(0.5 * noisy.roll(1, dims=1) + text)


def conditions() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    text = start((2, 3, 4), seed=3)
    return {"crossattn": text}, {"crossattn": torch.zeros_like(text)}


@pytest.mark.parametrize("sampler_class", SAMPLERS)
def test_a_guidance_batch_equals_two_passes(sampler_class: Any) -> None:
    cond, uncond = conditions()
    together, apart = TextNetwork(), TextNetwork()

    def two_passes(noisy: Tensor, alpha: Tensor, timesteps: Tensor, both: Mapping[str, Tensor]) -> Tensor:
        half = len(noisy) // 2
        passes = [
            apart(noisy[part], alpha[part], timesteps[part], own)
            for part, own in ((slice(half), uncond), (slice(half, None), cond))
        ]
        return torch.cat(passes)

    results = []
    for denoise in (together, two_passes):
        sampler = sampler_class(6, ZeroSNRDDPMDiscretization(), VanillaCFG(4.0))
        results.append(sampler(denoise, start(), cond, uncond, seeded_noise()))
    assert together.batches == [4] * 6
    assert apart.batches == [2] * 12
    torch.testing.assert_close(results[0], results[1], rtol=0.0, atol=1e-6)


@pytest.mark.parametrize("sampler_class", SAMPLERS)
def test_dynamic_guidance_takes_half_the_batch_at_the_steps_where_it_is_one(sampler_class: Any) -> None:
    cond, uncond = conditions()
    networks, results = [TextNetwork(), TextNetwork()], []
    guider = DynamicCFG(6.0, 5, 50, schedule="step_index")
    for network_, unguided in zip(networks, (lambda scale: abs(scale - 1.0) <= 2.0**-24, lambda scale: False)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("sat.diffusion.samplers.is_unguided", unguided)
            sampler = sampler_class(50, ZeroSNRDDPMDiscretization(), guider)
            results.append(sampler(network_, start(), cond, uncond, seeded_noise()))
    assert networks[0].batches == [2] * 8 + [4] * 42
    assert networks[1].batches == [4] * 50
    torch.testing.assert_close(results[0], results[1], rtol=0.0, atol=1e-5)


@pytest.mark.parametrize("sampler_class", SAMPLERS)
def test_a_scale_of_one_samples_the_condition_alone(sampler_class: Any) -> None:
    cond, uncond = conditions()
    results, networks = [], [TextNetwork(), TextNetwork()]
    for own, network_, other in ((VanillaCFG(1.0), networks[0], uncond), (VanillaCFG(4.0), networks[1], None)):
        sampler = sampler_class(6, ZeroSNRDDPMDiscretization(), own)
        results.append(sampler(network_, start(), cond, other, seeded_noise()))
    assert networks[0].batches == networks[1].batches == [2] * 6
    assert torch.equal(*results)


@pytest.mark.parametrize(
    ("schedule", "scales"),
    [
        ("released", {0: 2.29149, 1: 2.54350, 2: 6.97435, 3: 6.42036, 4: 2.78810, 49: 1.12}),
        ("step_index", {0: 1.0, 28: 1.04, 35: 1.41, 42: 3.24, 49: 6.86}),
    ],
)
def test_dynamic_scales_in_a_run(schedule: Any, scales: dict[int, float]) -> None:
    """With 0 as the unconditional and 1 as the conditional estimate, the guided one is the scale."""

    def denoise(noisy: Tensor, alpha: Tensor, timesteps: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
        return cond["crossattn"].view(-1, 1, 1, 1, 1).expand_as(noisy)

    one = torch.ones(2, 1, 1)
    sampler = VideoDDIMSampler(50, ZeroSNRDDPMDiscretization(), DynamicCFG(6, 5, 50, schedule))
    runs = sampler.run(denoise, start(), {"crossattn": one}, {"crossattn": 0 * one}, no_noise)
    got = {step.index: denoised.mean().item() for step, denoised, _ in runs}
    assert {index: got[index] for index in scales} == pytest.approx(scales, abs=5e-3)


# --- fixed frames ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sdedit", [False, True])
@pytest.mark.parametrize("sampler_class", SAMPLERS)
def test_fixed_frames_stay_and_are_seen_at_each_level(sampler_class: Any, sdedit: bool) -> None:
    prefix = start((2, 1, 4, 2, 2), seed=4)
    extra = torch.full_like(prefix, 0.25)
    seen: list[Tensor] = []

    def denoise(noisy: Tensor, alpha: Tensor, timesteps: Tensor, cond: Any) -> Tensor:
        seen.append(noisy[:, :1])
        return torch.tanh(noisy.roll(1, dims=1))

    def noise(kind: str, step: int, like: Tensor) -> Tensor:
        return extra if kind == "prefix" else torch.randn(like.shape, generator=generator)

    results = []
    for first in (prefix, prefix + 1):
        generator = torch.Generator().manual_seed(6)
        sampler = sampler_class(5, ZeroSNRDDPMDiscretization(), IdentityGuider(), fixed_frames=1, sdedit=sdedit)
        results.append(sampler(denoise, start(), {}, None, noise, prefix=first))
        assert torch.equal(results[-1][:, :1], first)
    for step, frame in zip(sampler.steps(), seen):
        expected = step.alpha * prefix + sigma(step.alpha) * extra if sdedit else prefix
        torch.testing.assert_close(frame, expected, rtol=0.0, atol=1e-6)
    assert not torch.allclose(results[0][:, 1:], results[1][:, 1:], atol=1e-2)  # the prefix steers the rest


def test_fixed_frames_need_a_prefix() -> None:
    sampler = VideoDDIMSampler(5, ZeroSNRDDPMDiscretization(), IdentityGuider(), fixed_frames=2)
    with pytest.raises(ConfigError, match="fixed_frames is 2, and there is no prefix to keep"):
        sampler(TextNetwork(), start(), {}, None, no_noise)


# --- options ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["VPSDEDPMPP2MSampler", "VPODEDPMPP2MSampler", "VideoDDIMSampler"])
def test_samplers_build_from_released_names(name: str) -> None:
    sgm = "sgm.modules.diffusionmodules"
    params = {
        "num_steps": 50,
        "verbose": True,
        "device": "cpu",
        "discretization_config": {"target": f"{sgm}.discretizer.ZeroSNRDDPMDiscretization"},
        "guider_config": {
            "target": f"{sgm}.guiders.DynamicCFG",
            "params": {"scale": 6, "exp": 5, "num_steps": 50},
        },
    }
    sampler = instantiate_from_config({"target": f"{sgm}.sampling.{name}", "params": params})
    steps = sampler.steps()
    assert [step.timestep for step in steps] == list(range(999, 0, -20))
    assert (steps[0].alpha, steps[0].previous_alpha, steps[-1].next_alpha) == (0.0, None, 1.0)
    assert [step.is_last for step in steps] == [False] * 49 + [True]


def test_contradicting_numbers_of_steps_are_refused() -> None:
    with pytest.raises(ConfigError, match="the sampler's num_steps is 25 and its guider's is 50"):
        VideoDDIMSampler(25, ZeroSNRDDPMDiscretization(), DynamicCFG(6, 5, 50))
    with pytest.raises(ConfigError, match="num_steps is 0; give 1 or more"):
        VideoDDIMSampler(0, ZeroSNRDDPMDiscretization(), IdentityGuider())


def test_the_released_image_to_video_sampler_is_ddim() -> None:
    """A name that files may hold, though the released pipeline cannot call it."""
    name = "sgm.modules.diffusionmodules.sampling.Image2VideoDDIMSampler"
    assert resolve_target(name) is VideoDDIMSampler
