"""Muon: momentum whose singular values are made equal, for matrices; AdamW for everything else."""

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

STEPS = 5
"""Newton-Schulz iterations."""
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the odd polynomial of an iteration, which is steep at 0 and brings singular values to about 0.7 to 1.2."""
TOGETHER = 1 << 22
"""Numbers of matrices of one shape that are multiplied together, so that small ones fill cores."""


class Muon(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024) for parameters of two or more dimensions, AdamW (Loshchilov & Hutter 2019) for others.

    The update of a matrix (m n) at lr 1 has singular values of about max(1, m / n)^0.5; a convolution is the matrix
    (out, in * kernel). AdamW's rate is lr * adam_lr_ratio. State per parameter: `momentum` of a matrix; `step`,
    `exp_avg` and `exp_avg_sq` of another. Every parameter has to be whole, as it is at ZeRO stage 0 (fp32) without
    tensor parallelism.
    """

    needs_whole_parameters = True

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 0.02,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        momentum: float = 0.95,
        adam_lr_ratio: float = 0.2,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": tuple(betas),
            "eps": eps,
            "weight_decay": weight_decay,
            "momentum": momentum,
            "adam_lr_ratio": adam_lr_ratio,
        }
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of all parameters that have a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            alike: dict[tuple[int, ...], list[Tensor]] = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                if parameter.ndim < 2:
                    self._move_vector(parameter, group)
                else:
                    alike[tuple(parameter.shape)].append(parameter)
            for matrices in alike.values():
                size = max(1, TOGETHER // matrices[0].numel())
                for start in range(0, len(matrices), size):
                    self._move_matrices(matrices[start : start + size], group)
        return loss

    def _move_matrices(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        """Update matrices of one shape, which are multiplied together."""
        lr = group["lr"]
        ahead = []
        for parameter in parameters:
            gradient: Any = parameter.grad
            state = self.state[parameter]
            if not state:
                state["momentum"] = torch.zeros_like(parameter)
            momentum = state["momentum"].lerp_(gradient, 1.0 - group["momentum"])
            ahead.append(gradient.lerp(momentum, group["momentum"]).flatten(1))  # Nesterov's
        rows, columns = ahead[0].shape
        step = lr * max(1.0, rows / columns) ** 0.5
        for parameter, direction in zip(parameters, orthogonalize(torch.stack(ahead))):
            parameter.mul_(1.0 - lr * group["weight_decay"]).sub_(direction.view_as(parameter), alpha=step)

    def _move_vector(self, parameter: Tensor, group: dict[str, Any]) -> None:
        gradient: Any = parameter.grad
        state = self.state[parameter]
        if not state:
            state["step"] = torch.tensor(0.0)  # a tensor, as in torch's optimizers, so that it is saved like theirs
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        state["step"] += 1
        beta1, beta2 = group["betas"]
        correction1, correction2 = (1.0 - beta ** int(state["step"]) for beta in (beta1, beta2))
        lr = group["lr"] * group["adam_lr_ratio"]
        first = state["exp_avg"].lerp_(gradient, 1.0 - beta1)
        second = state["exp_avg_sq"].mul_(beta2).addcmul_(gradient, gradient, value=1.0 - beta2)
        root = second.sqrt().div_(correction2**0.5).add_(group["eps"])
        parameter.mul_(1.0 - lr * group["weight_decay"]).addcdiv_(first, root, value=-lr / correction1)


def orthogonalize(matrices: Tensor) -> Tensor:
    """About U V^T of each matrix (... m n) = U S V^T, by Newton-Schulz iterations: singular values become about 1.

    They are done on the smaller Gram matrix, which takes a quarter of the operations where one side is long.
    """
    a, b, c = COEFFICIENTS
    is_tall = matrices.shape[-2] > matrices.shape[-1]
    wide = matrices.mT if is_tall else matrices
    wide = wide / (torch.linalg.matrix_norm(wide, keepdim=True) + 1e-7)
    gram = wide @ wide.mT
    product: Any = None
    for step in range(STEPS):
        factor = b * gram + c * gram @ gram  # and a on the diagonal
        factor.diagonal(dim1=-2, dim2=-1).add_(a)
        product = factor if product is None else factor @ product
        if step < STEPS - 1:
            gram = factor @ gram @ factor
    wide = product @ wide
    return wide.mT if is_tall else wide
