"""What the layers of one pass through encoder or decoder share.

Letters: `b` batch, `t` latent frames, `z` latent channels, `h w` rows and columns.
"""

from dataclasses import dataclass

from torch import Tensor

from sat.vae.causal_conv import ConvCache, FirstFrame
from sat.vae.shard import FrameShard


@dataclass(frozen=True)
class ChunkContext:
    """What the layers of one pass share: the first-frame rule, the clip's conv cache, in the decoder its latents."""

    first_frame: FirstFrame
    cache: ConvCache | None = None
    latents: Tensor | None = None
    """(b z t h w): the decoder's input, which conditions its norms."""
    shard: FrameShard | None = None
    """Set where other processes hold frames of the same clip."""
