"""Entries of a cache: what is written comes back bit for bit, or is told to be damaged."""

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import sat.data.cache as cache
from sat.data.cache import CachedClips, Entries, Header, image_to_store, latents_key, text_key
from sat.data.content import KnownFiles
from sat.data.dataset import SFTDataset
from sat.data.frames import levels_to_pixels
from sat.data.quarantine import BadClip
from sat.errors import CacheError
from sat.training.fill import ShardWriter

KEYS = [text_key(str(number)) for number in range(40)]


def write(folder: Path, contents: dict[str, dict[str, Tensor]], facts: dict[str, Any] | None = None) -> str:
    writer = ShardWriter(folder)
    for key, tensors in contents.items():
        writer.add(key, tensors, facts or {})
    writer.publish()
    return writer.names[-1]


def opened(folder: Path, *names: str) -> Entries:
    entries = Entries(folder)
    entries.add_shards(names)
    return entries


def drawn(seed: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    values = torch.randint(0, 256, (*shape, dtype.itemsize), generator=torch.Generator().manual_seed(seed))
    return values.to(torch.uint8).view(dtype).squeeze(-1)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40, deadline=None)
@given(
    st.lists(
        st.lists(st.tuples(st.integers(0, 39), st.sampled_from(list(cache._DTYPES.values()))), max_size=8), max_size=4
    ),
    st.lists(st.integers(0, 4), min_size=1, max_size=4).map(tuple),
)
def test_what_is_written_is_read(
    tmp_path: Path, groups: list[list[tuple[int, torch.dtype]]], shape: tuple[int, ...]
) -> None:
    """Any dtype and shape, any bits (NaN too), in shards of which several may hold the same entry."""
    folder = tmp_path / str(len(list(tmp_path.iterdir())))
    folder.mkdir()
    expected: dict[str, Tensor] = {}
    entries = Entries(folder)
    for group in groups:
        own = {KEYS[number]: expected.setdefault(KEYS[number], drawn(number, shape, dtype)) for number, dtype in group}
        if own:
            entries.add_shards([write(folder, {key: {"states": tensor} for key, tensor in own.items()}, {"fps": 0.1})])
    assert len(entries) == len(expected)
    assert [key in entries for key in KEYS] == [key in expected for key in KEYS]
    for key, tensor in expected.items():
        (found,) = entries.read(key).values()
        assert found.dtype == tensor.dtype and found.shape == tensor.shape
        assert found.view(-1).view(torch.uint8).tolist() == tensor.contiguous().view(-1).view(torch.uint8).tolist()
        assert entries.facts(key)["fps"] == 0.1
    assert len(list(entries.facts_of(set(KEYS)))) == len(expected)


def test_entries_go_to_workers_and_few_headers_stay_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "OPEN_HEADERS", 2)
    names = [write(tmp_path, {key: {"states": torch.full((2,), float(number))}}) for number, key in enumerate(KEYS[:5])]
    entries = opened(tmp_path, *names)
    for own in (entries, pickle.loads(pickle.dumps(entries))):
        assert [own.read(key)["states"][0].item() for key in KEYS[:5]] == [0, 1, 2, 3, 4]
        assert len(own._headers) == 2
    with pytest.raises(KeyError, match="has no entry"):
        entries.read(KEYS[7])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda content: content[:-1], r"has \d+ bytes instead of \d+; delete it, and what it held is computed anew"),
        (lambda content: content + b"0", r"has \d+ bytes instead of \d+; delete it"),
        (lambda content: content[:5], "is no shard of a cache"),
        (lambda content: b"\x7f" * 8 + content, "is no shard of a cache"),
        (lambda content: content.replace(b"__metadata__", b"__metadaten_"), "is no shard of a cache"),
        (lambda content: b"", "is no shard of a cache"),
    ],
)
def test_a_damaged_shard_is_told(tmp_path: Path, damage: Callable[[bytes], bytes], message: str) -> None:
    path = tmp_path / write(tmp_path, {KEYS[0]: {"states": torch.ones(3)}})
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(CacheError, match=f"{path.name} {message}"):
        Header.read(path)


def test_damage_after_the_start_is_told(tmp_path: Path) -> None:
    name = write(tmp_path, {KEYS[0]: {"states": torch.ones(3)}})
    entries, path = opened(tmp_path, name), tmp_path / name
    entries.read(KEYS[0])
    content = path.read_bytes()
    path.write_bytes(content[:-1] + b"\0")
    with pytest.raises(CacheError, match=r"is damaged: the states of entry .* have another checksum; delete it"):
        entries.read(KEYS[0])
    path.write_bytes(content[:-1])
    with pytest.raises(CacheError, match="was cut while it was in use"):
        entries.read(KEYS[0])
    path.unlink()
    with pytest.raises(CacheError, match="cannot be read: No such file"):
        entries.read(KEYS[0])


def test_frames_are_kept_without_loss() -> None:
    levels = torch.arange(192, dtype=torch.uint8).view(3, 8, 8)
    assert torch.equal(image_to_store(levels_to_pixels(levels)), levels)
    odd = levels_to_pixels(levels) + 1e-4
    assert torch.equal(image_to_store(odd), odd)


# --- clips -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def clips(make_set: Callable[..., Path]) -> SFTDataset:
    return SFTDataset(make_set(3), video_size=(32, 32), fps=8, max_num_frames=9, skip_frms_num=0)


def cached(clips: SFTDataset, folder: Path, texts: Entries | None = None) -> CachedClips:
    """The clips, their moments all zeros; the last one is not in the cache."""
    known, contents, keys = KnownFiles(folder), {}, []
    facts = {name: value for name, value in clips[0].items() if name not in ("pixels", "caption", "key")}
    for number in range(3):
        source = clips.source(number)
        keys.append(latents_key(source, f"{known.look_up(source)[0]}{number}", None))
        image = image_to_store(clips[number]["pixels"][0])
        contents[keys[-1]] = {"moments": torch.zeros(3, 32, 4, 4), "image": image}
    contents.pop(keys[2])
    entries = opened(folder, write(folder, contents, facts))
    return CachedClips(clips, entries, np.array(keys, "S32"), texts)


def test_an_item_is_what_the_clip_is(clips: SFTDataset, tmp_path: Path) -> None:
    for number in range(2):
        own, clip = cached(clips, tmp_path)[number], clips[number]
        assert torch.equal(own.pop("image"), clip.pop("pixels")[:1])
        assert own.pop("moments").shape == (3, 32, 4, 4)
        assert own.keys() == clip.keys()
        assert all(tuple(own[name]) == clip[name] if "as_tuple" in name or "crop" in name else own[name] == clip[name]
                   for name in own)  # fmt: skip


def test_what_changes_while_a_run_goes_on_is_a_bad_clip(clips: SFTDataset, tmp_path: Path) -> None:
    own = cached(clips, tmp_path)
    with pytest.raises(BadClip, match=r"the file of set/videos/2.mp4 has changed since the run began: it is not in"):
        own[2]
    texts = opened(tmp_path, write(tmp_path, {text_key("clip number 0"): {"states": torch.ones(4, 2)}}))
    own = cached(clips, tmp_path, texts)
    assert torch.equal(own[0]["text_states"], torch.ones(4, 2))
    with pytest.raises(BadClip, match=r"the caption of set/videos/1.mp4 has changed") as caught:
        own[1]
    assert caught.value.key == "set/videos/1.mp4"
