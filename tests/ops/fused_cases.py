"""Fused operations on random numbers: Triton's kernels against the plain forms, outputs and every gradient.

As a program it runs all cases in Triton's interpreter and prints how far the two are apart, as JSON:

    TRITON_INTERPRET=1 python -m tests.ops.fused_cases
"""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from importlib import import_module
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from sat.ops import adam, modulate, rotary
from sat.ops.adam import FusedEmaAdam
from sat.ops.layernorm import HeadNorm, LayerNorm, RMSNorm, norm_and_modulate
from sat.ops.modulate import Span, gated_residual
from sat.ops.rotary import rotate_interleaved

Results = dict[str, Tensor]

CHUNK = 8
"""Tokens of a program of the operations by span. The interpreter takes milliseconds for each, so that they are few."""
LENGTH, HEADS_LENGTH = 13, 67  # no multiples of a program's tokens
WHOLE = (Span(0, LENGTH, 0),)
TEXT_AND_VIDEO = (Span(0, 1, 0), Span(1, LENGTH, 1))  # the video takes two programs
PACKED = (Span(0, 2, 0, 0), Span(2, 4, 1, 0), Span(4, 5, 0, 1), Span(5, 6, 1, 1), Span(6, LENGTH, 0, 2))


class Maker:
    """Random tensors that want a gradient, each remembered under its name; the same for both forms."""

    def __init__(self, device: str, dtype: torch.dtype, is_exact: bool = False) -> None:
        self.device, self.dtype, self.is_exact = device, dtype, is_exact
        self.generator = torch.Generator().manual_seed(0)
        self.leaves: dict[str, Tensor] = {}

    def rounded(self, values: Tensor) -> Tensor:
        """Numbers of the dtype on the device; for an exact result in double precision."""
        values = values.to(self.device, self.dtype)
        return values.double() if self.is_exact else values

    def noise(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator)

    def __call__(self, name: str, *shape: int, around: float = 0.0) -> Tensor:
        self.leaves[name] = self.rounded(self.noise(*shape) + around).requires_grad_()
        return self.leaves[name]

    def weigh(self, module: nn.Module) -> nn.Module:
        """Put random weights into a module."""
        for name, parameter in list(module.named_parameters()):
            setattr(module, name, nn.Parameter(self(name, *parameter.shape, around=float(name == "weight")).detach()))
            self.leaves[name] = getattr(module, name)
        return module

    def results(self, output: Tensor) -> Results:
        """The output, and the gradients of all that was made, under a random cotangent."""
        output.backward(self.rounded(self.noise(*output.shape)))
        gradients = {name: leaf.grad for name, leaf in self.leaves.items() if leaf.grad is not None}
        assert gradients.keys() == self.leaves.keys()
        return {"output": output.detach(), **gradients}


def norm_case(norm: Callable[[int], nn.Module], spans: Sequence[Span], batch: int, width: int, make: Maker) -> Results:
    """Norm and modulation. The hidden states are far from zero: a forgotten mean shows."""
    hidden = make("hidden", batch, LENGTH, width, around=1.0)
    samples = batch if spans[0].sample is None else 3
    shift, scale = make("shift", samples, 2, width), make("scale", samples, 2, width)
    return make.results(norm_and_modulate(make.weigh(norm(width)), hidden, shift, scale, spans))


def gate_case(spans: Sequence[Span], batch: int, width: int, make: Maker) -> Results:
    hidden, branch = make("hidden", batch, LENGTH, width), make("branch", batch, LENGTH, width)
    gate = make("gate", batch if spans[0].sample is None else 3, 2, width)
    return make.results(gated_residual(hidden, branch, gate, spans))


