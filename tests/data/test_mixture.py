"""Mixtures: shares that are kept, every clip once before any comes again, and what is refused."""

import time
from collections import Counter
from fractions import Fraction
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sat.config import instantiate_from_config, load_config
from sat.data.mixture import BLOCK, MixedOrder, Mixture
from sat.data.packing import CostModel, PackingPlanner
from sat.data.quarantine import BadClip, ReplacingDataset
from sat.data.sampler import GlobalBatchSampler
from sat.errors import ConfigError, DataError


class Numbers:
    """A dataset of numbers; item i is broken where it is in `bad`."""

    def __init__(self, count: int, bad: tuple[int, ...] = ()) -> None:
        self.count, self.bad = count, bad

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Any]:
        if index in self.bad:
            raise BadClip(f"clip {index} is broken")
        return {"value": index}


def order_of(sizes: dict[str, int], shares: dict[str, Fraction], seed: int = 0) -> MixedOrder:
    sets, first = {}, 0
    for name, size in sizes.items():
        sets[name] = range(first, first + size)
        first += size
    return MixedOrder(sets, shares, seed, first)


def read(order: MixedOrder, counters: range) -> list[int]:
    return [order[counter] for counter in counters]


def mixed(*weights: int) -> dict[str, Fraction]:
    return {f"set {place}": Fraction(weight, sum(weights)) for place, weight in enumerate(weights)}


sets_and_weights = st.lists(st.tuples(st.integers(1, 30), st.integers(1, 1000)), min_size=1, max_size=6)


@settings(deadline=None, derandomize=True)
@given(sets_and_weights, st.integers(0, 5))
def test_every_clip_of_a_set_comes_once_before_any_comes_again(drawn: list[tuple[int, int]], seed: int) -> None:
    shares = mixed(*(weight for _, weight in drawn))
    order = order_of({name: size for name, (size, _) in zip(shares, drawn)}, shares, seed)
    seen: dict[str, Counter] = {name: Counter() for name in shares}
    for counter in range(400):
        clip = order[counter]
        name = next(name for name, clips in order.sets.items() if clip in clips)
        least = min(seen[name][other] for other in order.sets[name])
        assert seen[name][clip] == least
        seen[name][clip] += 1


@settings(deadline=None, derandomize=True)
@given(sets_and_weights)
def test_shares_are_kept_after_every_block(drawn: list[tuple[int, int]]) -> None:
    shares = mixed(*(weight for _, weight in drawn))
    order = order_of(dict.fromkeys(shares, 5), shares)
    for block in (1, 2, 7, 1000, 10**9):
        given_before = order._given(block)
        for count, share in zip(given_before, shares.values()):
            assert abs(count - block * BLOCK * share) < 1
        assert abs(sum(given_before) - block * BLOCK) < len(shares)


def test_a_rare_set_comes_as_often_as_its_share() -> None:
    order = order_of({"rare": 3, "usual": 50}, {"rare": Fraction(1, 1000), "usual": Fraction(999, 1000)})
    counters = [counter for counter in range(10_000) if order[counter] < 3]
    assert len(counters) == 10
    assert max(b - a for a, b in pairwise(counters)) < 1000 + 2 * BLOCK


def test_an_order_is_the_same_from_any_counter_on() -> None:
    shares = mixed(3, 1, 7)
    order = order_of(dict.fromkeys(shares, 9), shares)
    whole = read(order_of(dict.fromkeys(shares, 9), shares), range(500))
    for counter in (499, 3, 250, 249, 64, 63, 0):
        assert order[counter] == whole[counter]
    assert read(order_of(dict.fromkeys(shares, 9), shares, seed=1), range(500)) != whole


def test_orders_are_fixed_for_all_time() -> None:
    """A change here changes the data order of every mixture that is resumed."""
    order = order_of({"images": 100, "clips": 100}, {"images": Fraction(3, 10), "clips": Fraction(7, 10)}, seed=42)
    assert read(order, range(8)) == [165, 21, 140, 173, 158, 103, 156, 190]
    assert read(order, range(10**12, 10**12 + 4)) == [133, 185, 152, 58]


def test_far_ahead_costs_what_the_start_does() -> None:
    order = order_of({"a": 10**9, "b": 10**6}, {"a": Fraction(99, 100), "b": Fraction(1, 100)})
    start = time.perf_counter()
    assert order[10**14] >= 0
    assert time.perf_counter() - start < 0.5


def test_another_set_leaves_the_orders_of_the_others_alone() -> None:
    def clips_of(order: MixedOrder, name: str) -> list[int]:
        found = read(order, range(300))
        return [clip - order.sets[name][0] for clip in found if clip in order.sets[name]]

    two = clips_of(order_of({"a": 20, "b": 20}, {"a": Fraction(1, 2), "b": Fraction(1, 2)}), "b")
    three = clips_of(order_of({"new": 5, "a": 20, "b": 20}, dict.fromkeys(("new", "a", "b"), Fraction(1, 3))), "b")
    assert two[: len(three)] == three


