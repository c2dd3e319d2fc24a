"""The training loss: the plain error of v in another form, and its options."""

from typing import Any

import pytest
import torch
from torch import Tensor

from sat.diffusion.loss import VideoDiffusionLoss
from sat.diffusion.scaling import DiscreteDenoiser, VideoScaling, add_noise, velocity
from sat.diffusion.schedules import DiscreteSampling, ZeroSNRDDPMDiscretization
from sat.errors import ConfigError

SHAPE = (6, 3, 4, 2, 5)
TIMESTEPS = torch.tensor([0, 1, 250, 500, 998, 999])


def build(shift: float = 1.0, **options: Any) -> tuple[VideoDiffusionLoss, DiscreteDenoiser]:
    discretization = ZeroSNRDDPMDiscretization(shift_scale=shift)
    loss = VideoDiffusionLoss(DiscreteSampling(discretization), **options)
    return loss, DiscreteDenoiser(discretization, VideoScaling())


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    """Latents, noise, and what the network answers, each (b t c h w)."""
    generator = torch.Generator().manual_seed(1)
    latents, noise, output = (torch.randn(SHAPE, generator=generator) for _ in range(3))
    return latents, noise, output


def per_sample(error: Tensor) -> Tensor:
    return error.flatten(1).mean(dim=1)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_loss_is_the_plain_error_of_v(shift: float) -> None:
    loss, denoiser = build(shift)
    latents, noise, output = inputs()
    got = loss(lambda *_: output, denoiser, latents, {}, TIMESTEPS, noise)
    target = velocity(latents, noise, denoiser.alphas[TIMESTEPS])
    # Measured 2e-7, although at timestep 0 a weight of 1,177 meets a small error.
    torch.testing.assert_close(got, per_sample((output - target).square()), rtol=1e-6, atol=0.0)


def test_absolute_loss_is_weighted_alike() -> None:
    loss, denoiser = build(type="l1")
    latents, noise, output = inputs()
    got = loss(lambda *_: output, denoiser, latents, {}, TIMESTEPS, noise)
    alpha = denoiser.alphas[TIMESTEPS]
    target = velocity(latents, noise, alpha)
    expected = per_sample((output - target).abs()) / (1 - alpha.square()).sqrt()
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=0.0)


def test_gradient_is_that_of_the_plain_error() -> None:
    loss, denoiser = build()
    latents, noise, output = inputs()
    output.requires_grad_()
    loss(lambda *_: output, denoiser, latents, {}, TIMESTEPS, noise).mean().backward()
    target = velocity(latents, noise, denoiser.alphas[TIMESTEPS])
    expected = 2 * (output.detach() - target) / output.numel()
    largest = expected.abs().max().item()
    torch.testing.assert_close(output.grad, expected, rtol=0.0, atol=1e-5 * largest)  # measured 1.3e-6 of the largest


def test_weights_at_both_ends() -> None:
    loss, denoiser = build()
    weight = loss.weight(denoiser.alphas[[0, 999]])
    assert weight[1] == 1.0
    assert weight[0].item() == pytest.approx(1177, rel=1e-3)


def test_min_snr_caps_the_weight_of_each_sample() -> None:
    """The released code does this for a batch of one alone."""
    loss, denoiser = build(min_snr_value=5.0)
    latents, noise, output = inputs()
    got = loss(lambda *_: output, denoiser, latents, {}, TIMESTEPS, noise)
    alpha = denoiser.alphas[TIMESTEPS]
    target = velocity(latents, noise, alpha)
    share = (5.0 * (1 - alpha.square())).clamp(max=1.0)
    assert (share[:2] < 0.1).all()
    assert (share[-3:] == 1.0).all()
    torch.testing.assert_close(got, share * per_sample((output - target).square()), rtol=1e-6, atol=0.0)


def test_offset_noise_moves_a_whole_sample() -> None:
    loss, denoiser = build(offset_noise_level=0.1)
    latents, noise, _ = inputs()
    offset = torch.linspace(-2, 2, SHAPE[0])
    seen: list[Tensor] = []

    def network(noisy: Tensor, *_: Any) -> Tensor:
        seen.append(noisy)
        return torch.zeros_like(noisy)

    got = loss(network, denoiser, latents, {}, TIMESTEPS, noise, offset)
    moved = noise + 0.1 * offset.view(-1, 1, 1, 1, 1)
    alpha = denoiser.alphas[TIMESTEPS]
    assert torch.equal(seen[0], add_noise(latents, moved, alpha))
    torch.testing.assert_close(got, per_sample(velocity(latents, moved, alpha).square()), rtol=1e-6, atol=0.0)
    with pytest.raises(ValueError, match="the loss needs offset_noise"):
        loss(network, denoiser, latents, {}, TIMESTEPS, noise)


def test_a_samples_loss_does_not_depend_on_its_batch() -> None:
    loss, denoiser = build()
    latents, noise, output = inputs()
    whole = loss(lambda *_: output, denoiser, latents, {}, TIMESTEPS, noise)
    for i in range(len(latents)):
        one = slice(i, i + 1)
        alone = loss(lambda *_, one=one: output[one], denoiser, latents[one], {}, TIMESTEPS[one], noise[one])
        torch.testing.assert_close(alone, whole[one], rtol=1e-6, atol=0.0)


def test_loss_of_a_half_precision_network_is_float32() -> None:
    loss, denoiser = build()
    latents, noise, output = inputs()
    got = loss(lambda *_: output.bfloat16(), denoiser, latents, {}, TIMESTEPS, noise)
    assert got.dtype == torch.float32
    full = loss(lambda *_: output, denoiser, latents, {}, TIMESTEPS, noise)
    torch.testing.assert_close(got, full, rtol=4e-3, atol=0.0)  # bf16 has three digits


def test_names_handed_on_may_be_one_or_several() -> None:
    assert build(batch2model_keys="ofs")[0].batch2model_keys == ("ofs",)
    assert build(batch2model_keys=["ofs", "fps"])[0].batch2model_keys == ("ofs", "fps")
    assert build()[0].batch2model_keys == ()


def test_an_unknown_type_is_refused() -> None:
    with pytest.raises(ConfigError, match="loss type is 'l3'; give l2 or l1"):
        build(type="l3")
