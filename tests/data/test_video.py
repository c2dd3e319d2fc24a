"""Writing and reading video files, whole and broken."""

import os
import subprocess
import sys
from fractions import Fraction

import av
import numpy as np
import pytest

from sat.data.quarantine import BadClip
from sat.data.video import probe, read_frames, read_metadata, write_mp4, write_png
from tests.data.numbered import frame_numbers, numbered_frames


def write_with(path, codec, frames, times=None, pixel_format="yuv420p", rotation=0):
    """A file as other programs write it; `times` are presentation times in 1/1000 s."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=8)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = pixel_format
        if rotation:
            stream.set_display_rotation(rotation)
        if times:
            stream.codec_context.time_base = Fraction(1, 1000)
        for number, picture in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            if times:
                frame.pts, frame.time_base = times[number], stream.codec_context.time_base
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


@pytest.mark.parametrize(
    ("name", "codec"),
    [("a.mp4", "libx264"), ("a.mov", "mpeg4"), ("a.mkv", "libx264"), ("a.webm", "libvpx-vp9"), ("a.avi", "mpeg4")],
)
def test_frames_have_the_same_numbers_in_every_container(tmp_path, name, codec):
    write_with(tmp_path / name, codec, numbered_frames(30))
    info = probe(tmp_path / name)
    assert (info.num_frames, info.fps, info.height, info.width) == (30, 8, 32, 40)
    assert info.duration == 30 / 8
    assert probe(tmp_path / name, count=True) == info
    assert frame_numbers(read_frames(tmp_path / name, [0, 29, 7, 7, 13])) == [0, 29, 7, 7, 13]


def test_frames_at_uneven_times_are_numbered_in_order(tmp_path):
    times = list(np.cumsum([10, 40, 300, 10, 10, 500] * 4))
    write_with(tmp_path / "a.mkv", "libx264", numbered_frames(24), times=[int(time) for time in times])
    assert frame_numbers(read_frames(tmp_path / "a.mkv", range(24))) == list(range(24))


@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_an_image_is_a_clip_of_one_frame(tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    codec, pixel_format = ("png", "rgb24") if suffix == "png" else ("mjpeg", "yuvj420p")
    write_with(path, codec, numbered_frames(6)[5:], pixel_format=pixel_format)
    assert probe(path).num_frames == 1
    assert frame_numbers(read_frames(path, [0])) == [5]


def test_a_clip_filmed_upright_is_read_upright(tmp_path):
    frames = np.zeros((3, 32, 64, 3), np.uint8)
    frames[:, :, 48:] = (255, 0, 0)  # red on the right as stored; turned a quarter to the left, red is on top
    write_with(tmp_path / "a.mp4", "libx264", frames, rotation=90)
    read = read_frames(tmp_path / "a.mp4", [1])
    assert read.shape == (1, 64, 32, 3)
    assert read[0, :12, :, 0].min() > 240 and read[0, 20:, :, 0].max() < 15


def test_written_colours_come_back_and_are_tagged(tmp_path):
    colours = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 255], [128, 40, 200]], np.uint8)
    frames = np.tile(colours.repeat(16, 0)[None, :, None], (4, 1, 32, 1))
    write_mp4(tmp_path / "a.mp4", frames, 8)
    read = read_frames(tmp_path / "a.mp4", [2])[0, 8::16, 16]
    assert np.abs(read.astype(int) - colours).max() <= 6  # measured 5
    with av.open(str(tmp_path / "a.mp4")) as container:
        context = container.streams.video[0].codec_context
        assert (context.pix_fmt, int(context.colorspace), int(context.color_range)) == ("yuv420p", 1, 1)
        luma = next(container.decode(video=0)).to_ndarray(format="yuv420p")[40, 16]
    assert abs(int(luma) - 32) <= 2  # blue in BT.709: 16 + 219 * 0.0722; in BT.601 it would be 41


def test_odd_sides_gain_a_row_and_a_column(tmp_path):
    frames = np.full((2, 33, 47, 3), 200, np.uint8)
    write_mp4(tmp_path / "a.mp4", frames, 8)
    read = read_frames(tmp_path / "a.mp4", [0, 1])
    assert read.shape == (2, 34, 48, 3) and read.min() > 190


def test_chunks_write_the_same_file_as_one_array(tmp_path):
    frames = numbered_frames(20)
    write_mp4(tmp_path / "whole.mp4", frames, 29.97)
    write_mp4(tmp_path / "chunks.mp4", (frames[start : start + 7] for start in range(0, 20, 7)), 29.97)
    assert (tmp_path / "whole.mp4").read_bytes() == (tmp_path / "chunks.mp4").read_bytes()
    assert probe(tmp_path / "whole.mp4").fps == pytest.approx(29.97)


WRITE_SMALL_CLIPS = """
import sys, numpy
from sat.data.video import write_mp4

generator = numpy.random.default_rng(0)
for number in range(20):
    frames = numpy.zeros((9, 32, 32, 3), numpy.uint8)
    for frame in frames:
        top, left = generator.integers(4, 20, 2)
        frame[top : top + 10, left : left + 10] = generator.integers(0, 256, 3)
    write_mp4(f"{sys.argv[1]}/{number}.mp4", frames, 8)