@pytest.mark.parametrize(("dp_size", "micro"), [(2, 3), (3, 1), (6, 2)])
def test_ranks_and_micro_batches_change_nothing(dp_size: int, micro: int) -> None:
    shares = mixed(1, 5)
    whole = read(order_of(dict.fromkeys(shares, 7), shares), range(48))
    found = {}
    for rank in range(dp_size):
        order = order_of(dict.fromkeys(shares, 7), shares)
        layout = {"global_batch_size": 12, "micro_batch_size": micro, "dp_rank": rank, "dp_size": dp_size}
        found.update(pair for batch in GlobalBatchSampler(order, end_step=4, **layout) for pair in batch)
    assert found == dict(enumerate(whole))


def test_a_plan_packs_the_samples_of_the_order() -> None:
    """Each sample of an epoch once, those of a small set several times."""
    shares = {"images": Fraction(1, 2), "clips": Fraction(1, 2)}
    lengths = [3] * 4 + [10, 17, 24] * 20
    order = order_of({"images": 4, "clips": 60}, shares)
    planner = PackingPlanner(lengths, 40, 4, order, CostModel(8))
    rows = [row for epoch in range(3) for row in planner.epoch_rows(epoch)]
    samples = sorted((counter, index) for row in rows for counter, index in zip(row.counters, row.indices))
    assert samples == [(counter, order[counter]) for counter in range(3 * 64)]
    assert all(row.tokens == sum(lengths[index] for index in row.indices) <= 40 for row in rows)


# --- the dataset -----------------------------------------------------------------------------------------------------


def test_an_item_names_its_set_and_a_bad_clip_gives_way_to_one_of_its_set() -> None:
    mixture = Mixture({"a": Numbers(3), "b": Numbers(4, bad=(1, 3))})
    assert [mixture[index] for index in (0, 3, 5)] == [
        {"value": 0, "set": "a"},
        {"value": 0, "set": "b"},
        {"value": 2, "set": "b"},
    ]
    replacing = ReplacingDataset(mixture)
    assert {replacing[index]["set"] for index in range(3)} == {"a"}
    assert {replacing[index]["set"] for index in range(3, 7)} == {"b"}
    assert [list(mixture.peers(index)) for index in (2, 3)] == [[0, 1, 2], [3, 4, 5, 6]]


def shares_of(mixture: Mixture, lengths: list[int] | None = None, kept: Any = None) -> dict[str, float]:
    order = mixture.order(0, range(len(mixture)) if kept is None else kept, lengths)
    assert sum(order.shares.values()) == 1
    return {name: float(share) for name, share in order.shares.items()}


def test_shares_by_samples_by_tokens_and_by_repeats() -> None:
    sets = {"images": Numbers(10), "clips": Numbers(30)}
    weights = {"images": 0.3, "clips": 0.7}
    assert shares_of(Mixture(sets, weights)) == {"images": 0.3, "clips": 0.7}
    lengths = [140] * 30 + [20] * 10
    by_tokens = shares_of(Mixture(sets, weights, "tokens"), lengths)
    assert by_tokens == {"images": 0.75, "clips": 0.25}  # 15 : 5 of 20 and 140 tokens = 300 : 700
    assert shares_of(Mixture(sets)) == {"images": 0.25, "clips": 0.75}
    assert shares_of(Mixture(sets, repeats={"images": 3})) == {"images": 0.5, "clips": 0.5}
    assert shares_of(Mixture(sets, {"images": 0, "clips": 2})) == {"clips": 1}


def test_an_epoch_counts_repeats() -> None:
    sets = {"images": Numbers(10), "clips": Numbers(30), "more": Numbers(5)}

    def epoch_size(**words: Any) -> int:
        mixture = Mixture(sets, **words)
        return mixture.order(0, range(len(mixture)), None).epoch_size

    assert epoch_size() == 45
    assert epoch_size(repeats={"images": 2.5, "more": 0}) == 55
    assert epoch_size(weights={"images": 1, "clips": 1, "more": 0}) == 40


def test_the_order_in_which_the_sets_stand_decides_nothing() -> None:
    def drawn(*names: str) -> list[Any]:
        mixture = Mixture({name: Numbers(ord(name)) for name in names}, dict.fromkeys(names, 1))
        order = mixture.order(3, range(len(mixture)), None)
        return [mixture[order[counter]] for counter in range(200)]

    assert drawn("a", "b", "c") == drawn("c", "a", "b")


