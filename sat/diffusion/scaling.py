"""From the network's output to an estimate of the clean latents."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from sat.diffusion.schedules import ZeroSNRDDPMDiscretization
from sat.errors import ConfigError


def expand_to(values: Tensor, like: Tensor) -> Tensor:
    """(b,) -> (b 1 1 ...) with as many dimensions as `like`."""
    return values.view(-1, *[1] * (like.dim() - 1))


Clips = Tensor | Sequence[Tensor]
"""Latents of equal size (b ...), or a list of one for each sample."""


def weigh(clips: Clips, weights: Tensor, others: Clips, other_weights: Tensor) -> Any:
    """weights · clips + other_weights · others, with a weight (b,) for each sample."""
    if isinstance(clips, Tensor) and isinstance(others, Tensor):
        return expand_to(weights, clips) * clips + expand_to(other_weights, others) * others
    return [a * clip + b * other for clip, a, other, b in zip(clips, weights, others, other_weights)]


def add_noise(latents: Clips, noise: Clips, alpha: Tensor) -> Any:
    """alpha · latents + √(1 - alpha²) · noise, alpha (b,) (Ho et al. 2020, eq. 4)."""
    return weigh(latents, alpha, noise, (1.0 - alpha.square()).sqrt())


def velocity(latents: Clips, noise: Clips, alpha: Tensor) -> Any:
    """v = alpha · noise - √(1 - alpha²) · latents, alpha (b,) (Salimans & Ho 2022, arXiv:2202.00512, app. D)."""
    return weigh(noise, alpha, latents, -(1.0 - alpha.square()).sqrt())


class VideoScaling:
    """Coefficients of v-prediction: clean = c_skip · noisy + c_out · network(c_in · noisy, c_noise)."""

    def __call__(self, alpha: Tensor, timesteps: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """alpha (b,), timesteps (b,) -> c_skip = alpha, c_out = -√(1 - alpha²), c_in = 1, c_noise = timesteps."""
        return alpha, -(1.0 - alpha.square()).sqrt(), torch.ones_like(alpha), timesteps.clone()


class EpsWeighting:
    """w = sigma^-2 (Ho et al. 2020). Released files name it; the video loss has its own weight."""

    def __call__(self, sigma: Tensor) -> Tensor:
        return sigma**-2.0


class DiscreteDenoiser:
    """Turns a v-predicting network into an estimator of clean latents, on the training table of noise levels.

    A level that is not on the table is replaced by the nearest that is, as released.
    """

    def __init__(
        self,
        discretization: ZeroSNRDDPMDiscretization,
        scaling: VideoScaling,
        weighting: EpsWeighting | None = None,
        num_idx: int = 1000,
    ) -> None:
        if num_idx != discretization.num_timesteps:
            raise ConfigError(
                f"num_idx {num_idx} differs from the schedule's num_timesteps {discretization.num_timesteps}"
            )
        self.scaling = scaling
        self.weighting = weighting
        self.alphas = discretization.table()

    def nearest(self, values: Tensor) -> Tensor:
        """Index of the table entry nearest to each value: (b,) -> (b,) int64."""
        return (values.unsqueeze(1) - self.alphas.to(values)).abs().argmin(dim=1)

    def __call__(
        self, network: Callable[..., Clips], noisy: Clips, alpha: Tensor, timesteps: Tensor, cond: Any, **more: Any
    ) -> Any:
        """Estimate the clean latents.

        network(noisy, timesteps, cond, **more) -> v; noisy (b ...) or a list, alpha and timesteps (b,). -> like noisy.
        """
        alpha = self.alphas.to(alpha)[self.nearest(alpha)]
        c_skip, c_out, c_in, c_noise = self.scaling(alpha, timesteps)
        scaled = noisy * expand_to(c_in, noisy) if isinstance(noisy, Tensor) else [x * c for x, c in zip(noisy, c_in)]
        return weigh(network(scaled, c_noise, cond, **more), c_out, noisy, c_skip)
