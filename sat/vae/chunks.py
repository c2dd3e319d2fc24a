"""How a clip is cut along time, so that encoding or decoding it takes memory for one chunk only.

Convolution caches carry over from chunk to chunk. The norms' statistics are each chunk's own, so the numbers depend
on the cut: a model must be decoded with the one that it was released with.
"""

import logging
from dataclasses import dataclass

from sat.vae.causal_conv import FirstFrame

log = logging.getLogger(__name__)

MAX_MAIN_CHUNKS = 10
"""The preset `main` never makes more chunks than this; longer clips get longer chunks."""


@dataclass(frozen=True)
class DecodePlan:
    """How a row of latents is decoded."""

    sizes: tuple[int, ...]
    """Latents per chunk."""
    split_first: bool
    """Whether the clip's first frame stays apart (4n - 3 frames from n latents) or not (4n)."""
    drop_first: bool = False
    """Whether latent 0 is left out before the first chunk."""

    @property
    def rules(self) -> list[FirstFrame]:
        """The first-frame rule of each chunk."""
        rules: list[FirstFrame] = ["nosplit"] * len(self.sizes)
        if self.split_first:
            rules[0] = "split"
        return rules


DECODE_PRESETS = ("v1", "main_shipped", "main_intended")
"""Names of plans for any number of latents.

v1: chunks of 3, 2, 2, ...; for CogVideoX-2B and 5B; 13 latents -> 49 frames. One latent is an image.
main_intended: at most 10 chunks, the longer ones first; for CogVideoX1.5. Latent 0, a surplus, goes: 22 -> 81 frames.
main_shipped: the same, but the first frame is treated like all others, as the released script in fact does: 84 frames.
"""


def _sizes_v1(num_latents: int) -> tuple[int, ...]:
    first = 1 if num_latents == 1 else 2 + num_latents % 2
    return (first,) + (2,) * ((num_latents - first) // 2)


def _sizes_main(num_latents: int) -> tuple[int, ...]:
    num_chunks = max(min(MAX_MAIN_CHUNKS, num_latents // 2), 1)
    size, longer = divmod(num_latents, num_chunks)
    return (size + 1,) * longer + (size,) * (num_chunks - longer)


def plan_decode(preset: str, num_latents: int, every: bool = False) -> DecodePlan:
    """The plan that a preset's name stands for.

    every: decode every latent; else leave out what the released script of that name does: main_* latent 0, v1 the last
    of an even number. Raises ValueError for unknown names and for too few latents.
    """
    if preset not in DECODE_PRESETS:
        raise ValueError(f"there is no decode preset '{preset}'; presets: {', '.join(DECODE_PRESETS)}")
    if preset == "v1":
        return DecodePlan(_sizes_v1(num_latents if every else _odd(num_latents)), split_first=True)
    if not every and num_latents < 3:
        raise ValueError(
            f"preset {preset} leaves out latent 0 and needs 2 more, but there are {num_latents}; "
            "use decode() without chunks, or preset v1 for a single image"
        )
    split_first = preset == "main_intended"
    return DecodePlan(_sizes_main(num_latents if every else num_latents - 1), split_first, drop_first=not every)


def _odd(num_latents: int) -> int:
    """How many latents the released v1 decodes."""
    if num_latents == 2:
        raise ValueError("preset v1 starts with a chunk of 3 latents and cannot decode 2; use decode() without chunks")
    if num_latents % 2 == 0:
        log.warning("preset v1 decodes an odd number of latents: the last of %d is left out", num_latents)
    return num_latents - 1 + num_latents % 2


def encode_chunk_sizes(num_frames: int, frames_per_chunk: int) -> list[int]:
    """Frames per chunk: whole chunks, the remainder joining the first. diffusers' rule, there with 8 frames."""
    num_chunks = max(1, num_frames // frames_per_chunk)
    return [num_frames - (num_chunks - 1) * frames_per_chunk] + [frames_per_chunk] * (num_chunks - 1)