def test_repeats_give_each_clip_exactly_so_often_in_an_epoch() -> None:
    mixture = Mixture({"a": Numbers(16), "b": Numbers(32)}, repeats={"a": 2})
    order = mixture.order(5, range(48), None)
    assert order.epoch_size == 64 == BLOCK
    assert Counter(order[counter] for counter in range(64)) == {clip: 2 if clip < 16 else 1 for clip in range(48)}


def test_clips_that_a_plan_leaves_out_are_not_drawn() -> None:
    mixture = Mixture({"a": Numbers(4), "b": Numbers(6)}, {"a": 1, "b": 1})
    kept = [0, 2, 4, 7, 9]
    order = mixture.order(0, kept, [1] * 5)
    assert {name: list(clips) for name, clips in order.sets.items()} == {"a": [0, 1], "b": [2, 3, 4]}
    with pytest.raises(DataError, match="no clip of the set 'a' fits a row; raise max_tokens, or leave the set out"):
        mixture.order(0, [4, 5], [1, 1])
    assert shares_of(Mixture({"a": Numbers(4), "b": Numbers(6)}, {"a": 0, "b": 1}), kept=[4, 5]) == {"b": 1}


def test_validation_takes_the_sets_in_turn() -> None:
    mixture = Mixture({"a": Numbers(2), "b": Numbers(4)})
    assert mixture.in_turn(4) == [0, 2, 1, 3]
    assert mixture.in_turn(100) == [0, 2, 1, 3, 4, 5]


def test_a_configuration_builds_it_each_set_with_its_own_settings() -> None:
    images = "{target: sat.data.synthetic.SyntheticImages, params: {num_samples: 3, height: 8, width: 8}}"
    sizes = "num_samples: 5, num_frames: 3, channels: 4, height: 2, width: 2"
    clips = f"{{target: sat.data.synthetic.SyntheticLatents, params: {{{sizes}}}}}"
    words = [f"data={{target: sat.data.mixture.Mixture, params: {{sets: {{images: {images}, clips: {clips}}}}}}}"]
    mixture = instantiate_from_config(load_config([], [*words, "data.params.weights={images: 1, clips: 3}"])["data"])
    assert len(mixture) == 8
    assert mixture[0]["latents"].shape == (3, 4, 2, 2) and mixture[5]["pixels"].shape == (1, 3, 8, 8)
    with pytest.raises(ConfigError, match=r"data.params.sets.clips.params.heigth .*; did you mean 'height'"):
        instantiate_from_config(load_config([], [*words, "data.params.sets.clips.params.heigth=2"])["data"])


TWO = {"images": Numbers(2), "clips": Numbers(3)}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"sets": {}}, "data.params.sets names no set; give a mapping of names to {target: ..., params: {...}}"),
        ({"weights": {"images": 0, "clips": 0}}, "data.params.weights are 0 for every set, .* nothing to draw; raise"),
        ({"weights": {"images": -1, "clips": 2}}, "data.params.weights.images is -1; give a number, 0 or more"),
        ({"weights": {"images": "a", "clips": 2}}, "data.params.weights.images is 'a'; give a number, 0 or more"),
        ({"weights": {"images": float("nan"), "clips": 2}}, "data.params.weights.images is nan; give a number"),
        (
            {"weights": {"image": 1, "clips": 2}},
            "data.params.weights names a set 'image' that data.params.sets has not; did you mean 'images'?; the sets "
            "are clips, images",
        ),
        ({"weights": {"clips": 2}}, "data.params.weights says nothing of the set 'images'; give 0 to leave it out"),
        ({"weights": [1, 2]}, r"data.params.weights is \[1, 2\]; give a mapping of the sets' names to numbers"),
        ({"repeats": {"images": -2}}, "data.params.repeats.images is -2; give a number, 0 or more"),
        ({"repeats": {"images": 0, "clips": 0}}, "data.params.repeats are 0 for every set"),
        ({"repeats": {"x": 1}}, "data.params.repeats names a set 'x' that data.params.sets has not; the sets are"),
        ({"weights": {"images": 1, "clips": 1}, "repeats": {}}, "has both weights and repeats; give one"),
        ({"weights_by": "frames"}, "data.params.weights_by is 'frames'; give samples or tokens"),
        ({"weights_by": "tokens"}, "weights_by is tokens, and there are no weights; give data.params.weights"),
    ],
)
def test_what_cannot_be_is_refused(words: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message.replace("?", r"\?")):
        Mixture(**{"sets": TWO, **words})


def test_an_empty_set_is_refused() -> None:
    with pytest.raises(DataError, match="the set 'none' of the mixture is empty; leave it out, or mend its files"):
        Mixture({"some": Numbers(1), "none": Numbers(0)})