def heads_case(size: int, has_weight: bool | None, has_turn: bool, make: Maker) -> Results:
    """Heads as a part of a fused projection; has_weight None: no norm."""
    batch, num_heads = 2, 2
    mixed = make("mixed", batch, HEADS_LENGTH, 3 * num_heads * size, around=0.5)
    heads = mixed.chunk(3, dim=-1)[1].unflatten(-1, (num_heads, size)).transpose(1, 2)
    angles = make.noise(HEADS_LENGTH, size // 2).repeat_interleave(2, dim=-1)
    angles[:7] = 0.0  # text
    rope = (make.rounded(angles.cos()), make.rounded(angles.sin()))
    if has_weight is None:
        return make.results(rotate_interleaved(heads, *rope))
    norm = make.weigh(HeadNorm(size, eps=1e-6, elementwise_affine=has_weight))
    return make.results(norm(heads, rope if has_turn else None))


def adam_case(adam_w_mode: bool, make: Maker) -> Results:
    """Three updates of two parameters, one of them longer than a program."""
    parameters = [nn.Parameter(make(name, size).detach()) for name, size in (("long", 2500), ("short", 3))]
    optimizer = FusedEmaAdam(parameters, lr=3e-2, weight_decay=0.1, adam_w_mode=adam_w_mode, ema_decay=0.5)
    for step in range(3):
        for parameter in parameters:
            parameter.grad = make.rounded(make.noise(*parameter.shape) * 10.0 ** (step - 1))
        optimizer.step()
    states = [optimizer.state[parameter] for parameter in parameters]
    kept = {f"{key} {n}": s[key] for n, s in enumerate(states) for key in ("exp_avg", "exp_avg_sq", "shadow")}
    return {**{f"weights {number}": parameter.detach() for number, parameter in enumerate(parameters)}, **kept}


BARE = partial(LayerNorm, elementwise_affine=False)
CASES: dict[str, Callable[[Maker], Results]] = {
    "norm, text and video": partial(norm_case, LayerNorm, TEXT_AND_VIDEO, 2, 48),
    "norm, one span": partial(norm_case, LayerNorm, WHOLE, 1, 64),
    "norm, packed": partial(norm_case, LayerNorm, PACKED, 1, 48),
    "norm without weights": partial(norm_case, BARE, TEXT_AND_VIDEO, 1, 80),
    "norm without its bias": partial(norm_case, partial(LayerNorm, bias=False), TEXT_AND_VIDEO, 1, 48),
    "root mean square": partial(norm_case, RMSNorm, TEXT_AND_VIDEO, 1, 48),
    "gate, text and video": partial(gate_case, TEXT_AND_VIDEO, 2, 48),
    "gate, packed": partial(gate_case, PACKED, 1, 80),
    "heads of 16": partial(heads_case, 16, True, True),
    "heads of 32 without weights": partial(heads_case, 32, False, True),
    "heads of 48": partial(heads_case, 48, True, True),
    "heads of 64": partial(heads_case, 64, True, True),
    "heads, turn alone": partial(heads_case, 16, None, True),
    "heads, norm alone": partial(heads_case, 16, True, False),
}
UPDATES = {"adam": partial(adam_case, False), "adamw": partial(adam_case, True)}
IN_HALF = ("norm, text and video", "norm, packed", "root mean square", "gate, packed", "heads of 16", "heads of 64")
"""Cases that run in bfloat16, too."""
RUNS = [(name, "float32") for name in (*CASES, *UPDATES)] + [(name, "bfloat16") for name in IN_HALF]


@contextmanager
def plain_forms() -> Iterator[None]:
    """Plain torch, whatever the device."""
    with ExitStack() as stack:
        for module in (adam, modulate, rotary):
            stack.enter_context(patch.object(module, "triton_kernels", lambda *_: None))
        yield


def worst(found: Results, exact: Results) -> dict[str, float]:
    """How far each tensor is from the exact one, relative to the largest entry."""
    assert found.keys() == exact.keys()
    return {name: float((found[name].double() - e).abs().max() / e.abs().max()) for name, e in exact.items()}


def compare(name: str, device: str, dtype: torch.dtype) -> dict[str, dict[str, float]]:
    """Errors of both forms of one case, by tensor. Exact is the plain form in double precision on the same numbers."""
    case = {**CASES, **UPDATES}[name]
    with plain_forms():
        exact, plain = case(Maker(device, dtype, is_exact=True)), case(Maker(device, dtype))
    with counted_launches() as launches:
        found = case(Maker(device, dtype))
    assert launches, "no kernel ran"
    return {"kernel": worst(found, exact), "plain": worst(plain, exact)}


@contextmanager
def counted_launches() -> Iterator[list[str]]:
    """Names of the kernels that run within."""
    triton_kernels = import_module("sat.ops.triton_kernels")
    names: list[str] = []
    start = triton_kernels._launch

    def counting(kernel: Any, *arguments: Any, **constants: Any) -> None:
        names.append(kernel.fn.__name__)
        start(kernel, *arguments, **constants)

    with patch.object(triton_kernels, "_launch", counting), patch.object(triton_kernels, "CHUNK", CHUNK):
        yield names


def times_on_gpu(tokens: int, width: int, head_dim: int) -> dict[str, tuple[float, float]]:
    """Seconds of forward and backward in bfloat16, by kernel and plainly; of Adam the update of 2^26 weights."""
    make = Maker("cuda", torch.bfloat16)
    hidden, branch, cotangent = (make(name, 1, tokens, width) for name in ("hidden", "branch", "cotangent"))
    shift, scale = make("shift", 1, 2, width), make("scale", 1, 2, width)
    spans = (Span(0, 226, 0), Span(226, tokens, 1))
    norm, head_norm = make.weigh(LayerNorm(width)), make.weigh(HeadNorm(head_dim))
    heads = branch.unflatten(-1, (-1, head_dim)).transpose(1, 2)
    angles = make.noise(tokens, head_dim // 2).repeat_interleave(2, dim=-1)
    rope = (make.rounded(angles.cos()), make.rounded(angles.sin()))
    optimizer = FusedEmaAdam([nn.Parameter(torch.zeros(2**26, device="cuda"))])
    optimizer.param_groups[0]["params"][0].grad = torch.ones(2**26, device="cuda")
    calls: dict[str, Callable[[], Any]] = {
        "norm and modulation": lambda: norm_and_modulate(norm, hidden, shift, scale, spans).backward(cotangent),
        "gated residual": lambda: gated_residual(hidden, branch, shift, spans).backward(cotangent),
        "head norm and turn": lambda: head_norm(heads, rope).backward(torch.ones_like(heads)),
        "Adam and average": optimizer.step,
    }
    times = {}
    for name, call in calls.items():
        kernel = _seconds_on_gpu(call)
        with plain_forms():
            times[name] = kernel, _seconds_on_gpu(call)
    return times


def _seconds_on_gpu(call: Callable[[], Any], repeats: int = 20) -> float:
    for _ in range(3):  # compiles, warms up
        call()
    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(repeats):
        call()
    stop.record()
    torch.cuda.synchronize()
    return start.elapsed_time(stop) / 1e3 / repeats


def main() -> None:
    """All runs on the CPU."""
    torch.set_num_threads(1)
    print(json.dumps({f"{name}, {dtype}": compare(name, "cpu", getattr(torch, dtype)) for name, dtype in RUNS}))


if __name__ == "__main__":
    main()
