"""The list of a run's checkpoints: what they hold, their layout, which are whole."""

import json
import shutil
from pathlib import Path

import pytest

from sat.weights.checkpoints import bytes_to_read, checkpoints
from sat.weights.survey import survey
from sat.weights.whole import MANIFEST, checksum
from tests.weights.test_survey import run_tool, write_transformer


def make_whole(folder: Path) -> None:
    """A manifest for what there is."""
    files = {file.name: {"bytes": file.stat().st_size, "blake2b": checksum(file)} for file in folder.iterdir()}
    (folder / "manifest.json").write_text(json.dumps({"files": files}))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Steps 9 and 10 and the averages of 10, in the form that training gives them."""
    write_transformer(tmp_path, "5B", "10")
    for name in ("9", "10-ema"):
        shutil.copytree(tmp_path / "10", tmp_path / name)
    for name, tp in (("9", 1), ("10", 2)):
        layout = {"cp": 1, "dp": 3, "tp": tp}
        state = {"stage": "clips", "layout": layout, "zero_stage": 2, "precision": "bf16"}
        (tmp_path / name / "training_state.json").write_text(json.dumps(state))
        (tmp_path / name / "optimizer_rank_00000.safetensors").write_bytes(b"0123")
    for name in ("9", "10", "10-ema"):
        make_whole(tmp_path / name)
    return tmp_path


def test_each_checkpoint_is_listed_with_its_content_and_layout(run: Path) -> None:
    found = checkpoints(run)
    assert [(one.path.name, one.what) for one in found] == [("9", "whole"), ("10", "whole"), ("10-ema", "whole")]
    held = "weights, optimizer, training state"
    assert found[0].facts == [held, "stage clips", "dp 3 x cp 1 x tp 1, ZeRO 2, bf16"]
    assert found[1].facts == [held, "stage clips", "dp 3 x cp 1 x tp 2, ZeRO 2, bf16", "latest"]
    assert found[2].facts == ["averaged weights"]
    assert [one.path for one in checkpoints(run / "10")] == [run / "10"]


def test_what_is_not_whole_is_told_and_why(run: Path) -> None:
    (run / "9" / "optimizer_rank_00000.safetensors").write_bytes(b"01")
    (run / "10" / "manifest.json").unlink()
    (run / "10-ema" / "mp_rank_00_model_states.pt").unlink()
    assert [one.what for one in checkpoints(run)] == [
        "not whole: optimizer_rank_00000.safetensors has 2 bytes of 4",
        "not whole: manifest.json is missing",
        "not whole: mp_rank_00_model_states.pt is missing",
    ]


def test_progress_is_told_of_all_that_is_read(run: Path) -> None:
    told: list[int] = []
    assert not any(one.problem for one in checkpoints(run, told.append))
    files = [file for file in run.glob("*/*") if file.name != MANIFEST]
    assert sum(told) == bytes_to_read(run) == sum(file.stat().st_size for file in files)
    assert bytes_to_read(run / "9") == sum(file.stat().st_size for file in files if file.parent.name == "9")


def test_checksums_find_what_sizes_do_not(run: Path) -> None:
    (run / "9" / "optimizer_rank_00000.safetensors").write_bytes(b"0124")
    assert not any(one.problem for one in checkpoints(run))
    first, *others = checkpoints(run, lambda num_bytes: None)
    assert first.problem is not None and first.problem.startswith("optimizer_rank_00000.safetensors is damaged")
    assert {one.what for one in others} == {"whole, its checksums are right"}
    done = run_tool("--quick", str(run))
    assert done.returncode == 0 and "  9: whole\n" in done.stdout and "were not read" in done.stdout
    done = run_tool(str(run))
    assert done.returncode == 1 and "  9: not whole: optimizer_rank_00000.safetensors is damaged" in done.stdout


def test_a_damaged_run_file_is_named(run: Path) -> None:
    (run / "run.json").write_text('{"numb')
    (first, *others) = checkpoints(run)
    assert (first.path, first.problem) == (run / "run.json", "run.json is damaged") and len(others) == 3
    done = run_tool(str(run))
    assert done.returncode == 1 and "  run.json: not whole: run.json is damaged\n" in done.stdout


def test_released_weights_have_no_list(tmp_path: Path) -> None:
    write_transformer(tmp_path, "5B", "1")
    assert checkpoints(tmp_path) == [] and checkpoints(tmp_path / "1") == []


def test_the_advice_for_latest_names_no_averages(run: Path) -> None:
    shutil.rmtree(run / "10")
    problem = f"'latest' names 10, but {run / '10'} has no weights; write 9 into it"
    assert survey(run).problem == problem
    (run / "latest").unlink()
    assert survey(run).problem == "it has no file 'latest'; write one that holds 9"
    (run / "9" / "mp_rank_00_model_states.pt").unlink()  # its manifest is left
    assert survey(run).problem == "it has no file 'latest'"
