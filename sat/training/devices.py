"""What devices can do: published figures as data, and the rate of matrix products as measured here."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch

from sat.config import did_you_mean
from sat.errors import ConfigError

Precision = Literal["fp32", "bf16", "fp16"]
DTYPES: dict[Precision, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
GIB = 2**30
Clock = Callable[[], float]


@dataclass(frozen=True, kw_only=True)
class Device:
    """One device. Rates in TFLOP/s are of dense products, without sparsity."""

    name: str
    """A part of the name that the driver gives."""
    half_tflops: float
    """The vendor's peak in bf16 and fp16,"""
    single_tflops: float
    """and in fp32 as torch computes it by default, without TF32."""
    memory_gib: float
    """What torch can allocate."""
    copy_tb_s: float
    """The vendor's bandwidth of its memory (1e12 bytes a second)."""
    link_gb_s: float
    """What it sends to the others of its machine, one way (1e9 bytes a second);"""
    host_gb_s: float
    """to the host's memory, one way: half of what datasheets give for its 16 lanes of PCIe (B200's is a guess);"""
    network_gb_s: float = 50.0
    """and to other machines: a 400 Gbit/s adapter for each device."""
    matrix_share: float = 0.75
    """Of the peak, what large products reach;"""
    attention_shares: tuple[float, float] = (0.40, 0.36)
    """and attention of heads of 64 over long sequences, forward and backward."""
    copy_share: float = 0.80
    link_share: float = 0.75
    host_share: float = 0.80
    """What copies from and to pinned memory reach: a guess."""

    def peak_tflops(self, precision: Precision) -> float:
        """The vendor's dense peak in a precision."""
        return self.single_tflops if precision == "fp32" else self.half_tflops


# Shares of H100 and H200: 790 of 989 TFLOP/s for products; attention 497 forward, 474 backward (FlashAttention-3,
# arXiv:2407.08608, head size 64). A100: 190 and 170 of 312 (FlashAttention-2, arXiv:2307.08691). Others are guesses.
_HOPPER: dict[str, tuple[float, float] | float] = {"matrix_share": 0.80, "attention_shares": (0.50, 0.48)}
_AMPERE: dict[str, tuple[float, float] | float] = {"matrix_share": 0.83, "attention_shares": (0.61, 0.54)}

DEVICES = tuple(
    Device(
        name=name,
        half_tflops=half,
        single_tflops=single,
        memory_gib=memory,
        copy_tb_s=copy,
        link_gb_s=link,
        host_gb_s=host,
        **shares,  # type: ignore[arg-type]
    )
    for name, half, single, memory, copy, link, host, shares in (
        ("B200", 2250.0, 75.0, 178.0, 7.7, 900.0, 64.0, {}),
        ("H200", 989.0, 67.0, 139.8, 4.8, 450.0, 64.0, _HOPPER),
        ("H100", 989.0, 67.0, 79.1, 3.35, 450.0, 64.0, _HOPPER),
        ("H800", 989.0, 67.0, 79.1, 3.35, 200.0, 64.0, _HOPPER),
        ("H20", 148.0, 44.0, 95.0, 4.0, 450.0, 64.0, {}),
        ("A100-SXM4-40GB", 312.0, 19.5, 39.4, 1.55, 300.0, 32.0, _AMPERE),
        ("A100", 312.0, 19.5, 79.1, 2.0, 300.0, 32.0, _AMPERE),
        ("A800", 312.0, 19.5, 79.1, 2.0, 200.0, 32.0, _AMPERE),
        ("L40S", 362.0, 91.6, 44.4, 0.86, 25.0, 32.0, {}),
        ("4090", 165.0, 82.6, 23.5, 1.0, 25.0, 32.0, {}),
    )
)
"""Vendors' figures; a device is the first whose name is a part of the driver's."""


def find_device(name: str) -> Device | None:
    """The device whose name is a part of this one, None where none is."""
    return next((device for device in DEVICES if device.name.lower() in name.lower()), None)


def named_device(name: str) -> Device:
    """The same for a name that a user gives. Raises ConfigError for one that is not known."""
    device = next((device for device in DEVICES if device.name.lower() == name.lower()), None)
    if device is None:
        names = [device.name.lower() for device in DEVICES]
        raise ConfigError(
            f"device '{name}' is not known{did_you_mean(name.lower(), names)}; there are {', '.join(names)}"
        )
    return device


def peak_tflops(device: torch.device, precision: Precision) -> float | None:
    """The vendor's dense peak of a GPU in a precision, None where it is not known."""
    if device.type != "cuda":
        return None
    found = find_device(torch.cuda.get_device_name(device))
    return None if found is None else found.peak_tflops(precision)


def matrix_tflops(
    device: torch.device,
    precision: Precision,
    size: int | None = None,
    repeats: int = 5,
    clock: Clock = time.perf_counter,
) -> float:
    """Measured rate of square products (TFLOP/s), the best of some; size: of the matrices, by default a large one."""
    size = size or (8192 if device.type == "cuda" else 1536)
    one, other = (torch.randn(size, size, device=device, dtype=DTYPES[precision]) for _ in range(2))
    result = torch.empty_like(one)
    seconds = seconds_of(lambda: torch.mm(one, other, out=result), device, repeats, clock)
    return 2 * size**3 / seconds / 1e12


def seconds_of(
    call: Callable[[], object], device: torch.device, repeats: int, clock: Clock = time.perf_counter
) -> float:
    """Least seconds of a call of nothing, after one that warms up; the device has finished each."""

    def timed() -> float:
        start = clock()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return clock() - start

    timed()
    return min(timed() for _ in range(repeats))
