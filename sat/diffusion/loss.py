"""The training loss of the video model."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from sat.diffusion.scaling import Clips, DiscreteDenoiser, add_noise, expand_to
from sat.diffusion.schedules import DiscreteSampling
from sat.errors import ConfigError


class VideoDiffusionLoss:
    """Weighted error of the clean estimate; with type l2 it equals the plain error of v.

    offset_noise_level: strength of one number per sample that is added to all its noise. min_snr_value caps the weight
    (Hang et al. 2023, arXiv:2303.09556). batch2model_keys: entries of the batch that go to the network by name.
    """

    def __init__(
        self,
        sigma_sampler: DiscreteSampling,
        type: Literal["l2", "l1"] = "l2",
        offset_noise_level: float = 0.0,
        min_snr_value: float | None = None,
        batch2model_keys: Sequence[str] | str | None = None,
    ) -> None:
        if type not in ("l2", "l1"):
            raise ConfigError(f"loss type is '{type}'; give l2 or l1")
        self.sigma_sampler = sigma_sampler
        self.type = type
        self.offset_noise_level = offset_noise_level
        self.min_snr_value = min_snr_value
        keys = [batch2model_keys] if isinstance(batch2model_keys, str) else batch2model_keys
        self.batch2model_keys = tuple(keys or ())

    def weight(self, alpha: Tensor) -> Tensor:
        """1 / (1 - alpha²), capped where min_snr_value is set: (b,) -> (b,)."""
        weight = 1.0 / (1.0 - alpha.square())
        return weight if self.min_snr_value is None else weight.clamp(max=self.min_snr_value)

    def __call__(
        self,
        network: Callable[..., Clips],
        denoiser: DiscreteDenoiser,
        latents: Clips,
        cond: Mapping[str, Tensor],
        timesteps: Tensor,
        noise: Clips,
        offset_noise: Tensor | None = None,
        **more: Any,
    ) -> Tensor:
        """Loss of each sample (b,).

        latents and noise (b t c h w), or lists of (t c h w), scaled; timesteps (b,) int64; offset_noise (b,) standard
        normal, needed where offset_noise_level is set.
        """
        if self.offset_noise_level > 0.0:
            if offset_noise is None:
                raise ValueError("offset_noise_level is set, so the loss needs offset_noise")
            noise = _add_offset(noise, self.offset_noise_level * offset_noise)
        first = latents if isinstance(latents, Tensor) else latents[0]
        alpha = self.sigma_sampler.alphas.to(first)[timesteps]
        noisy = add_noise(latents, noise, alpha)
        denoised = denoiser(network, noisy, alpha, timesteps, cond, **more)
        return self.weight(alpha) * self._mean_errors(denoised, latents)

    def _mean_errors(self, denoised: Clips, latents: Clips) -> Tensor:
        """Mean error of each sample (b,), over all of its values."""
        if not (isinstance(denoised, Tensor) and isinstance(latents, Tensor)):
            return torch.stack([self._mean_errors(*pair)[0] for pair in zip(_rows(denoised), _rows(latents))])
        error = denoised - latents
        return (error.square() if self.type == "l2" else error.abs()).flatten(1).mean(dim=1)


def _rows(clips: Clips) -> Iterator[Tensor]:
    """Each clip as a batch of one."""
    return (clip.unsqueeze(0) for clip in clips)


def _add_offset(noise: Clips, offset: Tensor) -> Clips:
    if isinstance(noise, Tensor):
        return noise + expand_to(offset, noise)
    return [own + number for own, number in zip(noise, offset)]
