"""What layers keep for backward changes nothing but memory: the same gradients to the last bit."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from sat.errors import ConfigError
from sat.model import activations
from sat.model.activations import CHOICES, Activations
from tests.cogvideox.test_packing import MIXED, make_clips
from tests.cogvideox.tiny import build, make_inputs

EVERY = [choice.replace("_N", "_2") for choice in CHOICES]


def run(network: Any, inputs: dict[str, Any]) -> tuple[list[Tensor], int]:
    """Gradients, and the FLOPs of forward and backward."""
    network.zero_grad()
    with FlopCounterMode(display=False) as counter:
        outputs = network(**inputs)
        outputs = [outputs] if isinstance(outputs, Tensor) else outputs
        torch.stack([output.square().mean() for output in outputs]).sum().backward()
    return [p.grad.clone() for p in network.parameters() if p.grad is not None], counter.get_total_flops()


def make(is_packed: bool) -> dict[str, Any]:
    if not is_packed:
        return make_inputs("5B")
    inputs = make_clips("5B", MIXED)
    return {**inputs, "x": [clip.float() for clip in inputs["x"]], "context": inputs["context"].float()}


@pytest.mark.parametrize("is_packed", [False, True], ids=["batch", "packed"])
@pytest.mark.parametrize("choice", EVERY)
def test_gradients_are_the_same_bits(choice: str, is_packed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(activations, "_MIN_OFFLOADED", 1)
    network, inputs = build("5B", num_layers=3).train(), make(is_packed)
    expected, _ = run(network, inputs)
    network.transformer.activations = Activations.parse(choice)
    found, _ = run(network, inputs)
    assert len(found) == len(expected) and all(torch.equal(a, b) for a, b in zip(found, expected))


def test_each_choice_computes_again_what_it_says() -> None:
    network, inputs = build("5B", num_layers=2).train(), make(is_packed=True)  # torch does not count a batch's on CPUs
    flops = {}
    for choice in EVERY:
        network.transformer.activations = Activations.parse(choice)
        _, flops[choice] = run(network, inputs)
    again = {choice: count - flops["keep"] for choice, count in flops.items()}
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(**inputs)
    counts = counter.get_flop_counts()["Global"]
    attention = sum(count for operation, count in counts.items() if "attention" in str(operation))
    assert attention > 0
    assert again["keep"] == again["offload"] == 0
    assert again["recompute_every_2"] * 2 == again["recompute"]  # two layers, of which it recomputes one
    assert again["recompute"] - again["keep_attention"] == attention


def test_weights_and_small_tensors_stay_where_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(activations, "_MIN_OFFLOADED", 100)
    weight = torch.nn.Parameter(torch.ones(20, 20))
    small, large = torch.ones(9), torch.ones(20, 20)
    assert activations._to_host(weight) is weight
    view = weight.t()
    assert activations._to_host(view) is view
    assert activations._to_host(small) is small
    kept = activations._to_host(large)
    assert kept[1] is not large and torch.equal(activations._from_host(kept), large)


def test_layers_at_the_end_and_groups_are_as_the_checkpoint_arguments_say() -> None:
    options = {"checkpoint_activations": True, "checkpoint_num_layers": 2, "checkpoint_skip_layers": 1}
    transformer = build("5B", num_layers=5, transformer_args=options).train().transformer
    assert transformer._layer_groups() == [((0, 1), "inputs"), ((2, 3), "inputs"), ((4,), "all")]
    transformer.activations = Activations.parse("keep_attention")
    assert transformer._layer_groups() == [((0, 1), "attention"), ((2, 3), "attention"), ((4,), "all")]
    transformer.activations = Activations.parse("keep")
    assert transformer._layer_groups() == [((index,), "all") for index in range(5)]


def test_layers_are_counted_by_what_they_keep() -> None:
    transformer = build("5B", num_layers=5).transformer
    transformer.activations = Activations.parse("recompute_every_2")
    assert (transformer.layers_that_keep("inputs"), transformer.layers_that_keep("all", "inputs")) == (3, 5)


def test_nothing_is_recomputed_outside_training() -> None:
    network, inputs = build("5B", num_layers=2), make(is_packed=True)
    _, plain = run(network.eval(), inputs)
    network.transformer.activations = Activations.parse("recompute")
    assert run(network, inputs)[1] == plain


def test_an_unknown_choice_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"activations is 'every'; give one of keep, recompute, keep_attention"):
        Activations.parse("every")
    with pytest.raises(ConfigError):
        Activations.parse("recompute_every_0")
