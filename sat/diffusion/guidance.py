"""Classifier-free guidance (Ho & Salimans 2022, arXiv:2207.12598, eq. 6)."""

import math
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from sat.errors import ConfigError

GUIDED = ("crossattn", "concat", "vector")
"""Condition entries that differ between the two halves of a guidance batch; all others must be equal."""


def combine(unconditional: Tensor, conditional: Tensor, scale: float) -> Tensor:
    """u + scale · (c - u)."""
    return unconditional + scale * (conditional - unconditional)


def is_unguided(scale: float) -> bool:
    """Whether a scale is 1 in float32, in which estimates are combined: dynamic guidance creeps away from 1."""
    return abs(scale - 1.0) <= 2.0**-24


def split_conditions(
    cond: Mapping[str, Tensor], uncond: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The conditions of the unconditional and of the conditional half. Raises where what they share differs."""
    for name in cond:
        if name not in GUIDED and not torch.equal(cond[name], uncond[name]):
            raise ValueError(f"condition '{name}' differs between the guided halves, which share it")
    return {name: uncond[name] if name in GUIDED else cond[name] for name in cond}, dict(cond)


def double_batch(cond: Mapping[str, Tensor], uncond: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """One condition of twice the batch: the unconditional half first."""
    first, second = split_conditions(cond, uncond)
    return {name: torch.cat([first[name], second[name]]) if name in GUIDED else cond[name] for name in cond}


class VanillaCFG:
    """The same guidance scale at every step.

    two_passes: call the network once for each half, in half the memory, instead of once for both as one batch.
    """

    def __init__(self, scale: float, two_passes: bool = False) -> None:
        self.scale = scale
        self.two_passes = two_passes

    def scale_at(self, step: int, timestep: float) -> float:
        """Guidance scale of a sampling step (0 up) at its training timestep."""
        return self.scale


class IdentityGuider(VanillaCFG):
    """No guidance: the conditional estimate alone."""

    def __init__(self) -> None:
        super().__init__(1.0)


class DynamicCFG:
    """A scale that grows from 1 to 1 + scale: 1 + scale · (1 - cos(π · (k / num_steps)^exp)) / 2.

    schedule: "step_index" takes for k the number of the sampling step, as was meant. "released" takes num_steps minus
    the training timestep (0 .. 999), as the released code and diffusers do: k is far below zero for most steps and the
    scale jumps between the two ends. Released weights are sampled by users with the latter, so it is the default.
    two_passes: as in VanillaCFG.
    """

    def __init__(
        self,
        scale: float,
        exp: float,
        num_steps: int,
        schedule: Literal["released", "step_index"] = "released",
        two_passes: bool = False,
    ) -> None:
        if schedule not in ("released", "step_index"):
            raise ConfigError(f"DynamicCFG schedule is '{schedule}'; give released or step_index")
        if schedule == "released" and exp != int(exp):
            raise ConfigError(
                f"DynamicCFG exp is {exp}; with schedule released it must be whole (its base is negative)"
            )
        self.scale = scale
        self.exp = exp
        self.num_steps = num_steps
        self.schedule = schedule
        self.two_passes = two_passes

    def scale_at(self, step: int, timestep: float) -> float:
        """Guidance scale of a sampling step (0 up) at its training timestep."""
        k = step if self.schedule == "step_index" else self.num_steps - timestep
        return 1.0 + self.scale * (1.0 - math.cos(math.pi * (k / self.num_steps) ** self.exp)) / 2.0
