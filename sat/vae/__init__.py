"""Pixels to latents and back: the 3D causal VAE of the CogVideoX models.

vae = VideoAutoencoder(Encoder3D(...), Decoder3D(...), DiagonalGaussianRegularizer(), ckpt_path="3d-vae.pt")
latents = vae.encode(pixels, generator=generator)       # (b T 3 H W) -> (b t z h w)
for frames in vae.decode_chunks(latents):               # (b T' 3 H W), chunk by chunk
    ...
"""

from sat.vae.autoencoder import VideoAutoencoder
from sat.vae.causal_conv import ConvCache
from sat.vae.checkpoint import load_vae, load_vae_state, save_vae_state
from sat.vae.chunks import DECODE_PRESETS, DecodePlan
from sat.vae.decoder import Decoder3D, count_pixel_frames
from sat.vae.encoder import Encoder3D, count_latent_frames
from sat.vae.losses import ReconstructionLoss
from sat.vae.posterior import DiagonalGaussian, DiagonalGaussianRegularizer
from sat.vae.tiles import Tiling

__all__ = [
    "DECODE_PRESETS",
    "ConvCache",
    "DecodePlan",
    "Decoder3D",
    "DiagonalGaussian",
    "DiagonalGaussianRegularizer",
    "Encoder3D",
    "ReconstructionLoss",
    "Tiling",
    "VideoAutoencoder",
    "count_latent_frames",
    "count_pixel_frames",
    "load_vae",
    "load_vae_state",
    "save_vae_state",
]
