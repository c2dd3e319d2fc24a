"""Muon: momentum whose singular values are made equal, for matrices; AdamW for everything else."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

STEPS = 5
"""Newton-Schulz iterations."""
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the odd polynomial of an iteration, which is steep at 0 and brings singular values to about 0.7 to 1.2."""


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
            for parameter in group["params"]:
                if parameter.grad is not None:
                    direction = self._of_matrix if parameter.ndim > 1 else self._of_vector
                    update = direction(parameter, self.state[parameter], group)
                    lr = group["lr"] * (1.0 if parameter.ndim > 1 else group["adam_lr_ratio"])
                    parameter.mul_(1.0 - lr * group["weight_decay"]).sub_(lr * update)
        return loss

    @staticmethod
    def _of_matrix(parameter: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
        gradient: Any = parameter.grad
        if not state:
            state["momentum"] = torch.zeros_like(parameter)
        momentum = state["momentum"].lerp_(gradient, 1.0 - group["momentum"])
        ahead = gradient.lerp(momentum, group["momentum"]).flatten(1)  # Nesterov's
        return orthogonalize(ahead).mul_(max(1.0, ahead.shape[0] / ahead.shape[1]) ** 0.5).view_as(gradient)

    @staticmethod
    def _of_vector(parameter: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
        gradient: Any = parameter.grad
        if not state:
            state["step"] = torch.tensor(0.0)  # a tensor, as in torch's optimizers, so that it is saved like theirs
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        state["step"] += 1
        beta1, beta2 = group["betas"]
        first = state["exp_avg"].lerp_(gradient, 1.0 - beta1) / (1.0 - beta1 ** int(state["step"]))
        second = state["exp_avg_sq"].lerp_(gradient.square(), 1.0 - beta2) / (1.0 - beta2 ** int(state["step"]))
        return first / (second.sqrt() + group["eps"])


def orthogonalize(matrix: Tensor) -> Tensor:
    """About U V^T of a matrix (m n) = U S V^T, by Newton-Schulz iterations: its singular values become about 1.

    They are done on the smaller Gram matrix, which takes a quarter of the operations where one side is long.
    """
    a, b, c = COEFFICIENTS
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.mT
    wide = wide / (wide.norm() + 1e-7)
    gram = wide @ wide.mT
    product: Any = None
    for step in range(STEPS):
        factor = b * gram + c * gram @ gram  # and a on the diagonal
        factor.diagonal().add_(a)
        product = factor if product is None else factor @ product
        if step < STEPS - 1:
            gram = factor @ gram @ factor
    wide = product @ wide
    return wide if matrix.shape[0] <= matrix.shape[1] else wide.mT