"""


def test_the_same_frames_give_the_same_file_whatever_the_memory_held(tmp_path):
    """See the comment in write_mp4. glibc fills fresh memory with the value of MALLOC_PERTURB_."""
    contents = set()
    for fill in ("0", "85"):
        folder = tmp_path / fill
        folder.mkdir()
        environment = {**os.environ, "MALLOC_PERTURB_": fill}
        subprocess.run([sys.executable, "-c", WRITE_SMALL_CLIPS, str(folder)], env=environment, check=True)
        contents.add(b"".join((folder / f"{number}.mp4").read_bytes() for number in range(20)))
    assert len(contents) == 1


def test_metadata_comes_back(tmp_path):
    metadata = {"prompt": 'a "red" circle;\nünïcode 日本 = #', "seed": "42", "notes": "", "long": "x" * 5000}
    write_mp4(tmp_path / "a.mp4", numbered_frames(2), 8, metadata)
    assert read_metadata(tmp_path / "a.mp4") == metadata


@pytest.mark.parametrize(
    ("frames", "message"),
    [
        (np.zeros((2, 8, 8, 3), np.float32), r"frames are float32 \(2, 8, 8, 3\); give uint8 \(t h w 3\)"),
        (np.zeros((8, 8, 3), np.uint8), r"give uint8 \(t h w 3\)"),
        (iter([]), "no frames to write"),
        ([np.zeros((1, 8, 8, 3), np.uint8), np.zeros((1, 8, 10, 3), np.uint8)], "differ in size"),
    ],
)
def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, frames, message):
    path = tmp_path / "a.mp4"
    path.write_bytes(b"old")
    with pytest.raises(ValueError, match=message):
        write_mp4(path, frames, 8)
    assert [file.name for file in tmp_path.iterdir()] == ["a.mp4"] and path.read_bytes() == b"old"


def test_a_picture_keeps_every_value_and_its_texts(tmp_path):
    from PIL import Image

    picture = np.random.default_rng(0).integers(0, 256, (33, 47, 3), dtype=np.uint8)
    write_png(tmp_path / "a.png", picture, {"prompt": "ein Frühlingstag\n春天", "seed": "7"})
    assert np.array_equal(read_frames(tmp_path / "a.png", [0])[0], picture)
    with Image.open(tmp_path / "a.png") as image:
        assert np.array_equal(np.asarray(image), picture)
        assert image.text == {"prompt": "ein Frühlingstag\n春天", "seed": "7"}
    assert [file.name for file in tmp_path.iterdir()] == ["a.png"]


@pytest.mark.parametrize("picture", [np.zeros((4, 4)), np.zeros((1, 4, 4, 3), np.uint8), np.zeros((4, 4, 4), np.uint8)])
def test_a_picture_of_another_form_is_refused(tmp_path, picture):
    with pytest.raises(ValueError, match=r"the picture is .*; give uint8 \(h w 3\)"):
        write_png(tmp_path / "a.png", picture)
    assert not list(tmp_path.iterdir())


def broken(tmp_path, kind):
    """A file that is broken in one way."""
    path = tmp_path / f"{kind}.mp4"
    noise = np.random.default_rng(0).integers(0, 256, (60, 32, 40, 3), dtype=np.uint8)
    if kind == "cut short, header first":
        write_mp4(path, noise, 8)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    elif kind == "cut short, header last":
        write_with(path, "libx264", noise)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    elif kind == "garbage":
        path.write_bytes(np.random.default_rng(0).bytes(10_000))
    elif kind == "empty":
        path.touch()
    elif kind == "sound only":
        with av.open(str(path), "w") as container:
            stream = container.add_stream("aac", rate=8000)
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 2048), np.float32), format="fltp", layout="mono")
            frame.sample_rate = 8000
            container.mux(stream.encode(frame))
            container.mux(stream.encode())
    elif kind == "folder":
        path.mkdir()
    return path


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("cut short, header first", "cut short"),
        ("cut short, header last", "unreadable"),
        ("garbage", "unreadable"),
        ("empty", "empty file"),
        ("missing", "missing file"),
        ("sound only", "no video stream"),
        ("folder", "unreadable"),
    ],
)
def test_broken_files_are_named_with_a_reason(tmp_path, kind, reason):
    path = broken(tmp_path, kind)
    with pytest.raises(BadClip) as caught:
        probe(path, count=True)
    assert caught.value.reason == reason and str(path) in str(caught.value)


def test_frames_of_a_cut_file_are_refused(tmp_path):
    with pytest.raises(BadClip):
        read_frames(broken(tmp_path, "cut short, header first"), range(60))


def test_known_damage_is_refused(tmp_path):
    """Three bytes turned over. Most such changes still decode to some picture; those the decoder knows of are told."""
    path = tmp_path / "a.mp4"
    write_mp4(path, np.random.default_rng(0).integers(0, 256, (60, 32, 40, 3), dtype=np.uint8), 8)
    content = path.read_bytes()
    reasons = []
    for place in range(6000, len(content) // 2, 1000):
        path.write_bytes(
            content[:place] + bytes(255 - byte for byte in content[place : place + 3]) + content[place + 3 :]
        )
        try:
            read_frames(path, range(60))
        except BadClip as bad:
            reasons.append(bad.reason)
    assert "damaged" in reasons


def test_frames_past_the_end_are_refused(tmp_path):
    write_mp4(tmp_path / "a.mp4", numbered_frames(5), 8)
    with pytest.raises(BadClip, match="ends early: 1 of 2 frames could be decoded, the last wanted is number 5"):
        read_frames(tmp_path / "a.mp4", [4, 5])
