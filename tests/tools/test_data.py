"""tools/data.py: what it tells of sets, and how it ends."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from sat.data.sheet import THUMB
from sat.data.video import read_frames, write_mp4
from tests.data.packed import mp4, write_shard
from tests.tiny import ROOT
from tools.data import main

SMALL = ("data.params.video_size=[16,16]", "data.params.max_num_frames=9")


Run = Callable[..., str]


@pytest.fixture
def run(fresh_log: None, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> Run:
    """A function that runs the tool, which must end with `status`: what it prints, or what it logs."""

    def check(*words: str | Path, status: int) -> str:
        caplog.clear()
        assert main(["check", *map(str, words)]) == status, caplog.text
        return capsys.readouterr().out or caplog.text

    return check


@pytest.fixture
def clips(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Five good clips of 13 and 21 frames, of two sizes, in the released layout."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = tmp_path / "clips"
    (folder / "videos").mkdir(parents=True)
    (folder / "labels").mkdir()
    for number in range(5):
        size = (32, 40) if number else (48, 32)
        frames = np.full((13 + 8 * (number > 2), *size, 3), 40 * number, dtype=np.uint8)
        write_mp4(folder / "videos" / f"{number}.mp4", frames, 8)
        (folder / "labels" / f"{number}.txt").write_text(f"clip {number}")
    return folder


def test_a_good_folder(run: Run, clips: Path) -> None:
    assert run(clips, *SMALL, "data.params.max_num_frames=12", status=0).splitlines() == [
        f"{clips}: 5 of 5 clips can be used",
        "  3 give fewer than the 12 frames of max_num_frames",
        "  frames of a clip",
        "    13         3 ########################################",
        "    21         2 ###########################",
        "  rows x columns",
        "    32 x 40         4 ########################################",
        "    48 x 32         1 ##########",
    ]


def test_everything_that_is_wrong_is_told(run: Run, clips: Path, tmp_path: Path) -> None:
    whole = (clips / "videos" / "4.mp4").read_bytes()
    (clips / "videos" / "0.mp4").write_bytes(b"no video")
    (clips / "videos" / "1.mp4").write_bytes(whole[:-30])
    (clips / "labels" / "2.txt").write_text("\n")
    write_mp4(clips / "videos" / "5.mp4", np.zeros((6, 32, 40, 3), dtype=np.uint8), 8)
    (clips / "labels" / "5.txt").write_text("six frames, none of which is left")
    write_mp4(clips / "videos" / "6.mp4", np.zeros((13, 32, 40, 3), dtype=np.uint8), 8)
    shutil.copy(clips / "videos" / "4.mp4", clips / "videos" / "7.mp4")
    (clips / "labels" / "7.txt").write_text("clip 4 again")
    report = tmp_path / "report.jsonl"
    told = run(clips, *SMALL, "--report", report, status=1)
    assert f"{clips}: 3 of 8 clips can be used" in told
    assert "  1 there twice or more\n    clips/videos/4.mp4 = clips/videos/7.mp4\n" in told
    assert "  2 broken, no caption\n    clips/videos/2.mp4: " in told
    rows = [json.loads(line) for line in report.read_text().splitlines()]
    assert {(row["kind"], row.get("key"), row.get("reason")) for row in rows} == {
        ("broken", "clips/videos/0.mp4", "unreadable"),
        ("broken", "clips/videos/1.mp4", "cut short"),
        ("broken", "clips/videos/2.mp4", "no caption"),
        ("broken", "clips/videos/5.mp4", "too short"),
        ("broken", "clips/videos/6.mp4", "no caption"),
        ("duplicate", None, None),
    }
    assert rows[-1] == {"set": str(clips), "kind": "duplicate", "keys": ["clips/videos/4.mp4", "clips/videos/7.mp4"]}


def test_what_the_settings_leave_out_is_not_broken(run: Run, clips: Path) -> None:
    told = run(clips, *SMALL, "data.params.short_clips=drop", status=0)
    assert f"{clips}: 2 of 5 clips can be used\n  3 left out, too short\n" in told
    assert "0 of 5 clips can be used" in run(
        clips, *SMALL, "data.params.short_clips=drop", "data.params.max_num_frames=99", status=1
    )
    (clips / "labels" / "2.txt").unlink()
    run(clips, *SMALL, "data.params.missing_caption=empty", status=0)


def test_manifests_and_shards(run: Run, clips: Path, tmp_path: Path) -> None:
    manifest = clips / "clips.jsonl"
    rows = [{"video": "videos/1.mp4", "caption": "a"}, {"video": "videos/2.mp4"}, {"video": "../x.mp4", "caption": "b"}]
    manifest.write_text("\n".join(map(json.dumps, rows)))
    told = run(manifest, *SMALL, status=1)
    assert "1 of 3 clips can be used\n  2 broken, wrong row\n" in told
    assert f"    {manifest} line 2: no 'caption' among its keys: video" in told
    for name in "ab":
        write_shard(tmp_path / f"{name}.tar", {"1.mp4": mp4(tmp_path), "1.txt": "t", "2.txt": "no video"})
    (tmp_path / "b.tar").write_bytes((tmp_path / "b.tar").read_bytes()[:700])
    told = run(f"{tmp_path}/{{a,b}}.tar", *SMALL, status=1)
    assert "1 broken, unusable shard\n" in told and "1 broken, no video\n" in told and "b.tar ends early" in told


def test_the_sets_of_a_configuration(run: Run, clips: Path, tmp_path: Path) -> None:
    data = "data: {target: data_video.SFTDataset, params: {video_size: [16, 16], fps: 8, max_num_frames: 9}}"
    file = tmp_path / "run.yaml"
    file.write_text(f"args: {{train_data: ['{clips}'], valid_data: ['{tmp_path}/other']}}\n{data}\n")
    told = run(file, status=1)
    assert f"args.train_data {clips}: 5 of 5 clips can be used" in told
    assert f"args.valid_data {tmp_path}/other: 0 of 1 clips can be used\n  1 broken, cannot be opened\n" in told
    part = f"target: data_video.SFTDataset, params: {{data_dir: '{clips}', video_size: [16, 16], fps: 8"
    sets = f"{{a: {{{part}, max_num_frames: 1}}}}, b: {{{part}, max_num_frames: 9}}}}}}"
    file.write_text(f"data: {{target: sat.data.mixture.Mixture, params: {{sets: {sets}, weights: {{a: 1, b: 1}}}}}}")
    told = run(file, status=0)
    assert [line for line in told.splitlines() if "can be used" in line] == [
        f"data.params.sets.{name}: 5 of 5 clips can be used" for name in "ab"
    ]
    words = ("stages=[{name: s, args: {train_iters: 1}, data: {params: {sets: {b: {params: {fps: 4}}}}}}]",)
    assert "stage s: data.params.sets.b: 5 of 5 clips can be used" in run(file, *words, status=0)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["clips", "configs/tiny.yaml"], "error: clips beside configs/tiny.yaml; give paths or YAML files, and 'args"),
        (["data.params.fps=3"], "error: give a folder, a manifest, tar shards or a YAML file"),
        (["clips", "data.params.fsp=3"], "error: unknown key data.params.fsp .*; did you mean 'fps'"),
        (["clips", "--workers", "0"], "error: --workers is 0; give 1 or more"),
        (["no.yaml"], "no.yaml"),
    ],
)
def test_what_cannot_be_checked(run: Run, words: list[str], message: str) -> None:
    assert re.search(message, run(*words, status=2))


def test_the_sheet_shows_what_the_model_sees(run: Run, clips: Path, tmp_path: Path) -> None:
    (clips / "videos" / "1.mp4").write_bytes(b"no video")
    told = run(clips, *SMALL, "--sheet", tmp_path / "sheet.png", status=1)
    lines = told[told.index("sheet.png") :].splitlines()
    assert lines[1:] == [f"  {row}: clips/videos/{n}.mp4: clip {n}" for row, n in enumerate((0, 2, 3, 4), start=1)]
    (sheet,) = read_frames(tmp_path / "sheet.png", [0])
    assert sheet.shape == (4 * THUMB[0], 4 * THUMB[1], 3)
    for row, number in enumerate((0, 2, 3, 4)):
        middle = sheet[row * THUMB[0] + THUMB[0] // 2, :: THUMB[1] // 2]
        assert abs(int(middle[1, 0]) - 40 * number) <= 3


def test_it_runs_and_its_help_tells() -> None:
    command = [sys.executable, "tools/data.py", "check"]
    told = subprocess.run([*command, "--help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert "Exit code 0: all can be used. 1: something is broken. 2: it could not be checked." in told
    done = subprocess.run([*command, "/nowhere"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "no data at /nowhere: give a folder with clips" in done.stdout
