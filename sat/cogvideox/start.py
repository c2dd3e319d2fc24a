"""Weights of a text-to-video network as those of an image-to-video one."""

from collections.abc import Mapping

import torch
from torch import Tensor

from sat.errors import CheckpointError

PATCHES = "mixins.patch_embed.proj.weight"
ADDED = ("mixins.pos_embed.pos_embedding", "ofs_embed.2.weight", "ofs_embed.2.bias")
"""What an image-to-video network adds to its tokens or to the time embedding: at zero it changes nothing."""
BEFORE_ADDED = ("ofs_embed.0.weight", "ofs_embed.0.bias")


def start_from_text_to_video(state: Mapping[str, Tensor], own: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
    """A text-to-video network's state dict, completed for an image-to-video network with the state dict `own`.

    The image's inputs get weights of zero, and so does what the larger network adds, so that the output is that of the
    text-to-video network whatever the image. Both dicts have the same prefix before their names, or none. Raises
    CheckpointError where the file is no such network.
    """
    name = next((name for name in state if name.endswith(PATCHES)), None)
    if name is None or name not in own:
        raise CheckpointError(f"{source} holds no CogVideoX transformer that an image-to-video model could start from")
    prefix, kernel = name.removesuffix(PATCHES), state[name].flatten(1)
    if own[name].shape[1] != 2 * kernel.shape[1]:
        raise CheckpointError(
            f"{source} takes {kernel.shape[1]} numbers a patch and the model {own[name].shape[1]}: these are not a "
            "text-to-video model and its image-to-video form; leave args.from_text_to_video out"
        )
    result = {**state, name: torch.cat([kernel, torch.zeros_like(kernel)], dim=1)}  # patches have their channels first
    for part in (*ADDED, *BEFORE_ADDED):
        missing = f"{prefix}{part}"
        if missing in own and missing not in state:
            result[missing] = torch.zeros_like(own[missing]) if part in ADDED else own[missing]
    return result
