"""NVIDIA Apex is found by its own modules, gives torch's results, and its namesake on the Python index is left alone.

Here it is a small package with Apex's interface, whose mathematics is torch's, on the path of a process.
"""

import importlib
import logging
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sat.ops import apex
from sat.ops.layernorm import LayerNorm
from sat.training.optim import build_optimizer
from tests.ranks import run_ranks

NORM = """
import torch
calls = []
def fused_layer_norm_affine(input, weight, bias, normalized_shape, eps=1e-6, memory_efficient=False):
    calls.append(eps)
    return torch.nn.functional.layer_norm(input, normalized_shape, weight, bias, eps)
"""
ADAM = """
import torch
class FusedAdam(torch.optim.Optimizer):
    def __init__(self, params, lr=1e-3, bias_correction=True, betas=(0.9, 0.999), eps=1e-8, adam_w_mode=True,
                 weight_decay=0.0, amsgrad=False, set_grad_none=True):
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay))
        self.adam_w_mode = adam_w_mode
    def zero_grad(self):
        pass
    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            (one, two), lr, decay = group["betas"], group["lr"], group["weight_decay"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if len(state) == 0:
                    state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
                grad = p.grad if self.adam_w_mode else p.grad + decay * p
                state["exp_avg"].lerp_(grad, 1 - one)
                state["exp_avg_sq"].mul_(two).addcmul_(grad, grad, value=1 - two)
                first = state["exp_avg"] / (1 - one ** group["step"])
                second = state["exp_avg_sq"] / (1 - two ** group["step"])
                update = first / (second.sqrt() + group["eps"]) + (decay * p if self.adam_w_mode else 0)
                p.sub_(lr * update)
"""
APEX = {
    "apex/__init__.py": "",
    "apex/normalization/__init__.py": "",
    "apex/normalization/fused_layer_norm.py": NORM,
    "apex/optimizers/__init__.py": "",
    "apex/optimizers/fused_adam.py": ADAM,
    "fused_layer_norm_cuda.py": "",
    "amp_C.py": "",
}


def install(folder: Path, files: dict[str, str]) -> str:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return str(folder)


def norms_on_rank(rank: int, folder: str, is_on_gpu: bool) -> dict[str, int]:
    """How often each norm calls Apex's; results and gradients are compared with torch's."""
    sys.path.insert(0, folder)
    apex._is_on_gpu = lambda tensor: is_on_gpu  # type: ignore[assignment]
    calls = importlib.import_module("apex.normalization.fused_layer_norm").calls
    cases: dict[str, tuple[dict[str, Any], torch.dtype]] = {
        "plain": ({}, torch.float32),
        "half": ({"dtype": torch.bfloat16}, torch.bfloat16),
        "no weights": ({"elementwise_affine": False}, torch.float32),
        "no bias": ({"bias": False}, torch.float32),
    }
    counts = {}
    for name, (options, dtype) in cases.items():
        hidden = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
        ours, plain = LayerNorm(8, eps=1e-3, **options), nn.LayerNorm(8, eps=1e-3, **options)
        plain.load_state_dict(ours.state_dict())  # the same names and shapes
        results = []
        calls.clear()
        for norm in (ours, plain):
            own = hidden.clone().requires_grad_()
            output = norm(own)
            output.square().sum().backward()
            results.append([output, own.grad, *(parameter.grad for parameter in norm.parameters())])
        assert all(torch.equal(one, other) for one, other in zip(*results))
        counts[name] = len(calls)
    assert apex.norm_for(torch.ones(8, dtype=torch.bfloat16), torch.ones(8), torch.ones(8)) is None
    return counts


def test_the_norm_is_torchs_with_the_same_weights(tmp_path: Path) -> None:
    folder = install(tmp_path, APEX)
    assert run_ranks(norms_on_rank, 1, folder, True) == [{"plain": 1, "half": 1, "no weights": 0, "no bias": 0}]
    assert run_ranks(norms_on_rank, 1, folder, False) == [dict.fromkeys(("plain", "half", "no weights", "no bias"), 0)]


def compiled_on_rank(rank: int, folder: str) -> bool:
    sys.path.insert(0, folder)
    apex._is_on_gpu = lambda tensor: True  # type: ignore[assignment]
    torch.compiler.is_compiling = lambda: True  # type: ignore[assignment]
    return apex.norm_for(torch.ones(2), torch.ones(2), torch.ones(2)) is None


