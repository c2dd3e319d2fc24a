"""Adapters: what is adapted, how strongly in each call, and that folding them in changes nothing."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from sat.errors import ConfigError
from sat.model.finetune.lora2 import Adapter, LoraMixin, lora_layers, wrap
from tests.cogvideox.tiny import build, make_inputs

ALL = ("qkv", "dense", "mlp")


def lora(**params: Any) -> dict[str, Any]:
    node = {"target": "sat.model.finetune.lora2.LoraMixin", "params": {"r": 4, "lora_alpha": 2.0, **params}}
    return {"extra_modules": {"lora_config": node}}


def output(network: Any, **more: Any) -> Tensor:
    with torch.no_grad():
        return network(**make_inputs("5B"), **more)


def base_of(network: Any, **options: Any) -> Any:
    """The same network without its adapters."""
    plain = build("5B", **options)
    state = {name.replace(".original.", "."): v for name, v in network.state_dict().items() if "matrix_" not in name}
    plain.load_state_dict(state, strict=True)
    return plain


@pytest.mark.parametrize(
    ("params", "names"),
    [
        ({}, {"attention.query_key_value", "attention.dense"}),
        ({"targets": ["qkv"]}, {"attention.query_key_value"}),
        ({"targets": ["dense", "mlp"]}, {"attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"}),
    ],
)
def test_targets_choose_the_projections(params: dict[str, Any], names: set[str]) -> None:
    found = lora_layers(build("5B", **lora(**params)))
    assert set(found) == {f"transformer.layers.{layer}.{name}" for layer in range(2) for name in names}
    assert set(lora_layers(build("5B", **lora(**params, layer_range=[1])))) == {name for name in found if ".1." in name}


@pytest.mark.parametrize(("targets", "options"), [(ALL, {}), (["mlp"], {"use_SwiGLU": True})], ids=["all", "swiglu"])
def test_folding_in_changes_nothing(targets: list[str], options: dict[str, Any]) -> None:
    network = build("5B", **lora(targets=targets), **options)
    before, plain = output(network), output(base_of(network, **options))
    assert (before - plain).abs().max() > 0.05  # the adapters do something
    network.get_mixin("lora").merge_lora()
    assert not lora_layers(network) and not any("matrix_" in name for name in network.state_dict())
    assert_close(output(network), before, rtol=0.0, atol=1e-5)  # measured 1.2e-6 on outputs of up to 4


RECOMPUTED = {"transformer_args": {"checkpoint_activations": True}}


@pytest.mark.parametrize("options", [{}, RECOMPUTED], ids=["kept", "recomputed"])
def test_a_call_scales_the_adapters(options: dict[str, Any]) -> None:
    network = build("5B", **lora(targets=ALL), **options)
    assert torch.equal(output(network, lora_scale=0.0), output(base_of(network)))
    assert torch.equal(output(network, lora_scale=1.0), output(network))
    halved = build("5B", **lora(targets=ALL, lora_alpha=1.0))
    halved.load_state_dict(network.state_dict())
    assert torch.equal(output(network, lora_scale=0.5), output(halved))
    inputs = make_inputs("5B")
    for own, scale in ((network, 0.5), (halved, None)):
        own.zero_grad()
        own.train()(**inputs, lora_scale=scale).square().mean().backward()
    for (name, one), (_, other) in zip(network.named_parameters(), halved.named_parameters()):
        assert one.grad is other.grad is None or torch.equal(one.grad, other.grad), name  # type: ignore[arg-type]


def test_fresh_adapters_change_nothing() -> None:
    network = build("5B", **lora(targets=ALL))
    with torch.no_grad():
        for layer in lora_layers(network).values():
            for matrix in layer.matrix_B:
                matrix.zero_()
    assert torch.equal(output(network), output(base_of(network)))


def test_adapters_side_by_side_are_the_sum_of_each() -> None:
    linear = torch.nn.Module()
    linear.layer = torch.nn.Linear(6, 5)
    plain, x = linear.layer, torch.randn(3, 6)
    wrapped = wrap(linear, "layer", [Adapter(0, 2, 0.5), Adapter(2, 3, 2.0)])
    assert torch.equal(wrapped(x), plain(x))  # B starts at zero
    a, b = torch.randn(5, 6), torch.randn(5, 5)
    wrapped.fill({"matrix_A.0": a, "matrix_B.0": b})
    for scales in ([1.0, 7.0, 1.0], [0.5, 7.0, -1.0]):
        ctx: Any = {"lora_scale": scales}
        expected = plain(x)
        for rows, scaling, scale in ((slice(0, 2), 0.5, scales[0]), (slice(2, 5), 2.0, scales[2])):
            expected = expected + scale * scaling * x @ a[rows].T @ b[:, rows].T
        assert_close(wrapped(x, ctx), expected)
    assert_close(wrapped.weight_change(), 0.5 * b[:, :2] @ a[:2] + 2.0 * b[:, 2:] @ a[2:])


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"r": 0}, "lora rank r is 0; give 1 or more"),
        ({"r": 4, "targets": ["qvk"]}, "lora targets has 'qvk'; did you mean 'qkv'.; give qkv, dense, mlp, cross"),
        ({"r": 4, "layer_range": [1, 2]}, r"lora layer_range has \[2\]; the model's layers are 0 to 1"),
        ({"r": 4, "layer_range": []}, "lora layer_range is empty, so nothing would be adapted; leave it out"),
        ({"r": 4, "qlora": True}, "qlora .4-bit base weights. is not supported"),
    ],
)
def test_what_makes_no_adapter_is_refused(params: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        LoraMixin(layer_num=2, **params)


def test_targets_that_no_layer_has_are_refused() -> None:
    with pytest.raises(ConfigError, match="lora targets are cross_attention, and no layer has them; give some of qkv"):
        build("5B", **lora(targets=["cross_attention"]))
