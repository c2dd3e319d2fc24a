"""Samplers: from pure noise to clean latents in a few calls of the network.

A step is a function of tensors and levels; a sampler class holds the numbers of a configuration and runs the loop.
Levels rise along a run: from alpha = 0, pure noise, to 1, clean.
"""

import math
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from sat.diffusion.guidance import DynamicCFG, VanillaCFG, combine, double_batch, is_unguided, split_conditions
from sat.diffusion.scaling import add_noise
from sat.diffusion.schedules import ZeroSNRDDPMDiscretization
from sat.errors import ConfigError
from sat.mpu.guidance import GuidanceSplit

Denoise = Callable[..., Tensor]
"""denoise(noisy (b ...), alpha (b,), timesteps (b,), cond, **more) -> estimate of the clean latents (b ...)."""

Estimate = Callable[[Tensor, "Step"], Tensor]
"""estimate(noisy (b ...), where) -> guided estimate of the clean latents, at the level and timestep of a Step."""


class NoiseSource(Protocol):
    """Standard normal noise of a kind for a sampling step: "step" and "churn" like the latents, "prefix" like fixed
    frames."""

    def __call__(self, kind: str, step: int, like: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class Step:
    """One step of a run: its number, training timestep, and the levels it goes from and to."""

    index: int
    timestep: float
    alpha: float
    next_alpha: float
    previous_alpha: float | None
    """The level of the step before, None for the first step."""

    @property
    def is_last(self) -> bool:
        return self.next_alpha == 1.0


def log_snr_half(alpha: float) -> float:
    """λ = ln(alpha / √(1 - alpha²)); -∞ for pure noise, +∞ for clean."""
    if alpha <= 0.0:
        return -math.inf
    return math.inf if alpha >= 1.0 else math.log(alpha) - 0.5 * math.log1p(-alpha * alpha)


def sigma(alpha: float) -> float:
    """√(1 - alpha²)."""
    return math.sqrt(1.0 - alpha * alpha)


def ddim_step(noisy: Tensor, denoised: Tensor, step: Step) -> Tensor:
    """Deterministic DDIM (Song et al. 2021, arXiv:2010.02502, eq. 12 with σ = 0), written for a clean estimate."""
    ratio = sigma(step.next_alpha) / sigma(step.alpha)
    return ratio * noisy + (step.next_alpha - step.alpha * ratio) * denoised


def extrapolate_2m(denoised: Tensor, previous: Tensor | None, step: Step) -> Tensor:
    """The two-point estimate of DPM-Solver++(2M) (Lu et al. 2022, arXiv:2211.01095, Algorithm 2)."""
    if previous is None or step.previous_alpha is None:
        return denoised
    h = log_snr_half(step.next_alpha) - log_snr_half(step.alpha)
    # Infinite where the step before left pure noise: its estimate then has no weight.
    r = (log_snr_half(step.alpha) - log_snr_half(step.previous_alpha)) / h
    return (1.0 + 0.5 / r) * denoised - (0.5 / r) * previous


def dpmpp_ode_2m_step(noisy: Tensor, denoised: Tensor, previous: Tensor | None, step: Step) -> Tensor:
    """A step of DPM-Solver++(2M) along the probability-flow ODE."""
    if step.is_last:
        return denoised
    h = log_snr_half(step.next_alpha) - log_snr_half(step.alpha)
    estimate = extrapolate_2m(denoised, previous, step)
    return (sigma(step.next_alpha) / sigma(step.alpha)) * noisy - step.next_alpha * math.expm1(-h) * estimate


def dpmpp_sde_2m_step(
    noisy: Tensor, denoised: Tensor, previous: Tensor | None, noise: Tensor | None, step: Step
) -> Tensor:
    """A step of SDE-DPM-Solver++(2M) (Lu et al. 2022, eq. 15 and app. A.3); the last step needs no noise."""
    if step.is_last or noise is None:
        return denoised
    h = log_snr_half(step.next_alpha) - log_snr_half(step.alpha)
    shrink = sigma(step.next_alpha) / sigma(step.alpha) * math.exp(-h)
    estimate = extrapolate_2m(denoised, previous, step)
    spread = sigma(step.next_alpha) * math.sqrt(-math.expm1(-2.0 * h))
    return shrink * noisy - step.next_alpha * math.expm1(-2.0 * h) * estimate + spread * noise


@dataclass
class _Prefix:
    """Leading frames that a run keeps: clean, or with is_noised at the noise level of each step."""

    frames: Tensor
    """(b f c h w)"""
    is_noised: bool
    noise: NoiseSource
    _drawn: dict[int, Tensor] = field(default_factory=dict)

    def put(self, latents: Tensor, step: Step) -> Tensor:
        """The latents (b t c h w) at a step, with the frames in their place."""
        if not self.is_noised:
            return self.put_clean(latents)
        self._drawn = {index: drawn for index, drawn in self._drawn.items() if index >= step.index}
        if step.index not in self._drawn:  # a sampler may have looked ahead to this step
            self._drawn[step.index] = self.noise("prefix", step.index, self.frames)
        alpha = torch.full((len(latents),), step.alpha, device=latents.device)
        return self._join(add_noise(self.frames, self._drawn[step.index], alpha), latents)

    def put_clean(self, latents: Tensor) -> Tensor:
        """The latents with the clean frames in their place."""
        return self._join(self.frames, latents)

    def _join(self, frames: Tensor, latents: Tensor) -> Tensor:
        return torch.cat([frames, latents[:, frames.shape[1] :]], dim=1)


class Sampler(ABC):
    """What the samplers share: the grid of steps, the guided estimate, and frames that stay fixed.

    fixed_frames: keep that many leading frames at the given prefix; with sdedit the prefix is noised to each step's
    level instead of staying clean.
    """

    def __init__(
        self,
        num_steps: int,
        discretization: ZeroSNRDDPMDiscretization,
        guider: VanillaCFG | DynamicCFG,
        fixed_frames: int = 0,
        sdedit: bool = False,
    ) -> None:
        if num_steps < 1:
            raise ConfigError(f"the sampler's num_steps is {num_steps}; give 1 or more")
        guided_steps = getattr(guider, "num_steps", num_steps)
        if guided_steps != num_steps:
            raise ConfigError(
                f"the sampler's num_steps is {num_steps} and its guider's is {guided_steps}; give both the same"
            )
        self.num_steps = num_steps
        self.discretization = discretization
        self.guider = guider
        self.fixed_frames = fixed_frames
        self.sdedit = sdedit

    def steps(self) -> list[Step]:
        """The steps of a run, from pure noise to clean."""
        levels, timesteps = self.discretization.steps(self.num_steps)
        alphas = [*levels.tolist(), 1.0]
        return [
            Step(index, int(timestep), alphas[index], alphas[index + 1], alphas[index - 1] if index else None)
            for index, timestep in enumerate(timesteps)
        ]

    @abstractmethod
    def advance(
        self, noisy: Tensor, denoised: Tensor, previous: Tensor | None, step: Step, noise: NoiseSource
    ) -> Tensor:
        """Latents at the next level, from the estimate at this one and that of the step before."""

    def take_step(
        self,
        noisy: Tensor,
        previous: Tensor | None,
        step: Step,
        following: Step | None,
        noise: NoiseSource,
        estimate: Estimate,
    ) -> tuple[Tensor, Tensor]:
        """One whole step: the estimate of the clean latents, and the latents at the next level.

        following: the step after this one. Samplers that ask for more than one estimate a step have their own.
        """
        denoised = estimate(noisy, step)
        return denoised, self.advance(noisy, denoised, previous, step, noise)

    def run(
        self,
        denoise: Denoise,
        latents: Tensor,
        cond: Mapping[str, Tensor],
        uncond: Mapping[str, Tensor] | None,
        noise: NoiseSource,
        prefix: Tensor | None = None,
        split: GuidanceSplit | None = None,
        **more: Any,
    ) -> Iterator[tuple[Step, Tensor, Tensor]]:
        """Sample step by step, yielding (step, denoised estimate, latents after the step).

        latents (b t c h w): standard normal, float32. uncond None, or a guidance scale of 1: one call of the network
        with cond alone. prefix (b, fixed_frames, c, h, w). split: another rank computes the other half of guidance.
        """
        if self.fixed_frames and prefix is None:
            raise ConfigError(f"the sampler's fixed_frames is {self.fixed_frames}, and there is no prefix to keep")
        kept = None
        if self.fixed_frames and prefix is not None:
            kept = _Prefix(prefix[:, : self.fixed_frames], self.sdedit, noise)

        def estimate(noisy: Tensor, step: Step) -> Tensor:
            noisy = noisy if kept is None else kept.put(noisy, step)
            return self.estimate(denoise, noisy, step, cond, uncond, split, **more)

        previous, steps = None, self.steps()
        for step, following in zip(steps, [*steps[1:], None]):
            noisy = latents if kept is None else kept.put(latents, step)
            denoised, latents = self.take_step(noisy, previous, step, following, noise, estimate)
            if kept is not None and step.is_last:
                latents = kept.put_clean(latents)
            previous = denoised
            yield step, denoised, latents

    def estimate(
        self,
        denoise: Denoise,
        noisy: Tensor,
        step: Step,
        cond: Mapping[str, Tensor],
        uncond: Mapping[str, Tensor] | None,
        split: GuidanceSplit | None = None,
        **more: Any,
    ) -> Tensor:
        """The estimate of the clean latents under this sampler's guidance, float32."""
        scale = self.guider.scale_at(step.index, step.timestep)
        return guided(denoise, noisy, step, cond, uncond, scale, self.guider.two_passes, split, **more)

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        """The latents after the last step of `run`."""
        _, _, latents = deque(self.run(*args, **kwargs), maxlen=1).pop()
        return latents


def guided(
    denoise: Denoise,
    latents: Tensor,
    step: Step,
    cond: Mapping[str, Tensor],
    uncond: Mapping[str, Tensor] | None,
    scale: float,
    two_passes: bool = False,
    split: GuidanceSplit | None = None,
    **more: Any,
) -> Tensor:
    """The guided estimate of the clean latents, float32. One call with the prompt alone where the scale is 1."""

    def call(noisy: Tensor, condition: Mapping[str, Tensor]) -> Tensor:
        levels, timesteps = (
            torch.full((len(noisy),), float(value), device=noisy.device) for value in (step.alpha, step.timestep)
        )
        return denoise(noisy, levels, timesteps, condition, **more).float()

    if uncond is None or is_unguided(scale):
        return call(latents, cond)
    if split is not None:
        own = split_conditions(cond, uncond)[split.is_conditional]
        unconditional, conditional = split.exchange(call(latents, own))
    elif two_passes:
        unconditional, conditional = (call(latents, half) for half in split_conditions(cond, uncond))
    else:
        unconditional, conditional = call(torch.cat([latents, latents]), double_batch(cond, uncond)).chunk(2)
    return combine(unconditional, conditional, scale)


class VideoDDIMSampler(Sampler):
    """DDIM without noise."""

    def advance(
        self, noisy: Tensor, denoised: Tensor, previous: Tensor | None, step: Step, noise: NoiseSource
    ) -> Tensor:
        return ddim_step(noisy, denoised, step)


class VPODEDPMPP2MSampler(Sampler):
    """DPM-Solver++(2M) along the ODE."""

    def advance(
        self, noisy: Tensor, denoised: Tensor, previous: Tensor | None, step: Step, noise: NoiseSource
    ) -> Tensor:
        return dpmpp_ode_2m_step(noisy, denoised, previous, step)


class VPSDEDPMPP2MSampler(Sampler):
    """SDE-DPM-Solver++(2M), the released default."""

    def advance(
        self, noisy: Tensor, denoised: Tensor, previous: Tensor | None, step: Step, noise: NoiseSource
    ) -> Tensor:
        drawn = None if step.is_last else noise("step", step.index, noisy)
        return dpmpp_sde_2m_step(noisy, denoised, previous, drawn, step)
