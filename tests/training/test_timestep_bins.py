"""The loss by timestep is the mean over the samples of each bin, whoever had them."""

import math
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from sat.training.timestep_bins import TimestepBins
from tests.ranks import run_ranks
from tests.tiny import only_run, records, train_on_rank


def bins_of_rank(rank: int, shares: list[list[tuple[int, float]]]) -> list[dict[str, float]]:
    bins = TimestepBins(1000, 10, torch.device("cpu"), dist.group.WORLD)
    for timestep, loss in shares[rank]:
        bins.add(torch.tensor([timestep]), torch.tensor([loss]))
    return [bins.take(), bins.take()]


def test_samples_of_all_ranks_are_counted_once() -> None:
    shares = [[(0, 1.0), (99, 2.0), (999, 5.0)], [(50, 6.0), (100, 7.0), (500, math.nan)]]
    for first, second in run_ranks(bins_of_rank, 2, shares):
        assert first == {"loss_0-99": 3.0, "loss_100-199": 7.0, "loss_900-999": 5.0}
        assert second == {}


@given(st.integers(1, 1000), st.data())
def test_names_cover_every_timestep_once(num_timesteps: int, data: st.DataObject) -> None:
    num_bins = data.draw(st.integers(1, num_timesteps))
    bins = TimestepBins(num_timesteps, num_bins, torch.device("cpu"), None)
    named = [
        timestep
        for number in range(num_bins)
        for first, last in [map(int, bins._name(number).removeprefix("loss_").split("-"))]
        for timestep in range(first, last + 1)
        if timestep * num_bins // num_timesteps == number
    ]
    assert named == list(range(num_timesteps))


@pytest.mark.parametrize(
    ("more", "widths"),
    [
        ((), {100}),
        (("model.loss_fn_config.params.sigma_sampler_config.params.group_num=4",), {250}),
    ],
    ids=["independent", "strata"],
)
def test_a_run_tells_the_loss_by_timestep(tmp_path: Path, more: tuple[str, ...], widths: set[int]) -> None:
    strata = (
        "model.loss_fn_config.params.sigma_sampler_config.params.uniform_sampling=true",
        "args.global_batch_size=4",
        "args.train_iters=4",
        "args.log_interval=2",
        f"args.save={tmp_path}",
    )
    run_ranks(train_on_rank, 2, (*strata, *more))
    for record in records(only_run(tmp_path)):
        found = {key.removeprefix("loss_"): value for key, value in record.items() if key.startswith("loss_")}
        edges = [tuple(map(int, key.split("-"))) for key in found]
        assert {last - first + 1 for first, last in edges} == widths
        if more:  # every stratum has one sample of each of the two steps
            assert len(found) == 4
