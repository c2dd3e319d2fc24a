"""Adam with an exponential moving average of the weights, under SAT's name."""

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor


class FusedEmaAdam(torch.optim.Optimizer):
    """Adam (Kingma & Ba 2015) or AdamW (Loshchilov & Hutter 2019) that also keeps a shadow of each parameter.

    The shadow starts as a copy and after update n moves by 1 - d towards the parameter, with
    d = min(ema_decay, (1 + n) / (10 + n)), or d = ema_decay without use_num_upates (SAT's spelling). State per
    parameter: `step`, `exp_avg`, `exp_avg_sq`, `shadow`.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        adam_w_mode: bool = True,
        bias_correction: bool = True,
        ema_decay: float = 0.9999,
        use_num_upates: bool = True,
    ) -> None:
        defaults = {"lr": lr, "betas": tuple(betas), "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults)
        self.adam_w_mode = adam_w_mode
        self.bias_correction = bias_correction
        self.ema_decay = ema_decay
        self.use_num_upates = use_num_upates

    def ema_decay_at(self, step: int) -> float:
        """Decay of the shadow after update `step` (1 up)."""
        return min(self.ema_decay, (1 + step) / (10 + step)) if self.use_num_upates else self.ema_decay

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of all parameters that have a gradient, and of their shadows."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            by_step: dict[int, list[Tensor]] = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    state = self._state_of(parameter)
                    state["step"] += 1
                    by_step[int(state["step"])].append(parameter)
            for step, parameters in by_step.items():
                self._update(group, parameters, step)
        return loss

    def _update(self, group: dict[str, Any], parameters: list[Tensor], step: int) -> None:
        """Update parameters that have all had `step` updates, this one included."""
        states = [self.state[parameter] for parameter in parameters]
        gradients: Any = [parameter.grad for parameter in parameters]
        first = [state["exp_avg"] for state in states]
        second = [state["exp_avg_sq"] for state in states]
        shadows = [state["shadow"] for state in states]
        beta1, beta2 = group["betas"]
        lr, decay = group["lr"], group["weight_decay"]

        if decay and not self.adam_w_mode:
            gradients = torch._foreach_add(gradients, parameters, alpha=decay)
        torch._foreach_lerp_(first, gradients, 1.0 - beta1)
        torch._foreach_mul_(second, beta2)
        torch._foreach_addcmul_(second, gradients, gradients, value=1.0 - beta2)
        correction1 = 1.0 - beta1**step if self.bias_correction else 1.0
        correction2 = 1.0 - beta2**step if self.bias_correction else 1.0
        denominator = torch._foreach_sqrt(second)
        torch._foreach_div_(denominator, correction2**0.5)
        torch._foreach_add_(denominator, group["eps"])
        if decay and self.adam_w_mode:
            torch._foreach_mul_(parameters, 1.0 - lr * decay)
        torch._foreach_addcdiv_(parameters, first, denominator, value=-lr / correction1)
        torch._foreach_lerp_(shadows, parameters, 1.0 - self.ema_decay_at(step))

    def _state_of(self, parameter: Tensor) -> dict[str, Any]:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.tensor(0.0)  # a tensor, as in torch's optimizers, so that it is saved like theirs
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
            state["shadow"] = parameter.detach().clone()
        return state
