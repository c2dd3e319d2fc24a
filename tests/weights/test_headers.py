"""Names and shapes read without data: equal to what loading gives, whatever the file's size, age and intentions."""

import argparse
import io
import os
import pickle
import time
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from sat.errors import CheckpointError
from sat.training.checkpoint import load_weights
from sat.weights.headers import read_header
from tests.golden_files import golden_root

STATE = {
    "a.weight": torch.randn(3, 4),
    "a.bias": torch.zeros(3, dtype=torch.bfloat16),
    "b": torch.arange(6).reshape(2, 3).T,
    "c": torch.tensor(1.5, dtype=torch.float16),
    "d": torch.zeros(2, dtype=torch.float8_e4m3fn),
}


def shapes_by_loading(file: Path) -> dict[str, tuple[tuple[int, ...], str]]:
    return {name: (tuple(v.shape), str(v.dtype).removeprefix("torch.")) for name, v in load_weights(file).items()}


def shapes_by_header(file: Path) -> dict[str, tuple[tuple[int, ...], str]]:
    return {name: (info.shape, info.dtype) for name, info in read_header(file).tensors.items()}


@pytest.mark.parametrize("is_zip", [True, False])
@pytest.mark.parametrize("container", ["module", "state_dict", ""])
def test_a_torch_file_reads_as_it_loads(tmp_path, is_zip, container):
    state = OrderedDict((name, torch.nn.Parameter(v, False) if name == "a.weight" else v) for name, v in STATE.items())
    content = {container: state, "iteration": 3, "args": argparse.Namespace(lr=1.0)} if container else state
    torch.save(content, tmp_path / "w.pt", _use_new_zipfile_serialization=is_zip)
    header = read_header(tmp_path / "w.pt")
    assert shapes_by_header(tmp_path / "w.pt") == {
        name: (tuple(v.shape), str(v.dtype).removeprefix("torch.")) for name, v in STATE.items()
    }
    assert header.container == container
    assert header.entries == (("iteration", "args") if container else ())
    assert header.classes == ({"argparse.Namespace"} if container else set())
    if is_zip:
        assert shapes_by_header(tmp_path / "w.pt") == shapes_by_loading(tmp_path / "w.pt")


def test_a_safetensors_file_reads_as_it_loads(tmp_path):
    state = {name: value.contiguous() for name, value in STATE.items() if name != "d"}
    save_file(state, tmp_path / "w.safetensors", metadata={"rank": "4"})
    assert shapes_by_header(tmp_path / "w.safetensors") == shapes_by_loading(tmp_path / "w.safetensors")
    assert read_header(tmp_path / "w.safetensors").metadata == {"rank": "4"}


@pytest.mark.parametrize("file", sorted(golden_root().glob("*/checkpoint*/**/*.pt")), ids=lambda file: file.parent.name)
def test_recorded_checkpoints_read_as_they_load(file):
    assert shapes_by_header(file) == shapes_by_loading(file)


