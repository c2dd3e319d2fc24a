"""The formula's operations are those that torch counts, for every released model, a pack, and adapters."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from sat.cogvideox.flops import Clip, TransformerFlops
from sat.cogvideox.presets import PRESETS
from sat.config import instantiate_from_config, load_config
from sat.training.optim import freeze
from tests.cogvideox.tiny import TEXT_LENGTH, build, make_inputs
from tests.marks import rest_is_slow

CONFIGS = Path(__file__).parents[2] / "configs"
LORA = {"target": "sat.model.finetune.lora2.LoraMixin", "params": {"r": 4, "targets": ["qkv", "dense", "mlp"]}}


def count_backward(output: Any) -> int:
    """Operations of backward as torch counts them."""
    outputs = [output] if isinstance(output, torch.Tensor) else output
    with FlopCounterMode(display=False) as counter:
        sum(part.float().square().mean() for part in outputs).backward()
    return counter.get_total_flops()


def count_forward(network: Any, **inputs: Any) -> tuple[int, Any]:
    with FlopCounterMode(display=False) as counter:
        output = network(**inputs)
    return counter.get_total_flops(), output


def on_meta(inputs: dict[str, Any]) -> dict[str, Any]:
    """On the meta device attention is two products, forward, and four, backward, as the formula counts it."""
    return {
        key: [part.to("meta") for part in value] if isinstance(value, list) else value.to("meta")
        for key, value in inputs.items()
    }


BY_DEFAULT = [preset for preset in PRESETS if preset.name in ("CogVideoX-2B", "CogVideoX1.5-5B-I2V")]


@pytest.mark.parametrize("preset", rest_is_slow(PRESETS, BY_DEFAULT), ids=lambda preset: preset.name)
def test_released_models_at_their_size(preset: Any) -> None:
    config = load_config([CONFIGS / preset.config])["model"]["network_config"]
    with torch.device("meta"):
        network = instantiate_from_config(config)
        t, _, _ = network.stored_grid
        o, p, q = network.patch_size
        text = network.get_mixin("pos_embed").text_length
        width = network.get_mixin("patch_embed").text_proj.in_features
        grid = (-(-t // o) * o, 60, 90)
        inputs = {
            "x": torch.empty(1, grid[0], preset.in_channels, *grid[1:]),
            "timesteps": torch.empty(1),
            "context": torch.empty(1, text, width),
        }
        if preset.has_ofs:
            inputs["ofs"] = torch.empty(1)
    network.transformer.checkpoint_activations = False
    counted, output = count_forward(network, **inputs)
    clips = [Clip(text, grid[0] // o * 60 // p * 90 // q)]
    flops = TransformerFlops(network)
    assert flops.forward(clips).total == counted
    assert flops.backward(clips).total == count_backward(output)


@pytest.mark.parametrize("form", ["2B", "1.5-5B-I2V"])
@pytest.mark.parametrize("frozen", [(), ("all",), ("transformer.", "mixins.patch_embed")], ids=["none", "all", "some"])
@pytest.mark.parametrize("has_adapters", [False, True])
def test_what_is_frozen_costs_no_gradient(form: str, frozen: tuple[str, ...], has_adapters: bool) -> None:
    extra = {"lora_config": LORA} if has_adapters else {}
    network = build(form, extra_modules=extra).to("meta")
    freeze(network, frozen)
    inputs = on_meta(make_inputs(form))
    if "ofs" in inputs:
        inputs["ofs"] = inputs["ofs"][:1]  # one for all samples, as in training
    counted, output = count_forward(network, **inputs)
    clips = 2 * [Clip(TEXT_LENGTH, (4 if form == "2B" else 2) * 3 * 4)]
    flops = TransformerFlops(network)
    assert flops.forward(clips).total == counted
    if output.requires_grad:
        assert flops.backward(clips).total == count_backward(output)
    else:
        assert flops.backward(clips).total == 0


def test_adapters_on_some_projections() -> None:
    lora = {"target": LORA["target"], "params": {"r": 4, "targets": ["dense"]}}
    network = build("5B", extra_modules={"lora_config": lora}).to("meta")
    freeze(network, ("all",))
    counted, output = count_forward(network, **on_meta(make_inputs("5B")))
    flops, clips = TransformerFlops(network), 2 * [Clip(TEXT_LENGTH, 48)]
    assert (flops.forward(clips).total, flops.backward(clips).total) == (counted, count_backward(output))


@pytest.mark.parametrize("recomputes", [False, True])
def test_a_pack_of_clips(recomputes: bool) -> None:
    network = build("5B").to("meta")
    network.transformer.checkpoint_activations = recomputes
    sizes = [(4, 6, 8), (1, 4, 4), (2, 8, 6)]
    inputs = {
        "x": [torch.empty(t, 4, h, w) for t, h, w in sizes],
        "timesteps": torch.empty(3),
        "context": torch.empty(3, TEXT_LENGTH, 24),
    }
    counted, output = count_forward(network, **on_meta(inputs))
    clips = [Clip(TEXT_LENGTH, t * h // 2 * w // 2) for t, h, w in sizes]
    flops = TransformerFlops(network)
    assert flops.forward(clips, is_packed=True).total == counted
    backward = flops.backward(clips, is_packed=True)
    if recomputes:
        backward += flops.recomputed(clips, num_layers=2)
    assert backward.total == count_backward(output)


def test_swiglu() -> None:
    network = build("5B", use_SwiGLU=True).to("meta")
    counted, output = count_forward(network, **on_meta(make_inputs("5B")))
    flops, clips = TransformerFlops(network), 2 * [Clip(TEXT_LENGTH, 48)]
    assert (flops.forward(clips).total, flops.backward(clips).total) == (counted, count_backward(output))


def test_the_published_form() -> None:
    """24 L s d² + 4 L s² d is all but a hundredth of a forward pass of 5B."""
    with torch.device("meta"):
        network = instantiate_from_config(load_config([CONFIGS / "cogvideox_5b.yaml"])["model"]["network_config"])
    s, d, layers = 17776, 3072, 42
    flops = TransformerFlops(network).forward([Clip(226, 17550)])
    assert flops.attention == 4 * layers * s**2 * d
    assert flops.products == pytest.approx(24 * layers * s * d**2, rel=0.01)
