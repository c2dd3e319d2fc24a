"""How diffusers names the same weights. Patterns as data, and functions that map state dicts both ways, bit for bit."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sat.compat.patterns import matched, renamed
from sat.errors import CheckpointError

# --- the VAE ---------------------------------------------------------------------------------------------------------

VAE_PREFIXES = (
    ("encoder.down.{level}.block.{block}.", "encoder.down_blocks.{level}.resnets.{block}."),
    ("encoder.down.{level}.downsample.", "encoder.down_blocks.{level}.downsamplers.0."),
    ("encoder.mid.block_1.", "encoder.mid_block.resnets.0."),
    ("encoder.mid.block_2.", "encoder.mid_block.resnets.1."),
    ("decoder.up.{level}.block.{block}.", "decoder.up_blocks.{reversed}.resnets.{block}."),
    ("decoder.up.{level}.upsample.", "decoder.up_blocks.{reversed}.upsamplers.0."),
    ("decoder.mid.block_1.", "decoder.mid_block.resnets.0."),
    ("decoder.mid.block_2.", "decoder.mid_block.resnets.1."),
    ("encoder.conv_in.", "encoder.conv_in."),
    ("encoder.norm_out.", "encoder.norm_out."),
    ("encoder.conv_out.", "encoder.conv_out."),
    ("decoder.conv_in.", "decoder.conv_in."),
    ("decoder.norm_out.", "decoder.norm_out."),
    ("decoder.conv_out.", "decoder.conv_out."),
)
"""Beginnings of the VAE's names: ours, diffusers'. `{reversed}` counts levels from the other end."""

VAE_SHORTCUT = ("nin_shortcut.", "conv_shortcut.")
"""The 1x1x1 convolution of a residual block that changes the width: ours, diffusers'."""


def vae_name_to_diffusers(name: str, num_levels: int) -> str:
    """Diffusers' name of one VAE weight of ours; num_levels is the length of ch_mult."""
    return _rename(name, num_levels, source=0, target=1)


def vae_name_from_diffusers(name: str, num_levels: int) -> str:
    """Our name of one weight of diffusers' AutoencoderKLCogVideoX."""
    return _rename(name, num_levels, source=1, target=0)


def vae_to_diffusers(state: Mapping[str, Any], num_levels: int) -> dict[str, Any]:
    """A VAE state dict under diffusers' names, without training-only weights (`loss...`).

    Raises CheckpointError for other names that diffusers has no place for.
    """
    kept = (name for name in state if not name.startswith("loss."))
    return {vae_name_to_diffusers(name, num_levels): state[name] for name in kept}


def vae_from_diffusers(state: Mapping[str, Any], num_levels: int) -> dict[str, Any]:
    """A state dict of diffusers' AutoencoderKLCogVideoX under our names; CheckpointError for other names."""
    return {vae_name_from_diffusers(name, num_levels): state[name] for name in state}


def _rename(name: str, num_levels: int, source: int, target: int) -> str:
    for prefixes in VAE_PREFIXES:
        pattern = re.sub(r"\\\{(\w+)\\\}", r"(?P<\1>\\d+)", re.escape(prefixes[source]))
        match = re.match(pattern, name)
        if match:
            fields = {key: int(value) for key, value in match.groupdict().items()}
            level = fields.get("level", num_levels - 1 - fields.get("reversed", 0))
            fields.update(level=level, reversed=num_levels - 1 - level)
            rest = name[match.end() :].replace(VAE_SHORTCUT[source], VAE_SHORTCUT[target])
            return prefixes[target].format(**fields) + rest
    whose = ("diffusers' VAE has", "our VAE has")[source]
    raise CheckpointError(f"{whose} no place for the weight '{name}'")


# --- the transformer -------------------------------------------------------------------------------------------------

