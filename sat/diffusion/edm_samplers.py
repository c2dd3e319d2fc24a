"""The samplers of Karras et al. 2022 (arXiv:2206.00364) and their ancestral relatives, on variance-preserving levels.

Papers write them for x̄ = clean + σ · noise. With alpha = 1 / √(1 + σ²) and x = alpha · x̄ they run on the same levels,
the same network and the same first level of pure noise (σ = ∞) as the samplers of `sat.diffusion.samplers`, some of
which they turn out to be: Euler's step is DDIM's, and DPM-Solver++(2M), as an ODE and as an SDE, is the same formula.
"""

import math
from dataclasses import replace

from torch import Tensor

from sat.diffusion.guidance import DynamicCFG, VanillaCFG
from sat.diffusion.samplers import Estimate, NoiseSource, Sampler, Step, ddim_step, sigma
from sat.diffusion.schedules import ZeroSNRDDPMDiscretization
from sat.errors import ConfigError


def noise_ratio(alpha: float) -> float:
    """σ = √(1 - alpha²) / alpha; ∞ for pure noise."""
    return sigma(alpha) / alpha if alpha > 0.0 else math.inf


def level_of(ratio: float) -> float:
    """alpha = 1 / √(1 + σ²)."""
    return 1.0 / math.hypot(1.0, ratio)


def churn(noisy: Tensor, noise: Tensor, alpha: float, raised: float, s_noise: float) -> Tensor:
    """Add noise to come from one level to a noisier one (Karras et al. 2022, Algorithm 2, lines 5 and 6)."""
    added = math.sqrt(noise_ratio(raised) ** 2 - noise_ratio(alpha) ** 2)
    return (raised / alpha) * noisy + raised * added * s_noise * noise


def heun_step(noisy: Tensor, denoised: Tensor, euler: Tensor, second: Tensor, step: Step) -> Tensor:
    """Euler's step, corrected by half the change of the slope (Karras et al. 2022, Algorithm 1, lines 7 and 8).

    euler: the latents that Euler's step gives; second: the estimate there. Both levels must hold signal and noise.
    """
    slope = (noisy - step.alpha * denoised) / sigma(step.alpha)
    next_slope = (euler - step.next_alpha * second) / sigma(step.next_alpha)
    change = noise_ratio(step.next_alpha) - noise_ratio(step.alpha)
    return euler + 0.5 * step.next_alpha * change * (next_slope - slope)


def ancestral_split(step: Step, eta: float) -> tuple[float, float]:
    """(σ_down, σ_up): how far to denoise and how much noise to add, for σ' = √(σ_down² + σ_up²) of the next level.

    σ_up = min(σ', eta · σ' √(1 - σ'²/σ²)); eta 1 is the posterior of the diffusion process, 0 adds nothing.
    """
    ratio = noise_ratio(step.next_alpha)
    shrink = step.alpha * sigma(step.next_alpha) / (step.next_alpha * sigma(step.alpha))  # σ' / σ, 0 from pure noise
    up = min(ratio, eta * ratio * math.sqrt(1.0 - shrink**2))
    return math.sqrt(ratio**2 - up**2), up


def add_ancestral_noise(latents: Tensor, noise: Tensor, down: float, up: float, s_noise: float) -> Tensor:
    """From the level of σ_down to that of √(σ_down² + σ_up²)."""
    next_alpha = level_of(math.hypot(down, up))
    return (next_alpha / level_of(down)) * latents + next_alpha * up * s_noise * noise


