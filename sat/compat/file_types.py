"""What files that are not weights start with, and what the shapes of a VAE's weights say: data about foreign files."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

FOREIGN_STARTS = {
    b"<": "a web page, as a download link gives that asks for a log-in or a confirmation; download it again",
    b"version https://git-lfs": "a Git LFS pointer, not the file that it points to; run `git lfs pull`",
}
"""Beginning of a file -> what it is instead of weights, and how to get them."""


def describe_vae(shapes: Mapping[str, Sequence[int]]) -> str | None:
    """The options that a VAE's weights were made with; None for weights of another kind.

    For the released one: `ch 128, ch_mult [1, 2, 2, 4], num_res_blocks 3, z_channels 16`.
    """
    sizes = vae_sizes(shapes)
    if sizes is None:
        return None
    mult = ", ".join(f"{factor:g}" for factor in sizes["ch_mult"])
    return (
        f"ch {sizes['ch']}, ch_mult [{mult}], num_res_blocks {sizes['num_res_blocks']}, "
        f"z_channels {sizes['z_channels']}"
    )


def vae_sizes(shapes: Mapping[str, Sequence[int]]) -> dict[str, Any] | None:
    """ch, ch_mult, num_res_blocks and z_channels of a VAE, by the shapes of its weights under our names."""
    conv_in, latent_in = shapes.get("encoder.conv_in.conv.weight"), shapes.get("decoder.conv_in.conv.weight")
    if conv_in is None or latent_in is None:
        return None
    pattern = re.compile(r"encoder\.down\.(\d+)\.block\.(\d+)\.conv2\.conv\.weight")
    blocks = [(int(match[1]), int(match[2]), shapes[name][0]) for name in shapes if (match := pattern.fullmatch(name))]
    widths = {level: width for level, _, width in blocks}
    factors = [widths[level] / conv_in[0] for level in sorted(widths)]
    return {
        "ch": conv_in[0],
        "ch_mult": [int(factor) if factor.is_integer() else factor for factor in factors],
        "num_res_blocks": 1 + max((block for _, block, _ in blocks), default=-1),
        "z_channels": latent_in[1],
    }
