"""What the hooks of the video transformer share during one forward pass."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from sat.errors import HookError
from sat.model.hooks import Context
from sat.mpu.context import SequenceShard
from sat.mpu.state import ParallelState
from sat.ops.modulate import Span, TokenRows

Grid = tuple[int, int, int]
"""Token frames, rows and columns of a clip; columns change fastest along the sequence."""

TEXT, VIDEO, NUM_ROWS = 0, 1, 2
"""Rows of a sample's modulation, and how many there are."""


@dataclass(frozen=True)
class TokenLayout:
    """How samples lie in sequences: each its text, then its video.

    Either every sample is a row of its own, all of one grid, or all lie one behind the other in a single row (packed;
    Dehghani et al. 2023, arXiv:2307.06304), each with a grid of its own.
    """

    grids: tuple[Grid, ...]
    text_length: int
    """Text tokens of each sample."""
    is_packed: bool = False

    @property
    def lengths(self) -> list[int]:
        """Tokens of each sample, text and video."""
        return [self.text_length + math.prod(grid) for grid in self.grids]

    @property
    def bounds(self) -> tuple[int, ...]:
        """Where samples begin and end in a row."""
        return (0, *accumulate(self.lengths)) if self.is_packed else (0, self.lengths[0])

    @property
    def length(self) -> int:
        """Tokens of a row."""
        return self.bounds[-1]

    def share(self, parallel: ParallelState, device: torch.device | None = None) -> SequenceShard | None:
        """What of a row this rank holds; None: all of it, and every token sees every other."""
        return SequenceShard.of(self.length, parallel, self.bounds if self.is_packed else None, device)

    def modality_spans(self, sequence: SequenceShard | None) -> tuple[Span, ...]:
        """Which of the tokens that a rank holds are text and which are video, and of which sample."""
        spans = []
        for number, start in enumerate(self.bounds[:-1]):
            sample = number if self.is_packed else None
            middle, stop = start + self.text_length, start + self.lengths[number]
            spans += [Span(start, middle, TEXT, sample), Span(middle, stop, VIDEO, sample)]
        return _own(spans, sequence)

    def sample_spans(self, sequence: SequenceShard | None) -> tuple[Span, ...]:
        """The same without telling text and video apart: all tokens of a sample take row 0."""
        pairs = zip(self.bounds, self.bounds[1:])
        spans = [Span(start, stop, 0, number if self.is_packed else None) for number, (start, stop) in enumerate(pairs)]
        return _own(spans, sequence)

    def video_slices(self) -> list[slice]:
        """Where in a row the video tokens of each sample are."""
        ends = self.bounds[1:]
        return [slice(end - math.prod(grid), end) for end, grid in zip(ends, self.grids)]


def _own(spans: Sequence[Span], sequence: SequenceShard | None) -> tuple[Span, ...]:
    """The parts of spans that a rank holds, counted from its first token. Padding goes to the last span."""
    if sequence is None:
        return tuple(spans)
    own = []
    for number, span in enumerate(spans):
        stop = sequence.part_length * sequence.num_parts if number == len(spans) - 1 else span.stop
        low, high = sequence.count_before(span.start), sequence.count_before(stop)
        if low < high:
            own.append(Span(low, high, span.row, span.sample))
    return tuple(own)


class NoTextLength:
    """Stands for the number of text tokens at the front where samples are packed: there is no such number."""

    def __index__(self) -> int:
        raise HookError(
            "samples are packed into one row, so its text is not at the front: a mixin that reads `text_length` must "
            "use the context's `spans` instead, or train without data.params.pack"
        )


@dataclass(frozen=True)
class VideoContext(Context):
    """Values of one forward pass, under the names that SAT's CogVideoX mixins know."""

    images: Tensor | Sequence[Tensor] | None = None
    """Noisy latents, with the condition's channels appended (b t c h w); of packed samples (t c h w) each."""
    encoder_outputs: Tensor | None = None
    """Text states (b n x)."""
    emb: Tensor | None = None
    """Time embedding (b e)."""
    layout: TokenLayout | None = None
    """How the samples lie in the sequence."""
    text_length: Any = 0
    """Text tokens n, at the front of the hidden states that this rank holds."""
    seq_length: int = 0
    """Video tokens of the whole sequence."""
    rope_T: int = 0
    """Token grid of the (first) sample: frames,"""
    rope_H: int = 0
    """rows"""
    rope_W: int = 0
    """and columns."""
    rope: tuple[Tensor, Tensor] | None = None
    """cos and sin of the turn of every token in attention (s, head size); text tokens do not turn."""
    spans: tuple[Span, ...] = ()
    """Which hidden states that this rank holds are text (row 0) and which are video (row 1)."""
    token_rows: TokenRows | None = None
    """The same as tensors, where layers are compiled."""
    sequence: SequenceShard | None = None
    """What of the sequence this rank holds; None: all of it."""
    lora_scale: float | Sequence[float] | None = None
    """What the effect of adapters is multiplied by in this call: one number for all of them, or one for each."""