class EulerEDMSampler(Sampler):
    """Euler's method for the ODE of Karras et al., with their churn (Algorithm 2 without the correction).

    s_churn: noise added over a run, in steps' worth; 0 makes it DDIM. It is added at levels with σ from s_tmin to
    s_tmax, s_noise times as strong as the level asks for.
    """

    def __init__(
        self,
        num_steps: int,
        discretization: ZeroSNRDDPMDiscretization,
        guider: VanillaCFG | DynamicCFG,
        fixed_frames: int = 0,
        sdedit: bool = False,
        s_churn: float = 0.0,
        s_tmin: float = 0.0,
        s_tmax: float = math.inf,
        s_noise: float = 1.0,
    ) -> None:
        super().__init__(num_steps, discretization, guider, fixed_frames, sdedit)
        if s_churn < 0.0 or s_tmin > s_tmax:
            raise ConfigError(
                f"s_churn is {s_churn}, s_tmin {s_tmin}, s_tmax {s_tmax}; give an s_churn of 0 or more, and s_tmin "
                "below s_tmax"
            )
        self.s_churn, self.s_tmin, self.s_tmax, self.s_noise = s_churn, s_tmin, s_tmax, s_noise

    def stir(self, noisy: Tensor, step: Step, noise: NoiseSource) -> tuple[Tensor, Step]:
        """The latents at the level that churn raises a step to, and the step from there."""
        ratio = noise_ratio(step.alpha)
        if self.s_churn == 0.0 or not self.s_tmin <= ratio <= self.s_tmax or math.isinf(ratio):
            return noisy, step
        raised = level_of(ratio * (1.0 + min(self.s_churn / self.num_steps, math.sqrt(2.0) - 1.0)))
        noisy = churn(noisy, noise("churn", step.index, noisy), step.alpha, raised, self.s_noise)
        return noisy, replace(step, alpha=raised, timestep=self.discretization.timestep_at(raised))

    def take_step(
        self,
        noisy: Tensor,
        previous: Tensor | None,
        step: Step,
        following: Step | None,
        noise: NoiseSource,
        estimate: Estimate,
    ) -> tuple[Tensor, Tensor]:
        noisy, step = self.stir(noisy, step, noise)
        return super().take_step(noisy, previous, step, following, noise, estimate)

    def advance(
        self, noisy: Tensor, denoised: Tensor, previous: Tensor | None, step: Step, noise: NoiseSource
    ) -> Tensor:
        return ddim_step(noisy, denoised, step)


class HeunEDMSampler(EulerEDMSampler):
    """Heun's second-order method (Karras et al. 2022, Algorithm 2); two estimates a step.

    The first step, which is infinitely long, and the last are Euler's.
    """

    def take_step(
        self,
        noisy: Tensor,
        previous: Tensor | None,
        step: Step,
        following: Step | None,
        noise: NoiseSource,
        estimate: Estimate,
    ) -> tuple[Tensor, Tensor]:
        noisy, step = self.stir(noisy, step, noise)
        denoised = estimate(noisy, step)
        euler = self.advance(noisy, denoised, previous, step, noise)
        if following is None or step.alpha == 0.0:
            return denoised, euler
        return denoised, heun_step(noisy, denoised, euler, estimate(euler, following), step)


class EulerAncestralSampler(Sampler):
    """Euler's step past the next level, and noise back up to it.

    With eta 1 and s_noise 1 this is the step of DDPM (Ho et al. 2020, arXiv:2006.11239, eq. 7), with eta 0 DDIM.
    """

    def __init__(
        self,
        num_steps: int,
        discretization: ZeroSNRDDPMDiscretization,
        guider: VanillaCFG | DynamicCFG,
        fixed_frames: int = 0,
        sdedit: bool = False,
        eta: float = 1.0,
        s_noise: float = 1.0,
    ) -> None:
        super().__init__(num_steps, discretization, guider, fixed_frames, sdedit)
        if not eta >= 0.0:
            raise ConfigError(f"the sampler's eta is {eta}; give 0 (no noise) or more")
        self.eta, self.s_noise = eta, s_noise

    def advance(
        self, noisy: Tensor, denoised: Tensor, previous: Tensor | None, step: Step, noise: NoiseSource
    ) -> Tensor:
        down, up = ancestral_split(step, self.eta)
        latents = ddim_step(noisy, denoised, replace(step, next_alpha=level_of(down)))
        return self._noise_up(latents, down, up, step, noise)

    def _noise_up(self, latents: Tensor, down: float, up: float, step: Step, noise: NoiseSource) -> Tensor:
        if up == 0.0:
            return latents
        return add_ancestral_noise(latents, noise("step", step.index, latents), down, up, self.s_noise)


class DPMPP2SAncestralSampler(EulerAncestralSampler):
    """The second-order single-step DPM-Solver++ (Lu et al. 2022, arXiv:2211.01095, Algorithm 1, r = 1/2), then noise.

    Two estimates a step: at its beginning, and half way in ln σ. Steps from pure noise and to clean are Euler's.
    """

    def take_step(
        self,
        noisy: Tensor,
        previous: Tensor | None,
        step: Step,
        following: Step | None,
        noise: NoiseSource,
        estimate: Estimate,
    ) -> tuple[Tensor, Tensor]:
        denoised = estimate(noisy, step)
        down, up = ancestral_split(step, self.eta)
        if step.alpha == 0.0 or down == 0.0:
            return denoised, self.advance(noisy, denoised, previous, step, noise)
        middle = level_of(math.sqrt(noise_ratio(step.alpha) * down))
        half_way = ddim_step(noisy, denoised, replace(step, next_alpha=middle))
        timestep = self.discretization.timestep_at(middle)
        second = estimate(half_way, replace(step, alpha=middle, timestep=timestep))
        latents = ddim_step(noisy, second, replace(step, next_alpha=level_of(down)))
        return denoised, self._noise_up(latents, down, up, step, noise)
