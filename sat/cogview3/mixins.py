"""The parts of CogView3-Plus: those of CogVideoX under the names of the CogView3 release, and 2D positions.

An image is a clip of one frame. Letters: b batch, h w latent rows and columns; n text tokens, s all tokens (text
first), d hidden size.
"""

import torch
from torch import Tensor, nn

from sat.cogvideox.context import Grid, VideoContext
from sat.cogvideox.mixins import FINAL_NORM_EPSILON, AdaLNMixin, FinalLayerMixin, sincos_positions
from sat.config import warn_once
from sat.model.base_model import BaseMixin, BaseModel


def sincos_table_2d(rows: int, columns: int, hidden_size: int) -> Tensor:
    """Fixed positions of a grid: (rows, columns, hidden_size) float32; half of the channels hold the column, then the
    other half the row."""
    half = hidden_size // 2
    by_column = sincos_positions(torch.arange(columns, dtype=torch.float64), half)
    by_row = sincos_positions(torch.arange(rows, dtype=torch.float64), half)
    parts = (by_column[None].expand(rows, -1, -1), by_row[:, None].expand(-1, columns, -1))
    return torch.cat(parts, dim=-1).float()


class PositionEmbeddingMixin(BaseMixin):
    """Fixed 2D sin-cos positions added to the image tokens. The table is stored but never trained.

    max_height, max_width: rows and columns of the stored table, in tokens. An image takes the table's corner of its
    own size; one larger than the table gets the same function computed further.
    """

    replaces_position_embeddings = True

    def __init__(self, max_height: int, max_width: int, hidden_size: int) -> None:
        super().__init__()
        if hidden_size % 4:
            raise ValueError(f"2D sin-cos positions need a hidden_size that is a multiple of 4, not {hidden_size}")
        self.hidden_size = hidden_size
        self.image_pos_embedding = nn.Parameter(torch.empty(max_height, max_width, hidden_size), requires_grad=False)
        self.reinit()

    def reinit(self, parent_model: BaseModel | None = None) -> None:
        rows, columns, _ = self.image_pos_embedding.shape
        with torch.no_grad():
            self.image_pos_embedding.copy_(sincos_table_2d(rows, columns, self.hidden_size))

    def position_embedding_forward(self, position_ids: Tensor | None, *, ctx: VideoContext) -> Tensor:
        assert ctx.layout is not None
        grids = ctx.layout.grids if ctx.layout.is_packed else ctx.layout.grids[:1]
        return torch.cat([self._rows_of_one(grid, ctx.layout.text_length) for grid in grids]).unsqueeze(0)  # 1 s d

    def _rows_of_one(self, grid: Grid, text_length: int) -> Tensor:
        _, rows, columns = grid
        table: Tensor = self.image_pos_embedding
        if rows > table.shape[0] or columns > table.shape[1]:
            stored = " x ".join(map(str, table.shape[:2]))
            warn_once(
                f"positions are computed for {rows} x {columns} tokens; the model was trained with up to {stored}"
            )
            table = sincos_table_2d(rows, columns, self.hidden_size).to(table)
        image = table[:rows, :columns].reshape(rows * columns, -1)
        return torch.cat([image.new_zeros(text_length, self.hidden_size), image])


class AdalnAttentionMixin(AdaLNMixin):
    """Expert AdaLN as in CogVideoX; it starts as the identity, and its norms on q and k have no weights."""

    def __init__(
        self,
        hidden_size: int,
        num_layers: int,
        time_embed_dim: int,
        hidden_size_head: int,
        qk_ln: bool = True,
        elementwise_affine: bool = False,
        sequence_parallel: bool = False,
    ) -> None:
        sizes = (hidden_size, num_layers, time_embed_dim, hidden_size_head)
        super().__init__(*sizes, qk_ln, elementwise_affine, sequence_parallel)
        self.adaln_modules = self.adaLN_modulations
        del self.adaLN_modulations

    @property
    def modulations(self) -> nn.ModuleList:
        return self.adaln_modules

    def reinit(self, parent_model: BaseModel | None = None) -> None:
        self.zero_modulations()


class CogView3FinalLayerMixin(FinalLayerMixin):
    """The final layer as in CogVideoX; its norm has no weights."""

    def __init__(
        self,
        hidden_size: int,
        time_embed_dim: int,
        patch_size: tuple[int, ...],
        out_channels: int,
        elementwise_affine: bool = False,
        eps: float = FINAL_NORM_EPSILON,
    ) -> None:
        super().__init__(hidden_size, time_embed_dim, patch_size, out_channels, elementwise_affine, eps)
        self.adaln = self.adaLN_modulation
        del self.adaLN_modulation

    @property
    def modulation(self) -> nn.Module:
        return self.adaln
