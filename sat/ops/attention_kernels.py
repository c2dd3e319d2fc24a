"""Which kernel torch's attention runs, chosen once at the start: by configuration, or by a short timing on the device,
which is kept for the next runs.

torch's `flash` is FlashAttention 2, so the package flash-attn is of no further use; FlashAttention 3 takes its place in
torch's own operations where its package (flash_attn_interface) is installed. Packed rows go by torch's variable-length
form of the same kernels.
"""

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn import attention as kernels
from torch.nn.attention import SDPBackend, sdpa_kernel

from sat.environment import cache_folder
from sat.errors import ConfigError
from sat.ops.kept_times import keep_times, recall_times

log = logging.getLogger(__name__)

KERNELS: Mapping[str, SDPBackend] = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "flash3": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
"""Name in the configuration -> torch's back end. math is never picked by timing."""

CHOICES = ("auto", *KERNELS)
_MAX_TIMED_TOKENS = 16_384
_TIMED_CALLS = 3


@dataclass(frozen=True)
class AttentionWork:
    """What attention a run will do."""

    heads: int
    """Of this rank."""
    tokens: int
    head_dim: int
    dtype: torch.dtype
    device: torch.device


Measure = Callable[[AttentionWork], dict[str, float]]


@contextmanager
def using(name: str) -> Iterator[None]:
    """Prefer one kernel in this block; what it does not take goes to the others."""
    rest = [kernel for kernel in KERNELS.values() if kernel is not KERNELS[name]]
    if name == "flash3":
        kernels.activate_flash_attention_impl("FA3")
    try:
        with sdpa_kernel([KERNELS[name], *dict.fromkeys(rest)], set_priority=True):
            yield
    finally:
        if name == "flash3":
            kernels.restore_flash_attention_impl()


@contextmanager
def attention_kernel(choice: str, work: AttentionWork) -> Iterator[str]:
    """Run this block's attention by the kernel that was chosen, or that is the fastest here; gives its name.

    On a CPU there is one, torch's. Every rank must call it: the first one's timing decides for all.
    """
    if work.device.type != "cuda":
        if choice != "auto":
            raise ConfigError(
                f"args.attention is '{choice}', a kernel for GPUs, and this is a {work.device.type}; give auto"
            )
        yield "torch"
        return
    if choice == "flash3" and not has_flash3():
        raise ConfigError(
            "args.attention is flash3, and this torch has no FlashAttention 3: install its package, which has the "
            "module flash_attn_interface, or give auto"
        )
    name = fastest(*agreed_times(work)) if choice == "auto" else choice
    with using(name):
        yield name


def has_flash3() -> bool:
    """Whether FlashAttention 3 can take the place of torch's own flash kernel."""
    return hasattr(kernels, "activate_flash_attention_impl") and find_spec("flash_attn_interface") is not None


def fastest(seconds: Mapping[str, float], source: Path | None = None) -> str:
    """The kernel that took the least time, with a line in the log; flash where none could be timed.

    source: the file that the times are from, where they were not taken now.
    """
    if not seconds:
        log.info("attention: flash (torch's; no kernel took the sizes of this run)")
        return "flash"
    order = sorted(seconds, key=seconds.__getitem__)
    times = ", ".join(f"{name} {1e3 * seconds[name]:.2f} ms" for name in order)
    log.info("attention: %s (%s%s)", order[0], times, "" if source is None else f"; from {source}")
    return order[0]


def agreed_times(work: AttentionWork, measure: Measure | None = None) -> tuple[dict[str, float], Path | None]:
    """Seconds of each kernel by the first rank, on every rank, and the file that they are from if not taken now.

    measure: takes the times of such work, by default `time_kernels`.
    """
    found: list[Any] = [None]
    if not dist.is_initialized() or dist.get_rank() == 0:
        found = [_times(work, measure or time_kernels)]
    if dist.is_initialized():
        dist.broadcast_object_list(found)
    return found[0]


def _times(work: AttentionWork, measure: Measure) -> tuple[dict[str, float], Path | None]:
    file, key = cache_folder() / "attention.json", _key(work)
    kept = recall_times(file, key)
    if kept is not None and kept.keys() <= KERNELS.keys():
        return kept, file
    seconds = measure(work)
    if seconds:
        keep_times(file, key, seconds)
    return seconds, None


def _key(work: AttentionWork) -> str:
    """All that the times depend on, in words."""
    device = torch.cuda.get_device_name(work.device) if work.device.type == "cuda" else work.device.type
    dtype = str(work.dtype).removeprefix("torch.")
    sizes = f"{work.heads} heads of {work.head_dim}, {_timed_tokens(work)} tokens"
    return f"{device}, torch {torch.__version__}, {dtype}, {sizes}: {' '.join(_timed_kernels())}"


def _timed_kernels() -> list[str]:
    return [name for name in KERNELS if name != "math" and (name != "flash3" or has_flash3())]


def _timed_tokens(work: AttentionWork) -> int:
    return min(work.tokens, _MAX_TIMED_TOKENS)


def time_kernels(work: AttentionWork) -> dict[str, float]:
    """Seconds of a forward and backward call of each kernel that takes such work."""
    seconds = {}
    for name in _timed_kernels():
        try:
            with using(name), sdpa_kernel(KERNELS[name]):
                seconds[name] = _seconds(work)
        except RuntimeError as error:  # torch's word for: this kernel is not for this
            log.debug("attention by %s is not available: %s", name, error)
    return seconds


def _seconds(work: AttentionWork) -> float:
    shape = (1, work.heads, _timed_tokens(work), work.head_dim)
    query, key, value = (torch.randn(shape, dtype=work.dtype, device=work.device, requires_grad=True) for _ in "qkv")
    best = float("inf")
    for _ in range(1 + _TIMED_CALLS):  # the first one warms up
        torch.cuda.synchronize(work.device)
        start = time.perf_counter()
        torch.autograd.grad(F.scaled_dot_product_attention(query, key, value).sum(), (query, key, value))
        torch.cuda.synchronize(work.device)
        best = min(best, time.perf_counter() - start)
    return best