class Trap:
    """A pickle that would create a file when it is loaded."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.file),)


@pytest.mark.parametrize("is_zip", [True, False])
def test_nothing_that_a_pickle_asks_for_is_run(tmp_path, is_zip):
    trap = Trap(tmp_path / "sprung")
    content = {"module": STATE, "trap": trap, "array": np.zeros(3), "set": {1}, "more": [trap, {"x": trap}]}
    torch.save(content, tmp_path / "w.pt", _use_new_zipfile_serialization=is_zip)
    header = read_header(tmp_path / "w.pt")
    assert not (tmp_path / "sprung").exists()
    assert header.shapes["a.weight"] == (3, 4) and "posix.mkdir" in header.classes


def write_sparse(file: Path, name: str, num_bytes: int, count: int) -> None:
    """A torch file of `count` tensors that together have num_bytes, which take no room on the disk."""
    small = io.BytesIO()
    length = num_bytes // count
    tensors = {f"{name}.{index}": torch.empty(0, dtype=torch.bfloat16) for index in range(count)}
    torch.save({"module": tensors}, small)
    with zipfile.ZipFile(small) as archive:
        index = archive.read("archive/data.pkl")
    with file.open("wb") as stream, zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("archive/data.pkl", index)
        for key in range(count):
            info = zipfile.ZipInfo(f"archive/data/{key}")
            info.file_size, info.compress_size, info.CRC = length, length, 0
            info.header_offset = stream.tell()
            stream.write(info.FileHeader(zip64=True))
            stream.seek(length, os.SEEK_CUR)
            archive.filelist.append(info)
            archive.start_dir = stream.tell()


def test_twenty_gigabytes_take_no_longer(tmp_path):
    write_sparse(tmp_path / "w.pt", "layer", 20_000_000_000, 800)
    assert (tmp_path / "w.pt").stat().st_size > 20_000_000_000
    started = time.perf_counter()
    assert len(read_header(tmp_path / "w.pt").tensors) == 800
    assert time.perf_counter() - started < 2.0  # measured: 0.02 s


def save_zip(file: Path) -> None:
    torch.save({"module": STATE}, file)


def save_old(file: Path) -> None:
    torch.save({"module": STATE}, file, _use_new_zipfile_serialization=False)


def save_tensors(file: Path) -> None:
    save_file({"a": torch.randn(100)}, file)


@pytest.mark.parametrize("save", [save_zip, save_old, save_tensors])
def test_half_a_file_is_told_wherever_it_ends(tmp_path, save):
    save(tmp_path / "w")
    whole = (tmp_path / "w").read_bytes()
    read_header(tmp_path / "w")
    for end in (*range(1, 60), *range(60, len(whole), max(len(whole) // 50, 1)), len(whole) - 1):
        (tmp_path / "w").write_bytes(whole[:end])
        with pytest.raises(CheckpointError, match=r"w (is|has|holds|lacks)"):
            read_header(tmp_path / "w")


def test_a_tensor_without_its_numbers_is_told(tmp_path):
    save_zip(tmp_path / "w.pt")
    with zipfile.ZipFile(tmp_path / "w.pt") as whole, zipfile.ZipFile(tmp_path / "lacking.pt", "w") as lacking:
        for info in whole.infolist():
            if not info.filename.endswith("data/1"):
                lacking.writestr(info.filename, whole.read(info))
    with pytest.raises(CheckpointError, match=r"lacking\.pt lacks the numbers of 1 of 5 tensors"):
        read_header(tmp_path / "lacking.pt")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty; copy or download it again"),
        (b"  <!DOCTYPE html>", "is a web page"),
        (b"version https://git-lfs.github.com/spec/v1\n", r"is a Git LFS pointer, .*run `git lfs pull`"),
        (b"hello", "is no file of weights: neither torch nor safetensors wrote it"),
        (pickle.dumps({"a": 1}), r"is a pickle, but not one that torch\.save wrote"),
        ((10).to_bytes(8, "little") + b'{"a": {}}', "is half a file: its list of names is cut short"),
        ((9).to_bytes(8, "little") + b'{"a": {}}', "has a damaged list of names"),
        (b"\xff" * 8 + b"{", "is no file of weights"),
    ],
)
def test_what_is_no_weights_is_told(tmp_path, content, message):
    (tmp_path / "w.pt").write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        read_header(tmp_path / "w.pt")


def test_a_zip_archive_and_an_odd_content_are_told(tmp_path):
    with zipfile.ZipFile(tmp_path / "w.pt", "w") as archive:
        archive.writestr("transformer/latest", "1")
    with pytest.raises(CheckpointError, match="is a zip archive, not a file of weights; unpack it"):
        read_header(tmp_path / "w.pt")
    torch.save([torch.zeros(1)], tmp_path / "w.pt")
    with pytest.raises(CheckpointError, match="holds no state dict, but a list"):
        read_header(tmp_path / "w.pt")
    with pytest.raises(CheckpointError, match=r"cannot read .*nowhere\.pt: No such file"):
        read_header(tmp_path / "nowhere.pt")