def test_a_compiler_gets_torchs_norm(tmp_path: Path) -> None:
    assert run_ranks(compiled_on_rank, 1, install(tmp_path, APEX)) == [True]


def trained(optimizer: torch.optim.Optimizer, weights: list[Tensor], steps: int) -> None:
    for step in range(steps):
        for number, weight in enumerate(weights):
            generator = torch.Generator().manual_seed(10 * step + number)
            weight.grad = torch.randn(weight.shape, generator=generator)
        optimizer.step()


def adam_on_rank(rank: int, folder: str, kind: str, params: dict[str, Any]) -> list[str]:
    """Updates as torch's; also where it goes on with torch's state, and torch with its."""
    sys.path.insert(0, folder)

    def make(is_on_gpu: bool) -> tuple[torch.optim.Optimizer, list[Tensor]]:
        weights = [torch.linspace(-1, 1, size).requires_grad_() for size in (5, 7)]
        groups = [{"params": weights[:1], "lr": 0.1}, {"params": weights[1:], "lr": 0.2, "weight_decay": 0.0}]
        return build_optimizer(groups, {"type": kind, "params": params}, is_on_gpu), weights

    (ours, own), (theirs, plain) = make(True), make(False)
    for _ in range(2):
        trained(ours, own, 3)
        trained(theirs, plain, 3)
        for one, other in zip(own, plain):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
            assert ours.state[one].keys() == theirs.state[other].keys()
        mine, yours = ([optimizer.state[w] for w in weights] for optimizer, weights in ((ours, own), (theirs, plain)))
        for weight, other, state, given in zip(own, plain, yours, mine):  # each goes on with the other's state
            ours.state[weight] = {name: value.clone() for name, value in state.items()}
            theirs.state[other] = {name: value.clone() for name, value in given.items()}
    return [type(ours).__name__, type(theirs).__name__]


@pytest.mark.parametrize(
    ("kind", "params", "expected"),
    [
        ("AdamW", {}, "ApexAdam"),
        ("Adam", {"weight_decay": 0.1, "betas": [0.8, 0.95], "eps": 1e-6}, "ApexAdam"),
        ("AdamW", {"amsgrad": True}, "AdamW"),
        ("AdamW", {"torch_adam": True}, "AdamW"),
    ],
)
def test_adam_is_torchs_with_the_same_state(tmp_path: Path, kind: str, params: dict[str, Any], expected: str) -> None:
    assert run_ranks(adam_on_rank, 1, install(tmp_path, APEX), kind, params) == [[expected, kind]]


def found_on_rank(rank: int, folder: str) -> tuple[bool, bool, bool]:
    sys.path.insert(0, folder)
    return apex.find_norm() is None, apex.find_adam() is None, "apex" in sys.modules


def without(*names: str) -> dict[str, str]:
    return {name: text for name, text in APEX.items() if name not in names}


NAMESAKE = {"apex/__init__.py": "raise RuntimeError('imported')", "apex/models.py": "", "amp_C.py": ""}
BROKEN = {
    "apex/normalization/fused_layer_norm.py": "raise ImportError('undefined symbol')",
    "apex/optimizers/fused_adam.py": "import no_such_module",
}


@pytest.mark.parametrize(
    ("files", "is_imported"),
    [
        ({}, False),
        (NAMESAKE, False),
        (without("amp_C.py", "fused_layer_norm_cuda.py"), False),
        ({**APEX, **BROKEN}, True),
    ],
    ids=["none", "the package of the index", "without extensions", "built for another torch"],
)
def test_what_is_not_apex_or_does_not_work_is_left_alone(
    tmp_path: Path, files: dict[str, str], is_imported: bool
) -> None:
    assert run_ranks(found_on_rank, 1, install(tmp_path, files)) == [(True, True, is_imported)]


def lines_on_rank(rank: int, folder: str) -> list[str]:
    sys.path.insert(0, folder)
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    apex.log.addHandler(handler)
    apex.log.setLevel(logging.INFO)
    for _ in range(2):
        apex.find_norm(), apex.find_adam()
    return lines


def test_the_log_says_once_which_is_used(tmp_path: Path) -> None:
    fused = run_ranks(lines_on_rank, 1, install(tmp_path / "one", without("amp_C.py")))
    assert fused == [["LayerNorm: NVIDIA Apex's fused kernel", "Adam: torch's"]]
