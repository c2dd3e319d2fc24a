"""Noise schedules, and the draw of training timesteps."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from sat.errors import ConfigError
from sat.mpu.random import sample_uniform, stream_generator


def scaled_linear_alphas_cumprod(steps: int, start: float, end: float) -> Tensor:
    """Cumulative signal variance of the schedule that is linear in √β (Rombach et al. 2022): (steps,) float64."""
    betas = torch.linspace(start**0.5, end**0.5, steps, dtype=torch.float64).square()
    return torch.cumprod(1.0 - betas, dim=0)


def shift_snr(alphas_cumprod: Tensor, shift: float) -> Tensor:
    """Divide the signal-to-noise ratio by `shift` (Hoogeboom et al. 2023, arXiv:2301.11093, sec. 2.1)."""
    return alphas_cumprod / (shift + (1.0 - shift) * alphas_cumprod)


def zero_terminal_snr(alphas: Tensor) -> Tensor:
    """Shift and stretch falling levels (m,) so that the last is 0 and the first stays; a single one becomes 0.

    Lin et al. 2023 (arXiv:2305.08891), Algorithm 1.
    """
    if len(alphas) == 1:
        return torch.zeros_like(alphas)
    return (alphas - alphas[-1]) * (alphas[0] / (alphas[0] - alphas[-1]))


def trailing_timesteps(num_timesteps: int, num_steps: int) -> Tensor:
    """A sampler's training timesteps: evenly spaced, the last one included, 0 left out; rising (num_steps,) int64."""
    if not 1 <= num_steps <= num_timesteps:
        raise ConfigError(f"a sampler of {num_steps} steps over {num_timesteps} timesteps; give 1 to {num_timesteps}")
    falling = torch.linspace(num_timesteps - 1, 0, num_steps + 1, dtype=torch.float64)[:-1]
    return falling.long().flip(0)


class ZeroSNRDDPMDiscretization:
    """Levels of the released models: linear in √β, SNR shifted by shift_scale, rescaled to end in pure noise.

    keep_start changes linear_start so that the shift leaves the first level in its place; post_shift applies the
    shift after the rescaling. levels: how a sampler's steps get theirs. "steps" rescales the chosen levels among
    themselves, as released, which differs from the training table by up to 1e-3; "table" takes them from the table, as
    diffusers does.
    """

    def __init__(
        self,
        linear_start: float = 0.00085,
        linear_end: float = 0.012,
        num_timesteps: int = 1000,
        shift_scale: float = 1.0,
        keep_start: bool = False,
        post_shift: bool = False,
        levels: Literal["steps", "table"] = "steps",
    ) -> None:
        if levels not in ("steps", "table"):
            raise ConfigError(f"the discretization's levels is '{levels}'; give steps or table")
        if keep_start and not post_shift:
            linear_start = linear_start / (shift_scale + (1.0 - shift_scale) * linear_start)
        self.num_timesteps = num_timesteps
        self.shift_scale = shift_scale
        self.post_shift = post_shift
        self.levels = levels
        alphas_cumprod = scaled_linear_alphas_cumprod(num_timesteps, linear_start, linear_end)
        self.alphas_cumprod = alphas_cumprod if post_shift else shift_snr(alphas_cumprod, shift_scale)

    def table(self) -> Tensor:
        """Levels of all training timesteps: (num_timesteps,) float32, falling to 0."""
        return self._rescale(self.alphas_cumprod)

    def steps(self, num_steps: int) -> tuple[Tensor, Tensor]:
        """Levels (num_steps,) float32 from pure noise up, and their timesteps (num_steps,) int64, falling."""
        timesteps = trailing_timesteps(self.num_timesteps, num_steps)
        chosen = self.alphas_cumprod[timesteps]
        levels = self._rescale(chosen) if self.levels == "steps" else self.table()[timesteps]
        return levels.flip(0), timesteps.flip(0)

    def timestep_at(self, alpha: float) -> float:
        """The training timestep of any level, between whole ones by linear interpolation of the table."""
        rising = self.table().double().flip(0)
        above = int(torch.searchsorted(rising, alpha).clamp(1, self.num_timesteps - 1))
        low, high = float(rising[above - 1]), float(rising[above])
        place = above - 1 + min(max((alpha - low) / (high - low), 0.0), 1.0)
        return self.num_timesteps - 1 - place

    def _rescale(self, alphas_cumprod: Tensor) -> Tensor:
        alphas = zero_terminal_snr(alphas_cumprod.sqrt().float())
        return shift_snr(alphas.square(), self.shift_scale).sqrt() if self.post_shift else alphas


@dataclass(frozen=True)
class StepPlaces:
    """Where samples stand in the global batches that they belong to."""

    steps: tuple[int, ...]
    """Each sample's optimizer step, 0 up."""
    places: tuple[int, ...]
    """Its place in that step's global batch, 0 up."""
    num_samples: int
    """Samples of such a batch."""

    @classmethod
    def of_counters(cls, counters: Iterable[int], global_batch_size: int) -> "StepPlaces":
        """Where every step takes the next global_batch_size samples."""
        pairs = [divmod(int(counter), global_batch_size) for counter in counters]
        return cls(tuple(step for step, _ in pairs), tuple(place for _, place in pairs), global_batch_size)


class DiscreteSampling:
    """Draws training timesteps, one for each sample, from the sample's own random stream.

    uniform_sampling: explicit uniform sampling (CogVideoX, sec. 2.5): the timesteps are cut into strata of equal width
    and the samples of a global batch are dealt out evenly to them. group_num: number of strata, at most one for each
    sample of the global batch, which is also what 0 means. Every sample's timestep stays uniform over all timesteps.
    """

    def __init__(
        self,
        discretization: ZeroSNRDDPMDiscretization,
        num_idx: int = 1000,
        uniform_sampling: bool = False,
        group_num: int = 0,
    ) -> None:
        if num_idx != discretization.num_timesteps:
            raise ConfigError(
                f"num_idx {num_idx} differs from the schedule's num_timesteps {discretization.num_timesteps}"
            )
        if group_num < 0:
            raise ConfigError(f"group_num is {group_num}; give the number of strata, or 0 for one for each sample")
        self.num_idx = num_idx
        self.uniform_sampling = uniform_sampling
        self.group_num = group_num
        self.alphas = discretization.table()

    def draw(self, seed: int, counters: Sequence[int], where: StepPlaces) -> Tensor:
        """Timesteps (b,) int64 of the samples with these global counters."""
        position = sample_uniform(seed, "timestep", counters)
        if self.uniform_sampling:
            num_strata = self.num_strata(where.num_samples)
            pairs = zip(where.steps, where.places)
            strata = [stratum_of(seed, step, place, where.num_samples, num_strata) for step, place in pairs]
            position = (torch.tensor(strata, dtype=torch.float64) + position) / num_strata
        return (position * self.num_idx).long().clamp(max=self.num_idx - 1)  # a position may round up to 1

    def num_strata(self, num_samples: int) -> int:
        """Strata of a global batch. With fewer samples than groups, more would leave most of the range out of it."""
        return min(self.group_num or num_samples, num_samples)


def stratum_of(seed: int, step: int, place: int, num_samples: int, num_strata: int) -> int:
    """The stratum of one sample: the places of its global batch are shuffled, then dealt out in turn."""
    generator = stream_generator(seed, "stratum", step)
    dealt = torch.randperm(num_samples, generator=generator)[place]
    offset = torch.randint(num_strata, (), generator=generator)
    return int((dealt + offset) % num_strata)
