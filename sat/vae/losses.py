"""What a VAE is trained to make small."""

import torch
from torch import Tensor, nn

from sat.vae.posterior import DiagonalGaussian


class ReconstructionLoss(nn.Module):
    """l1_weight * mean |x - y| + l2_weight * mean (x - y)^2 + kl_weight * mean KL, for each clip.

    Means are over every value of the pixels and of the latents, so that weights keep their meaning when clips grow in
    a later stage. (The released code sums both over the clip: its KL weight is ours times values per latent over
    values per pixel.) At kl_weight 1e-4 about 3 nats per latent value remain.
    """

    def __init__(self, l1_weight: float = 1.0, l2_weight: float = 0.0, kl_weight: float = 1e-4) -> None:
        super().__init__()
        self.l1_weight = l1_weight
        self.l2_weight = l2_weight
        self.kl_weight = kl_weight

    def forward(self, pixels: Tensor, reconstruction: Tensor, posterior: DiagonalGaussian) -> dict[str, Tensor]:
        """Per clip (b,), float32: `loss`, and before weighting `l1`, `l2`, `kl`, and `psnr` in dB.

        pixels and reconstruction (b T 3 H W) in [-1, 1].
        """
        difference = (reconstruction.float() - pixels.float()).flatten(1)
        l1, l2 = difference.abs().mean(dim=1), difference.square().mean(dim=1)
        kl = DiagonalGaussian(posterior.moments.float()).kl().sum(dim=1) / posterior.mean[0].numel()
        loss = self.l1_weight * l1 + self.l2_weight * l2 + self.kl_weight * kl
        return {"loss": loss, "l1": l1, "l2": l2, "kl": kl, "psnr": psnr(l2)}


def psnr(mean_square: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of a mean squared error between pixels in [-1, 1]."""
    return 10.0 * torch.log10(4.0 / mean_square.detach().clamp(min=1e-12))
