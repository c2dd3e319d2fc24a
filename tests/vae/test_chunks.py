"""How clips are cut along time."""

import logging

import pytest

from sat.vae.chunks import DECODE_PRESETS, DecodePlan, encode_chunk_sizes, plan_decode
from sat.vae.decoder import count_pixel_frames


def num_frames(plan: DecodePlan) -> int:
    """Pixel frames that a plan decodes to, time compressed four times."""
    return sum(count_pixel_frames(size, 2, rule) for size, rule in zip(plan.sizes, plan.rules))


@pytest.mark.parametrize(
    "num_latents, sizes, frames", [(1, (1,), 1), (3, (3,), 9), (5, (3, 2), 17), (13, (3, 2, 2, 2, 2, 2), 49)]
)
def test_v1(num_latents: int, sizes: tuple[int, ...], frames: int) -> None:
    plan = plan_decode("v1", num_latents)
    assert plan == DecodePlan(sizes, split_first=True)
    assert plan.rules == ["split"] + ["nosplit"] * (len(sizes) - 1)
    assert num_frames(plan) == frames


@pytest.mark.parametrize("num_latents, frames", [(4, 9), (14, 49)])
def test_v1_leaves_out_the_last_of_an_even_number_and_says_so(
    num_latents: int, frames: int, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, logger="sat"):
        plan = plan_decode("v1", num_latents)
    assert sum(plan.sizes) == num_latents - 1
    assert num_frames(plan) == frames
    assert f"the last of {num_latents} is left out" in caplog.text


@pytest.mark.parametrize("num_latents, sizes, frames", [(2, (2,), 5), (4, (2, 2), 13), (14, (2,) * 7, 53)])
def test_v1_of_every_latent_of_an_even_number(num_latents: int, sizes: tuple[int, ...], frames: int) -> None:
    plan = plan_decode("v1", num_latents, every=True)
    assert plan == DecodePlan(sizes, split_first=True)
    assert num_frames(plan) == frames


@pytest.mark.parametrize("num_latents", range(1, 60))
@pytest.mark.parametrize("preset", DECODE_PRESETS)
def test_every_latent_may_be_decoded(preset: str, num_latents: int) -> None:
    plan = plan_decode(preset, num_latents, every=True)
    assert sum(plan.sizes) == num_latents and not plan.drop_first
    assert min(plan.sizes[1:], default=2) >= 2
    keeps_first_apart = preset != "main_shipped" or num_latents == 1
    assert num_frames(plan) == 4 * num_latents - 3 * keeps_first_apart
    if preset == "v1" and num_latents % 2:
        assert plan == plan_decode(preset, num_latents)
    if preset != "v1" and num_latents > 1:  # the numbers of the released script, which is given one more
        released = plan_decode(preset, num_latents + 1)
        assert (plan.sizes, plan.rules) == (released.sizes, released.rules)


@pytest.mark.parametrize(
    "num_latents, sizes, intended, shipped",
    [
        (3, (2,), 5, 8),
        (4, (3,), 9, 12),
        (5, (2, 2), 13, 16),
        (13, (2,) * 6, 45, 48),
        (14, (3, 2, 2, 2, 2, 2), 49, 52),
        (22, (3,) + (2,) * 9, 81, 84),
        (42, (5,) + (4,) * 9, 161, 164),
    ],
)
def test_main(num_latents: int, sizes: tuple[int, ...], intended: int, shipped: int) -> None:
    plans = [plan_decode(name, num_latents) for name in ("main_intended", "main_shipped")]
    assert plans[0] == DecodePlan(sizes, split_first=True, drop_first=True)
    assert plans[1] == DecodePlan(sizes, split_first=False, drop_first=True)
    assert plans[1].rules == ["nosplit"] * len(sizes)
    assert [num_frames(plan) for plan in plans] == [intended, shipped]


@pytest.mark.parametrize("preset", ["main_intended", "main_shipped"])
@pytest.mark.parametrize("num_latents", range(3, 60))
def test_main_uses_every_latent_but_the_first(preset: str, num_latents: int) -> None:
    plan = plan_decode(preset, num_latents)
    assert sum(plan.sizes) == num_latents - 1
    assert len(plan.sizes) <= 10
    assert min(plan.sizes) >= 2
    assert plan.sizes == tuple(sorted(plan.sizes, reverse=True))
    assert plan.sizes[0] - plan.sizes[-1] <= 1


def test_too_few_latents() -> None:
    with pytest.raises(ValueError, match=r"v1 starts with a chunk of 3 latents and cannot decode 2; use decode\(\)"):
        plan_decode("v1", 2)
    for num_latents in (1, 2):
        message = rf"main_intended leaves out latent 0 and needs 2 more, but there are {num_latents}; use decode\(\)"
        with pytest.raises(ValueError, match=message):
            plan_decode("main_intended", num_latents)


def test_an_unknown_preset() -> None:
    with pytest.raises(ValueError, match="there is no decode preset 'v2'; presets: v1, main_shipped, main_intended"):
        plan_decode("v2", 13)
    assert set(DECODE_PRESETS) == {"v1", "main_shipped", "main_intended"}


@pytest.mark.parametrize(
    "frames, chunk, sizes",
    [
        (49, 8, [9, 8, 8, 8, 8, 8]),
        (17, 8, [9, 8]),
        (9, 8, [9]),
        (8, 8, [8]),
        (1, 8, [1]),
        (20, 8, [12, 8]),
        (9, 4, [5, 4]),
    ],
)
def test_chunks_of_encoding(frames: int, chunk: int, sizes: list[int]) -> None:
    assert encode_chunk_sizes(frames, chunk) == sizes
