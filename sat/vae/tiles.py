"""Tiles along space that overlap and are blended, so that memory does not grow with a clip's rows and columns.

Norms see one tile at a time, so a tiled result is near the whole one but not equal to it. A clip that fits into one
tile is not cut and comes out exactly as without tiles. Video is (b t c h w).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sat.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Tiling:
    """Sizes of tiles and of what neighbours share, all in pixels and whole latents."""

    height: int
    width: int
    overlap_height: int | None = None
    """By default a sixth of `height`, rounded down to whole latents but one at least."""
    overlap_width: int | None = None
    """By default a fifth of `width`, likewise."""

    def in_latents(self, factor: int) -> "LatentTiling":
        """The same in latents of `factor` pixels. Raises ConfigError where that is no whole number."""
        return LatentTiling(
            tile=(_in_latents("height", self.height, factor, 2), _in_latents("width", self.width, factor, 2)),
            overlap=(
                self._overlap("height", self.height, self.overlap_height, 6, factor),
                self._overlap("width", self.width, self.overlap_width, 5, factor),
            ),
        )

    @staticmethod
    def _overlap(name: str, size: int, overlap: int | None, share: int, factor: int) -> int:
        if overlap is None:
            return max(1, size // share // factor)
        if 2 * overlap > size:
            raise ConfigError(
                f"tile: overlap_{name} {overlap} is more than half of {name} {size}, so that three tiles would share "
                f"a place; give at most {size // 2 // factor * factor}"
            )
        return _in_latents(f"overlap_{name}", overlap, factor, 1)


def _in_latents(name: str, size: int, factor: int, least: int) -> int:
    if size < least * factor or size % factor:
        near = max(least, size // factor) * factor
        raise ConfigError(
            f"tile: {name} {size} is not a multiple of a latent's {factor} pixels, from {least * factor} on; "
            f"give {near} or {near + factor}"
        )
    return size // factor


@dataclass(frozen=True)
class LatentTiling:
    """(rows, columns) of latents: of a tile, and of what it shares with the next one."""

    tile: tuple[int, int]
    overlap: tuple[int, int]

    @property
    def step(self) -> tuple[int, int]:
        """From one tile to the next."""
        return self.tile[0] - self.overlap[0], self.tile[1] - self.overlap[1]

    def covers(self, size: Sequence[int]) -> bool:
        """Whether a clip of `size` rows and columns of latents fits into one tile."""
        return size[0] <= self.tile[0] and size[1] <= self.tile[1]


def run_tiles(
    run: Callable[[Tensor], Tensor], video: Tensor, tiling: LatentTiling, size: Sequence[int], factors: tuple[int, int]
) -> Tensor:
    """`run` on tiles of (b t c h w), one at a time, put together.

    size: the clip's rows and columns of latents. factors: rows (columns) of the video, and of the result, per latent.
    Over what they share, a tile is blended linearly with the one above, then with the one to its left.
    """
    factor_in, factor_out = factors
    overlap, step = ([factor_out * count for count in counts] for counts in (tiling.overlap, tiling.step))
    result: Tensor | None = None
    lower_edges: dict[int, Tensor] = {}
    for top in range(0, size[0], tiling.step[0]):
        right_edge: Tensor | None = None
        for left in range(0, size[1], tiling.step[1]):
            rows, columns = (
                # The last tile also gets the pixels that are left over from whole latents.
                slice(factor_in * start, None if start + length >= end else factor_in * (start + length))
                for start, length, end in zip((top, left), tiling.tile, size)
            )
            tile = run(video[..., rows, columns])
            if left in lower_edges:
                _blend(lower_edges[left], tile, -2)
            if right_edge is not None:
                _blend(right_edge, tile, -1)
            lower_edges[left] = tile[..., -overlap[0] :, :].clone()  # a view would keep the tile alive
            right_edge = tile[..., -overlap[1] :].clone()
            if result is None:
                result = tile.new_empty((*tile.shape[:3], *(factor_out * count for count in size)))
            place = result[..., factor_out * top :, factor_out * left :][..., : step[0], : step[1]]
            place.copy_(tile[..., : step[0], : step[1]])
    assert result is not None
    return result


def _blend(edge: Tensor, tile: Tensor, dim: int) -> None:
    """Fade from the end of `edge` to the start of `tile` along `dim`, in place: from all edge to nearly all tile."""
    length = min(edge.shape[dim], tile.shape[dim])
    share = torch.arange(length, device=tile.device) / length
    head = tile.narrow(dim, 0, length)
    end = edge.narrow(dim, edge.shape[dim] - length, length)
    head.copy_(torch.lerp(end, head, share.to(tile.dtype).unflatten(0, (-1, 1) if dim == -2 else (1, -1))))
