"""Which code runs a fused operation: Triton's kernels on a GPU, plain torch everywhere else."""

import logging
import os
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

import torch
from torch import Tensor

log = logging.getLogger(__name__)

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def triton_kernels(*tensors: Tensor) -> ModuleType | None:
    """`sat.ops.triton_kernels` where its kernels can take these tensors; None: the operation's plain form runs.

    They take tensors of one dtype with at most 32 bits, on a GPU (or anywhere in Triton's interpreter,
    TRITON_INTERPRET=1). Compiled layers keep the plain form, which the compiler fuses with what is around it, and
    under autocast the plain form says what is computed in which precision.
    """
    device, dtype = tensors[0].device, tensors[0].dtype
    is_interpreted = device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"
    if device.type != "cuda" and not is_interpreted:
        return None
    if torch.compiler.is_compiling() or is_autocast(device):
        return None
    if dtype not in _DTYPES or any(tensor.dtype != dtype for tensor in tensors):
        return None
    return _load(device)


def is_autocast(device: torch.device) -> bool:
    """Whether torch chooses each operation's precision on such a device."""
    return device.type != "meta" and torch.is_autocast_enabled(device.type)  # torch refuses the question for meta


@cache
def _load(device: torch.device) -> ModuleType | None:
    """The kernels, after one of them ran on this device; the log says which form runs and why."""
    if find_spec("triton") is None:
        log.info("fused operations: plain torch, because triton is not installed")
        return None
    try:
        module = import_module("sat.ops.triton_kernels")
        module.try_on(device)
    except Exception as error:  # no C compiler, a GPU too old, a driver that does not fit: all have a type of their own
        log.warning("fused operations: plain torch, because Triton failed on %s: %s", device, error)
        return None
    log.info("fused operations: Triton %s", module.VERSION)
    return module
