"""The law of packing: clips in one row equal each of them alone, outputs and gradients."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sat.cogvideox.context import NoTextLength
from sat.errors import HookError
from sat.model import BaseMixin, non_conflict
from tests.cogvideox.tiny import FORMS, TEXT_LENGTH, TEXT_WIDTH, build

Size = tuple[int, int, int]
MIXED: list[Size] = [(4, 6, 8), (2, 2, 4), (2, 8, 6), (4, 2, 2)]
"""Latent frames, rows, columns."""

LORA = {"lora_config": {"target": "sat.model.finetune.lora2.LoraMixin", "params": {"r": 4}}}


def make_clips(form: str, sizes: list[Size], dtype: torch.dtype = torch.float64) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(4)
    channels = FORMS[form]["in_channels"]
    inputs: dict[str, Any] = {
        "x": [torch.randn(t, channels, h, w, generator=generator).to(dtype) for t, h, w in sizes],
        "timesteps": torch.randint(0, 1000, (len(sizes),), generator=generator),
        "context": torch.randn(len(sizes), TEXT_LENGTH, TEXT_WIDTH, generator=generator).to(dtype),
    }
    if "ofs_embed_dim" in FORMS[form]:
        inputs["ofs"] = torch.full((len(sizes),), 2.0)
    return inputs


def alone(network: Any, inputs: dict[str, Any]) -> list[Tensor]:
    """Each clip in a batch of its own."""
    outputs = []
    for number in range(len(inputs["x"])):
        own = {name: value[number : number + 1] for name, value in inputs.items() if name != "x"}
        outputs.append(network(inputs["x"][number].unsqueeze(0), **own)[0])
    return outputs


def loss_of(outputs: list[Tensor]) -> Tensor:
    generator = torch.Generator().manual_seed(6)
    losses = [(out - torch.randn(out.shape, generator=generator).to(out)).square().mean() for out in outputs]
    return torch.stack(losses).mean()


def run(network: Any, outputs: list[Tensor]) -> tuple[list[Tensor], dict[str, Tensor]]:
    network.zero_grad()
    loss_of(outputs).backward()
    gradients = {name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None}
    return [output.detach() for output in outputs], gradients


def is_nothing(form: str, name: str) -> bool:
    """Whether a gradient is rounding of zero: without rotary positions softmax does not see what all keys share."""
    return form == "2B" and "key_layernorm" in name and name.endswith("bias")


def compare(form: str, sizes: list[Size], dtype: torch.dtype = torch.float64, **options: Any) -> float:
    """Worst difference of an output or gradient, relative to its largest entry."""
    network = build(form, **options).to(dtype)
    inputs = make_clips(form, sizes, dtype)
    expected, expected_gradients = run(network, alone(network, inputs))
    packed, gradients = run(network, network(**inputs))
    assert gradients.keys() == expected_gradients.keys()
    named = [name for name in gradients if dtype == torch.float64 or not is_nothing(form, name)]
    pairs = [*zip(packed, expected), *((gradients[name], expected_gradients[name]) for name in named)]
    return max(float((a - b).abs().max() / b.abs().max().clamp(min=1e-6)) for a, b in pairs)


@pytest.mark.parametrize("form", FORMS)
def test_clips_in_a_row_equal_each_alone(form: str) -> None:
    # 2B and 5B-I2V store positions for one grid: other grids have theirs computed or interpolated, packed or not.
    assert compare(form, MIXED) < 1e-10
    assert compare(form, MIXED, torch.float32) < 1e-5  # measured 2.7e-6


@pytest.mark.parametrize(
    "options",
    [
        {"use_SwiGLU": True},
        {"use_RMSNorm": True},
        {"transformer_args": {"layernorm_order": "sandwich"}},
        {"transformer_args": {"checkpoint_activations": True}},
        {"extra_modules": LORA},
    ],
    ids=["swiglu", "rmsnorm", "sandwich", "recomputed", "lora"],
)
def test_every_switch(options: dict[str, Any]) -> None:
    assert compare("5B", MIXED, **options) < 1e-10


@settings(max_examples=20, deadline=None, derandomize=True)
@given(
    st.lists(
        st.tuples(st.integers(1, 4), st.integers(1, 4), st.integers(1, 4)).map(lambda s: (s[0], 2 * s[1], 2 * s[2])),
        min_size=1,
        max_size=5,
    )
)
def test_any_mix(sizes: list[Size]) -> None:
    assert compare("5B", sizes) < 1e-10


def test_the_order_within_a_row_changes_nothing() -> None:
    network = build("5B").double()
    inputs = make_clips("5B", MIXED)
    order = [2, 0, 3, 1]
    shuffled = {name: [value[i] for i in order] if name == "x" else value[order] for name, value in inputs.items()}
    with torch.no_grad():
        outputs, others = network(**inputs), network(**shuffled)
    for place, number in enumerate(order):
        torch.testing.assert_close(others[place], outputs[number], rtol=0.0, atol=1e-12)


def test_a_clip_does_not_see_its_neighbours() -> None:
    network = build("5B").double()
    inputs = make_clips("5B", MIXED)
    with torch.no_grad():
        before = network(**inputs)
        inputs["x"][1] = inputs["x"][1] + 1.0
        after = network(**inputs)
    assert torch.equal(before[0], after[0]) and torch.equal(before[2], after[2])
    assert not torch.equal(before[1], after[1])


class SlicesText(BaseMixin):
    """Written for SAT: takes the text to be at the front."""

    @non_conflict
    def mlp_forward(self, hidden_states: Tensor, *, text_length: Any, old_impl: Any) -> Tensor:
        text, video = hidden_states[:, :text_length], hidden_states[:, text_length:]
        return old_impl(torch.cat([text, video], dim=1))


def test_a_mixin_that_counts_text_at_the_front_is_refused() -> None:
    network = build("5B").double()
    network.add_mixin("slices", SlicesText())
    inputs = make_clips("5B", MIXED)
    assert len(alone(network, inputs)) == len(MIXED)
    with pytest.raises(HookError, match=r"samples are packed into one row.*must use the context's `spans`"):
        network(**inputs)
    with pytest.raises(HookError):
        range(NoTextLength())
