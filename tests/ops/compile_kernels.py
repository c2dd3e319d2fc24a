"""Compile every Triton kernel for A100 and H100 or H200, and print its name; needs neither."""

from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from sat.ops import triton_kernels

BLOCKS = {"CHUNKS": 32, "COLUMNS": 64, "TOKENS": triton_kernels.HEAD_TOKENS}
SINGLE = {"mean", "rstd", "gain_sums", "offset_sums", "gate_sums", "weight_sums", "bias_sums", "partial", "sums"}
WHOLE = {"length", "width", "rows", "num_chunks", "count", "size", "table_stride"}


def constant(kernel: str, name: str) -> int | bool:
    """A constant's value at the sizes of CogVideoX-5B."""
    if name == "BLOCK":
        return 64 if "heads" in kernel else 1024 if "adam" in kernel else 4096
    return BLOCKS.get(name, True)


def argument(kernel: str, name: str) -> str:
    """Triton's name of an argument's type."""
    if name in WHOLE or name.endswith(("_b", "_k", "_s")):
        return "i32"
    if name == "chunks":
        return "*i32"
    if name == "eps" or ("adam" in kernel and name not in ("parameter", "gradient", "first", "second", "shadow")):
        return "fp32"
    return "*fp32" if name in SINGLE or "adam" in kernel else "*bf16"


def compile_for_gpus(name: str, kernel: Any) -> None:
    constants = {p.name: constant(name, p.name) for p in kernel.params if p.is_constexpr}
    types = {p.name: "constexpr" if p.is_constexpr else argument(name, p.name) for p in kernel.params}
    for capability in (80, 90):
        triton.compile(ASTSource(kernel, types, constants), target=GPUTarget("cuda", capability, 32))


if __name__ == "__main__":
    for name, kernel in list(vars(triton_kernels).items()):
        if name.endswith("_kernel"):
            compile_for_gpus(name, kernel)
            print(name)
