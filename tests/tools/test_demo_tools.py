"""Making, grading and picturing the demo set."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sat.data.dataset import SFTDataset
from sat.data.video import write_mp4
from sat.errors import DataError
from tools import demo, demo_report, grade_demo, make_demo_data
from tools.demo_shapes import is_held_out, parse_caption, training_scenes


@pytest.fixture(scope="module")
def demo_set(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo") / "shapes"
    assert make_demo_data.make(folder, num_clips=24, seed=1, num_frames=9, workers=2)
    return folder


def test_folder_and_manifest_are_the_same_data_set(demo_set):
    settings: dict[str, Any] = {"video_size": (32, 32), "fps": 8, "max_num_frames": 9, "skip_frms_num": 0}
    folder, manifest = SFTDataset(demo_set, **settings), SFTDataset(demo_set / "manifest.jsonl", **settings)
    assert len(folder) == len(manifest) == 24
    for index in (0, 23):
        ours, theirs = folder[index], manifest[index]
        assert ours["num_frames"] == 9 and ours["pixels"].equal(theirs["pixels"])
        assert (ours["caption"], ours["key"]) == (theirs["caption"], theirs["key"])
    assert folder.index[3].caption() == training_scenes()[3].caption


def test_held_out_captions_are_listed_and_not_drawn(demo_set):
    rows = [json.loads(line) for line in (demo_set / "heldout.jsonl").read_text().splitlines()]
    held_out = (demo_set / "heldout.txt").read_text().splitlines()
    seen = (demo_set / "seen.txt").read_text().splitlines()
    assert [row["caption"] for row in rows] == held_out and len(held_out) == 27 and len(seen) == 243
    assert all(is_held_out(parse_caption(caption)) for caption in held_out)
    drawn = [json.loads(line)["caption"] for line in (demo_set / "manifest.jsonl").read_text().splitlines()]
    assert drawn == seen[:24]


def test_a_second_run_does_nothing_and_another_set_is_not_overwritten(demo_set):
    times = {path: path.stat().st_mtime_ns for path in demo_set.rglob("*")}
    assert not make_demo_data.make(demo_set, 24, 1, 9, 2)
    with pytest.raises(DataError, match=r"holds a set made with .*'seed': 1.*; delete it, or give another --out"):
        make_demo_data.make(demo_set, 24, 2, 9, 2)
    assert times == {path: path.stat().st_mtime_ns for path in demo_set.rglob("*")}


def test_the_same_arguments_make_the_same_files_also_after_a_stop(demo_set, tmp_path):
    (tmp_path / "videos").mkdir(parents=True)
    (tmp_path / "videos" / "00000.mp4").write_bytes(b"half a clip")
    receipt = {**json.loads((demo_set / "demo_set.json").read_text()), "complete": False}
    (tmp_path / "demo_set.json").write_text(json.dumps(receipt))
    assert make_demo_data.make(tmp_path, 24, 1, 9, 1)
    for path in sorted(demo_set.rglob("*.*")):
        assert (tmp_path / path.relative_to(demo_set)).read_bytes() == path.read_bytes()


def test_grading_prints_a_table_and_writes_metrics(demo_set, tmp_path, capsys):
    rows = ["--row", f"real clips={demo_set}", "--shuffled", f"others' captions={demo_set / 'manifest.jsonl'}"]
    grade_demo.main(["--out", str(tmp_path / "grades"), *rows])
    head, real, control = capsys.readouterr().out.splitlines()
    assert head.split() == ["clips", "of", "clips", "colour", "shape", "motion", "background", "all"]
    assert real.split()[:5] == ["real", "clips", "24", "100.0", "%"] and control.startswith("others' captions")
    metrics = json.loads((tmp_path / "grades" / "metrics.json").read_text())
    assert list(metrics) == ["real clips", "others' captions"]
    assert metrics["real clips"]["motion"] == 1 and metrics["others' captions"]["all"] <= 0.1


def test_clips_that_cannot_be_graded_are_named(demo_set, tmp_path):
    with pytest.raises(DataError, match="no mp4 files below"):
        grade_demo.captions_of(tmp_path)
    write_mp4(tmp_path / "a.mp4", np.zeros((9, 32, 32, 3), np.uint8), 8)
    with pytest.raises(
        DataError, match=r"a\.mp4 has no 'prompt' in its metadata; list the clips and captions in a JSONL"
    ):
        grade_demo.captions_of(tmp_path)
    with pytest.raises(SystemExit, match="no mp4 files below"):
        grade_demo.main(["--out", str(tmp_path), "--row", f"a={tmp_path / 'nowhere'}"])


@pytest.mark.parametrize("words", [[], ["--row", "no path"], ["--row", "=path"]])
def test_wrong_rows_show_the_usage(words, tmp_path, capsys):
    with pytest.raises(SystemExit):
        grade_demo.main(["--out", str(tmp_path), *words])
    assert "NAME=PATH" in capsys.readouterr().err


def test_a_contact_sheet_shows_the_frames(demo_set, tmp_path):
    demo_report.main(["sheet", "--out", str(tmp_path / "sheet.png"), "--frames", "3", "--scale", "2", str(demo_set)])
    sheet = np.asarray(Image.open(tmp_path / "sheet.png"))
    assert sheet.shape == (24 * (64 + 20), 3 * (64 + 3), 3)
    background = sheet[14 + 2, 2]
    assert np.abs(background.astype(int) - (8, 8, 8)).max() < 8  # the first clip is on black


def test_curves_are_drawn(tmp_path):
    for name, start in (("a", 1.0), ("b", 2.0)):
        lines = [{"kind": "train", "step": step, "loss": start / step} for step in range(1, 50)]
        lines += [{"kind": "valid", "step": 50, "loss": 9e9}, {"kind": "train", "step": 50, "loss": float("nan")}]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    demo_report.main(["curve", "--out", str(tmp_path / "c.png"), f"a={tmp_path}/a.jsonl", f"b={tmp_path}/b.jsonl"])
    chart = np.asarray(Image.open(tmp_path / "c.png"))
    for number, colour in enumerate(demo_report.LINES[:2]):
        rows, columns = np.nonzero((chart == colour).all(-1) & (np.arange(chart.shape[0]) > 60)[:, None])
        assert np.ptp(columns) > 600, number
        assert rows[columns < 100].mean() < rows[columns > 650].mean()  # falls from left to right
    with pytest.raises(SystemExit, match="no training line with 'lr'; its keys are kind, loss, step"):
        demo_report.main(["curve", "--out", str(tmp_path / "c.png"), "--key", "lr", f"a={tmp_path}/a.jsonl"])


@pytest.mark.parametrize("tool", ["make_demo_data", "grade_demo", "demo_report"])
def test_tools_run_as_files_from_anywhere(tool, tmp_path):
    path = make_demo_data.__file__.replace("make_demo_data", tool)
    done = subprocess.run([sys.executable, path, "--help"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and f"tools/{tool}.py" in done.stdout


# --- what is passed over ---------------------------------------------------------------------------------------------


def make_demo(folder, monkeypatch):
    """A demo whose data and weights are there, and the commands that it runs: they write what the real ones would."""
    for name in ("manifest", "heldout"):
        (folder / "shapes").mkdir(parents=True, exist_ok=True)
        (folder / "shapes" / f"{name}.jsonl").write_text('{"caption": "a ball"}\n')
    (folder / "vae").mkdir()
    (folder / "vae" / "3d-vae.pt").write_bytes(b"first")
    (folder / "run" / "10").mkdir(parents=True)
    (folder / "run" / "latest").write_text("10")
    (folder / "run" / "10" / "manifest.json").write_text("first")
    commands = []

    def run_script(script, *words):
        commands.append(script)
        named = [str(word).removeprefix("args.output_dir=") for word in words if "output_dir=" in str(word)]
        target = Path(named[0] if named else words[words.index("--out") + 1])
        target.mkdir(parents=True, exist_ok=True)
        for number in range(demo.SAMPLES_PER_CAPTION if named else demo.VALIDATION_CLIPS):
            (target / f"{len(commands)}-{number}.mp4").touch()  # another seed: other names

    monkeypatch.setattr(demo, "python", run_script)
    monkeypatch.setattr(demo, "launch", lambda num_processes, *words: run_script(*words))
    return demo.Demo(folder, {}, 1, 1), commands


def test_videos_are_made_anew_where_weights_are_others(tmp_path, monkeypatch):
    made, commands = make_demo(tmp_path, monkeypatch)
    sample, all_three = "sample_video.py", ["sample_video.py"] * 3
    made.sample(tmp_path / "run")
    assert commands == [*all_three, "tools/reconstruct.py"]
    commands.clear()
    made.sample(tmp_path / "run")
    assert commands == []
    (tmp_path / "run" / "10" / "manifest.json").write_text("trained again, to the same step")
    made.sample(tmp_path / "run")
    assert commands == all_three
    assert len(list((tmp_path / "samples" / "seen").glob("*.mp4"))) == demo.SAMPLES_PER_CAPTION  # the old ones are gone
    commands.clear()
    (tmp_path / "vae" / "3d-vae.pt").write_bytes(b"second")
    made.sample(tmp_path / "run")
    assert commands == [*all_three, "tools/reconstruct.py"]
    commands.clear()
    next((tmp_path / "samples" / "notext").glob("*.mp4")).unlink()
    made.sample(tmp_path / "run")
    assert commands == [sample]
