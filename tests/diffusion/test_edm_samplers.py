"""Samplers of Karras et al. and ancestral ones: their papers' formulas, their order, and what all samplers share.

The papers' formulas stand here in their own variables, x̄ = clean + σ · noise; ours run on x = alpha · x̄.
"""

import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from sat.cogvideox.engine import build_engine
from sat.compat.sat_names import TARGETS
from sat.config import instantiate_from_config
from sat.diffusion.edm_samplers import (
    DPMPP2SAncestralSampler,
    EulerAncestralSampler,
    EulerEDMSampler,
    HeunEDMSampler,
    level_of,
    noise_ratio,
)
from sat.diffusion.guidance import IdentityGuider, VanillaCFG
from sat.diffusion.samplers import Sampler, Step, VideoDDIMSampler, VPODEDPMPP2MSampler, VPSDEDPMPP2MSampler, sigma
from sat.diffusion.schedules import ZeroSNRDDPMDiscretization
from sat.errors import ConfigError
from tests.tiny import tiny_config

OWN = (EulerEDMSampler, HeunEDMSampler, EulerAncestralSampler, DPMPP2SAncestralSampler)
ALL = (VideoDDIMSampler, VPODEDPMPP2MSampler, VPSDEDPMPP2MSampler, *OWN)
SGM = "sgm.modules.diffusionmodules"
SHAPE = (2, 3, 4, 2, 2)


