"""Backwards through DDIM: the noise from which given latents would be sampled."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from sat.diffusion.samplers import Denoise, Step, VideoDDIMSampler, sigma


def velocity_of(noisy: Tensor, denoised: Tensor, alpha: float) -> Tensor:
    """v = (alpha · noisy - denoised) / √(1 - alpha²) (Salimans & Ho 2022, arXiv:2202.00512, app. D)."""
    return (alpha * noisy - denoised) / sigma(alpha)


def ddim_inverse_step(latents: Tensor, velocity: Tensor, step: Step) -> Tensor:
    """The noisier latents that DDIM's step, with this v at them, takes to the given ones.

    With alpha = cos φ a step is the turn x' = cos(φ - φ') x - sin(φ - φ') v (Salimans & Ho 2022, app. D); here it is
    solved for x.
    """
    angle = math.acos(step.alpha) - math.acos(step.next_alpha)
    return (latents + math.sin(angle) * velocity) / math.cos(angle)


def ddim_invert(
    sampler: VideoDDIMSampler,
    denoise: Denoise,
    latents: Tensor,
    cond: Mapping[str, Tensor],
    uncond: Mapping[str, Tensor] | None = None,
    num_iterations: int = 4,
    **more: Any,
) -> Iterator[tuple[Step, Tensor]]:
    """Run a DDIM sampler backwards, from clean latents (b t c h w) to noise, yielding (step, latents before the step).

    Each step's v belongs to the noisier latents, which are looked for: num_iterations 1 takes v at the less noisy ones,
    as is usual (Song et al. 2021, sec. 4.3); further ones repeat it at what was found (Pan et al. 2023,
    arXiv:2309.04907), until sampling leads back. One call of the network for each.
    """
    for step in reversed(sampler.steps()):
        noisier = latents
        for _ in range(num_iterations):
            denoised = sampler.estimate(denoise, noisier, step, cond, uncond, **more)
            noisier = ddim_inverse_step(latents, velocity_of(noisier, denoised, step.alpha), step)
        latents = noisier
        yield step, latents
