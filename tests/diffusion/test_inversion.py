"""DDIM backwards: the formula of one step, and latents -> noise -> latents on a problem with a known answer."""

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from sat.diffusion.guidance import IdentityGuider, VanillaCFG
from sat.diffusion.inversion import ddim_inverse_step, ddim_invert, velocity_of
from sat.diffusion.samplers import Step, VideoDDIMSampler, ddim_step
from sat.diffusion.schedules import ZeroSNRDDPMDiscretization

MEAN, SPREAD = 0.7, 0.4
"""Clean data are normal with these."""


def denoise(noisy: Tensor, alpha: Tensor, timesteps: Tensor, cond: Any) -> Tensor:
    """The expected clean value, shifted by the condition."""
    alpha = alpha.view(-1, 1, 1, 1, 1).double()
    mean = MEAN + (cond["crossattn"].mean() if cond else 0.0)
    return mean + alpha * SPREAD**2 / ((alpha * SPREAD) ** 2 + 1 - alpha**2) * (noisy - alpha * mean)


def no_noise(kind: str, step: int, like: Tensor) -> Tensor:
    raise AssertionError(f"noise of kind {kind} drawn in step {step}")


def sampler(num_steps: int, guider: Any = None) -> VideoDDIMSampler:
    return VideoDDIMSampler(num_steps, ZeroSNRDDPMDiscretization(), guider or IdentityGuider())


CLEAN = (MEAN + SPREAD * torch.linspace(-2, 2, 9)).view(1, 9, 1, 1, 1)


def round_trip(num_steps: int, num_iterations: int) -> tuple[Tensor, float]:
    """The noise of CLEAN, and how far sampling from it ends from CLEAN."""
    *_, (step, noise) = ddim_invert(sampler(num_steps), denoise, CLEAN, {}, num_iterations=num_iterations)
    assert step.index == 0
    back = sampler(num_steps)(denoise, noise, {}, None, no_noise)
    return noise, float((back - CLEAN).abs().max())


@pytest.mark.parametrize(("alpha", "next_alpha"), [(0.3, 0.5), (0.0, 0.2), (0.95, 1.0), (0.0, 1.0 - 1e-9)])
def test_a_step_back_undoes_a_step(alpha: float, next_alpha: float) -> None:
    noisy, denoised = torch.randn(2, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    step = Step(0, 500, alpha, next_alpha, None)
    after = ddim_step(noisy, denoised, step)
    velocity = velocity_of(noisy, denoised, alpha)
    assert_close(ddim_inverse_step(after, velocity, step), noisy, rtol=0.0, atol=1e-4 if next_alpha > 0.999 else 1e-12)


def test_more_iterations_lead_back_to_the_latents() -> None:
    errors = [round_trip(50, count)[1] for count in (1, 2, 4, 8)]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] < 0.04  # measured 0.036, of latents with a spread of 0.4
    assert errors[2] < 1e-5  # measured 5.8e-6
    assert errors[3] < 1e-6  # measured 3.6e-7


def test_usual_inversion_is_of_first_order() -> None:
    errors = [round_trip(num_steps, 1)[1] for num_steps in (100, 200, 400)]
    for coarse, fine in itertools.pairwise(errors):
        assert math.log2(coarse / fine) == pytest.approx(1.0, abs=0.1)


def test_the_noise_is_where_the_flow_keeps_each_quantile() -> None:
    noise, _ = round_trip(400, 6)
    # Both ends of the schedule are cut off a little: noise is normal up to the cleanest level's share.
    assert_close(noise.flatten(), torch.linspace(-2, 2, 9), rtol=0.0, atol=0.04)  # measured 0.032


def test_guidance_may_be_inverted_too() -> None:
    cond, uncond = ({"crossattn": torch.full((1, 2, 3), value)} for value in (0.5, 0.0))
    own = sampler(50, VanillaCFG(1.5))
    *_, (_, noise) = ddim_invert(own, denoise, CLEAN, cond, uncond, num_iterations=8)
    back = own(denoise, noise, cond, uncond, no_noise)
    assert_close(back, CLEAN, rtol=0.0, atol=1e-3)
    assert not torch.allclose(own(denoise, noise, cond, None, no_noise), CLEAN, atol=0.05)
