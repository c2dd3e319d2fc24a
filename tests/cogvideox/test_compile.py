"""A compiled layer is one graph, for every form and switch, and gives what the plain one gives."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from sat.errors import ConfigError
from sat.model.activations import Activations
from tests.cogvideox.test_packing import LORA, MIXED, Size, make_clips
from tests.cogvideox.tiny import FORMS, build, make_inputs
from tests.marks import rest_is_slow

BATCH = [(4, 6, 8), (4, 6, 8)]
MIXES: list[list[Size]] = [
    MIXED,
    [(2, 4, 4), (4, 2, 6)],
    [(2, 2, 2)] * 5,
    [(4, 4, 4), (2, 6, 2), (2, 2, 2)],
    [(2, 8, 8)] * 2 + [(4, 2, 2)] * 4,
    [(4, 6, 8)] * 3,
]


@pytest.fixture(autouse=True)
def forget_graphs(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("TORCHDYNAMO_DISABLE", raising=False)  # tests of ranks set it for those that they start
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def run(network: Any, inputs: dict[str, Any]) -> dict[str, Tensor]:
    """Outputs and gradients by name."""
    network.zero_grad()
    outputs = network(**inputs)
    outputs = [outputs] if isinstance(outputs, Tensor) else outputs
    torch.stack([output.square().mean() for output in outputs]).sum().backward()
    gradients = {name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None}
    return {**{f"output {number}": output.detach() for number, output in enumerate(outputs)}, **gradients}


def worst_difference(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Relative to the largest entry of each tensor."""
    assert found.keys() == expected.keys()
    return max(float((found[name] - e).abs().max() / e.abs().max().clamp(min=1e-6)) for name, e in expected.items())


def compare(network: Any, inputs: dict[str, Any], backend: str = "aot_eager") -> float:
    """Compiled against plain; a graph break is an error."""
    network.train()
    expected = run(network, inputs)
    network.transformer.compile_layers(fullgraph=True, backend=backend)
    return worst_difference(run(network, inputs), expected)


def doubled(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.double() if value.is_floating_point() else value for name, value in inputs.items()}


@pytest.mark.parametrize("form", rest_is_slow(FORMS, ("5B", "1.5-5B-I2V")))
def test_a_layer_of_every_form_is_one_graph(form: str) -> None:
    # Worst measured: 5e-15.
    assert compare(build(form, num_layers=1).double(), doubled(make_inputs(form))) < 1e-13
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize(
    "options",
    [
        {"extra_modules": LORA},
        pytest.param({"use_SwiGLU": True}, marks=pytest.mark.slow),
        pytest.param({"use_RMSNorm": True}, marks=pytest.mark.slow),
        {"transformer_args": {"layernorm_order": "sandwich"}},
        {"transformer_args": {"checkpoint_activations": True}},
    ],
    ids=["lora", "swiglu", "rmsnorm", "sandwich", "recomputed"],
)
@pytest.mark.parametrize("is_packed", rest_is_slow([False, True], [True]), ids=["batch", "packed"])
def test_every_switch(options: dict[str, Any], is_packed: bool) -> None:
    network = build("5B", num_layers=1, **options).double()
    inputs = make_clips("5B", MIXED) if is_packed else doubled(make_inputs("5B"))
    assert compare(network, inputs) < 1e-13
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("choice", rest_is_slow(["keep_attention", "recompute_every_2", "offload"], ["keep_attention"]))
def test_every_choice_of_activations(choice: str) -> None:
    network = build("5B").double()
    network.transformer.activations = Activations.parse(choice)
    assert compare(network, make_clips("5B", MIXED)) < 1e-13
    assert counters["stats"]["unique_graphs"] == 2


def test_new_mixes_of_a_packed_row_use_the_same_graph() -> None:
    network = build("5B", num_layers=1).double().train()
    expected = [run(network, make_clips("5B", mix)) for mix in MIXES]
    network.transformer.compile_layers(fullgraph=True, backend="aot_eager")
    for mix, values in zip(MIXES, expected):
        assert worst_difference(run(network, make_clips("5B", mix)), values) < 1e-13
    # One for the first mix, one for all others.
    assert counters["stats"]["unique_graphs"] == 2


def test_sampling_in_half_batches_and_with_scaled_adapters() -> None:
    network = build("5B", num_layers=1, extra_modules=LORA).eval()
    inputs = make_inputs("5B")
    with torch.no_grad():
        expected = network(**inputs, lora_scale=0.5)
        network.transformer.compile_layers(fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(network(**inputs, lora_scale=0.5), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_generated_code_equals_the_plain_layer() -> None:
    network = build("1.5-5B-I2V", num_layers=1)
    # Worst measured: 2e-6, single precision.
    assert compare(network, single_clips("1.5-5B-I2V"), backend="inductor") < 2e-5
    assert counters["stats"]["unique_graphs"] == 1


def single_clips(form: str) -> dict[str, Any]:
    inputs = make_clips(form, MIXED)
    return {**inputs, "x": [clip.float() for clip in inputs["x"]], "context": inputs["context"].float()}


def test_a_mixin_that_breaks_the_graph_is_seen() -> None:
    """The control of the tests above."""
    network = build("5B", num_layers=1)

    def breaking(hidden: Tensor) -> Tensor:
        torch._dynamo.graph_break()
        return hidden

    network.transformer.layers[0].mlp.activation_func = breaking
    with pytest.raises(torch._dynamo.exc.Unsupported):
        compare(network, make_inputs("5B"))


def test_a_torch_that_cannot_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda model, backend=None: model)
    with pytest.raises(ConfigError, match=r"compiled layers need torch 2\.13 or later, not .*; set compile: false"):
        build("5B", num_layers=1).transformer.compile_layers()
