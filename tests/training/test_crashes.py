"""Kill -9 at every change that a save makes on disk, and at random: nothing that was published is lost.

After each kill: all numbered folders are whole and equal the uninterrupted run's bit for bit, and `latest` names one of
them; lost are the steps since it: one interval where no save was under way, and else one interval and the steps that
were made while the save ran, which are never more than another one; and the same command goes on to the same end. The
whole matrix is marked `faults`; a share of it belongs to the default suite.
"""

import random
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.training.crashes import Chain, Plan, Reference, at_random, make_reference, memory_folder

RANDOM_INSTANTS = 200
LONGEST_LIFE = 1.6
"""Seconds in which a start of one or two ranks trains for a few steps and saves some of them, on a quiet machine."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with memory_folder(tmp_path_factory.mktemp("crashes")) as found:
        yield found


@pytest.fixture(scope="module")
def references(folder: Path) -> Callable[[int], Reference]:
    """The uninterrupted run of some ranks, made when it is first asked for."""
    made: dict[int, Reference] = {}

    def reference(world: int) -> Reference:
        if world not in made:
            made[world] = make_reference(folder / f"reference{world}", world)
        return made[world]

    return reference


def points(reference: Reference, rank: int) -> list[Plan]:
    """Before and after each change of one save, and in the middle of each write."""
    return [
        Plan(number, when)
        for number, name in enumerate(reference.changes[rank])
        for when in ("before", "after", *(["half"] if name.startswith("write") else []))
    ]


def run_points(chain: Chain, plans: list[Plan], rank: int) -> None:
    """Kill at each point; every start goes on from where the last one was killed."""
    for plan in plans:
        if not any(chain.go({rank: plan})):  # the run came to its end first: the point is that of the next run's save
            assert any(chain.go({rank: plan})), plan
    chain.finish()
    assert chain.num_kills == len(plans)


def run_random(chain: Chain, count: int, seed: int, rank: int | None) -> None:
    """Kill at random instants, until so many starts were killed rather than done."""
    chooser = random.Random(seed)
    while chain.num_kills < count:
        chain.go(harm=at_random(chooser, LONGEST_LIFE, rank))
    chain.finish()


def in_two(work: Callable[[int], None]) -> None:
    """Two chains at a time: work(0) and work(1)."""
    with ThreadPoolExecutor(2) as pool:
        for done in [pool.submit(work, half) for half in range(2)]:
            done.result()


# --- a share of the matrix -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("world", "rank", "every"), [pytest.param(1, 0, 17, marks=pytest.mark.slow), (2, 1, 5)])
def test_some_points(folder: Path, references: Callable[[int], Reference], world: int, rank: int, every: int) -> None:
    reference = references(world)
    chain = Chain(folder / f"some-{world}-{rank}", world, reference)
    run_points(chain, points(reference, rank)[::every], rank)


@pytest.mark.parametrize(
    ("world", "rank"),
    [(1, None), (2, 1), *(pytest.param(2, rank, marks=pytest.mark.slow) for rank in (None, 0))],
)
def test_a_few_random_instants(
    folder: Path, references: Callable[[int], Reference], world: int, rank: int | None
) -> None:
    run_random(Chain(folder / f"few-{world}-{rank}", world, references(world)), 3, 1, rank)


# --- the whole matrix ------------------------------------------------------------------------------------------------


@pytest.mark.faults
@pytest.mark.parametrize(("world", "rank"), [(1, 0), (2, 0), (2, 1)])
def test_every_point_of_a_save(folder: Path, references: Callable[[int], Reference], world: int, rank: int) -> None:
    plans = points(references(world), rank)

    def work(half: int) -> None:
        run_points(Chain(folder / f"all-{world}-{rank}-{half}", world, references(world)), plans[half::2], rank)

    in_two(work)


@pytest.mark.faults
def test_every_point_of_the_first_save(folder: Path, references: Callable[[int], Reference]) -> None:
    """A run that has nothing yet: whatever happens it starts anew in its own folder."""
    reference = references(1)
    first = len(reference.changes[0]) - len(reference.changes[0][reference.changes[0].index("unlink") - 2 :])

    def work(half: int) -> None:
        chain = Chain(folder / f"first-{half}", 1, reference, is_begun=False)
        for number in range(half, first, 2):
            chain.go({0: Plan(number, "before")})
            shutil.rmtree(chain.save)
        assert chain.num_kills == len(range(half, first, 2))

    in_two(work)


@pytest.mark.faults
@pytest.mark.parametrize("world", [1, 2])
def test_every_point_of_a_start(folder: Path, references: Callable[[int], Reference], world: int) -> None:
    """Removing leftovers, describing the run, cutting the metrics back to the checkpoint."""
    chain, number, is_over = Chain(folder / f"start-{world}", world, references(world)), 0, False
    while not is_over:
        for when in ("before", "after"):
            is_over = not any(chain.go({0: Plan(number, when, in_save=False)}))
        number += 1
    assert number > 10


@pytest.mark.faults
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("world", "rank"), [(1, None), (2, None), (2, 0), (2, 1)])
def test_random_instants(folder: Path, references: Callable[[int], Reference], world: int, rank: int | None) -> None:
    """All ranks, or one alone: the other one dies of it, as under a launcher."""
    count, reference = RANDOM_INSTANTS if rank is None else RANDOM_INSTANTS // 2, references(world)

    def work(half: int) -> None:
        chain = Chain(folder / f"random-{world}-{rank}-{half}", world, reference)
        run_random(chain, count // 2, 1 + half, rank)
        assert chain.num_finished > 0

    in_two(work)
