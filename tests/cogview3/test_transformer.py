"""CogView3-Plus by itself: released names, the position table, the identity at the start, what it refuses."""

from pathlib import Path

import pytest
import torch

from sat.cogvideox.engine import build_engine
from sat.cogview3.mixins import sincos_table_2d
from sat.cogview3.transformer import CogView3PlusTransformer
from sat.config import _warned, instantiate_from_config, load_config
from sat.diffusion.samplers import VideoDDIMSampler
from sat.diffusion.scaling import VideoScaling
from sat.errors import ConfigError
from tests.cogview3.tiny import HEAD_DIM, HEADS, LARGEST, TEXT_WIDTH, build, make_inputs, network_config

CONFIGS = Path(__file__).parents[2] / "configs"

RELEASED_LAYER_NAMES = {
    "transformer.layers.{}.attention.query_key_value",
    "transformer.layers.{}.attention.dense",
    "transformer.layers.{}.mlp.dense_h_to_4h",
    "transformer.layers.{}.mlp.dense_4h_to_h",
    "mixins.adaln.adaln_modules.{}.1",
}
RELEASED_NAMES = {
    "time_embed.0",
    "time_embed.2",
    "label_emb.0.0",
    "label_emb.0.2",
    "mixins.patch_embed.proj",
    "mixins.patch_embed.text_proj",
    "mixins.final_layer.adaln.1",
    "mixins.final_layer.linear",
}


def test_weights_have_the_released_names() -> None:
    names = RELEASED_NAMES | {name.format(layer) for name in RELEASED_LAYER_NAMES for layer in range(2)}
    expected = {f"{name}.{part}" for name in names for part in ("weight", "bias")}
    assert set(build().state_dict()) == expected | {"mixins.pos_embed.image_pos_embedding"}


def test_an_image_takes_the_corner_of_the_table() -> None:
    position = build().get_mixin("pos_embed")
    rows = sincos_table_2d(LARGEST, LARGEST, HEADS * HEAD_DIM)
    assert torch.equal(position.image_pos_embedding, rows)
    assert torch.equal(sincos_table_2d(3, 5, HEADS * HEAD_DIM), rows[:3, :5])


def test_a_larger_image_gets_the_same_positions_further_on() -> None:
    small, large = build(), build()
    position = {"target": "sgm.modules.diffusionmodules.dit.PositionEmbeddingMixin", "params": {}}
    position["params"] = {"max_height": 20, "max_width": 20}
    large = build(modules={**network_config()["params"]["modules"], "pos_embed_config": position})
    inputs = make_inputs(rows=2 * LARGEST + 4, columns=8)
    _warned.clear()
    with torch.no_grad():
        assert torch.equal(small(**inputs), large(**inputs))
    assert any("positions are computed for 10 x 4 tokens" in message for message in _warned)


def test_a_fresh_model_passes_its_tokens_through() -> None:
    network = instantiate_from_config(network_config())
    seen = {}
    network.transformer.layers[1].register_forward_hook(lambda layer, inputs, output: seen.update(out=output))
    network.transformer.layers[0].register_forward_pre_hook(lambda layer, inputs: seen.update(into=inputs[0]))
    inputs = make_inputs(4, 4)
    network(**inputs)
    assert torch.equal(seen["into"], seen["out"])


def test_text_of_any_length_and_any_image_size_run() -> None:
    network = build()
    for text_length, rows, columns in ((1, 2, 2), (9, 16, 4)):
        inputs = {**make_inputs(rows, columns), "context": torch.randn(2, text_length, TEXT_WIDTH)}
        with torch.no_grad():
            assert network(**inputs).shape == (2, 1, 4, rows, columns)


def test_the_sizes_reach_the_output() -> None:
    network, inputs = build(), make_inputs(4, 4)
    with torch.no_grad():
        output = network(**inputs)
        other = network(**{**inputs, "y": inputs["y"].flip(0)})
    assert not torch.allclose(output, other, atol=1e-3)


def test_the_published_network_has_diffusers_parameter_count() -> None:
    from diffusers import CogView3PlusTransformer2DModel

    with torch.device("meta"):
        ours = instantiate_from_config(load_config([CONFIGS / "cogview3plus_3b.yaml"])["model"]["network_config"])
        theirs = CogView3PlusTransformer2DModel()
    trained = sum(p.numel() for p in ours.parameters() if p.requires_grad)
    assert trained == sum(p.numel() for p in theirs.parameters()) == 2_848_836_672


RELEASED = """
model:
  network_config:
    target: sgm.modules.diffusionmodules.dit.DiffusionTransformer
    params:
      in_channels: 16
      out_channels: 16
      hidden_size: 2560
      num_layers: 30
      patch_size: 2
      block_size: 16
      num_attention_heads: 64
      text_length: 224
      time_embed_dim: 512
      num_classes: sequential
      adm_in_channels: 1536
      modules:
        pos_embed_config:
          target: sgm.modules.diffusionmodules.dit.PositionEmbeddingMixin
          params: { max_height: 128, max_width: 128, max_length: 4096 }
        patch_embed_config:
          target: sgm.modules.diffusionmodules.dit.ImagePatchEmbeddingMixin
          params: { text_hidden_size: 4096 }
        attention_config:
          target: sgm.modules.diffusionmodules.dit.AdalnAttentionMixin
          params: { qk_ln: true }
        final_layer_config:
          target: sgm.modules.diffusionmodules.dit.FinalLayerMixin
"""


def test_the_released_keys_load_and_those_without_effect_say_why(tmp_path: Path) -> None:
    (tmp_path / "released.yaml").write_text(RELEASED)
    _warned.clear()
    with torch.device("meta"):
        network = instantiate_from_config(load_config([tmp_path / "released.yaml"])["model"]["network_config"])
    assert sum(p.numel() for p in network.parameters() if p.requires_grad) == 2_848_836_672
    for key in ("block_size", "text_length", "max_length"):
        assert any(f"{key} (" in message and "has no effect here" in message for message in _warned), key


def test_the_configs_of_both_sizes_name_what_the_release_names() -> None:
    engine = build_engine(load_config([CONFIGS / "cogview3plus_tiny.yaml"])["model"])
    assert type(engine.network) is CogView3PlusTransformer
    assert type(engine.denoiser.scaling) is VideoScaling and type(engine.sampler) is VideoDDIMSampler
    assert [type(embedder).__name__ for embedder in engine.conditioner.embedders] == [
        "ByteEmbedder",
        *["SizeEmbedder"] * 3,
    ]


def test_a_vector_of_another_width_is_refused() -> None:
    config = load_config([CONFIGS / "cogview3plus_tiny.yaml"], ["model.network_config.params.adm_in_channels=60"])
    with pytest.raises(ConfigError, match="sizes give a vector of 96 numbers, the network takes 60; make its adm_in"):
        build_engine(config["model"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"patch_size": [1, 2, 2]}, "an image model takes one number"),
        ({"adm_in_channels": None}, "num_classes: sequential needs adm_in_channels"),
    ],
)
def test_wrong_settings_are_refused(changes: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(**changes)


def test_a_missing_part_is_named_by_the_released_key() -> None:
    modules = network_config()["params"]["modules"]
    del modules["attention_config"]
    with pytest.raises(ConfigError, match=r"modules has no attention_config; .* needs pos_embed_config, patch_embed"):
        build(modules=modules)
