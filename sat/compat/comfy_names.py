"""How ComfyUI's own nodes name a CogVideoX transformer. Its VAE has diffusers' names.

Read in ComfyUI's `comfy/ldm/cogvideo/model.py`, `comfy/model_detection.py` and `comfy/lora.py`, see docs/conversion.md.
"""

from collections.abc import Mapping
from typing import Any

from sat.compat.patterns import renamed
from sat.errors import CheckpointError

COMFY_PREFIXES = (
    ("patch_embed.", "patch_embed."),
    ("time_embedding.linear_1.", "time_embedding_linear_1."),
    ("time_embedding.linear_2.", "time_embedding_linear_2."),
    ("ofs_embedding.linear_1.", "ofs_embedding_linear_1."),
    ("ofs_embedding.linear_2.", "ofs_embedding_linear_2."),
    ("transformer_blocks.{layer}.norm1.", "blocks.{layer}.norm1."),
    ("transformer_blocks.{layer}.attn1.to_q.", "blocks.{layer}.q."),
    ("transformer_blocks.{layer}.attn1.to_k.", "blocks.{layer}.k."),
    ("transformer_blocks.{layer}.attn1.to_v.", "blocks.{layer}.v."),
    ("transformer_blocks.{layer}.attn1.norm_q.", "blocks.{layer}.norm_q."),
    ("transformer_blocks.{layer}.attn1.norm_k.", "blocks.{layer}.norm_k."),
    ("transformer_blocks.{layer}.attn1.to_out.0.", "blocks.{layer}.attn_out."),
    ("transformer_blocks.{layer}.norm2.", "blocks.{layer}.norm2."),
    ("transformer_blocks.{layer}.ff.net.0.proj.", "blocks.{layer}.ff_proj."),
    ("transformer_blocks.{layer}.ff.net.2.", "blocks.{layer}.ff_out."),
    ("norm_final.", "norm_final."),
    ("norm_out.", "norm_out."),
    ("proj_out.", "proj_out."),
)
"""Beginnings of the transformer's names: diffusers', ComfyUI's."""

COMFY_STARTS = ("model.diffusion_model.", "diffusion_model.")
"""What may stand before the names in a file; nothing in those that hold the transformer alone."""


def comfy_from_diffusers(state: Mapping[str, Any]) -> dict[str, Any]:
    """A state dict of CogVideoXTransformer3DModel under ComfyUI's names, bare."""
    return {_rename(name, 0, 1, "ComfyUI has"): value for name, value in state.items()}


def comfy_to_diffusers(state: Mapping[str, Any]) -> dict[str, Any]:
    """A state dict under ComfyUI's names under those of CogVideoXTransformer3DModel."""
    return {_rename(_bare(name), 1, 0, "this project has"): value for name, value in state.items()}


def _bare(name: str) -> str:
    for start in COMFY_STARTS:
        name = name.removeprefix(start)
    return name


def _rename(name: str, source: int, target: int, whose: str) -> str:
    found = renamed(name, COMFY_PREFIXES, source, target)
    if found is None:
        raise CheckpointError(f"{whose} no place for the weight '{name}'")
    return found
