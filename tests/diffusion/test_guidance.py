"""Guidance: the combination rule, and the dynamic scale in its two forms."""

import math

import pytest
import torch

from sat.diffusion.guidance import DynamicCFG, IdentityGuider, VanillaCFG, combine, double_batch, is_unguided
from sat.errors import ConfigError


def test_a_scale_of_one_is_the_conditional_estimate_and_zero_the_other() -> None:
    unconditional, conditional = torch.tensor([1.0, 2.0]), torch.tensor([3.0, 5.0])
    assert torch.equal(combine(unconditional, conditional, 1.0), conditional)
    assert torch.equal(combine(unconditional, conditional, 0.0), unconditional)
    assert torch.equal(combine(unconditional, conditional, 6.0), torch.tensor([13.0, 20.0]))


def test_a_scale_that_float32_takes_for_one_guides_nothing() -> None:
    assert is_unguided(1.0) and is_unguided(1.0 + 5e-8) and not is_unguided(1.0 + 7e-8) and not is_unguided(0.0)
    assert torch.tensor(1.0 + 5e-8, dtype=torch.float32) == 1.0 != torch.tensor(1.0 + 7e-8, dtype=torch.float32)
    dynamic = DynamicCFG(scale=6, exp=5, num_steps=50, schedule="step_index")
    assert [step for step in range(50) if is_unguided(dynamic.scale_at(step, 0))] == list(range(8))


def test_the_unconditional_half_comes_first() -> None:
    text = torch.ones(2, 3, 4)
    ofs = torch.tensor([2.0])
    both = double_batch({"crossattn": text, "ofs": ofs}, {"crossattn": 0 * text, "ofs": ofs})
    assert torch.equal(both["crossattn"], torch.cat([0 * text, text]))
    assert torch.equal(both["ofs"], ofs)


def test_a_shared_entry_that_differs_is_refused() -> None:
    with pytest.raises(ValueError, match="condition 'ofs' differs between the guided halves"):
        double_batch({"ofs": torch.tensor([2.0])}, {"ofs": torch.tensor([1.0])})


def test_plain_guiders_keep_their_scale() -> None:
    assert {VanillaCFG(6.0).scale_at(step, 999 - 20 * step) for step in range(50)} == {6.0}
    assert IdentityGuider().scale_at(0, 999) == 1.0


@pytest.mark.parametrize(
    ("timestep", "scale"),
    [
        (999, 2.29149), (979, 2.54350), (959, 6.97435), (939, 6.42036), (919, 2.78810),
        (859, 4.17), (719, 4.33), (579, 6.61), (439, 4.13), (299, 7.00), (159, 6.21), (19, 1.12),
    ],
)  # fmt: skip
def test_released_scale_jumps_with_the_timestep(timestep: int, scale: float) -> None:
    guider = DynamicCFG(scale=6, exp=5, num_steps=50)
    assert guider.scale_at(step=0, timestep=timestep) == pytest.approx(scale, abs=5e-3)


@pytest.mark.parametrize("num_steps", [10, 25, 50])
def test_released_scale_is_that_of_diffusers_pipeline(num_steps: int) -> None:
    guider = DynamicCFG(scale=6, exp=5, num_steps=num_steps)
    for timestep in range(1000):
        theirs = 1 + 6 * ((1 - math.cos(math.pi * ((num_steps - timestep) / num_steps) ** 5.0)) / 2)
        assert guider.scale_at(0, timestep) == theirs


@pytest.mark.parametrize(
    ("step", "scale"), [(0, 1.0), (7, 1.0), (14, 1.0), (21, 1.0), (28, 1.04), (35, 1.41), (42, 3.24), (49, 6.86)]
)
def test_step_index_scale_grows_from_one(step: int, scale: float) -> None:
    guider = DynamicCFG(scale=6, exp=5, num_steps=50, schedule="step_index")
    assert guider.scale_at(step, timestep=999) == pytest.approx(scale, abs=5e-3)


def test_step_index_scale_never_falls_and_takes_any_exponent() -> None:
    guider = DynamicCFG(scale=6, exp=2.5, num_steps=50, schedule="step_index")
    scales = [guider.scale_at(step, 0) for step in range(51)]
    assert scales == sorted(scales)
    assert scales[0] == 1.0
    assert scales[-1] == pytest.approx(7.0)


def test_bad_options_are_refused() -> None:
    with pytest.raises(ConfigError, match="DynamicCFG schedule is 'sane'; give released or step_index"):
        DynamicCFG(scale=6, exp=5, num_steps=50, schedule="sane")
    with pytest.raises(ConfigError, match=r"exp is 2\.5; with schedule released it must be whole"):
        DynamicCFG(scale=6, exp=2.5, num_steps=50)