DIT_PREFIXES = (
    ("time_embed.0.", "time_embedding.linear_1."),
    ("time_embed.2.", "time_embedding.linear_2."),
    ("ofs_embed.0.", "ofs_embedding.linear_1."),
    ("ofs_embed.2.", "ofs_embedding.linear_2."),
    ("mixins.patch_embed.proj.", "patch_embed.proj."),
    ("mixins.patch_embed.text_proj.", "patch_embed.text_proj."),
    ("mixins.pos_embed.pos_embedding", "patch_embed.pos_embedding"),
    ("transformer.layers.{layer}.input_layernorm.", "transformer_blocks.{layer}.norm1.norm."),
    ("transformer.layers.{layer}.post_attention_layernorm.", "transformer_blocks.{layer}.norm2.norm."),
    ("transformer.layers.{layer}.attention.dense.", "transformer_blocks.{layer}.attn1.to_out.0."),
    ("transformer.layers.{layer}.mlp.dense_h_to_4h.", "transformer_blocks.{layer}.ff.net.0.proj."),
    ("transformer.layers.{layer}.mlp.dense_4h_to_h.", "transformer_blocks.{layer}.ff.net.2."),
    ("mixins.adaln_layer.query_layernorm_list.{layer}.", "transformer_blocks.{layer}.attn1.norm_q."),
    ("mixins.adaln_layer.key_layernorm_list.{layer}.", "transformer_blocks.{layer}.attn1.norm_k."),
    ("transformer.final_layernorm.", "norm_final."),
    ("mixins.final_layer.norm_final.", "norm_out.norm."),
    ("mixins.final_layer.adaLN_modulation.1.", "norm_out.linear."),
    ("mixins.final_layer.linear.", "proj_out."),
)
"""Beginnings of the transformer's names: ours, diffusers'."""

Blocks = tuple[tuple[str, Mapping[str, tuple[int, ...]]], ...]

DIT_BLOCKS: Blocks = (
    (
        "transformer.layers.{layer}.attention.query_key_value.",
        {
            "transformer_blocks.{layer}.attn1.to_q.": (0,),
            "transformer_blocks.{layer}.attn1.to_k.": (1,),
            "transformer_blocks.{layer}.attn1.to_v.": (2,),
        },
    ),
    (
        "mixins.adaln_layer.adaLN_modulations.{layer}.1.",
        {
            "transformer_blocks.{layer}.norm1.linear.": (0, 1, 2, 6, 7, 8),
            "transformer_blocks.{layer}.norm2.linear.": (3, 4, 5, 9, 10, 11),
        },
    ),
)
"""Fused weights of ours -> diffusers' names for them and the equal blocks of rows that each holds, in its order."""

DIT_LEFT_OUT = ("transformer.position_embeddings.weight", "mixins.pos_embed.freqs_sin", "mixins.pos_embed.freqs_cos")
"""Names of ours that diffusers has no place for: a table that nothing reads, and tables that release 1.0 stored."""

DIT_POSITIONS = "mixins.pos_embed.pos_embedding"


def dit_to_diffusers(
    state: Mapping[str, Tensor], patch_size: int | Sequence[int], has_learned_positions: bool
) -> dict[str, Tensor]:
    """A transformer's state dict under the names of diffusers' CogVideoXTransformer3DModel.

    A fixed position table (has_learned_positions False) is left out: diffusers computes it. Without a patch in time,
    diffusers keeps the patch projection as a convolution kernel (d c p q). Raises CheckpointError for other names.
    """
    frames, rows, columns = (1, patch_size, patch_size) if isinstance(patch_size, int) else patch_size
    left_out = DIT_LEFT_OUT if has_learned_positions else (*DIT_LEFT_OUT, DIT_POSITIONS)
    result: dict[str, Tensor] = {}
    for name, value in state.items():
        if name in left_out:
            continue
        if name == "mixins.patch_embed.proj.weight" and frames == 1:
            value = value.reshape(value.shape[0], -1, rows, columns)
        result.update(_blocks_to_diffusers(name, value) or {_rename_dit(name, source=0, target=1): value})
    return result


def dit_from_diffusers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict of diffusers' CogVideoXTransformer3DModel under our names; what DIT_LEFT_OUT lists is not in it."""
    parts: dict[str, dict[int, Tensor]] = {}
    result: dict[str, Tensor] = {}
    for name, value in state.items():
        fused = _blocks_from_diffusers(name, value)
        if fused is not None:
            parts.setdefault(fused[0], {}).update(fused[1])
        elif name == "patch_embed.proj.weight":
            result["mixins.patch_embed.proj.weight"] = value.flatten(1)
        else:
            result[_rename_dit(name, source=1, target=0)] = value
    result.update(_joined(parts))
    return result


def _joined(parts: Mapping[str, Mapping[int, Tensor]]) -> dict[str, Tensor]:
    """Fused weights of their blocks of rows."""
    return {name: torch.cat([blocks[index] for index in sorted(blocks)]) for name, blocks in parts.items()}


