"""Files of adapters: what they carry, where they fit, and what is refused."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.testing import assert_close

from sat.errors import CheckpointError
from sat.model.finetune.lora2 import lora_layers
from sat.mpu.shards import cut_state, shard_rules
from sat.weights.lora import LoraFile, attach_loras, join_adapters, lora_of, read_lora, write_lora
from tests.cogvideox.tiny import build, make_inputs

ALL = ("qkv", "dense", "mlp")


def trained(seed: int = 0, base: int = 0, **params: Any) -> Any:
    """A network with adapters: the base weights of one seed, the adapters of another."""
    node = {"target": "sat.model.finetune.lora2.LoraMixin", "params": {"r": 4, **params}}
    network = build("5B", seed=seed, extra_modules={"lora_config": node})
    network.load_state_dict(build("5B", seed=base).state_dict(), strict=False)
    return network


def adapter(network: Any, alpha: float = 1.0) -> LoraFile:
    return lora_of(network.state_dict(), alpha, "a test")


def output(network: Any, **more: Any) -> Tensor:
    with torch.no_grad():
        return network(**make_inputs("5B"), **more)


def test_a_file_carries_all_that_it_takes(tmp_path: Path) -> None:
    lora = adapter(trained(lora_alpha=3.5, targets=ALL), 3.5)
    write_lora(tmp_path / "lora.safetensors", lora)
    with safe_open(tmp_path / "lora.safetensors", framework="pt") as reader:
        assert reader.metadata() == {
            "format": "pt",
            "rank": "4",
            "alpha": "3.5",
            "targets": "qkv,dense,mlp",
            "base_model": "a transformer in the form of CogVideoX-5B of hidden_size 48, 2 layers",
        }
    again = read_lora(tmp_path / "lora.safetensors")
    assert (again.rank, again.alpha, again.targets) == (4, 3.5, ALL)
    assert again.base_model == lora.base_model
    assert again.weights.keys() == lora.weights.keys() and len(again.weights) == 2 * (3 + 1 + 1 + 1) * 2
    assert all(torch.equal(again.weights[name], value) for name, value in lora.weights.items())
    assert "transformer.layers.1.attention.query_key_value.matrix_B.2" in again.weights
    numbers = sum(value.numel() for value in lora.weights.values())
    assert (tmp_path / "lora.safetensors").stat().st_size < 4 * numbers + 8000  # names and metadata, no other weight


@pytest.mark.parametrize("targets", [None, ALL, ["mlp"]])
def test_a_network_with_the_file_is_the_trained_one(targets: Any, caplog: pytest.LogCaptureFixture) -> None:
    network = trained(seed=3, lora_alpha=2.0, targets=targets)
    plain = build("5B")
    with caplog.at_level(logging.INFO, logger="sat"):
        attach_loras(plain, [adapter(network, 2.0)])
    assert torch.equal(output(plain), output(network))
    assert torch.equal(output(plain, lora_scale=[0.3]), output(network, lora_scale=0.3))
    total = len(adapter(network).weights)
    assert f"a test: {total}/{total} modules, rank 4, alpha 2, on" in caplog.text
    changes = [layer.weight_change().norm() / layer.original.weight.norm() for layer in lora_layers(network).values()]
    assert f"mean |dW| / |W| {100 * torch.stack(changes).mean().item():.3g} %" in caplog.text


def test_two_files_add_up() -> None:
    """One on attention, of rank 4; the other on attention and MLP, of rank 3; each with a scale of its own."""
    first, second = trained(seed=1), trained(seed=2, r=3, lora_alpha=2.0, targets=ALL)
    both = build("5B")
    attach_loras(both, [adapter(first), adapter(second, 2.0)])
    for number, alone in enumerate((first, second)):
        scales = [0.0, 0.0]
        scales[number] = 0.7
        assert_close(output(both, lora_scale=scales), output(alone, lora_scale=0.7), rtol=0.0, atol=1e-5)
    expected = build("5B")
    with torch.no_grad():
        for network in (first, second):
            for name, layer in lora_layers(network).items():
                expected.get_submodule(name).weight.add_(layer.weight_change())
    assert_close(output(both), output(expected), rtol=0.0, atol=2e-5)  # measured 3e-6


def test_untrained_adapters_are_noticed(caplog: pytest.LogCaptureFixture) -> None:
    network = trained()
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if "matrix_B" in name:
                parameter.zero_()
    attach_loras(build("5B"), [adapter(network)])
    assert "a test changes nothing: its B matrices are zero" in caplog.text


def test_another_base_model_is_named(caplog: pytest.LogCaptureFixture) -> None:
    attach_loras(build("5B-I2V"), [adapter(trained())])
    assert "was trained on a transformer in the form of CogVideoX-5B of hidden" in caplog.text
    assert "is put on a transformer in the form of CogVideoX-5B-I2V of hidden" in caplog.text


@pytest.mark.parametrize("ranks", [2, 3])
def test_parts_of_ranks_are_joined(ranks: int) -> None:
    """Three heads over two ranks do not divide: one rank has more."""
    network = trained(targets=ALL)
    whole, rules = network.state_dict(), shard_rules(network)
    parts = [cut_state(whole, rules, rank, ranks) for rank in range(ranks)]
    adapters = [{name: value for name, value in part.items() if "matrix_" in name} for part in parts]
    joined = join_adapters(adapters)
    assert joined.keys() == adapters[0].keys()
    assert all(torch.equal(value, whole[name]) for name, value in joined.items())
    assert any(value.shape != adapters[0][name].shape for name, value in joined.items())


# --- what does not fit -----------------------------------------------------------------------------------------------


def moved(lora: LoraFile, old: str, new: str) -> LoraFile:
    return LoraFile("moved", {name.replace(old, new): v for name, v in lora.weights.items()}, 1.0, "CogVideoX-9B")


def test_names_that_match_nothing_are_refused() -> None:
    with pytest.raises(CheckpointError, match="moved does not fit the model: 0/16 modules do") as refused:
        attach_loras(build("5B"), [moved(adapter(trained(targets=["qkv", "dense"])), "layers", "blocks")])
    assert "the model has no transformer.blocks.0.attention.query_key_value" in str(refused.value)
    assert "it was trained on CogVideoX-9B" in str(refused.value)


def test_a_deeper_models_adapter_is_refused() -> None:
    with pytest.raises(CheckpointError, match="moved does not fit the model: 8/16 modules do") as refused:
        attach_loras(build("5B"), [moved(adapter(trained(targets=["qkv", "dense"])), "layers.1", "layers.7")])
    assert "the model has no transformer.layers.7.attention.query_key_value" in str(refused.value)


def test_a_wider_models_adapter_is_refused() -> None:
    lora = adapter(trained(targets=["dense"]))
    wider = {name: v.repeat(1, 2) if "_A" in name else v.repeat(2, 1) for name, v in lora.weights.items()}
    message = "dense has 96 inputs and 96 outputs, the model's has 48 inputs and 48 outputs"
    with pytest.raises(CheckpointError, match=message):
        attach_loras(build("5B"), [LoraFile("wider", wider, 1.0, "")])


def test_a_network_with_adapters_takes_no_others() -> None:
    with pytest.raises(CheckpointError, match="the loaded weights have adapters of their own"):
        attach_loras(trained(), [adapter(trained())])


def test_files_of_other_kinds_are_refused(tmp_path: Path) -> None:
    matrix = {"transformer.layers.0.attention.dense.matrix_A.0": torch.zeros(2, 4)}
    files: dict[str, dict[str, Tensor]] = {
        "other": {"a.weight": torch.zeros(2)},
        "peft": {"transformer.transformer_blocks.0.attn1.to_q.lora_A.weight": torch.zeros(2, 4)},
        "silent": matrix,
    }
    for name, weights in files.items():
        save_file(weights, tmp_path / f"{name}.safetensors")
    (tmp_path / "half.safetensors").write_bytes((tmp_path / "silent.safetensors").read_bytes()[:-4])
    for name, message in (
        ("other", "other.safetensors holds no adapters but names such as a.weight"),
        ("peft", "holds LoRA adapters under diffusers' names; give a file with SAT's names, as tools/convert.py makes"),
        ("silent", "silent.safetensors does not say its alpha, without which its strength is unknown"),
        ("half", "half.safetensors is not a whole safetensors file"),
        ("nowhere", "nowhere.safetensors is not a whole safetensors file"),
    ):
        with pytest.raises(CheckpointError, match=message):
            read_lora(tmp_path / f"{name}.safetensors")


def test_weights_without_adapters_are_refused() -> None:
    with pytest.raises(CheckpointError, match="a base model holds no adapters: none of its"):
        lora_of(build("5B").state_dict(), 1.0, "a base model")


def test_several_ranks_in_one_file_are_refused() -> None:
    lora = adapter(trained(targets=["dense"]))
    mixed = {name: v[:2] if "layers.0" in name and "_A" in name else v for name, v in lora.weights.items()}
    with pytest.raises(CheckpointError, match=r"has adapters of the ranks \[2, 4\]; one rank is expected"):
        attach_loras(build("5B"), [LoraFile("mixed", mixed, 1.0, "")])
