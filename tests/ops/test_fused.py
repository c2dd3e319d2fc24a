"""Fused operations: Triton's kernels (here in its interpreter) and the plain forms are the same functions."""

import json
import logging
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sat.ops import kernels
from sat.ops.kernels import triton_kernels
from sat.ops.layernorm import LayerNorm, norm_and_modulate
from sat.ops.modulate import Span, modulate_spans
from sat.ops.rotary import rotate_interleaved
from tests.ops.fused_cases import RUNS, compare, times_on_gpu

ROOT = Path(__file__).resolve().parent.parent.parent
KERNEL_ERROR = {"float32": 1e-6, "bfloat16": 2e-2}
"""Of the largest entry of each output and gradient. Measured worst in the interpreter: 3e-7 and 9e-3."""
PLAIN_ERROR = {"float32": 1e-6, "bfloat16": 1e-1}
"""Measured worst: 5e-7; 5e-2, in the gradients of head norms' weights, which torch sums in bfloat16 on CPUs."""

needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")


def in_fresh_python(*words: str, **environment: str) -> str:
    """What a Python of its own prints: Triton decides at its import whether it interprets."""
    variables = {**os.environ, **environment, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *words], cwd=ROOT, env=variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def interpreted() -> dict[str, Any]:
    return json.loads(in_fresh_python("-m", "tests.ops.fused_cases", TRITON_INTERPRET="1"))


@needs_triton
@pytest.mark.parametrize(("name", "dtype"), RUNS)
def test_a_kernel_gives_outputs_and_gradients_of_the_plain_form(
    interpreted: dict[str, Any], name: str, dtype: str
) -> None:
    check_errors(interpreted[f"{name}, {dtype}"], dtype)


def check_errors(errors: dict[str, dict[str, float]], dtype: str) -> None:
    assert all(error < KERNEL_ERROR[dtype] for error in errors["kernel"].values()), errors  # max passes over nan
    assert all(error < PLAIN_ERROR[dtype] for error in errors["plain"].values()), errors


@needs_triton
@pytest.mark.slow
def test_kernels_compile_for_gpus(tmp_path: Path) -> None:
    names = in_fresh_python("-m", "tests.ops.compile_kernels", TRITON_CACHE_DIR=str(tmp_path)).split()
    assert len(names) == 8


def test_a_cpu_and_wide_or_mixed_numbers_have_no_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    single = torch.zeros(1)
    assert triton_kernels(single) is None
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(kernels, "_load", lambda device: kernels)
    assert triton_kernels(single, single) is kernels
    assert triton_kernels(single.double()) is None
    assert triton_kernels(single, single.bfloat16()) is None
    assert triton_kernels(single.to("meta")) is None
    with torch.autocast("cpu"):
        assert triton_kernels(single) is None


