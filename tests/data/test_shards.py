"""Clips in tar shards: the samples of a folder, from any place, by an index that is made once."""

import io
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st

from sat.data import remote, shards
from sat.data.dataset import LatentShards, SFTDataset
from sat.data.manifest import scan
from sat.data.quarantine import BadClip
from sat.data.shards import expand_braces, index_folder, shard_places
from sat.data.video import write_png
from sat.errors import ConfigError, DataError, DownloadError
from tests.data.packed import mp4, shard_server, write_shard

SETTINGS: dict[str, Any] = {"video_size": (32, 40), "fps": 8, "max_num_frames": 9}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """Indexes of these tests, and quick tries at servers."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(remote, "PAUSES", (0.0,))
    assert index_folder() == tmp_path / "cache" / "sat-video" / "shards"


def write_set(folder: Path, num_shards: int = 2, per_shard: int = 2) -> str:
    """Shards of clips of 20, 21, ... frames; the pattern of their names."""
    for shard in range(num_shards):
        members: dict[str, bytes | str] = {}
        for number in range(shard * per_shard, (shard + 1) * per_shard):
            members[f"{number:04d}.mp4"] = mp4(folder, 20 + number)
            members[f"{number:04d}.txt"] = f" clip number {number}\n"
        write_shard(folder / f"set-{shard:02d}.tar", members)
    return f"{folder}/set-{{00..{num_shards - 1:02d}}}.tar"


# --- patterns --------------------------------------------------------------------------------------------------------


def test_patterns() -> None:
    assert expand_braces("a.tar") == ["a.tar"]
    assert expand_braces("a{8..11}.tar") == ["a8.tar", "a9.tar", "a10.tar", "a11.tar"]
    assert expand_braces("{x,y}-{08..09}") == ["x-08", "x-09", "y-08", "y-09"]


@given(first=st.integers(0, 300), more=st.integers(0, 50), digits=st.integers(1, 5))
def test_a_count_has_every_number_once(first: int, more: int, digits: int) -> None:
    words = expand_braces(f"s{{{first:0{digits}d}..{first + more}}}.tar")
    assert [int(word[1:-4]) for word in words] == list(range(first, first + more + 1))
    assert {len(word[1:-4]) for word in words} <= set(range(digits, 6))


@pytest.mark.parametrize("pattern", ["a{3..1}.tar", "a{x}.tar", "a{}.tar"])
def test_a_pattern_that_cannot_be_read(pattern: str) -> None:
    with pytest.raises(ConfigError, match=r"cannot read \{.*\} in a\{.*\}.tar; write \{000..019\} or \{a,b\}"):
        expand_braces(pattern)


def test_shards_that_are_not_there_or_named_twice(tmp_path: Path) -> None:
    write_set(tmp_path, 2)
    assert shard_places(f"{tmp_path}/*.tar") == [f"{tmp_path}/set-00.tar", f"{tmp_path}/set-01.tar"]
    with pytest.raises(DataError, match=r"there is no shard .*/set-02.tar \(data_dir .*/set-\{00..02\}.tar\)"):
        shard_places(f"{tmp_path}/set-{{00..02}}.tar")
    with pytest.raises(DataError, match=r"there is no shard .*/x\*.tar"):
        shard_places(f"{tmp_path}/x*.tar")
    with pytest.raises(DataError, match=r"the shard .*/set-01.tar is named twice by"):
        shard_places(f"{tmp_path}/set-{{0*,01}}.tar")


# --- samples ---------------------------------------------------------------------------------------------------------


def assert_like_files(folder: Path, source: str) -> None:
    """Shards at a source give the samples, sizes and captions of the same clips as files."""
    (folder / "files").mkdir(exist_ok=True)
    for number in range(4):
        (folder / "files" / f"{number}.mp4").write_bytes(mp4(folder, 20 + number))
        (folder / "files" / f"{number}.txt").write_text(f"clip number {number}")
    settings = {**SETTINGS, "short_clips": "keep", "max_num_frames": 17, "read_headers": True}
    files, packed = SFTDataset(folder / "files", **settings), SFTDataset(source, **settings)
    assert packed.latent_sizes().tolist() == files.latent_sizes().tolist() and len(packed) == 4
    for number in range(4):
        own, other = packed[number], files[number]
        torch.testing.assert_close(own.pop("pixels"), other.pop("pixels"), rtol=0, atol=0)
        assert own.pop("key") == f"set-{number // 2:02d}.tar/{number:04d}"
        assert own == {name: value for name, value in other.items() if name != "key"}


@pytest.mark.parametrize("pattern", [None, "set-*.tar", "set-0{0,1}.tar"])
def test_shards_on_disk_give_the_samples_of_files(tmp_path: Path, pattern: str | None) -> None:
    source = write_set(tmp_path)
    assert_like_files(tmp_path, source if pattern is None else f"{tmp_path}/{pattern}")


def test_shards_behind_http_give_the_samples_of_files(tmp_path: Path) -> None:
    write_set(tmp_path)
    with shard_server(tmp_path) as server:
        server.failures = [503]
        assert_like_files(tmp_path, f"{server.address}set-{{00..01}}.tar?token=a")


def test_released_members_and_json(tmp_path: Path) -> None:
    """SAT's own names, those of webdataset's writers, an image, and what is neither."""
    png = tmp_path / "1.png"
    write_png(png, np.full((32, 40, 3), 9, dtype=np.uint8))
    about = json.dumps({"caption": "from json", "fps": 8, "num_frames": 20, "height": 32, "width": 40, "shard": "x"})
    shard = write_shard(
        tmp_path / "a.tar",
        {
            "./x/a.avi": mp4(tmp_path),
            "./x/a.caption": "released",
            "./x/a.duration": "2.5",
            "./x/a.fps": "8.0",
            "b.mp4": mp4(tmp_path),
            "b.json": about,
            "b.dense": "a long text",
            "c.png": png.read_bytes(),
            "c.txt": "\ufeffan image\n",
            ".hidden": "no clip",
        },
    )
    index = scan(str(shard), read_headers=False)
    assert [(clip.key, clip.caption(), clip.num_frames) for clip in map(index.__getitem__, range(3))] == [
        ("a.tar/x/a", "released", 20),
        ("a.tar/b", "from json", 20),
        ("a.tar/c", "an image", None),
    ]
    assert index[2].is_image and index[1].row["shard"] == str(shard)
    dense = scan(str(shard), read_headers=False, caption_key="dense", strict=False)
    assert [(clip.key, clip.reason) for clip in dense.dropped] == [
        ("a.tar/x/a", "no caption"),
        ("a.tar/c", "no caption"),
    ]
    assert "it has no member or JSON key dense; its members are avi, caption" in dense.dropped[0].detail
    image = SFTDataset(str(shard), **SETTINGS, short_clips="keep")[2]
    assert image["pixels"].shape == (1, 3, 32, 40)


def test_clips_that_are_too_short_are_left_out_as_released(tmp_path: Path) -> None:
    """By duration and fps, without opening a video."""
    members: dict[str, bytes | str] = {}
    for name, seconds in (("a", "1.8"), ("b", "1.9")):
        members |= {f"{name}.mp4": b"", f"{name}.fps": "8", f"{name}.duration": seconds, f"{name}.txt": name}
    shard = write_shard(tmp_path / "a.tar", members)
    dataset = SFTDataset(str(shard), **SETTINGS, short_clips="drop")  # 9 frames and 3 at each end
    assert [clip.key for clip in dataset.index.dropped] == ["a.tar/a"] and len(dataset) == 1
    assert "14 frames are fewer than the 15 needed" in dataset.index.dropped[0].detail


@pytest.mark.parametrize("kind", ["safetensors", "npy"])
def test_latents_in_shards(tmp_path: Path, kind: str) -> None:
    moments = torch.randn(3, 32, 4, 6)
    array = io.BytesIO()
    np.save(array, moments.numpy())
    content = safetensors.torch.save({"moments": moments}) if kind == "safetensors" else array.getvalue()
    members: dict[str, bytes | str] = {"a.mp4": b"beside", f"a.{kind}": content, "a.txt": "text", "a.fps": "16"}
    dataset = LatentShards(str(write_shard(tmp_path / "a.tar", members)))
    assert dataset.latent_sizes().tolist() == [[3, 4, 6]]
    item = dataset[0]
    torch.testing.assert_close(item.pop("moments"), moments, rtol=0, atol=0)
    assert item == {"caption": "text", "key": "a.tar/a", "fps": 16.0, "num_frames": 9}


def test_latents_that_cannot_be_used(tmp_path: Path) -> None:
    def dataset(name: str, members: dict[str, bytes | str], **more: Any) -> LatentShards:
        return LatentShards(str(write_shard(tmp_path / f"{name}.tar", members)), **more)

    good = safetensors.torch.save({"latents": torch.zeros(1, 16, 2, 2)})
    with pytest.raises(DataError, match=r"a.tar/x has no fps in its shard; set data.params.fps"):
        dataset("a", {"x.safetensors": good, "x.txt": "t"})
    assert dataset("b", {"x.safetensors": good, "x.txt": "t"}, fps=8)[0]["fps"] == 8.0
    flat = safetensors.torch.save({"latents": torch.zeros(16, 2, 2)})
    with pytest.raises(
        DataError, match=r"c.tar: x: its member safetensors cannot be read \(its shape is \[16, 2, 2\]; g"
    ):
        dataset("c", {"x.safetensors": flat, "x.txt": "t"})
    other = safetensors.torch.save({"z": torch.zeros(1, 16, 2, 2)})
    with pytest.raises(DataError, match=r"it holds .*z.*; give a tensor called moments or latents"):
        dataset("d", {"x.safetensors": other, "x.txt": "t"})
    with pytest.raises(DataError, match=r"e.tar: x: its member npy cannot be read"):
        dataset("e", {"x.npy": b"nothing", "x.txt": "t"})
    with pytest.raises(
        ConfigError, match=r"data_dir is clips; give the path, pattern or URL of shards, which end in .tar"
    ):
        LatentShards("clips")
    with pytest.raises(ConfigError, match=r"missing_caption is 'skip'; give error or empty"):
        LatentShards("a.tar", missing_caption="skip")  # type: ignore[arg-type]


# --- the index -------------------------------------------------------------------------------------------------------


def test_an_index_is_made_once_and_again_when_the_shard_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[str] = []
    make = shards._make_index
    monkeypatch.setattr(shards, "_make_index", lambda shard, headers: (made.append(shard), make(shard, headers))[1])

    def look(read_headers: bool = False) -> int:
        made.clear()
        return len(scan(source, read_headers=read_headers))

    source = write_set(tmp_path)
    assert look() == 4 and sorted(made) == shard_places(source)
    assert look() == 4 and not made
    assert look(read_headers=True) == 4 and len(made) == 2
    assert look(read_headers=True) == look() == 4 and not made
    write_shard(tmp_path / "set-01.tar", {"0.mp4": mp4(tmp_path), "0.txt": "t"})
    assert look() == 3 and made == [f"{tmp_path}/set-01.tar"]
    for kept in index_folder().glob("*.jsonl"):
        kept.write_text("half a li")
    assert look() == 3 and len(made) == 2


def test_an_index_that_cannot_be_kept_is_made_at_each_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    source = write_set(tmp_path, 1)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with caplog.at_level(logging.WARNING):
        assert len(scan(source)) == 2
    assert "set-00.tar cannot be kept in" in caplog.text and "it is made at each start" in caplog.text


def test_a_shard_that_is_replaced_on_its_server(tmp_path: Path) -> None:
    write_set(tmp_path)
    with shard_server(tmp_path) as server:
        source = f"{server.address}set-00.tar"
        dataset = SFTDataset(source, **SETTINGS)
        write_shard(tmp_path / "set-00.tar", {"0.mp4": mp4(tmp_path), "0.txt": "new", "1.pad": bytes(99_999)})
        with pytest.raises(DownloadError, match=r"bytes, and had .* before: start again, and its index is made anew"):
            dataset[0]
        assert SFTDataset(source, **SETTINGS)[0]["caption"] == "new"


def test_a_clip_is_one_request(tmp_path: Path) -> None:
    write_set(tmp_path)
    with shard_server(tmp_path) as server:
        dataset = SFTDataset(f"{server.address}set-00.tar", **SETTINGS)
        server.ranges.clear()
        for number in range(2):
            dataset[number]
        assert len(server.ranges) == 2


def corrupt(change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def apply(path: Path) -> None:
        path.write_bytes(change(path.read_bytes()))

    return apply


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data[:600], r"set-00.tar ends early: its end mark is missing after \d clips; copy it again"),
        (lambda data: data.rstrip(b"\0"), "ends early: its end mark is missing after 2 clips"),
        (lambda data: b"<html>" + data, r"set-00.tar is no tar file that can be read from any place"),
        (lambda data: b"\x1f\x8b\x08" + data, "a compressed one must be unpacked"),
        (lambda data: b"", r"set-00.tar is empty \(0 bytes\); copy it again, or leave it out"),
    ],
)
def test_shards_that_are_broken(tmp_path: Path, change: Callable[[bytes], bytes], message: str) -> None:
    source = write_set(tmp_path)
    corrupt(change)(tmp_path / "set-00.tar")
    with pytest.raises(DataError, match=message):
        scan(source, read_headers=False)
    index = scan(source, read_headers=False, strict=False)
    assert len(index) == 2 and [clip.reason for clip in index.dropped] == ["unusable shard"]


def test_members_that_are_wrong(tmp_path: Path) -> None:
    clip = mp4(tmp_path)
    for members, message in (
        ({"a.mp4": clip, "a.json": "[1]"}, r"a: its member json cannot be read \(not a JSON object\)"),
        ({"a.mp4": clip, "a.json": '{"fps": "8"}'}, "a: 'fps' is '8'; give a number above 0"),
        ({"a.mp4": clip, "a.json": '{"num_frames": 8.5}'}, "a: 'num_frames' is 8.5; give a whole number"),
        ({"a.mp4": clip, "a.json": '{"caption": ["t"]}'}, r"a: its caption is \['t'\]; give a text"),
        ({"a.mp4": clip, "a.fps": "fast"}, "a: its member fps cannot be read"),
        ({"a.mp4": clip, "a.txt": b"\xff\xfe"}, "a: its member txt cannot be read"),
    ):
        shard = write_shard(tmp_path / "x.tar", members)
        with pytest.raises(DataError, match=f"x.tar: {message}"):
            scan(str(shard), read_headers=False)
        (dropped,) = scan(str(shard), read_headers=False, strict=False).dropped
        assert dropped.reason == "wrong row"
    write_shard(tmp_path / "x.tar", {"a.txt": "alone"})
    with pytest.raises(DataError, match=r"no clip can be used\n.*\n.*its members are txt; none of them is mp4 avi"):
        scan(str(shard), read_headers=False)
    twice = tmp_path / "y.tar"
    write_shard(twice, {"a.mp4": clip, "./a.mp4": clip})
    with pytest.raises(DataError, match=r"y.tar has two members a.mp4; a name may stand in it once, so pack it again"):
        scan(str(twice), read_headers=False)
    with pytest.raises(DataError, match=r"no clips in .*/z.tar: looked for members that end in mp4 avi"):
        scan(str(write_shard(tmp_path / "z.tar", {})), read_headers=False)


def test_a_clip_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    clip = mp4(tmp_path)
    members: dict[str, bytes | str] = {"a.mp4": b"no video", "b.mp4": clip, "c.mp4": b"", "d.mp4": clip[:-50]}
    members |= {f"{name}.txt": name for name in "abcd"}
    shard = write_shard(tmp_path / "x.tar", members)
    dataset = SFTDataset(str(shard), **SETTINGS)
    for number, message in ((0, "x.tar: a.mp4 cannot be read"), (2, r"c.mp4 is empty"), (3, "d.mp4 was cut short: 50")):
        with pytest.raises(BadClip, match=message) as caught:
            dataset[number]
        assert caught.value.key == f"x.tar/{'abcd'[number]}"
    index = SFTDataset(str(shard), **SETTINGS, read_headers=True, strict=False).index
    assert {clip.key: clip.reason for clip in index.dropped}.keys() >= {"x.tar/a", "x.tar/c"}


def test_a_folder_with_shards_says_how_to_name_them(tmp_path: Path) -> None:
    (tmp_path / "s").mkdir()
    write_shard(tmp_path / "s" / "a.tar", {})
    with pytest.raises(DataError, match=r"for its shards give .*/s/\*.tar"):
        scan(tmp_path / "s")
