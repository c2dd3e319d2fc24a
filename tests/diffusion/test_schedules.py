"""The noise schedule: equal to diffusers', zero at its end, and a grid that starts there."""

import pytest
import torch
from diffusers import CogVideoXDDIMScheduler
from hypothesis import given
from hypothesis import strategies as st

from sat.diffusion.schedules import (
    ZeroSNRDDPMDiscretization,
    scaled_linear_alphas_cumprod,
    shift_snr,
    trailing_timesteps,
    zero_terminal_snr,
)
from sat.errors import ConfigError

SHIFTS = (1.0, 3.0)  # of the 5B models and of 2B


def their_scheduler(shift: float) -> CogVideoXDDIMScheduler:
    return CogVideoXDDIMScheduler(
        rescale_betas_zero_snr=True,
        snr_shift_scale=shift,
        timestep_spacing="trailing",
        prediction_type="v_prediction",
        clip_sample=False,
    )


@pytest.mark.parametrize("shift", SHIFTS)
def test_levels_are_those_of_diffusers(shift: float) -> None:
    levels = ZeroSNRDDPMDiscretization(shift_scale=shift).table()
    theirs = their_scheduler(shift).alphas_cumprod
    # Theirs is float64; float32 rounds ours by up to 1.2e-7.
    torch.testing.assert_close(levels.double().square(), theirs, rtol=0.0, atol=2e-7)


@pytest.mark.parametrize(
    ("shift", "expected"),
    [(1.0, [0.99915, 0.65246, 0.24102, 0.03280, 0.0]), (3.0, [0.99745, 0.38905, 0.09533, 0.01084, 0.0])],
)
def test_levels_at_known_timesteps(shift: float, expected: list[float]) -> None:
    levels = ZeroSNRDDPMDiscretization(shift_scale=shift).table()[[0, 250, 500, 750, 999]]
    torch.testing.assert_close(levels.square(), torch.tensor(expected), rtol=0.0, atol=5e-6)


@pytest.mark.parametrize("shift", SHIFTS)
@pytest.mark.parametrize("post_shift", [False, True])
def test_levels_fall_to_exactly_zero(shift: float, post_shift: bool) -> None:
    levels = ZeroSNRDDPMDiscretization(shift_scale=shift, post_shift=post_shift).table()
    assert levels[-1] == 0.0
    assert (levels.diff() < 0.0).all()
    assert levels[0] < 1.0


def test_rescaling_keeps_the_first_level() -> None:
    alphas = scaled_linear_alphas_cumprod(1000, 0.00085, 0.012).sqrt()
    rescaled = zero_terminal_snr(alphas)
    assert rescaled[-1] == 0.0
    torch.testing.assert_close(rescaled[0], alphas[0], rtol=1e-15, atol=0.0)


def test_keep_start_leaves_the_first_level_in_place() -> None:
    kept = ZeroSNRDDPMDiscretization(shift_scale=3.0, keep_start=True).table()
    plain = ZeroSNRDDPMDiscretization(shift_scale=1.0).table()
    torch.testing.assert_close(kept[0], plain[0], rtol=1e-6, atol=0.0)
    assert ZeroSNRDDPMDiscretization(shift_scale=3.0).table()[0] < plain[0]


def test_post_shift_shifts_what_is_rescaled_already() -> None:
    shifted = ZeroSNRDDPMDiscretization(shift_scale=3.0, post_shift=True).table().double()
    plain = ZeroSNRDDPMDiscretization(shift_scale=1.0).table().double()
    torch.testing.assert_close(shifted.square(), shift_snr(plain.square(), 3.0), rtol=0.0, atol=2e-7)


@given(st.floats(0.01, 100.0), st.floats(0.001, 0.999))
def test_a_shift_divides_the_ratio_of_signal_to_noise(shift: float, signal: float) -> None:
    before = torch.tensor(signal, dtype=torch.float64)
    after = shift_snr(before, shift)
    torch.testing.assert_close(after / (1 - after) * shift, before / (1 - before), rtol=1e-9, atol=0.0)


# --- the grid of a sampler -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_steps", [10, 25, 50, 100])
def test_a_samplers_timesteps_are_those_of_diffusers(num_steps: int) -> None:
    theirs = their_scheduler(1.0)
    theirs.set_timesteps(num_steps)
    _, timesteps = ZeroSNRDDPMDiscretization().steps(num_steps)
    assert timesteps.tolist() == theirs.timesteps.tolist()


def test_fifty_steps_start_at_the_last_timestep() -> None:
    assert trailing_timesteps(1000, 50).tolist() == list(range(19, 1000, 20))


@given(st.integers(1, 1000))
def test_timesteps_rise_to_the_last(num_steps: int) -> None:
    timesteps = trailing_timesteps(1000, num_steps)
    assert len(timesteps) == num_steps
    assert timesteps[-1] == 999
    assert timesteps[0] >= 0
    assert (timesteps.diff() > 0).all()


@pytest.mark.parametrize("shift", SHIFTS)
@pytest.mark.parametrize("num_steps", [1, 2, 10, 50, 1000])
def test_a_samplers_levels_rise_from_pure_noise(shift: float, num_steps: int) -> None:
    levels, timesteps = ZeroSNRDDPMDiscretization(shift_scale=shift).steps(num_steps)
    assert levels[0] == 0.0
    assert timesteps[0] == 999
    assert (levels.diff() > 0.0).all()
    assert levels[-1] < 1.0


@pytest.mark.parametrize(("shift", "difference"), [(1.0, 6.2e-4), (3.0, 1.0e-3)])
def test_a_samplers_levels_are_rescaled_on_their_own(shift: float, difference: float) -> None:
    """As released: fifty levels differ from the training table's at the same timesteps, by a known amount."""
    discretization = ZeroSNRDDPMDiscretization(shift_scale=shift)
    levels, timesteps = discretization.steps(50)
    worst = (levels - discretization.table()[timesteps]).abs().max().item()
    assert worst == pytest.approx(difference, rel=0.05)


def test_all_steps_are_the_training_table() -> None:
    discretization = ZeroSNRDDPMDiscretization()
    levels, timesteps = discretization.steps(1000)
    assert torch.equal(levels.flip(0), discretization.table())
    assert timesteps.tolist() == list(range(999, -1, -1))


@pytest.mark.parametrize("num_steps", [0, 1001])
def test_an_impossible_number_of_steps_is_refused(num_steps: int) -> None:
    with pytest.raises(ConfigError, match=rf"{num_steps} steps over 1000 timesteps; give 1 to 1000"):
        ZeroSNRDDPMDiscretization().steps(num_steps)