def _rename_dit(name: str, source: int, target: int, table: Sequence[tuple[str, str]] = DIT_PREFIXES) -> str:
    found = renamed(name, table, source, target)
    if found is not None:
        return found
    whose = ("diffusers has", "this project has")[source]
    hint = "; fold adapters into the weights first (merge_lora)" if "matrix_" in name or ".original." in name else ""
    raise CheckpointError(f"{whose} no place for the weight '{name}'{hint}")


def _blocks_to_diffusers(name: str, value: Tensor, table: Blocks = DIT_BLOCKS) -> dict[str, Tensor] | None:
    for pattern, targets in table:
        match = matched(pattern, name)
        if match and name[match.end() :] in ("weight", "bias"):
            chunks = value.chunk(sum(map(len, targets.values())))
            return {
                target.format(**match.groupdict()) + name[match.end() :]: torch.cat([chunks[i] for i in blocks])
                for target, blocks in targets.items()
            }
    return None


def _blocks_from_diffusers(
    name: str, value: Tensor, table: Blocks = DIT_BLOCKS
) -> tuple[str, dict[int, Tensor]] | None:
    for pattern, targets in table:
        for target, blocks in targets.items():
            match = matched(target, name)
            if match:
                whole = pattern.format(**match.groupdict()) + name[match.end() :]
                return whole, dict(zip(blocks, value.chunk(len(blocks))))
    return None


# --- CogView3-Plus ---------------------------------------------------------------------------------------------------

COGVIEW3_PREFIXES = (
    ("time_embed.0.", "time_condition_embed.timestep_embedder.linear_1."),
    ("time_embed.2.", "time_condition_embed.timestep_embedder.linear_2."),
    ("label_emb.0.0.", "time_condition_embed.condition_embedder.linear_1."),
    ("label_emb.0.2.", "time_condition_embed.condition_embedder.linear_2."),
    ("mixins.patch_embed.proj.", "patch_embed.proj."),
    ("mixins.patch_embed.text_proj.", "patch_embed.text_proj."),
    ("mixins.adaln.adaln_modules.{layer}.1.", "transformer_blocks.{layer}.norm1.linear."),
    ("transformer.layers.{layer}.attention.dense.", "transformer_blocks.{layer}.attn1.to_out.0."),
    ("transformer.layers.{layer}.mlp.dense_h_to_4h.", "transformer_blocks.{layer}.ff.net.0.proj."),
    ("transformer.layers.{layer}.mlp.dense_4h_to_h.", "transformer_blocks.{layer}.ff.net.2."),
    ("mixins.final_layer.linear.", "proj_out."),
)
"""Beginnings of CogView3-Plus' names: ours, diffusers'."""

COGVIEW3_BLOCKS: Blocks = (DIT_BLOCKS[0], ("mixins.final_layer.adaln.1.", {"norm_out.linear.": (1, 0)}))
"""As DIT_BLOCKS: q, k and v in the same way; the final layer's shift and scale stand in the other order."""

COGVIEW3_POSITIONS = "mixins.pos_embed.image_pos_embedding"
"""A fixed table of ours, which diffusers computes."""


def cogview3_to_diffusers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A CogView3-Plus state dict under the names of diffusers' CogView3PlusTransformer2DModel, without positions."""
    result: dict[str, Tensor] = {}
    for name, value in state.items():
        if name != COGVIEW3_POSITIONS:
            blocks = _blocks_to_diffusers(name, value, COGVIEW3_BLOCKS)
            result.update(blocks or {_rename_dit(name, source=0, target=1, table=COGVIEW3_PREFIXES): value})
    return result


def cogview3_from_diffusers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict of diffusers' CogView3PlusTransformer2DModel under our names, without COGVIEW3_POSITIONS."""
    parts: dict[str, dict[int, Tensor]] = {}
    result: dict[str, Tensor] = {}
    for name, value in state.items():
        fused = _blocks_from_diffusers(name, value, COGVIEW3_BLOCKS)
        if fused is not None:
            parts.setdefault(fused[0], {}).update(fused[1])
        else:
            result[_rename_dit(name, source=1, target=0, table=COGVIEW3_PREFIXES)] = value
    return {**result, **_joined(parts)}
