"""Writing files that survive a crash."""

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from sat.training import files
from sat.training.files import (
    HashedFile,
    LazyTensor,
    put_folder,
    remove_folder,
    remove_leftovers,
    sync_folder,
    write_json,
    write_safetensors,
    write_text,
    write_torch,
)
from sat.weights.whole import checksum


def entry_of(file: Path) -> dict[str, Any]:
    return {"bytes": file.stat().st_size, "blake2b": checksum(file)}


def test_what_is_written_is_summed_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "PIECE_BYTES", 7)
    with HashedFile(tmp_path / "a") as file:
        for part in (b"", b"abc", bytes(range(50)), memoryview(b"xyz")):
            assert file.write(part) == len(part)
    assert (tmp_path / "a").read_bytes() == b"abc" + bytes(range(50)) + b"xyz"
    assert file.entry == entry_of(tmp_path / "a")


def test_a_torch_file_is_that_of_torch(tmp_path: Path) -> None:
    content = {"module": {"a": torch.randn(5, 3), "b": torch.ones(2, dtype=torch.bfloat16)}, "iteration": 3}
    assert write_torch(tmp_path / "a.pt", content) == entry_of(tmp_path / "a.pt")
    loaded = torch.load(tmp_path / "a.pt", weights_only=True, mmap=True)
    assert loaded["iteration"] == 3
    assert all(torch.equal(loaded["module"][name], value) for name, value in content["module"].items())  # type: ignore[attr-defined]


TENSORS = {
    "a|b": torch.randn(3).bfloat16(),
    "step": torch.tensor(2.0),
    "empty": torch.zeros(0, 3),
    "long": torch.arange(3),
    "strided": torch.randn(4, 6).t(),
    "truth": torch.tensor([True, False]),
}


def test_safetensors_are_those_of_the_library(tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    entry = write_safetensors(file, {name: LazyTensor.of(value) for name, value in TENSORS.items()}, {"tp_rank": "0"})
    assert entry == entry_of(file)
    loaded = load_file(file)
    assert loaded.keys() == TENSORS.keys()
    assert all(
        torch.equal(loaded[name], value) and loaded[name].dtype == value.dtype for name, value in TENSORS.items()
    )
    with safe_open(file, framework="pt") as reader:
        assert reader.metadata() == {"tp_rank": "0"}


def test_numbers_lie_at_multiples_of_their_width(tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    write_safetensors(file, {name: LazyTensor.of(value) for name, value in TENSORS.items()}, {})
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    for name, entry in json.loads(content[8 : 8 + length]).items():
        assert (8 + length + entry["data_offsets"][0]) % TENSORS[name].element_size() == 0


def test_tensors_are_made_one_at_a_time(tmp_path: Path) -> None:
    alive: list[str] = []

    def lazily(name: str) -> LazyTensor:
        def make() -> torch.Tensor:
            alive.append(name)
            written = (tmp_path / "a.safetensors").exists()
            assert written
            return torch.full((2,), float(len(alive)))

        return LazyTensor(torch.Size([2]), torch.float32, make)

    write_safetensors(tmp_path / "a.safetensors", {name: lazily(name) for name in "cab"}, {})
    assert alive == ["a", "b", "c"]
    assert load_file(tmp_path / "a.safetensors")["c"].tolist() == [3.0, 3.0]


def test_small_files_are_replaced_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert write_text(tmp_path / "latest", "1") == entry_of(tmp_path / "latest")
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("stopped")))
        with pytest.raises(OSError, match="stopped"):
            write_text(tmp_path / "latest", "2")
    assert (tmp_path / "latest").read_text() == "1"
    write_json(tmp_path / "a.json", {"b": 1, "a": 0.1})
    assert json.loads((tmp_path / "a.json").read_text()) == {"a": 0.1, "b": 1}


@pytest.mark.parametrize(("number", "passes"), [(errno.EINVAL, True), (errno.ENOTSUP, True), (errno.EIO, False)])
def test_file_systems_that_cannot_sync_a_folder_are_suffered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, passes: bool
) -> None:
    def fsync(descriptor: int) -> None:
        raise OSError(number, "no")

    monkeypatch.setattr(os, "fsync", fsync)
    if passes:
        sync_folder(tmp_path)
    else:
        with pytest.raises(OSError, match="no"):
            sync_folder(tmp_path)


def everything_on_disk_before(monkeypatch: pytest.MonkeyPatch, name: str) -> list[bool]:
    """Notes at each call of an os function whether every file written before it was synced."""
    written: set[int] = set()
    seen: list[bool] = []
    fsync, call = os.fsync, getattr(os, name)

    def syncing(descriptor: int) -> None:
        written.discard(os.fstat(descriptor).st_ino)
        fsync(descriptor)

    def calling(*args: Any, **kwargs: Any) -> Any:
        seen.append(not written)
        return call(*args, **kwargs)

    make = HashedFile.__init__

    def making(self: HashedFile, path: Path) -> None:
        make(self, path)
        written.add(path.stat().st_ino)

    monkeypatch.setattr(os, "fsync", syncing)
    monkeypatch.setattr(os, name, calling)
    monkeypatch.setattr(HashedFile, "__init__", making)
    return seen


def test_content_is_on_disk_before_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = everything_on_disk_before(monkeypatch, "replace")
    write_text(tmp_path / "latest", "1")
    assert seen == [True]


def make_folder(path: Path, text: str) -> Path:
    path.mkdir()
    (path / "file").write_text(text)
    return path


@pytest.mark.parametrize("is_there", [False, True])
def test_a_folder_gets_its_name_whole(tmp_path: Path, is_there: bool) -> None:
    if is_there:
        make_folder(tmp_path / "5", "old")
    put_folder(make_folder(tmp_path / ".5.saving-1", "new"), tmp_path / "5")
    assert [path.name for path in tmp_path.iterdir()] == ["5"]
    assert (tmp_path / "5" / "file").read_text() == "new"


def test_a_folder_loses_its_name_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_folder(tmp_path / "5", "old")
    unlink: Callable[..., None] = os.unlink

    def watched(*args: Any, **kwargs: Any) -> None:
        assert not (tmp_path / "5").exists()
        unlink(*args, **kwargs)

    monkeypatch.setattr(os, "unlink", watched)
    remove_folder(tmp_path / "5")
    assert list(tmp_path.iterdir()) == []


def test_leftovers_go_and_nothing_else(tmp_path: Path) -> None:
    for name in (".5.saving-77-1", ".5-ema.saving-77-1", ".3.deleting", "5", "5-ema", ".config"):
        make_folder(tmp_path / name, "")
    (tmp_path / ".lock").touch()
    remove_leftovers(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"5", "5-ema", ".config", ".lock"}
