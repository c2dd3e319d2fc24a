"""Forward, backward and update never ask the device for a number: the meta device has none, and says so."""

from typing import Any

import pytest
import torch
from torch import Tensor

from sat.model.activations import Activations
from sat.ops.adam import FusedEmaAdam
from tests.cogvideox.test_packing import LORA, MIXED, make_clips
from tests.cogvideox.tiny import FORMS, build, make_inputs


def on_meta(value: Any) -> Any:
    if isinstance(value, list):
        return [on_meta(item) for item in value]
    return value.float().to("meta") if value.is_floating_point() else value.to("meta")


def step(network: Any, inputs: dict[str, Any]) -> None:
    outputs = network(**{name: on_meta(value) for name, value in inputs.items()})
    outputs = [outputs] if isinstance(outputs, Tensor) else outputs
    torch.stack([output.square().mean() for output in outputs]).mean().backward()
    FusedEmaAdam([p for p in network.parameters() if p.requires_grad]).step()


@pytest.mark.parametrize("form", FORMS)
def test_a_step_of_every_form(form: str) -> None:
    step(build(form, extra_modules=LORA).to("meta"), make_inputs(form))


@pytest.mark.parametrize("choice", ["keep", "recompute", "keep_attention"])
def test_a_step_with_packed_rows_whatever_is_kept(choice: str) -> None:
    network = build("5B").to("meta").train()
    network.transformer.activations = Activations.parse(choice)
    step(network, make_clips("5B", MIXED))


def test_a_layer_that_waits_is_seen() -> None:
    """The control of the tests above."""
    network = build("5B", num_layers=1).to("meta")

    def waiting(hidden: Tensor) -> Tensor:
        return hidden if hidden.sum() > 0 else -hidden

    network.transformer.layers[0].mlp.activation_func = waiting
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        step(network, make_inputs("5B"))
