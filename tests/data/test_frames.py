"""Frame choice (the released rule, as a table and on real files) and resizing."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sat.data.frames import (
    choose_frames,
    frames_to_pixels,
    largest_4k_plus_1,
    same_area_size,
)
from sat.data.quarantine import BadClip
from sat.data.video import probe, read_frames, write_mp4
from tests.data.numbered import frame_numbers, numbered_frames

# (clip fps, frames in the clip) -> (first frame, stride, number of frames), for 49 frames at 8 fps, 3 skipped.
# Worked out by hand from the rule; see the docstring of choose_frames for its three cases.
RELEASED = {
    (8, 20): (3, 1, 13),
    (8, 50): (3, 1, 47),  # long, but the clip ends before frame 52
    (8, 120): (3, 1, 49),
    (8, 400): (3, 1, 49),
    (16, 20): (3, 1, 13),
    (16, 50): (3, 1, 44),  # medium; the released stride is 44 // 49 = 0, on which it stops
    (16, 120): (3, 2, 49),
    (16, 400): (3, 2, 49),
    (24, 20): (3, 1, 13),
    (24, 50): (3, 1, 44),
    (24, 120): (3, 2, 49),
    (24, 400): (3, 3, 49),
    (29.97, 20): (3, 1, 13),
    (29.97, 50): (3, 1, 44),
    (29.97, 120): (3, 2, 49),
    (29.97, 400): (3, 3, 49),
    (30, 20): (3, 1, 13),
    (30, 50): (3, 1, 44),
    (30, 120): (3, 2, 49),
    (30, 400): (3, 3, 49),
}


@pytest.mark.parametrize("clip_fps", [8, 16, 24, 29.97, 30])
def test_frames_of_real_clips_are_those_of_the_table(tmp_path, clip_fps):
    for (fps, num_frames), (first, stride, count) in RELEASED.items():
        if fps != clip_fps:
            continue
        path = tmp_path / f"{num_frames}.mp4"
        write_mp4(path, numbered_frames(num_frames), clip_fps)
        info = probe(path, count=True)
        assert (info.num_frames, info.fps) == (num_frames, pytest.approx(clip_fps))
        indices = choose_frames(info.num_frames, info.fps, 8, 49, 3)
        assert indices.tolist() == [first + stride * step for step in range(count)]
        assert frame_numbers(read_frames(path, indices)) == indices.tolist()


@pytest.mark.parametrize(
    ("num_frames", "clip_fps", "fps", "max_num_frames", "skip", "expected"),
    [
        (60, 4, 8, 49, 3, list(range(3, 52))),  # slower than wanted: consecutive frames
        (40, 4, 8, 49, 3, list(range(3, 40))),  # and no further than the clip goes
        (7, 8, 8, 49, 3, [3]),
        (11, 8, 8, 49, 3, [3, 4, 5, 6, 7]),
        (1, 25, 8, 49, 0, [0]),
        (100, 30, 8, 1, 3, [3]),
        (5, 8, 8, 2, 3, [3, 4]),
    ],
)
def test_edges_of_the_rule(num_frames, clip_fps, fps, max_num_frames, skip, expected):
    assert choose_frames(num_frames, clip_fps, fps, max_num_frames, skip).tolist() == expected


@pytest.mark.parametrize(
    ("num_frames", "clip_fps", "skip", "reason"),
    [(6, 8, 3, "too short"), (3, 0.1, 3, "too short"), (0, 8, 3, "no frames"), (20, 0, 3, "no frame rate")],
)
def test_clips_that_leave_nothing_are_refused(num_frames, clip_fps, skip, reason):
    with pytest.raises(BadClip) as caught:
        choose_frames(num_frames, clip_fps, 8, 49, skip)
    assert caught.value.reason == reason


def test_too_short_says_how_long_and_which_key():
    with pytest.raises(BadClip, match=r"has 6 frames; skipping 3 at each end leaves none \(skip_frms_num\)"):
        choose_frames(6, 8, 8, 49, 3)


@settings(deadline=None)
@given(
    num_frames=st.integers(1, 2000),
    clip_fps=st.floats(0.5, 240),
    fps=st.floats(1, 60),
    max_num_frames=st.integers(1, 200),
    skip=st.integers(0, 10),
)
def test_chosen_frames_rise_evenly_inside_the_clip(num_frames, clip_fps, fps, max_num_frames, skip):
    try:
        indices = choose_frames(num_frames, clip_fps, fps, max_num_frames, skip)
    except BadClip:
        assert num_frames < 2 * skip + 1
        return
    assert 1 <= len(indices) <= max_num_frames
    assert indices[0] == skip and indices[-1] < num_frames
    assert len(set(np.diff(indices))) <= 1 and (np.diff(indices) >= 1).all()


@settings(deadline=None)
@given(count=st.integers(1, 1000))
def test_largest_4k_plus_1(count):
    assert largest_4k_plus_1(count) == max(number for number in range(1, count + 1) if number % 4 == 1)


def test_padding_repeats_the_last_frame():
    frames = np.arange(3, dtype=np.uint8).repeat(12).reshape(3, 2, 2, 3)
    pixels = frames_to_pixels(frames, (2, 2), 5) * 127.5 + 127.5
    assert pixels[:, 0, 0, 0].round().tolist() == [0, 1, 2, 2, 2]


@pytest.mark.parametrize(
    ("clip", "expected"),
    [((480, 720), (480, 720)), ((720, 480), (720, 480)), ((1080, 1920), (448, 784)), ((10, 4000), (32, 11760))],
)
def test_same_area_size(clip, expected):
    assert same_area_size(clip[0], clip[1], (480, 720)) == expected


def test_same_size_is_only_scaled():
    frames = np.arange(2 * 4 * 6 * 3, dtype=np.uint8).reshape(2, 4, 6, 3)
    pixels = frames_to_pixels(frames, (4, 6), 2)
    assert pixels.shape == (2, 3, 4, 6) and pixels.dtype == torch.float32
    torch.testing.assert_close(pixels[1, 2], (torch.from_numpy(frames[1, :, :, 2]).float() - 127.5) / 127.5)
    assert (pixels.min(), pixels.max()) == (-1.0, (143 - 127.5) / 127.5)


@pytest.mark.parametrize(("clip", "kept"), [((20, 40), (slice(None), slice(10, 30))), ((40, 20), (slice(10, 30),))])
def test_crop_keeps_the_centre(clip, kept):
    frames = np.zeros((1, *clip, 3), np.uint8)
    frames[(0, *kept)] = 255
    assert (frames_to_pixels(frames, (20, 20), 1) == 1).all()


def test_resize_covers_and_is_near_the_float_one():
    generator = np.random.default_rng(0)
    frames = generator.integers(80, 176, (2, 50, 90, 3), dtype=np.uint8)
    pixels = frames_to_pixels(frames, (32, 40), 2)
    floats = torch.nn.functional.interpolate(
        torch.from_numpy(frames).permute(0, 3, 1, 2).float(), (32, 57), mode="bicubic", antialias=True
    )
    difference = pixels * 127.5 + 127.5 - floats[..., 8:48]
    assert difference.abs().max() <= 1.5  # measured 1.1: rounding after each of the two passes
