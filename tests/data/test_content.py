"""Hashes of files: remembered as long as the file is the same."""

import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sat.data.clip import Clip
from sat.data.content import FILES, KnownFiles, Source, as_lines, make_key
from sat.data.quarantine import BadClip

PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)


def source_of(file: Path) -> Source:
    return Source(Clip(file.parent, {"video": file.name}), {})


def remember(folder: Path, *rows: dict[str, object]) -> None:
    (folder / FILES).mkdir(exist_ok=True)
    (folder / FILES / f"{len(list((folder / FILES).iterdir()))}.jsonl").write_text(as_lines(rows))


def test_a_file_is_hashed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "clip \u00e4.mp4"
    file.write_bytes(b"first")
    source = source_of(file)
    digest, row = KnownFiles(tmp_path).look_up(source)
    assert row is not None and row["digest"] == digest and len(digest) == 64
    remember(tmp_path, row, {"place": "another", "state": [1, 1], "digest": 64 * "0"})
    with monkeypatch.context() as patch:
        patch.setattr(Clip, "digest", None)  # it is not read
        assert KnownFiles(tmp_path).look_up(source) == (digest, None)

    time = file.stat().st_mtime_ns
    file.write_bytes(b"other")
    os.utime(file, ns=(time, time + 1))
    changed, row = KnownFiles(tmp_path).look_up(source)
    assert changed != digest and row is not None
    remember(tmp_path, row)
    assert KnownFiles(tmp_path).look_up(source) == (changed, None)


def test_the_bytes_decide(tmp_path: Path) -> None:
    contents = {"a": b"", "b": b"one", "c": b"one", "d": b"two"}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    digests = {name: KnownFiles(tmp_path).look_up(source_of(tmp_path / name))[0] for name in contents}
    assert digests["b"] == digests["c"] and len(set(digests.values())) == 3
    with pytest.raises(BadClip, match="gone cannot be read: No such file"):
        KnownFiles(tmp_path).look_up(source_of(tmp_path / "gone"))


@settings(suppress_health_check=[HealthCheck.too_slow])  # of drawing: how busy the machine is
@given(st.dictionaries(st.sampled_from("abc"), PLAIN), st.dictionaries(st.sampled_from("abc"), PLAIN))
def test_a_key_is_a_function_of_its_parts(one: dict[str, object], other: dict[str, object]) -> None:
    assert make_key(**one) == make_key(**dict(reversed(list(one.items()))))
    if one != other:
        assert make_key(**one) != make_key(**other)
