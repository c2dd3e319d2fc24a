"""Noise, velocity, and the estimate of clean latents that a v-predicting network gives."""

import pytest
import torch
from diffusers import CogVideoXDDIMScheduler
from torch import Tensor

from sat.diffusion.scaling import DiscreteDenoiser, EpsWeighting, VideoScaling, add_noise, velocity
from sat.diffusion.schedules import ZeroSNRDDPMDiscretization
from sat.errors import ConfigError

SHAPE = (5, 3, 4, 2, 2)
TIMESTEPS = torch.tensor([0, 1, 500, 998, 999])


def denoiser(shift: float = 1.0) -> DiscreteDenoiser:
    return DiscreteDenoiser(ZeroSNRDDPMDiscretization(shift_scale=shift), VideoScaling(), EpsWeighting())


def latents_and_noise(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    latents, noise = (torch.randn(SHAPE, generator=generator, dtype=torch.float64).to(dtype) for _ in range(2))
    return latents, noise


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_noise_and_velocity_are_those_of_diffusers(shift: float) -> None:
    theirs = CogVideoXDDIMScheduler(rescale_betas_zero_snr=True, snr_shift_scale=shift)
    latents, noise = latents_and_noise()
    alpha = ZeroSNRDDPMDiscretization(shift_scale=shift).table()[TIMESTEPS]
    # Measured 2.2e-6, at timestep 1: near alpha = 1 float32 has few digits of √(1 - alpha²) left.
    expected = theirs.add_noise(latents, noise, TIMESTEPS)
    torch.testing.assert_close(add_noise(latents, noise, alpha), expected, rtol=0.0, atol=5e-6)
    expected = theirs.get_velocity(latents, noise, TIMESTEPS)
    torch.testing.assert_close(velocity(latents, noise, alpha), expected, rtol=0.0, atol=5e-6)


def test_noisy_latents_and_velocity_give_back_both_parts() -> None:
    latents, noise = latents_and_noise(torch.float64)
    alpha = denoiser().alphas.double()[TIMESTEPS]
    sigma = (1 - alpha.square()).sqrt()
    noisy, v = add_noise(latents, noise, alpha), velocity(latents, noise, alpha)
    wide = (slice(None), *[None] * 4)
    torch.testing.assert_close(alpha[wide] * noisy - sigma[wide] * v, latents, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(sigma[wide] * noisy + alpha[wide] * v, noise, rtol=1e-12, atol=1e-12)


def test_true_velocity_gives_the_clean_latents() -> None:
    """At the last timestep, too, where the noisy latents say nothing: v is then minus the clean latents."""
    latents, noise = latents_and_noise()
    own = denoiser()
    alpha = own.alphas[TIMESTEPS]
    truth = velocity(latents, noise, alpha)
    estimate = own(lambda *_: truth, add_noise(latents, noise, alpha), alpha, TIMESTEPS, {})
    torch.testing.assert_close(estimate, latents, rtol=0.0, atol=1e-6)
    assert torch.equal(truth[-1], -latents[-1])


def test_levels_off_the_table_are_taken_from_it() -> None:
    """As released: 11 of 50 sampling levels land on another timestep's entry, at most 5.2e-4 away."""
    own = denoiser()
    levels, timesteps = ZeroSNRDDPMDiscretization().steps(50)
    entries = own.nearest(levels)
    assert int((entries != timesteps).sum()) == 11
    assert (own.alphas[entries] - levels).abs().max().item() == pytest.approx(5.2e-4, rel=0.02)
    estimate = own(lambda noisy, *_: torch.zeros_like(noisy), torch.ones(50, 1), levels, timesteps, {})
    assert torch.equal(estimate[:, 0], own.alphas[entries])


def test_levels_on_the_table_stay() -> None:
    own = denoiser()
    assert torch.equal(own.nearest(own.alphas), torch.arange(1000))


def test_the_network_sees_the_timesteps_and_the_condition() -> None:
    own, seen = denoiser(), {}
    _, noise = latents_and_noise()

    def network(noisy: Tensor, timesteps: Tensor, cond: dict[str, str], **more: str) -> Tensor:
        seen.update(timesteps=timesteps, cond=cond, more=more)
        return torch.zeros_like(noisy)

    alpha = own.alphas[TIMESTEPS]
    estimate = own(network, noise, alpha, TIMESTEPS, {"crossattn": "text"}, ofs="two")
    assert torch.equal(seen["timesteps"], TIMESTEPS)
    assert (seen["cond"], seen["more"]) == ({"crossattn": "text"}, {"ofs": "two"})
    assert torch.equal(estimate, alpha.view(5, 1, 1, 1, 1) * noise)


def test_half_precision_networks_give_a_full_precision_estimate() -> None:
    own = denoiser()
    latents, noise = latents_and_noise()
    alpha = own.alphas[TIMESTEPS]
    estimate = own(lambda noisy, *_: noisy.bfloat16(), add_noise(latents, noise, alpha), alpha, TIMESTEPS, {})
    assert estimate.dtype == torch.float32
    assert estimate.isfinite().all()


def test_a_table_of_another_length_is_refused() -> None:
    with pytest.raises(ConfigError, match="num_idx 500 differs from the schedule's num_timesteps 1000"):
        DiscreteDenoiser(ZeroSNRDDPMDiscretization(), VideoScaling(), num_idx=500)
