"""The CogView3-Plus transformer: CogVideoX's, assembled from the parts of an image model."""

from collections.abc import Mapping
from typing import Any, ClassVar

from sat.cogvideox.transformer import DiffusionTransformer
from sat.errors import ConfigError


class CogView3PlusTransformer(DiffusionTransformer):
    """Predicts v from noisy latents of an image, a time, text states and sizes (CogView3, arXiv:2403.05121; the DiT
    form of its later release).

    Its `forward` takes a clip of one frame (b 1 c h w), and as `y` (b, adm_in_channels) the embedded sizes: original
    size, crop, target size. latent_height and latent_width are what it is sampled at unless told otherwise.
    """

    MIXINS: ClassVar[Mapping[str, str]] = {
        "pos_embed": "pos_embed_config",
        "patch_embed": "patch_embed_config",
        "adaln": "attention_config",
        "final_layer": "final_layer_config",
        "lora": "lora_config",
    }

    def __init__(
        self,
        hidden_size: int,
        num_layers: int,
        num_attention_heads: int,
        in_channels: int,
        out_channels: int,
        patch_size: int,
        modules: Mapping[str, Any],
        latent_height: int = 128,
        latent_width: int = 128,
        time_embed_dim: int | None = None,
        num_classes: int | str | None = "sequential",
        adm_in_channels: int | None = 1536,
        elementwise_affine: bool = False,
        transformer_args: Mapping[str, Any] | None = None,
    ) -> None:
        if not isinstance(patch_size, int):
            raise ConfigError(f"patch_size is {patch_size}; an image model takes one number for rows and columns")
        super().__init__(
            hidden_size=hidden_size,
            num_layers=num_layers,
            num_attention_heads=num_attention_heads,
            num_frames=1,
            latent_height=latent_height,
            latent_width=latent_width,
            in_channels=in_channels,
            out_channels=out_channels,
            modules=modules,
            patch_size=patch_size,
            transformer_args=transformer_args,
            time_embed_dim=time_embed_dim,
            num_classes=num_classes,
            adm_in_channels=adm_in_channels,
            elementwise_affine=elementwise_affine,
        )
