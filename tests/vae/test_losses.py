"""The reconstruction loss: means over values, whatever the clip's size, and PSNR."""

import pytest
import torch
from torch.testing import assert_close

from sat.vae import DiagonalGaussian, ReconstructionLoss
from sat.vae.losses import psnr
from tests.vae.tiny import make_pixels


def make_posterior(batch: int = 2) -> DiagonalGaussian:
    return DiagonalGaussian(torch.randn(batch, 2, 8, 2, 3, generator=torch.Generator().manual_seed(0)))


def test_values_are_those_of_the_formula_for_each_clip() -> None:
    pixels, reconstruction = make_pixels(5, batch=2), make_pixels(5, batch=2, seed=2)
    posterior = make_posterior()
    values = ReconstructionLoss(l1_weight=0.3, l2_weight=2.0, kl_weight=0.1)(pixels, reconstruction, posterior)
    assert set(values) == {"loss", "l1", "l2", "kl", "psnr"}
    for clip in (0, 1):
        difference = pixels[clip] - reconstruction[clip]
        terms = posterior.mean[clip].square() + posterior.var[clip] - 1 - posterior.logvar[clip]
        l1, l2, kl = difference.abs().mean(), difference.square().mean(), terms.mean() / 2
        assert_close(values["l1"][clip], l1)
        assert_close(values["l2"][clip], l2)
        assert_close(values["kl"][clip], kl)
        assert_close(values["loss"][clip], 0.3 * l1 + 2.0 * l2 + 0.1 * kl)
        assert_close(values["psnr"][clip], -10 * torch.log10(l2 / 4))


def test_weights_keep_their_meaning_when_clips_grow() -> None:
    pixels, posterior = make_pixels(5), make_posterior(1)
    loss = ReconstructionLoss()
    values = loss(pixels, -pixels, posterior)
    grown = DiagonalGaussian(posterior.moments.repeat(1, 2, 1, 2, 2))
    large = pixels.repeat(1, 2, 1, 2, 2)
    for name, value in loss(large, -large, grown).items():
        assert_close(value, values[name])


def test_low_precision_is_measured_in_float32() -> None:
    pixels, moments = make_pixels(5).bfloat16(), make_posterior(1).moments.bfloat16()
    low = ReconstructionLoss()(pixels, -pixels, DiagonalGaussian(moments))
    exact = ReconstructionLoss()(pixels.float(), -pixels.float(), DiagonalGaussian(moments.float()))
    for name, value in low.items():
        assert torch.equal(value, exact[name]), name


@pytest.mark.parametrize("mean_square, expected", [(4.0, 0.0), (0.04, 20.0), (4e-6, 60.0), (0.0, 126.0206)])
def test_psnr_of_pixels_in_their_range(mean_square: float, expected: float) -> None:
    assert_close(psnr(torch.tensor(mean_square)), torch.tensor(expected), atol=1e-3, rtol=0.0)


def test_psnr_sends_no_gradient() -> None:
    assert not psnr(torch.tensor(0.5, requires_grad=True)).requires_grad