def start(shape: tuple[int, ...] = SHAPE, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def make(sampler_class: type[Sampler], num_steps: int = 10, **options: Any) -> Any:
    return sampler_class(num_steps, ZeroSNRDDPMDiscretization(), options.pop("guider", IdentityGuider()), **options)


def seeded_noise(seed: int = 0) -> Callable[[str, int, Tensor], Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return lambda kind, step, like: torch.randn(like.shape, generator=generator, dtype=like.dtype)


# --- the papers' formulas --------------------------------------------------------------------------------------------

STEP = Step(index=3, timestep=500, alpha=0.35, next_alpha=0.6, previous_alpha=0.2)
FOLLOWING = Step(index=4, timestep=400, alpha=0.6, next_alpha=0.8, previous_alpha=0.35)
NOISE = start(seed=8, dtype=torch.float64)


def denoise_ve(latents: Tensor, ratio: float) -> Tensor:
    """A smooth stand-in for the estimate, of x̄ and σ."""
    return torch.tanh(0.8 * latents.roll(1, dims=2) / math.hypot(1.0, ratio) + 0.1 * ratio)


def check_step(sampler: Sampler, expected: Callable[[Tensor, float, float], Tensor], previous: Any = None) -> None:
    """One step of ours from x against the paper's, called with (x̄, σ, σ')."""
    noisy = start(seed=7, dtype=torch.float64)

    def estimate(latents: Tensor, step: Step) -> Tensor:
        return denoise_ve(latents / step.alpha, noise_ratio(step.alpha))

    _, got = sampler.take_step(noisy, previous, STEP, FOLLOWING, lambda kind, step, like: NOISE, estimate)
    latents = expected(noisy / STEP.alpha, noise_ratio(STEP.alpha), noise_ratio(STEP.next_alpha))
    assert_close(got, STEP.next_alpha * latents, rtol=0.0, atol=1e-12)


def ancestral_ve(ratio: float, next_ratio: float, eta: float) -> tuple[float, float]:
    up = min(next_ratio, eta * (next_ratio**2 * (ratio**2 - next_ratio**2) / ratio**2) ** 0.5)
    return (next_ratio**2 - up**2) ** 0.5, up


@pytest.mark.parametrize("options", [{}, {"s_churn": 2.0, "s_noise": 1.1}])
def test_euler_is_karras_algorithm_2_without_correction(options: dict[str, float]) -> None:
    def expected(latents: Tensor, ratio: float, next_ratio: float) -> Tensor:
        raised = ratio * (1 + options.get("s_churn", 0.0) / 10)
        latents = latents + (raised**2 - ratio**2) ** 0.5 * options.get("s_noise", 1.0) * NOISE
        slope = (latents - denoise_ve(latents, raised)) / raised
        return latents + (next_ratio - raised) * slope

    check_step(make(EulerEDMSampler, **options), expected)


@pytest.mark.parametrize("options", [{}, {"s_churn": 2.0, "s_noise": 1.1}])
def test_heun_is_karras_algorithm_2(options: dict[str, float]) -> None:
    def expected(latents: Tensor, ratio: float, next_ratio: float) -> Tensor:
        raised = ratio * (1 + options.get("s_churn", 0.0) / 10)
        latents = latents + (raised**2 - ratio**2) ** 0.5 * options.get("s_noise", 1.0) * NOISE
        slope = (latents - denoise_ve(latents, raised)) / raised
        euler = latents + (next_ratio - raised) * slope
        second = (euler - denoise_ve(euler, next_ratio)) / next_ratio
        return latents + (next_ratio - raised) * (slope + second) / 2

    check_step(make(HeunEDMSampler, **options), expected)


@pytest.mark.parametrize(
    ("options", "stirs"),
    [({"s_tmin": 3.0}, False), ({"s_tmax": 2.0}, False), ({"s_tmin": 2.0, "s_tmax": 3.0}, True)],
)
def test_churn_keeps_to_its_range(options: dict[str, float], stirs: bool) -> None:
    noisy, step = make(EulerEDMSampler, s_churn=5.0, **options).stir(NOISE, STEP, lambda *_: NOISE)  # σ is 2.68
    assert (step.alpha < STEP.alpha) == (step.timestep > STEP.timestep) == stirs
    assert torch.equal(noisy, NOISE) != stirs


def test_churn_adds_at_most_the_papers_share() -> None:
    _, step = make(EulerEDMSampler, s_churn=1e9).stir(NOISE, STEP, lambda *_: NOISE)
    assert noise_ratio(step.alpha) == pytest.approx(2**0.5 * noise_ratio(STEP.alpha))


@pytest.mark.parametrize("options", [{}, {"eta": 0.6, "s_noise": 1.1}, {"eta": 0.0}])
def test_euler_ancestral(options: dict[str, float]) -> None:
    def expected(latents: Tensor, ratio: float, next_ratio: float) -> Tensor:
        down, up = ancestral_ve(ratio, next_ratio, options.get("eta", 1.0))
        slope = (latents - denoise_ve(latents, ratio)) / ratio
        return latents + (down - ratio) * slope + up * options.get("s_noise", 1.0) * NOISE

    check_step(make(EulerAncestralSampler, **options), expected)


def test_euler_ancestral_is_ddpm() -> None:
    """Ho et al. 2020, eq. 6 and 7: the posterior of the process, with the estimate in the clean data's place."""
    keep, next_keep = STEP.alpha**2, STEP.next_alpha**2
    beta = 1 - keep / next_keep

    def expected(latents: Tensor, ratio: float, next_ratio: float) -> Tensor:
        noisy, denoised = STEP.alpha * latents, denoise_ve(latents, ratio)
        mean = (next_keep**0.5 * beta * denoised + (1 - beta) ** 0.5 * (1 - next_keep) * noisy) / (1 - keep)
        return (mean + ((1 - next_keep) / (1 - keep) * beta) ** 0.5 * NOISE) / STEP.next_alpha

    check_step(make(EulerAncestralSampler), expected)


@pytest.mark.parametrize("options", [{}, {"eta": 0.6, "s_noise": 1.1}, {"eta": 0.0}])
def test_dpmpp_2s_ancestral(options: dict[str, float]) -> None:
    def expected(latents: Tensor, ratio: float, next_ratio: float) -> Tensor:
        down, up = ancestral_ve(ratio, next_ratio, options.get("eta", 1.0))
        t, t_next = -math.log(ratio), -math.log(down)
        h = t_next - t
        middle = math.exp(-(t + h / 2))
        denoised = denoise_ve(latents, ratio)
        half_way = middle / ratio * latents - math.expm1(-h / 2) * denoised
        result = down / ratio * latents - math.expm1(-h) * denoise_ve(half_way, middle)
        return result + up * options.get("s_noise", 1.0) * NOISE

    check_step(make(DPMPP2SAncestralSampler, **options), expected)


@pytest.mark.parametrize("name", ["DPMPP2MSampler", "SDEDPMPP2MSampler"])
def test_dpmpp_2m_has_the_same_form_in_both_variables(name: str) -> None:
    before = start(seed=9, dtype=torch.float64)
    sampler = {"DPMPP2MSampler": VPODEDPMPP2MSampler, "SDEDPMPP2MSampler": VPSDEDPMPP2MSampler}[name]
    assert TARGETS[f"{SGM}.sampling.{name}"].endswith(sampler.__name__)

    def expected(latents: Tensor, ratio: float, next_ratio: float) -> Tensor:
        h = math.log(ratio) - math.log(next_ratio)
        r = (math.log(noise_ratio(0.2)) - math.log(ratio)) / h
        mixed = (1 + 1 / (2 * r)) * denoise_ve(latents, ratio) - 1 / (2 * r) * before
        if name == "DPMPP2MSampler":
            return next_ratio / ratio * latents - math.expm1(-h) * mixed
        shrunk = next_ratio / ratio * math.exp(-h) * latents - math.expm1(-2 * h) * mixed
        return shrunk + next_ratio * (1 - math.exp(-2 * h)) ** 0.5 * NOISE

    check_step(make(sampler), expected, previous=before)


# --- a problem with a known answer -----------------------------------------------------------------------------------

MEAN, SPREAD = 0.7, 0.4
"""Clean data are normal with these. All that follows from it is exact."""


def marginal(alpha: float) -> tuple[float, float]:
    """Mean and standard deviation of noisy data at a level."""
    return alpha * MEAN, math.sqrt((alpha * SPREAD) ** 2 + 1 - alpha**2)


def best_estimate(noisy: Tensor, step: Step) -> Tensor:
    """The expected clean value of noisy data."""
    mean, spread = marginal(step.alpha)
    return MEAN + step.alpha * SPREAD**2 / spread**2 * (noisy - mean)


def flow_error(sampler: Sampler, num_steps: int) -> float:
    """How far a solver ends from where the probability-flow ODE goes, which keeps every quantile in its place."""
    low, high = math.log(noise_ratio(0.1)), math.log(noise_ratio(0.95))
    alphas = [level_of(math.exp(low + (high - low) * i / num_steps)) for i in range(num_steps + 1)]
    steps = [Step(i, 0, alphas[i], alphas[i + 1], alphas[i - 1] if i else None) for i in range(num_steps)]
    steps.append(Step(num_steps, 0, alphas[-1], 1.0, alphas[-2]))
    quantiles = torch.linspace(-2, 2, 9, dtype=torch.float64)
    mean, spread = marginal(alphas[0])
    noisy, previous = mean + spread * quantiles, None
    for step, following in itertools.pairwise(steps):
        previous, noisy = sampler.take_step(noisy, previous, step, following, seeded_noise(), best_estimate)
    mean, spread = marginal(alphas[-1])
    return (noisy - (mean + spread * quantiles)).abs().max().item()


@pytest.mark.parametrize(
    ("sampler", "order"),
    [
        (make(EulerEDMSampler), 1),
        (make(HeunEDMSampler), 2),
        (make(EulerAncestralSampler, eta=0.0), 1),
        (make(DPMPP2SAncestralSampler, eta=0.0), 2),
        (make(VPODEDPMPP2MSampler), 2),
    ],
    ids=lambda value: type(value).__name__,
)
def test_order_of_convergence(sampler: Sampler, order: int) -> None:
    errors = [flow_error(sampler, num_steps) for num_steps in (64, 128, 256)]
    for coarse, fine in itertools.pairwise(errors):
        assert math.log2(coarse / fine) == pytest.approx(order, abs=0.1)


@pytest.mark.parametrize(
    ("sampler_class", "options", "allowed"),
    # Measured: 0.0141, 0.0003, 0.0109, 0.0028, 0.0002; methods of first order contract a little too much.
    [
        (EulerEDMSampler, {"s_churn": 20.0}, 0.018),
        (HeunEDMSampler, {"s_churn": 20.0}, 0.003),
        (EulerAncestralSampler, {}, 0.014),
        (EulerAncestralSampler, {"eta": 0.5}, 0.005),
        (DPMPP2SAncestralSampler, {}, 0.003),
    ],
)
def test_noise_that_is_added_belongs_there(
    sampler_class: type[Sampler], options: dict[str, float], allowed: float
) -> None:
    """From pure noise to data on the released levels: the mean and spread of the last estimate of a perfect run."""
    sampler = make(sampler_class, 250, **options)

    def denoise(noisy: Tensor, alpha: Tensor, timesteps: Tensor, cond: Any) -> Tensor:
        return best_estimate(noisy, replace(STEP, alpha=float(alpha[0])))

    got = sampler(denoise, start((1, 40_000, 1, 1, 1)), {}, None, seeded_noise(5))
    last = sampler.steps()[-1].alpha
    # Standard errors are 0.002 for the mean (measured worst 0.0013), 0.0014 for the spread.
    assert got.mean().item() == pytest.approx(MEAN, abs=0.006)
    assert got.std().item() == pytest.approx(last * SPREAD**2 / marginal(last)[1], abs=allowed)


# --- what all samplers share -----------------------------------------------------------------------------------------


def network(noisy: Tensor, timesteps: Tensor) -> Tensor:
    phase = timesteps.view(-1, *[1] * (noisy.dim() - 1)) / 1000.0
    return torch.tanh(1.3 * noisy.roll(1, dims=2) - 0.7 * noisy + phase) - 0.4 * noisy * phase


def text_estimate(noisy: Tensor, alpha: Tensor, timesteps: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
    """An estimator whose answer depends on the condition and on all frames."""
    text = cond["crossattn"].mean(dim=(1, 2)).view(-1, 1, 1, 1, 1)
    return torch.tanh(0.5 * noisy.roll(1, dims=1) + text)


def options_of(sampler_class: type[Sampler]) -> dict[str, Any]:
    return {"s_churn": 3.0} if issubclass(sampler_class, EulerEDMSampler) else {}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("sampler_class", OWN)
def test_the_infinite_first_step_gives_no_nan(sampler_class: type[Sampler], dtype: torch.dtype) -> None:
    def denoise(noisy: Tensor, alpha: Tensor, timesteps: Tensor, cond: Any) -> Tensor:
        return network(noisy.to(dtype), timesteps).to(dtype)

    sampler = make(sampler_class, guider=VanillaCFG(6.0), **options_of(sampler_class))
    for _, denoised, latents in sampler.run(denoise, start(), {}, {}, seeded_noise()):
        assert denoised.isfinite().all() and latents.isfinite().all()
        assert latents.dtype == torch.float32


@pytest.mark.parametrize("sampler_class", ALL)
def test_two_passes_give_the_same_as_one_batch(sampler_class: type[Sampler]) -> None:
    text = start((2, 3, 4), seed=3)
    cond, uncond = {"crossattn": text, "rate": torch.ones(1)}, {"crossattn": 0 * text, "rate": torch.ones(1)}
    sizes: list[int] = []

    def denoise(noisy: Tensor, *others: Any) -> Tensor:
        sizes.append(len(noisy))
        return text_estimate(noisy, *others)

    results = []
    for two_passes in (False, True):
        guider = VanillaCFG(4.0, two_passes=two_passes)
        sampler = make(sampler_class, 6, guider=guider, **options_of(sampler_class))
        results.append(sampler(denoise, start(), cond, uncond, seeded_noise()))
    calls = len(sizes) // 3
    assert sizes == [4] * calls + [2] * 2 * calls
    # This estimator takes each sample by itself, so nothing rounds differently.
    assert torch.equal(*results)


@pytest.mark.parametrize("sdedit", [False, True])
@pytest.mark.parametrize("sampler_class", OWN)
def test_fixed_frames_stay_and_are_seen_at_each_level(sampler_class: type[Sampler], sdedit: bool) -> None:
    prefix = start((2, 1, 4, 2, 2), seed=4)
    extra = torch.full_like(prefix, 0.25)
    seen: list[tuple[float, Tensor]] = []

    def denoise(noisy: Tensor, alpha: Tensor, timesteps: Tensor, cond: Any) -> Tensor:
        seen.append((float(alpha[0]), noisy[:, :1]))
        return torch.tanh(noisy.roll(1, dims=1))

    def noise(kind: str, step: int, like: Tensor) -> Tensor:
        return extra if kind == "prefix" else torch.randn(like.shape, generator=generator)

    results = []
    for first in (prefix + 1, prefix):
        generator = torch.Generator().manual_seed(6)
        seen.clear()
        sampler = make(sampler_class, 5, fixed_frames=1, sdedit=sdedit, **options_of(sampler_class))
        results.append(sampler(denoise, start(), {}, None, noise, prefix=first))
        assert torch.equal(results[-1][:, :1], first)
    assert len(seen) == {HeunEDMSampler: 8, DPMPP2SAncestralSampler: 8}.get(sampler_class, 5)
    for alpha, frame in seen:
        expected = alpha * prefix + sigma(alpha) * extra if sdedit else prefix
        assert_close(frame, expected, rtol=0.0, atol=1e-6)
    assert not torch.allclose(results[0][:, 1:], results[1][:, 1:], atol=1e-2)  # the prefix steers the rest


def test_the_prefixs_noise_is_drawn_once_a_step() -> None:
    drawn: list[int] = []

    def noise(kind: str, step: int, like: Tensor) -> Tensor:
        drawn.append(step)
        return torch.zeros_like(like)

    sampler = make(HeunEDMSampler, 5, fixed_frames=1, sdedit=True)
    sampler(lambda noisy, *_: torch.tanh(noisy), start(), {}, None, noise, prefix=start()[:, :1])
    assert drawn == [0, 1, 2, 3, 4]


# --- levels ----------------------------------------------------------------------------------------------------------


def test_the_timestep_of_a_level() -> None:
    schedule = ZeroSNRDDPMDiscretization(shift_scale=3.0)
    table = schedule.table().double()
    for timestep in (0, 1, 500, 998, 999):
        assert schedule.timestep_at(float(table[timestep])) == pytest.approx(timestep, abs=1e-6)
    assert schedule.timestep_at(float(0.25 * table[700] + 0.75 * table[701])) == pytest.approx(700.75)
    assert schedule.timestep_at(1.0) == 0.0


@pytest.mark.parametrize("num_steps", [10, 50, 1000])
def test_levels_of_the_table_are_diffusers(num_steps: int) -> None:
    from diffusers import CogVideoXDDIMScheduler

    theirs = CogVideoXDDIMScheduler(snr_shift_scale=3.0, rescale_betas_zero_snr=True, timestep_spacing="trailing")
    theirs.set_timesteps(num_steps)
    levels, timesteps = ZeroSNRDDPMDiscretization(shift_scale=3.0, levels="table").steps(num_steps)
    assert torch.equal(timesteps, theirs.timesteps)
    assert_close(levels.double(), theirs.alphas_cumprod[timesteps].sqrt(), rtol=0.0, atol=2e-7)


# --- by name ---------------------------------------------------------------------------------------------------------

NAMES = {
    "DPMPP2MSampler": VPODEDPMPP2MSampler,
    "SDEDPMPP2MSampler": VPSDEDPMPP2MSampler,
    "ZeroSNRDDIMSampler": VideoDDIMSampler,
    "VideoDDPMSampler": EulerAncestralSampler,
    "EulerEDMSampler": EulerEDMSampler,
    "HeunEDMSampler": HeunEDMSampler,
    "EulerAncestralSampler": EulerAncestralSampler,
    "DPMPP2SAncestralSampler": DPMPP2SAncestralSampler,
}
"""Released name -> the class that answers to it."""


@pytest.mark.parametrize("name", NAMES)
def test_released_names_sample_the_video_model(name: str) -> None:
    overrides = (f"model.sampler_config.target={SGM}.sampling.{name}", "model.sampler_config.params.verbose=true")
    engine = build_engine(tiny_config(*overrides)["model"])
    assert type(engine.sampler) is NAMES[name]
    again, once, other = (engine.sample(["a blob"], [0], seed, (3, 16, 4, 4)) for seed in (1, 1, 2))
    assert once.isfinite().all()
    assert torch.equal(once, again)
    assert not torch.allclose(once, other, atol=0.1)


@pytest.mark.parametrize(
    ("sampler", "params", "message"),
    [
        ("EulerEDMSampler", {"s_churn": -1.0}, "give an s_churn of 0 or more"),
        ("HeunEDMSampler", {"s_tmin": 2.0, "s_tmax": 1.0}, "s_tmin below s_tmax"),
        ("EulerAncestralSampler", {"eta": -0.1}, r"eta is -0.1; give 0 \(no noise\) or more"),
        ("EulerEDMSampler", {"eta": 1.0}, r"unknown key .*eta.*; .*EulerEDMSampler takes num_steps"),
    ],
)
def test_wrong_options_are_refused(sampler: str, params: dict[str, float], message: str) -> None:
    released = {
        "num_steps": 5,
        "discretization_config": {"target": f"{SGM}.discretizer.ZeroSNRDDPMDiscretization"},
        "guider_config": {"target": f"{SGM}.guiders.IdentityGuider"},
    }
    with pytest.raises(ConfigError, match=message):
        instantiate_from_config({"target": f"{SGM}.sampling.{sampler}", "params": {**released, **params}})


def test_wrong_levels_are_refused() -> None:
    with pytest.raises(ConfigError, match="levels is 'all'; give steps or table"):
        ZeroSNRDDPMDiscretization(levels="all")  # type: ignore[arg-type]
