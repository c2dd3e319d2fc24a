"""The demo set's grammar, hold-out, drawing and checker."""

import itertools
from collections import Counter

import numpy as np
import pytest

from sat.data.video import read_frames, write_mp4
from sat.errors import DataError
from tools.demo_shapes import (
    ATTRIBUTES,
    BACKGROUNDS,
    COLOURS,
    SIZE,
    Scene,
    agreement,
    all_scenes,
    draw,
    is_held_out,
    parse_caption,
    see,
    training_scenes,
)
from tools.make_demo_data import CRF


def values(scenes, *names):
    """Counts of the values, or of the tuples of values, of some attributes."""
    return Counter(tuple(getattr(scene, name) for name in names) for scene in scenes)


def test_captions_read_back():
    scenes = all_scenes()
    assert len(scenes) == len(set(scenes)) == 270
    assert all(parse_caption(scene.caption) == scene for scene in scenes)
    assert parse_caption("a red circle standing still on a blue-grey background\n").motion == "standing still"


@pytest.mark.parametrize("text", ["", "a pink circle moving left on a black background", "a red circle moving left"])
def test_other_texts_are_refused(text):
    with pytest.raises(
        DataError, match=f"'{text}' is not a caption of the demo set, e.g. 'a red square moving left on a"
    ):
        parse_caption(text)


def test_what_is_held_out_is_seen_in_parts():
    """No colour-shape-motion triple is in both parts, yet training has every value and every pair of values."""
    held_out, training = [scene for scene in all_scenes() if is_held_out(scene)], training_scenes()
    assert (len(held_out), len(training)) == (27, 243) and not set(held_out) & set(training)
    triples = values(held_out, "colour", "shape", "motion")
    assert len(triples) == 9 and not set(triples) & set(values(training, "colour", "shape", "motion"))
    for names in itertools.combinations(ATTRIBUTES, 2):
        assert set(values(training, *names)) == set(values(all_scenes(), *names))
    for name in ATTRIBUTES:
        assert set(values(held_out, name)) == set(values(training, name))
        assert max(values(training, name).values()) < 1.5 * min(values(training, name).values())


def test_the_first_training_captions_differ():
    assert all(len(values(training_scenes()[:12], name)) >= 3 for name in ATTRIBUTES)


@pytest.mark.parametrize("num_frames", [9, 17])
def test_shapes_stay_inside_and_are_smooth(num_frames):
    for number, scene in enumerate(all_scenes()[::7]):
        frames = draw(scene, num_frames, np.random.default_rng(number))
        assert frames.shape == (num_frames, SIZE, SIZE, 3) and frames.dtype == np.uint8
        edge = np.concatenate([frames[:, 0], frames[:, -1], frames[:, :, 0], frames[:, :, -1]], axis=1)
        assert (edge == BACKGROUNDS[scene.background]).all()
        assert (frames == COLOURS[scene.colour]).all(-1).any((1, 2)).all()
        assert len(np.unique(frames.reshape(-1, 3), axis=0)) > 2  # anti-aliased: shades between the two colours


@pytest.mark.parametrize("num_frames", [9, 17])
def test_the_checker_reads_real_clips(tmp_path, num_frames):
    """Through H.264 and back, every caption once, those held out included."""
    scenes = all_scenes()
    right: Counter[str] = Counter()
    for number, scene in enumerate(scenes):
        path = tmp_path / "clip.mp4"
        write_mp4(path, draw(scene, num_frames, np.random.default_rng([5, number])), 8, crf=CRF)
        right.update(agreement(scene, see(read_frames(path, range(num_frames)))))
    shares = {name: right[name] / len(scenes) for name in (*ATTRIBUTES, "all")}
    assert min(shares["colour"], shares["motion"], shares["background"]) >= 0.99  # measured 1.0
    assert min(shares["shape"], shares["all"]) >= 0.98  # measured 0.996: a few shapes on the colour grid's edge


def test_the_checker_reads_blurred_and_noisy_clips():
    """As a small autoencoder gives them back: colour, motion and background hold."""
    generator = np.random.default_rng(0)
    right: Counter[str] = Counter()
    scenes = all_scenes()[::3]
    for scene in scenes:
        frames = draw(scene, 9, generator).astype(float)
        blurred = np.mean([np.roll(frames, (dy, dx), (1, 2)) for dy in (-1, 0, 1) for dx in (-1, 0, 1)], axis=0)
        noisy = np.clip(blurred + generator.normal(0, 8, blurred.shape), 0, 255).astype(np.uint8)
        right.update(agreement(scene, see(noisy)))
    assert min(right["colour"], right["motion"], right["background"]) >= 0.97 * len(scenes)


def test_empty_clips_and_noise_show_nothing_that_was_asked_for():
    blank = np.full((9, SIZE, SIZE, 3), BACKGROUNDS["brown"], np.uint8)
    assert see(blank) == Scene("", "", "", "brown")
    flash = blank.copy()
    flash[4, 10:20, 10:20] = COLOURS["red"]
    assert see(flash).motion == ""
    noise = np.random.default_rng(0).integers(0, 256, (9, SIZE, SIZE, 3), dtype=np.uint8)
    assert see(noise).motion == "standing still"


def test_agreement_counts_each_attribute():
    wanted = Scene("red", "circle", "moving up", "black")
    assert agreement(wanted, Scene("red", "square", "moving up", "black")) == {
        "colour": True,
        "shape": False,
        "motion": True,
        "background": True,
        "all": False,
    }
    assert agreement(wanted, wanted)["all"]
