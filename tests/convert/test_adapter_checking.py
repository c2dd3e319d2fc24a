"""Adapters in both systems' transformers: equal where they are the same, not where a scale or a module is wrong."""

import importlib.util
from typing import Any

import pytest
import torch

from sat.convert import adapter_checking, checking
from sat.convert.adapter_checking import compare_adapters, random_base
from sat.convert.adapters import Adapter, Adapters, adapters_to_diffusers
from sat.errors import CheckpointError

WIDTH = 48
ATTENTION = ("attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0")


def make(*parts: str, layers: tuple[int, ...] = (0, 1), width: int = WIDTH, alpha: float = 2.0) -> Adapters:
    generator = torch.Generator().manual_seed(0)
    outputs = {"norm1.linear": 6, "ff.net.0.proj": 4}
    inputs = {"ff.net.2": 4 * width, "norm1.linear": 512}
    return {
        f"transformer_blocks.{layer}.{part}": Adapter(
            torch.randn(4, inputs.get(part, width), generator=generator),
            torch.randn(outputs.get(part, 1) * width, 4, generator=generator),
            alpha,
        )
        for layer in layers
        for part in parts
    }


def compare(ours: Adapters, others: Adapters | None = None, check: Any = "auto") -> Any:
    return compare_adapters(ours, adapters_to_diffusers(others or ours)[0], None, check)


@pytest.mark.parametrize(
    "parts", [ATTENTION, ("attn1.to_v", "ff.net.0.proj", "ff.net.2"), ("attn1.to_q", "norm1.linear")]
)
def test_the_same_adapters_give_the_same_outputs(parts: tuple[str, ...]) -> None:
    found = compare(make(*parts))
    assert f"{2 * len(parts)} of {2 * len(parts)} modules" in found.what
    found.check()


def test_another_scale_or_place_is_told() -> None:
    adapters = make(*ATTENTION)
    with pytest.raises(CheckpointError, match="the two classes disagree"):
        compare(adapters, make(*ATTENTION, alpha=2.1)).check()
    swapped = {**adapters, "transformer_blocks.0.attn1.to_q": adapters["transformer_blocks.0.attn1.to_k"]}
    with pytest.raises(CheckpointError, match="the two classes disagree"):
        compare(adapters, swapped).check()


def test_of_many_layers_the_first_adapted_ones_are_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checking, "AUTO_NUMBERS", 1)
    found = compare(make("attn1.to_q", layers=(3, 7, 9)))
    assert "2 of 3 modules" in found.what
    found.check()
    assert "1 of 3 modules" in compare(make("attn1.to_q", layers=(3, 7, 9)), check=1).what


def test_what_cannot_be_run_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "what model the adapters are for (width 20)" in compare(make("attn1.to_q", width=20))
    monkeypatch.setattr(adapter_checking, "find_spec", lambda name: None)
    assert "pip install peft" in compare(make("attn1.to_q"))


def test_adapters_that_diffusers_passes_over_are_told() -> None:
    adapters = make("attn1.to_q")
    state = adapters_to_diffusers(adapters)[0]
    left = {name: value for name, value in state.items() if "transformer_blocks.1." not in name}
    with pytest.raises(CheckpointError, match="diffusers loads adapters on 1 modules; the file has 2"):
        compare_adapters(adapters, left, None, "auto")


def test_a_random_base_reacts_to_every_layer() -> None:
    """Weights that start at zero, such as the gates, would hide what the adapters do."""
    assert importlib.util.find_spec("peft")
    base = random_base((), WIDTH, 3, 2)
    assert all(bool(value.abs().max() > 0) for value in base.state.values())
