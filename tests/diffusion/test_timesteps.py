"""The draw of training timesteps: one a stratum, uniform on the whole, and the same at any layout."""

import math
from collections import Counter
from collections.abc import Sequence

import pytest
import torch

from sat.data.sampler import GlobalBatchSampler, ShuffledEpochs
from sat.diffusion.schedules import DiscreteSampling, StepPlaces, ZeroSNRDDPMDiscretization, stratum_of
from sat.errors import ConfigError

T = 1000


def sampling(uniform: bool = True, group_num: int = 0, num_idx: int = T) -> DiscreteSampling:
    discretization = ZeroSNRDDPMDiscretization(num_timesteps=num_idx)
    return DiscreteSampling(discretization, num_idx, uniform_sampling=uniform, group_num=group_num)


def draw(sampler: DiscreteSampling, seed: int, counters: Sequence[int], batch: int) -> torch.Tensor:
    return sampler.draw(seed, counters, StepPlaces.of_counters(counters, batch))


def draw_step(sampler: DiscreteSampling, step: int, batch: int, seed: int = 3) -> torch.Tensor:
    """All timesteps of one global batch."""
    return draw(sampler, seed, range(step * batch, (step + 1) * batch), batch)


@pytest.mark.parametrize("batch", [1, 2, 7, 48, 64, 1000])
def test_every_stratum_is_drawn_from_once(batch: int) -> None:
    """Also where the strata do not divide the timesteps: 48 strata have edges at 20.83, 41.67 and so on."""
    sampler = sampling()
    for step in range(5):
        timesteps = draw_step(sampler, step, batch).sort().values.tolist()
        for stratum, timestep in enumerate(timesteps):
            assert math.floor(stratum * T / batch) <= timestep < math.ceil((stratum + 1) * T / batch)


def test_the_noisiest_timesteps_are_not_lost() -> None:
    """The released division drops the rest: 48 strata of 20 never reach 960 .. 999, where the noise is pure."""
    sampler = sampling()
    drawn = torch.cat([draw_step(sampler, step, 48) for step in range(300)])
    assert drawn.max() == 999
    assert drawn.min() == 0
    share = (drawn >= 960).double().mean().item()
    assert share == pytest.approx(0.04, abs=0.004)


@pytest.mark.parametrize(("batch", "groups"), [(8, 3), (100, 40), (12, 12), (9, 1)])
def test_fewer_groups_than_samples_are_filled_evenly(batch: int, groups: int) -> None:
    for step in range(5):
        counters = range(step * batch, (step + 1) * batch)
        counts = Counter(stratum_of(3, *divmod(counter, batch), batch, groups) for counter in counters)
        assert sorted(counts) == list(range(groups))
        assert set(counts.values()) <= {batch // groups, -(-batch // groups)}


def test_strata_are_shuffled_within_a_batch() -> None:
    """Neighbours in a batch, who share a micro-batch, are not neighbours in time."""
    steps = range(0, 80 * 8, 8)
    distances = Counter(
        (stratum_of(3, first // 8, 1, 8, 8) - stratum_of(3, first // 8, 0, 8, 8)) % 8 for first in steps
    )
    assert sorted(distances) == [1, 2, 3, 4, 5, 6, 7]


def test_more_groups_than_samples_still_cover_the_whole_range() -> None:
    """The released 1.5 files ask for 40 groups; a small batch must not fall into a few neighbouring ones."""
    few, own = sampling(group_num=40), sampling()
    for step in range(20):
        assert torch.equal(draw_step(few, step, 4), draw_step(own, step, 4))
        assert torch.equal(draw_step(few, step, 4).sort().values * 4 // T, torch.arange(4))


@pytest.mark.parametrize(("batch", "groups"), [(1, 0), (8, 0), (8, 3), (7, 0)])
@pytest.mark.parametrize("place", [0, -1])
def test_each_samples_timestep_is_uniform(batch: int, groups: int, place: int) -> None:
    """Chi-square over 50 bins, for the sample in one place of the global batch, over 4,000 steps."""
    sampler, bins, steps = sampling(group_num=groups), 50, 4000
    counters = [step * batch + place % batch for step in range(steps)]
    timesteps = draw(sampler, 7, counters, batch)
    counts = torch.bincount(timesteps * bins // T, minlength=bins).double()
    chi_square = ((counts - steps / bins).square() / (steps / bins)).sum().item()
    freedom = bins - 1
    assert chi_square < freedom + 4 * math.sqrt(2 * freedom)  # 4 standard deviations: p is below 1e-3
    assert chi_square > freedom - 4 * math.sqrt(2 * freedom)  # no more even than chance, either


@pytest.mark.parametrize(("dp_size", "micro"), [(1, 12), (1, 1), (2, 3), (4, 1), (3, 4), (12, 1)])
def test_timesteps_are_the_same_at_any_layout(dp_size: int, micro: int) -> None:
    sampler, batch = sampling(), 12
    whole = {counter: int(t) for counter, t in enumerate(draw(sampler, 5, range(3 * batch), batch))}
    split: dict[int, int] = {}
    for rank in range(dp_size):
        order = GlobalBatchSampler(
            ShuffledEpochs(1000, 5),
            global_batch_size=batch,
            micro_batch_size=micro,
            dp_rank=rank,
            dp_size=dp_size,
            end_step=3,
        )
        for micro_batch in order:
            counters = [counter for counter, _ in micro_batch]
            split.update(zip(counters, draw(sampler, 5, counters, batch).tolist()))
    assert split == whole


def test_timesteps_depend_on_seed_and_counter_alone() -> None:
    sampler = sampling()
    first = draw_step(sampler, 0, 64)
    draw_step(sampler, 9, 64)
    assert torch.equal(draw_step(sampler, 0, 64), first)
    assert not torch.equal(draw_step(sampler, 0, 64, seed=4), first)
    assert not torch.equal(draw_step(sampler, 1, 64), first)


def test_without_uniform_sampling_draws_are_independent() -> None:
    """Strata cut the variance of a batch's mean by the square of their number; independent draws have the full one."""
    batch, steps = 16, 300
    independent_variance = (T**2 - 1) / 12 / batch
    for uniform, low, high in ((False, 0.75, 1.25), (True, 0.0, 0.01)):
        sampler = sampling(uniform, group_num=0)
        means = torch.stack([draw_step(sampler, step, batch).double().mean() for step in range(steps)])
        assert low < means.var().item() / independent_variance < high


def test_other_numbers_of_timesteps() -> None:
    drawn = draw(sampling(num_idx=10), 1, range(200), 20)
    assert torch.equal(torch.bincount(drawn, minlength=10), torch.full((10,), 20))


def test_bad_options_are_refused() -> None:
    with pytest.raises(ConfigError, match="group_num is -1; give the number of strata"):
        sampling(group_num=-1)
    with pytest.raises(ConfigError, match="num_idx 500 differs from the schedule's num_timesteps 1000"):
        DiscreteSampling(ZeroSNRDDPMDiscretization(), num_idx=500)
