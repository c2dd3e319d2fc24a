"""Data order: a function of seed and step alone."""

import itertools
import pickle
import time
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sat.data.sampler import GlobalBatchSampler, ShuffledEpochs, epoch_permutation
from sat.errors import ConfigError, DataError


@settings(deadline=None)
@given(num_samples=st.integers(1, 3000), seed=st.integers(0, 2**40), epoch=st.integers(0, 10**6))
def test_an_epoch_has_every_sample_once(num_samples, seed, epoch):
    order = epoch_permutation(num_samples, seed, epoch)
    assert sorted(order) == list(range(num_samples)) and len(order) == num_samples


def test_orders_are_fixed_for_all_time():
    """A change here changes the data order of every run that is resumed."""
    assert epoch_permutation(10, seed=42, epoch=0)[:] == [2, 4, 1, 0, 3, 9, 5, 6, 8, 7]
    assert epoch_permutation(10**6, seed=42, epoch=3)[:5] == [676966, 80331, 74334, 829500, 258217]


@pytest.mark.parametrize("num_samples", [3, 4, 5])
def test_all_orders_are_equally_likely(num_samples):
    orders = list(itertools.permutations(range(num_samples)))
    counts = Counter(tuple(epoch_permutation(num_samples, 7, epoch)) for epoch in range(40 * len(orders)))
    chi_square = sum((counts[order] - 40) ** 2 / 40 for order in orders)
    freedom = len(orders) - 1
    assert chi_square < freedom + 4 * (2 * freedom) ** 0.5


def test_places_outside_an_order_are_refused():
    order = epoch_permutation(5, 0, 0)
    assert order[-1] == order[4]
    with pytest.raises(IndexError, match="place 5 of an order of 5 samples"):
        order[5]


layouts = st.tuples(st.integers(1, 4), st.integers(1, 4), st.integers(1, 3))  # dp_size, micro-batch, accumulation


def read_steps(num_samples, seed, start_step, end_step, layout):
    """Per global step, the (counter, index) pairs of all ranks together."""
    dp_size, micro_batch_size, grad_accum_steps = layout
    settings = {
        "global_batch_size": dp_size * micro_batch_size * grad_accum_steps,
        "micro_batch_size": micro_batch_size,
        "dp_size": dp_size,
        "start_step": start_step,
        "end_step": end_step,
    }
    order = ShuffledEpochs(num_samples, seed)
    ranks = [list(GlobalBatchSampler(order, dp_rank=rank, **settings)) for rank in range(dp_size)]
    assert all(len(batch) == micro_batch_size for batches in ranks for batch in batches)
    assert all(len(batches) == (end_step - start_step) * grad_accum_steps for batches in ranks)
    steps = []
    for step in range(end_step - start_step):
        span = slice(step * grad_accum_steps, (step + 1) * grad_accum_steps)
        steps.append([pair for batches in ranks for batch in batches[span] for pair in batch])
    return steps


@settings(deadline=None)
@given(
    num_samples=st.integers(1, 40),
    seed=st.integers(0, 100),
    start_step=st.integers(0, 20),
    layout=layouts,
    data=st.data(),
)
def test_a_global_step_has_the_same_samples_in_every_layout(num_samples, seed, start_step, layout, data):
    size = layout[0] * layout[1] * layout[2]
    divisors = [number for number in range(1, size + 1) if size % number == 0]
    dp_size = data.draw(st.sampled_from(divisors))
    micro = data.draw(st.sampled_from([number for number in divisors if size // dp_size % number == 0]))
    other = (dp_size, micro, size // dp_size // micro)
    steps = read_steps(num_samples, seed, start_step, start_step + 4, layout)
    others = read_steps(num_samples, seed, start_step, start_step + 4, other)
    for step, (ours, theirs) in enumerate(zip(steps, others), start=start_step):
        assert sorted(ours) == sorted(theirs)
        assert sorted(counter for counter, _ in ours) == list(range(step * size, (step + 1) * size))
        for counter, index in ours:
            assert index == epoch_permutation(num_samples, seed, counter // num_samples)[counter % num_samples]


@settings(deadline=None)
@given(num_samples=st.integers(1, 30), layout=layouts, skip=st.integers(0, 6))
def test_starting_later_skips_exactly_what_came_before(num_samples, layout, skip):
    assert read_steps(num_samples, 5, skip, 8, layout) == read_steps(num_samples, 5, 0, 8, layout)[skip:]


def test_micro_batches_follow_the_formula():
    sampler = GlobalBatchSampler(
        ShuffledEpochs(100, 0), global_batch_size=12, micro_batch_size=2, dp_rank=1, dp_size=3, start_step=5, end_step=6
    )
    assert sampler.grad_accum_steps == 2
    assert [[counter for counter, _ in batch] for batch in sampler] == [[62, 63], [68, 69]]


def test_nothing_is_computed_ahead():
    start = time.perf_counter()
    order = ShuffledEpochs(10**12, 0)
    sampler = GlobalBatchSampler(order, global_batch_size=64, micro_batch_size=2, start_step=10**9)
    batches = list(itertools.islice(pickle.loads(pickle.dumps(sampler)), 3))
    assert time.perf_counter() - start < 1 and batches[0][0][0] == 64 * 10**9


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"global_batch_size": 10}, "global_batch_size 10 is no multiple of micro_batch_size 2 x 3 .* = 6"),
        ({"global_batch_size": 0}, "global_batch_size 0"),
        ({"dp_rank": 3}, "dp_rank is 3; with dp_size 3 it is 0 to 2"),
    ],
)
def test_layouts_that_do_not_divide_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        GlobalBatchSampler(
            ShuffledEpochs(10, 0),
            **{"global_batch_size": 12, "micro_batch_size": 2, "dp_size": 3, "dp_rank": 0, **settings},
        )


def test_an_empty_dataset_is_refused():
    with pytest.raises(DataError, match="the dataset is empty"):
        ShuffledEpochs(0, 0)
