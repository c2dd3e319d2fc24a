"""Adam with an exponential moving average of the weights, under SAT's name."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sat.ops.kernels import triton_kernels


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
        numbers = self._numbers_of(group, step)
        plain: list[Sequence[Tensor]] = []
        for parameter in parameters:
            state = self.state[parameter]
            tensors: Any = (parameter, parameter.grad, state["exp_avg"], state["exp_avg_sq"], state["shadow"])
            kernels = triton_kernels(*tensors)
            if kernels is None or parameter.dtype != torch.float32 or not all(t.is_contiguous() for t in tensors):
                plain.append(tensors)
            else:
                kernels.adam_ema(tensors, *numbers)
        if plain:
            _update_plainly(plain, numbers)

    def _numbers_of(self, group: dict[str, Any], step: int) -> "_Numbers":
        beta1, beta2 = group["betas"]
        lr, decay = group["lr"], group["weight_decay"]
        correction1 = 1.0 - beta1**step if self.bias_correction else 1.0
        correction2 = 1.0 - beta2**step if self.bias_correction else 1.0
        return _Numbers(
            rest1=1.0 - beta1,
            beta2=beta2,
            rest2=1.0 - beta2,
            kept=1.0 - lr * decay if self.adam_w_mode else 1.0,
            coupled_decay=0.0 if self.adam_w_mode else decay,
            step_size=lr / correction1,
            root_correction=correction2**0.5,
            eps=group["eps"],
            ema_rest=1.0 - self.ema_decay_at(step),
        )

    def _state_of(self, parameter: Tensor) -> dict[str, Any]:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.tensor(0.0)  # a tensor, as in torch's optimizers, so that it is saved like theirs
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
            state["shadow"] = parameter.detach().clone()
        return state


class _Numbers(NamedTuple):
    """What one update multiplies and adds, in the order in which the kernel takes it."""

    rest1: float
    """1 - beta1"""
    beta2: float
    rest2: float
    """1 - beta2"""
    kept: float
    """What AdamW multiplies the parameter by."""
    coupled_decay: float
    """What Adam adds to the gradient for each parameter."""
    step_size: float
    root_correction: float
    """What the root of the second moment is divided by."""
    eps: float
    ema_rest: float
    """How far the shadow moves towards the parameter."""


def _update_plainly(tensors: Sequence[Sequence[Tensor]], numbers: _Numbers) -> None:
    """One update in place. tensors: of each parameter itself, gradient, exp_avg, exp_avg_sq, shadow."""
    parameters, gradients, first, second, shadows = (list(own) for own in zip(*tensors))
    if numbers.coupled_decay:
        gradients = list(torch._foreach_add(gradients, parameters, alpha=numbers.coupled_decay))
    torch._foreach_lerp_(first, gradients, numbers.rest1)
    torch._foreach_mul_(second, numbers.beta2)
    torch._foreach_addcmul_(second, gradients, gradients, value=numbers.rest2)
    denominator = torch._foreach_sqrt(second)
    torch._foreach_div_(denominator, numbers.root_correction)
    torch._foreach_add_(denominator, numbers.eps)
    if numbers.kept != 1.0:
        torch._foreach_mul_(parameters, numbers.kept)
    torch._foreach_addcdiv_(parameters, first, denominator, value=-numbers.step_size)
    torch._foreach_lerp_(shadows, parameters, numbers.ema_rest)
