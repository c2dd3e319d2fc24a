"""NVIDIA Apex's fused LayerNorm and Adam, where Apex is installed with its CUDA extensions.

Apex is not the package called `apex` on the Python index. So it is known by its own modules, which are looked for
before anything called `apex` is imported, and by its compiled extensions, without which its first call would fail.
Both have twins in torch, which are taken else.
"""

import importlib
import logging
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

log = logging.getLogger(__name__)

Norm = Callable[..., Tensor]


@cache
def find_norm() -> Norm | None:
    """Apex's LayerNorm with weights: (hidden, weight, bias, normalized_shape, eps) -> hidden. None where it is not."""
    module = _find("normalization", "fused_layer_norm", "fused_layer_norm_cuda")
    return _told("LayerNorm", getattr(module, "fused_layer_norm_affine", None))


@cache
def find_adam() -> type[torch.optim.Optimizer] | None:
    """Apex's FusedAdam, None where it is not."""
    module = _find("optimizers", "fused_adam", "amp_C")
    fused = _told("Adam", getattr(module, "FusedAdam", None))
    return None if fused is None else _with_torch_state(fused)


def norm_for(hidden: Tensor, weight: Tensor | None, bias: Tensor | None) -> Norm | None:
    """Apex's LayerNorm if it is there and takes these; compilers fuse torch's own with its neighbours."""
    if not _is_on_gpu(hidden) or torch.compiler.is_compiling() or weight is None or bias is None:
        return None
    return find_norm() if hidden.dtype == weight.dtype == bias.dtype else None


def _is_on_gpu(tensor: Tensor) -> bool:
    return tensor.is_cuda


def _find(folder: str, name: str, extension: str) -> ModuleType | None:
    package = find_spec("apex")
    places = package.submodule_search_locations if package is not None else None
    if not any((Path(place) / folder / f"{name}.py").is_file() for place in places or ()) or not find_spec(extension):
        return None
    try:
        return importlib.import_module(f"apex.{folder}.{name}")
    except ImportError as error:  # built for another torch
        log.warning("NVIDIA Apex is installed, and apex.%s cannot be used: %s", folder, error)
        return None


def _told(what: str, found: Any) -> Any:
    log.info("%s: %s", what, "torch's" if found is None else "NVIDIA Apex's fused kernel")
    return found


def _with_torch_state(fused: Any) -> type[torch.optim.Optimizer]:
    class ApexAdam(fused):
        """FusedAdam that counts updates for each parameter as torch's Adam does, so that either goes on with the
        other's state: step, exp_avg, exp_avg_sq. Apex counts for each group, in a place that no checkpoint has."""

        def step(self, closure: Any = None) -> Any:
            for group in self.param_groups:
                updated = [parameter for parameter in group["params"] if parameter.grad is not None]
                counts = [self._count(parameter) for parameter in updated]
                group["step"] = max(counts, default=1) - 1  # FusedAdam adds one
            return super().step(closure)

        def zero_grad(self, set_to_none: bool = True) -> None:
            torch.optim.Optimizer.zero_grad(self, set_to_none)

        def _count(self, parameter: Tensor) -> int:
            state = self.state[parameter]
            if not state:
                state["step"] = torch.tensor(0.0)
                state["exp_avg"] = torch.zeros_like(parameter, dtype=torch.float32)
                state["exp_avg_sq"] = torch.zeros_like(parameter, dtype=torch.float32)
            state["step"] += 1
            return int(state["step"])

    return ApexAdam
