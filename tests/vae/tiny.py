"""A tiny VAE of the released form, with random numbers in every weight, and clips for it."""

from typing import Any

import torch
from torch import Tensor

from sat.vae import Decoder3D, DiagonalGaussianRegularizer, Encoder3D, VideoAutoencoder

SIZE: dict[str, Any] = {"ch": 8, "ch_mult": (1, 2, 2, 4), "num_res_blocks": 1, "z_channels": 4, "norm_groups": 4}
"""Eight rows, eight columns and four frames to a latent, as in the released models."""


def randomize(module: torch.nn.Module, seed: int = 0) -> None:
    """Random numbers in every weight, of a size that keeps activations near 1; no path is silent."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            is_gain = name.endswith("weight") and parameter.dim() == 1
            fan_in = max(1, parameter[0].numel())
            parameter.copy_(1.0 + 0.2 * noise if is_gain or ".conv_y.conv.bias" in name else noise / fan_in**0.5)


def build_vae(
    seed: int = 0, decoder: dict[str, Any] | None = None, decode_preset: str = "v1", **changes: Any
) -> VideoAutoencoder:
    """A VAE of SIZE with changes, those in `decoder` in its decoder only."""
    sizes = {**SIZE, **changes}
    halves = Encoder3D(**sizes), Decoder3D(**{**sizes, **(decoder or {})})
    vae = VideoAutoencoder(*halves, DiagonalGaussianRegularizer(), decode_preset=decode_preset)
    randomize(vae, seed)
    return vae.eval()


def make_pixels(num_frames: int, height: int = 16, width: int = 24, batch: int = 1, seed: int = 1) -> Tensor:
    """(b T 3 H W) in [-1, 1]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(batch, num_frames, 3, height, width, generator=generator) * 2 - 1


def make_latents(num_latents: int, height: int = 2, width: int = 3, batch: int = 1, seed: int = 2) -> Tensor:
    """(b t z h w), standard normal."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, num_latents, SIZE["z_channels"], height, width, generator=generator)


def make_hidden(shape: tuple[int, ...], layout: torch.memory_format, channels: int = 8) -> Tensor:
    batch, *rest = shape
    generator = torch.Generator().manual_seed(1)
    hidden = 0.5 + 2 * torch.randn(batch, channels, *rest, generator=generator)
    return hidden.contiguous(memory_format=layout)
