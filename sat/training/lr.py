"""The learning rate as a function of the step."""

import math
from dataclasses import dataclass
from typing import Literal

Style = Literal["linear", "cosine", "constant", "exponential"]


@dataclass(frozen=True, kw_only=True)
class LearningRate:
    """SAT's schedule: a short low start for a loaded model, warm-up, then decay. Steps count from 1.

    Being a function of the step alone it has no state to save: a resumed run continues on the same curve.
    """

    peak: float
    total_steps: int
    warmup_steps: float = 0.0
    style: Style = "linear"
    decay_ratio: float = 0.1
    """Cosine decay ends at this share of the peak."""
    auto_warmup_until: int = 0
    """Up to this step the rate is at most auto_warmup_rate of the peak."""
    auto_warmup_rate: float = 0.05

    def at(self, step: int) -> float:
        """The rate of one optimizer step. `exponential` is constant, as in SAT; linear falls below 0 after its end."""
        if step <= self.auto_warmup_until:
            ramp = self.peak * step / self.warmup_steps if self.warmup_steps else self.peak
            return min(self.peak * self.auto_warmup_rate, ramp)
        if self.warmup_steps and step <= self.warmup_steps:
            return self.peak * step / self.warmup_steps
        done = (step - self.warmup_steps) / self.total_steps
        if self.style == "linear":
            return self.peak * (1.0 - done)
        if self.style == "cosine":
            cosine = (math.cos(math.pi * min(1.0, done)) + 1.0) / 2.0
            return self.peak * (self.decay_ratio + (1.0 - self.decay_ratio) * cosine)
        return self.peak
