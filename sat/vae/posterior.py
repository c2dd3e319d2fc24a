"""The Gaussian that the encoder gives for every value of the latents.

Letters: `b` batch, `t` latent frames, `z` latent channels, `h w` latent rows and columns.
"""

import math

import torch
from torch import Tensor, nn

LOGVAR_MIN, LOGVAR_MAX = -30.0, 20.0


class DiagonalGaussian:
    """Independent normal distributions over latents (b t z h w).

    moments: (b t 2z h w), means and then log-variances, which are clamped to [-30, 20]. A deterministic one has no
    spread: samples are the mean, divergences 0.
    """

    def __init__(self, moments: Tensor, deterministic: bool = False) -> None:
        self.moments = moments
        self.deterministic = deterministic
        self.mean, logvar = moments.chunk(2, dim=2)
        self.logvar = logvar.clamp(LOGVAR_MIN, LOGVAR_MAX)

    @property
    def std(self) -> Tensor:
        """Standard deviations (b t z h w)."""
        return torch.zeros_like(self.mean) if self.deterministic else (self.logvar / 2).exp()

    @property
    def var(self) -> Tensor:
        """Variances (b t z h w)."""
        return torch.zeros_like(self.mean) if self.deterministic else self.logvar.exp()

    def sample(self, noise: Tensor | None = None, generator: torch.Generator | None = None) -> Tensor:
        """mean + std * noise (b t z h w); noise as given or drawn from `generator`, never from torch's global state."""
        if self.deterministic:
            return self.mean
        if noise is None:
            if generator is None:
                raise ValueError("give the noise or a generator to draw it from; for no noise take the mean")
            noise = torch.randn(self.mean.shape, generator=generator, device=generator.device)
        if noise.shape != self.mean.shape:
            raise ValueError(f"noise is {tuple(noise.shape)}, the latents are {tuple(self.mean.shape)}")
        return self.mean + self.std * noise.to(self.mean)

    def kl(self, other: "DiagonalGaussian | None" = None) -> Tensor:
        """Divergence from `other` (by default the standard normal), summed over t, z and h: (b w), of nothing else.

        The released code sums three dimensions because it was written for images; sum the rest for a number per clip.
        """
        if self.deterministic:
            return self.mean.new_zeros(1)
        if other is None:
            terms = self.mean.square() + self.var - 1 - self.logvar
        else:
            terms = ((self.mean - other.mean).square() + self.var) / other.var - 1 - self.logvar + other.logvar
        return terms.sum(dim=(1, 2, 3)) / 2

    def kl_loss(self) -> Tensor:
        """Divergence from the standard normal per clip: summed over everything, divided by b. A scalar."""
        return self.kl().sum() / len(self.mean)

    def nll(self, sample: Tensor) -> Tensor:
        """Negative log-likelihood of `sample` (b t z h w), summed over t, z and h: (b w)."""
        if self.deterministic:
            return self.mean.new_zeros(1)
        terms = math.log(2 * math.pi) + self.logvar + (sample - self.mean).square() / self.var
        return terms.sum(dim=(1, 2, 3)) / 2


class DiagonalGaussianRegularizer(nn.Module):
    """Latents from moments: a draw from the posterior, or with `sample: false` always its mean."""

    def __init__(self, sample: bool = True) -> None:
        super().__init__()
        self.samples = sample

    def forward(
        self, posterior: DiagonalGaussian, noise: Tensor | None = None, generator: torch.Generator | None = None
    ) -> Tensor:
        """Latents (b t z h w) of a posterior."""
        return posterior.sample(noise, generator) if self.samples else posterior.mean
