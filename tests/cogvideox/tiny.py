"""Tiny transformers in the forms of the released models, with random numbers in every weight."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from sat.config import instantiate_from_config

HEADS, HEAD_DIM, TEXT_WIDTH, TEXT_LENGTH = 3, 16, 24, 7

FORMS: dict[str, dict[str, Any]] = {
    "2B": {"patch_size": [1, 2, 2], "in_channels": 4, "positions": "sincos"},
    "5B": {"patch_size": [1, 2, 2], "in_channels": 4, "positions": "rotary"},
    "5B-I2V": {"patch_size": [1, 2, 2], "in_channels": 8, "positions": "rotary and learned"},
    "1.5-5B": {"patch_size": [2, 2, 2], "in_channels": 4, "positions": "rotary"},
    "1.5-5B-I2V": {"patch_size": [2, 2, 2], "in_channels": 8, "positions": "rotary", "ofs_embed_dim": 20},
}
"""What tells the released models apart."""


def network_config(
    form: str, num_layers: int = 2, extra_modules: Mapping[str, Any] | None = None, **changes: Any
) -> dict[str, Any]:
    """The configuration of one form: 48 wide, grid of 13 pixel frames and 6 x 8 latents."""
    options = FORMS[form]
    if options["positions"] == "sincos":
        positions = {"target": "dit_video_concat.Basic3DPositionEmbeddingMixin", "params": {"text_length": TEXT_LENGTH}}
    else:
        params: dict[str, Any] = {"hidden_size_head": HEAD_DIM, "text_length": TEXT_LENGTH}
        if "learned" in options["positions"]:
            params["learnable_pos_embed"] = True
        positions = {"target": "dit_video_concat.Rotary3DPositionEmbeddingMixin", "params": params}
    params = {
        "num_layers": num_layers,
        "hidden_size": HEADS * HEAD_DIM,
        "num_attention_heads": HEADS,
        "num_frames": 13,
        "latent_height": 6,
        "latent_width": 8,
        "time_embed_dim": 20,
        "patch_size": options["patch_size"],
        "in_channels": options["in_channels"],
        "out_channels": 4,
        "modules": {
            "pos_embed_config": positions,
            "patch_embed_config": {
                "target": "dit_video_concat.ImagePatchEmbeddingMixin",
                "params": {"text_hidden_size": TEXT_WIDTH},
            },
            "adaln_layer_config": {"target": "dit_video_concat.AdaLNMixin"},
            "final_layer_config": {"target": "dit_video_concat.FinalLayerMixin"},
            **(extra_modules or {}),
        },
    }
    if form == "2B":
        params.update(height_interpolation=1.875, width_interpolation=1.875)
    if "ofs_embed_dim" in options:
        params["ofs_embed_dim"] = options["ofs_embed_dim"]
    return {"target": "dit_video_concat.DiffusionTransformer", "params": {**params, **changes}}


def build(form: str, seed: int = 0, **changes: Any) -> Any:
    """A network whose every trained weight is random, so that no path is silent."""
    network = instantiate_from_config(network_config(form, **changes))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator)
                is_gain = name.endswith("weight") and parameter.dim() == 1
                parameter.copy_(1.0 + 0.2 * noise if is_gain else noise * 0.7 / parameter.shape[-1] ** 0.5)
    return network


def make_inputs(form: str, batch: int = 2, frames: int = 4, rows: int = 6, columns: int = 8) -> dict[str, Tensor]:
    """Inputs of one forward pass."""
    generator = torch.Generator().manual_seed(1)
    inputs = {
        "x": torch.randn(batch, frames, FORMS[form]["in_channels"], rows, columns, generator=generator),
        "timesteps": torch.randint(0, 1000, (batch,), generator=generator),
        "context": torch.randn(batch, TEXT_LENGTH, TEXT_WIDTH, generator=generator),
    }
    if "ofs_embed_dim" in FORMS[form]:
        inputs["ofs"] = torch.full((batch,), 2.0)
    return inputs
