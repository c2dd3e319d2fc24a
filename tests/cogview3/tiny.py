"""A tiny CogView3-Plus with random numbers in every weight, and inputs for it."""

from typing import Any

import torch
from torch import Tensor

from sat.conditioning.size import SIZE_KEYS, SizeEmbedder
from sat.config import instantiate_from_config

HEADS, HEAD_DIM, TEXT_WIDTH, TIME_DIM, CONDITION_DIM, LARGEST = 3, 20, 24, 28, 10, 8
"""The head size of the release, 40, is no multiple of 16 either; LARGEST is the side of the position table."""

SIZES = {
    "original_size_as_tuple": torch.tensor([[96.0, 128.0], [1024.0, 768.0]]),
    "crop_coords_top_left": torch.tensor([[0.0, 16.0], [3.0, 0.0]]),
    "target_size_as_tuple": torch.tensor([[96.0, 160.0], [96.0, 160.0]]),
}


def network_config(**changes: Any) -> dict[str, Any]:
    """The released form, 60 wide."""
    target = "sgm.modules.diffusionmodules.dit."
    params = {
        "num_layers": 2,
        "hidden_size": HEADS * HEAD_DIM,
        "num_attention_heads": HEADS,
        "in_channels": 4,
        "out_channels": 4,
        "patch_size": 2,
        "time_embed_dim": TIME_DIM,
        "num_classes": "sequential",
        "adm_in_channels": 6 * CONDITION_DIM,
        "modules": {
            "pos_embed_config": {
                "target": f"{target}PositionEmbeddingMixin",
                "params": {"max_height": LARGEST, "max_width": LARGEST},
            },
            "patch_embed_config": {
                "target": f"{target}ImagePatchEmbeddingMixin",
                "params": {"text_hidden_size": TEXT_WIDTH},
            },
            "attention_config": {"target": f"{target}AdalnAttentionMixin", "params": {"qk_ln": True}},
            "final_layer_config": {"target": f"{target}FinalLayerMixin"},
        },
    }
    return {"target": f"{target}DiffusionTransformer", "params": {**params, **changes}}


def build(seed: int = 0, **changes: Any) -> Any:
    """A network whose every trained weight is random, so that no path is silent."""
    network = instantiate_from_config(network_config(**changes))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(noise * 0.7 / parameter.shape[-1] ** 0.5)
    return network


def vector_of(sizes: dict[str, Tensor]) -> Tensor:
    """The vector condition (b, 6·CONDITION_DIM)."""
    embed = SizeEmbedder(CONDITION_DIM)
    return torch.cat([embed(sizes[key]) for key in SIZE_KEYS], dim=-1)


def make_inputs(rows: int = 12, columns: int = 10) -> dict[str, Tensor]:
    """Inputs of one forward pass of two images."""
    generator = torch.Generator().manual_seed(1)
    return {
        "x": torch.randn(2, 1, 4, rows, columns, generator=generator),
        "timesteps": torch.randint(0, 1000, (2,), generator=generator),
        "context": torch.randn(2, 7, TEXT_WIDTH, generator=generator),
        "y": vector_of(SIZES),
    }