@pytest.mark.parametrize(
    ("is_installed", "message"),
    [
        (False, "fused operations: plain torch, because triton is not installed"),
        (True, "fused operations: plain torch, because Triton failed on cpu: no C compiler"),
    ],
)
def test_without_a_working_triton_plain_torch_runs(
    is_installed: bool, message: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(name: str) -> Any:
        raise RuntimeError("no C compiler")

    monkeypatch.setattr(kernels, "find_spec", lambda name: is_installed or None)
    monkeypatch.setattr(kernels, "import_module", fail)
    with caplog.at_level(logging.INFO):
        assert kernels._load.__wrapped__(torch.device("cpu")) is None
    assert message in caplog.text


SPANS = {
    "batch": (2, (Span(0, 5, 0), Span(5, 600, 1))),
    "packed": (1, (Span(0, 5, 0, 0), Span(5, 300, 1, 0), Span(300, 306, 0, 1), Span(306, 600, 1, 1))),
}


@pytest.mark.parametrize("batch_and_spans", SPANS.values(), ids=SPANS)
@pytest.mark.parametrize("has_weight", [True, False], ids=["weights", "bare"])
def test_the_plain_norm_by_spans_is_norm_then_modulation(
    batch_and_spans: tuple[int, tuple[Span, ...]], has_weight: bool
) -> None:
    """Above the size from which it is one operation, which then keeps its input alone."""
    batch, spans = batch_and_spans
    generator = torch.Generator().manual_seed(0)
    norm = LayerNorm(256, elementwise_affine=has_weight, dtype=torch.float64)
    for parameter in norm.parameters():
        torch.nn.init.normal_(parameter, generator=generator)
    hidden = torch.randn(batch, 600, 256, generator=generator, dtype=torch.float64).requires_grad_()
    shift, scale = torch.randn(2, 2, 2, 256, generator=generator, dtype=torch.float64).requires_grad_().unbind(0)
    cotangent = torch.randn(hidden.shape, generator=generator, dtype=torch.float64)
    inputs = [hidden, shift, scale, *norm.parameters()]

    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: (kept.append(tensor), tensor)[1], lambda kept: kept):
        output = norm_and_modulate(norm, hidden, shift, scale, spans)
    assert sum(tensor.shape == hidden.shape for tensor in kept) == 1
    expected = modulate_spans(F.layer_norm(hidden, (256,), norm.weight, norm.bias, norm.eps), shift, scale, spans)
    torch.testing.assert_close(output, expected)
    own = torch.autograd.grad(output, inputs, cotangent, retain_graph=True)
    for gradient, other in zip(own, torch.autograd.grad(expected, inputs, cotangent)):
        torch.testing.assert_close(gradient, other)


def test_a_norm_of_another_kind_is_called_as_it_is() -> None:
    """Users put norms of their own, and those of other libraries, into layers."""

    class Halving(torch.nn.LayerNorm):
        def forward(self, hidden: Tensor) -> Tensor:
            return super().forward(hidden) / 2

    hidden, shift, scale = torch.randn(1, 600, 256), torch.randn(1, 1, 256), torch.randn(1, 1, 256)
    found = norm_and_modulate(Halving(256), hidden, shift, scale, (Span(0, 600, 0),))
    torch.testing.assert_close(found, F.layer_norm(hidden, (256,)) / 2 * (1 + scale) + shift)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_turn_is_that_of_pairs(dtype: torch.dtype) -> None:
    heads = torch.randn(2, 3, 9, 16, dtype=dtype).transpose(1, 2).requires_grad_()
    angles = torch.randn(3, 8, dtype=dtype)
    cos, sin = (table.repeat_interleave(2, dim=-1) for table in (angles.cos(), angles.sin()))
    even, odd = heads[..., ::2], heads[..., 1::2]
    expected = torch.stack((even * cos[:, ::2] - odd * sin[:, ::2], odd * cos[:, ::2] + even * sin[:, ::2]), -1)
    found = rotate_interleaved(heads, cos, sin)
    torch.testing.assert_close(found, expected.flatten(-2))
    cotangent = torch.randn_like(found)
    own = torch.autograd.grad(found, heads, cotangent)
    torch.testing.assert_close(own, torch.autograd.grad(expected.flatten(-2), heads, cotangent))


@pytest.mark.gpu
@pytest.mark.parametrize(("name", "dtype"), RUNS)
def test_on_a_gpu_as_well(name: str, dtype: str) -> None:
    check_errors(compare(name, "cuda", getattr(torch, dtype)), dtype)


@pytest.mark.gpu
def test_times_at_the_size_of_cogvideox_5b() -> None:
    """Prints them (python -m pytest -m gpu -s); no kernel may be slower than plain torch."""
    times = times_on_gpu(tokens=17_776, width=3_072, head_dim=64)
    for name, (kernel, plain) in times.items():
        print(f"{name:<20} Triton {1e3 * kernel:7.2f} ms   plain {1e3 * plain:7.2f} ms   {plain / kernel:5.2f} x")
    assert all(kernel < plain for kernel, plain in times.values())
