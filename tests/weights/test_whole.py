"""Whether a checkpoint folder is whole."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from sat.errors import CheckpointError
from sat.weights.whole import (
    checksum,
    damage_of,
    is_iteration,
    iteration_names,
    problem_of,
    read_latest,
    read_manifest,
    step_of,
)


def released(folder: Path, ranks: int = 2) -> Path:
    """A folder as it is downloaded."""
    folder.mkdir()
    for rank in range(ranks):
        torch.save({"module": {"a": torch.ones(2)}}, folder / f"mp_rank_{rank:02d}_model_states.pt")
    return folder


def ours(folder: Path) -> Path:
    """A folder with a manifest."""
    released(folder, 1)
    (folder / "training_state.json").write_text("{}")
    files = {file.name: {"bytes": file.stat().st_size, "blake2b": checksum(file)} for file in sorted(folder.iterdir())}
    (folder / "manifest.json").write_text(json.dumps({"files": files}))
    return folder


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(bytes(content))


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def test_whole_folders_have_no_problem(tmp_path: Path) -> None:
    for folder in (released(tmp_path / "1"), ours(tmp_path / "2")):
        assert problem_of(folder) is None and damage_of(folder) is None


@pytest.mark.parametrize(
    ("harm", "problem"),
    [
        (lambda f: (f / "mp_rank_00_model_states.pt").unlink(), "mp_rank_00_model_states.pt is missing"),
        (lambda f: cut(f / "training_state.json"), "training_state.json has 1 bytes of 2"),
        (lambda f: (f / "training_state.json").write_text(""), "training_state.json has 0 bytes of 2"),
        (lambda f: (f / "manifest.json").unlink(), "manifest.json is missing"),
        (lambda f: (f / "manifest.json").write_text(""), "manifest.json is damaged"),
        (lambda f: (f / "manifest.json").write_text('{"files": {"../x": {"bytes": 1, "blake2b": ""}}}'), "damaged"),
        (lambda f: (f / "manifest.json").write_text('{"files": {"x": {"bytes": "1", "blake2b": ""}}}'), "damaged"),
        (lambda f: (f / "manifest.json").write_text("[]"), "manifest.json is damaged"),
    ],
)
def test_what_the_manifest_tells(tmp_path: Path, harm: Callable[[Path], None], problem: str) -> None:
    folder = ours(tmp_path / "5")
    harm(folder)
    assert problem in (problem_of(folder) or "")


def test_a_changed_bit_is_damage_and_a_size_is_not_read_for_it(tmp_path: Path) -> None:
    folder = ours(tmp_path / "5")
    flip(folder / "mp_rank_00_model_states.pt")
    assert problem_of(folder) is None
    damage = damage_of(folder)
    assert damage is not None and damage.startswith("mp_rank_00_model_states.pt is damaged: its checksum is ")
    assert damage_of(folder, ["training_state.json", "unknown"]) is None


@pytest.mark.parametrize(
    ("harm", "problem"),
    [
        (lambda f: (f / "mp_rank_00_model_states.pt").unlink(), "tensor-parallel rank 0 is missing: it has ranks [1]"),
        (lambda f: cut(f / "mp_rank_01_model_states.pt"), "mp_rank_01_model_states.pt is half a file"),
        (
            lambda f: torch.save({"module": {"b": torch.ones(2)}}, f / "mp_rank_01_model_states.pt"),
            "the shards of ranks 0 and 1 hold different names",
        ),
        (lambda f: (f / "optimizer_rank_00000.safetensors").touch(), "manifest.json is missing"),
        (lambda f: [file.unlink() for file in f.iterdir()], "mp_rank_00_model_states.pt is missing"),
        (lambda f: f.rename(f.with_name("elsewhere")), "there is no such folder"),
    ],
)
def test_without_a_manifest_the_files_themselves_tell(
    tmp_path: Path, harm: Callable[[Path], None], problem: str
) -> None:
    folder = released(tmp_path / "5")
    harm(folder)
    assert problem in (problem_of(folder) or "")


def test_iterations_are_found_the_newest_first(tmp_path: Path) -> None:
    for name in ("9", "10", "10-ema", "release", ".11.saving-3", "other"):
        released(tmp_path / name)
    assert iteration_names(tmp_path) == ["10", "9", "release"]
    assert [step_of(name) for name in ("10", "10-ema", "release", "²")] == [10, 10, 0, 0]
    assert not any(map(is_iteration, ("²", "10-ema", "", "-1", "latest")))


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("10\n", ("10", "")),
        ("release", ("release", "")),
        ("", (None, "latest holds '', not an iteration's number or 'release'")),
        ("10-ema", (None, "latest holds '10-ema', not an iteration's number or 'release'")),
        ("../10", (None, "latest holds '../10', not an iteration's number or 'release'")),
    ],
)
def test_what_latest_says(tmp_path: Path, content: str, expected: tuple[str | None, str]) -> None:
    assert read_latest(tmp_path) == (None, "there is no file latest")
    (tmp_path / "latest").write_text(content)
    assert read_latest(tmp_path) == expected


def test_a_damaged_manifest_is_an_error_to_who_needs_it(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_bytes(b"\xff\x00")
    with pytest.raises(CheckpointError, match=r"manifest\.json is damaged"):
        read_manifest(tmp_path)
