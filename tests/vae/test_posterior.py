"""The latent distribution against torch's, its clamps, and its draws."""

import pytest
import torch
from torch import Tensor
from torch.distributions import Normal, kl_divergence
from torch.testing import assert_close

from sat.vae import DiagonalGaussian, DiagonalGaussianRegularizer


def make_moments(seed: int = 0) -> Tensor:
    return torch.randn(2, 3, 8, 4, 5, generator=torch.Generator().manual_seed(seed))


def normal(posterior: DiagonalGaussian) -> Normal:
    return Normal(posterior.mean, posterior.std)


def test_sums_are_those_of_independent_normals() -> None:
    own, other = DiagonalGaussian(make_moments()), DiagonalGaussian(make_moments(1))
    standard = Normal(torch.zeros(()), torch.ones(()))
    over = (1, 2, 3)  # t, z and h: what the released code sums
    assert_close(own.kl(), kl_divergence(normal(own), standard).sum(over))
    assert_close(own.kl(other), kl_divergence(normal(own), normal(other)).sum(over))
    assert_close(own.nll(other.mean), -normal(own).log_prob(other.mean).sum(over))
    assert own.kl().shape == (2, 5)
    assert_close(own.kl_loss(), kl_divergence(normal(own), standard).sum() / 2)


def test_log_variances_are_clamped() -> None:
    moments = torch.zeros(1, 1, 2, 1, 2)
    moments[:, :, 1] = torch.tensor([-1e4, 1e4])
    posterior = DiagonalGaussian(moments)
    assert posterior.logvar.flatten().tolist() == [-30.0, 20.0]
    assert torch.isfinite(posterior.var).all()
    assert torch.isfinite(posterior.kl()).all()


def test_draws_are_mean_and_scaled_noise() -> None:
    posterior = DiagonalGaussian(make_moments())
    noise = torch.randn(posterior.mean.shape, generator=torch.Generator().manual_seed(5))
    assert torch.equal(posterior.sample(noise), posterior.mean + posterior.std * noise)
    assert torch.equal(posterior.sample(generator=torch.Generator().manual_seed(5)), posterior.sample(noise))


def test_draws_leave_the_global_random_state_alone() -> None:
    state = torch.random.get_rng_state()
    DiagonalGaussian(make_moments()).sample(generator=torch.Generator().manual_seed(5))
    assert torch.equal(torch.random.get_rng_state(), state)


def test_a_draw_without_noise_is_refused() -> None:
    with pytest.raises(ValueError, match="give the noise or a generator to draw it from; for no noise take the mean"):
        DiagonalGaussian(make_moments()).sample()


def test_noise_of_another_shape_is_refused() -> None:
    with pytest.raises(ValueError, match=r"noise is \(2, 4\), the latents are \(2, 3, 4, 4, 5\)"):
        DiagonalGaussian(make_moments()).sample(torch.zeros(2, 4))


def test_noise_is_brought_to_the_precision_of_the_latents() -> None:
    posterior = DiagonalGaussian(make_moments().bfloat16())
    assert posterior.sample(generator=torch.Generator().manual_seed(5)).dtype == torch.bfloat16


def test_a_deterministic_one_has_no_spread() -> None:
    posterior = DiagonalGaussian(make_moments(), deterministic=True)
    assert torch.equal(posterior.sample(), posterior.mean)
    for value in (posterior.std, posterior.var, posterior.kl(), posterior.nll(posterior.mean)):
        assert not value.any()


def test_the_regularizer_draws_or_takes_the_mean() -> None:
    posterior = DiagonalGaussian(make_moments())
    noise = torch.ones_like(posterior.mean)
    assert torch.equal(DiagonalGaussianRegularizer()(posterior, noise), posterior.mean + posterior.std)
    assert torch.equal(DiagonalGaussianRegularizer(sample=False)(posterior), posterior.mean)
