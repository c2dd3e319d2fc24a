"""sample_video.py as a user types it."""

import signal
import subprocess
import sys
import time
from pathlib import Path

from sat.data.video import read_metadata
from sat.sampling.run import sample
from tests.sampling.conftest import CAPTIONS, ENVIRONMENT, Trained, command
from tests.tiny import ROOT

SCRIPT = "sample_video.py"


def stems(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_from_a_run_directory_to_a_video(trained: Trained, tmp_path: Path) -> None:
    done = command(
        SCRIPT, "--load", trained.run, "--prompt", CAPTIONS[2], "--seed", 7, f"args.output_dir={tmp_path / 'out'}"
    )
    assert done.returncode == 0, done.stderr
    assert stems(tmp_path / "out") == ["00000-a-small-blob-moving-up-seed7.mp4"]
    path = tmp_path / "out" / "00000-a-small-blob-moving-up-seed7.mp4"
    assert read_metadata(path)["seed"] == "7"
    lines = [line.partition("] ")[2] for line in done.stderr.splitlines()]
    assert lines[0].startswith("sampling 9 frames of 32x32 -> 3 latent frames of 4x4")
    assert lines[1].startswith(
        f"loaded {trained.run / '4' / 'mp_rank_00_model_states.pt'} (a transformer in the form of CogVideoX-5B"
    )
    assert lines[2].startswith("VPSDEDPMPP2MSampler of 5 steps, DynamicCFG(scale=6, ")
    assert lines[2].endswith("seed 7, fp32 on cpu")
    assert lines[3] == f"wrote {path}"
    assert lines[4].startswith(f"1 video in {tmp_path / 'out'}, ")
    assert len(lines) == 5
    assert done.stdout == ""


def test_two_processes_share_the_prompts_and_make_the_same_videos(trained: Trained, tmp_path: Path) -> None:
    """Bit-equal to one process, where every prompt is sampled alone."""
    prompts = [CAPTIONS[0], CAPTIONS[3], CAPTIONS[0]]
    (tmp_path / "prompts.txt").write_text("\n".join(prompts), encoding="utf-8")
    done = command(
        *("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2, SCRIPT),
        *("--load", trained.run, f"args.input_file={tmp_path / 'prompts.txt'}", f"args.output_dir={tmp_path / 'two'}"),
    )
    assert done.returncode == 0, done.stderr
    alone = sample(trained.config(f"args.output_dir={tmp_path / 'one'}"), 42, prompts)
    assert stems(tmp_path / "two") == [path.name for path in alone]
    for path in alone:
        assert (tmp_path / "two" / path.name).read_bytes() == path.read_bytes()
    assert "3 videos in" in done.stderr
    own = [line for line in done.stderr.splitlines() if "wrote" in line]
    assert len(own) == 2  # rank 0 speaks, for its share


def test_typed_prompts_become_videos_one_by_one(trained: Trained, tmp_path: Path) -> None:
    done = command(
        *(SCRIPT, "--load", trained.run, "args.input_type=cli", f"args.output_dir={tmp_path}", "args.batch_size=4"),
        input=f"{CAPTIONS[0]}\n{CAPTIONS[1]}\n\n",
    )
    assert done.returncode == 0, done.stderr
    assert [read_metadata(tmp_path / name)["prompt"] for name in stems(tmp_path)] == CAPTIONS[:2]
    assert done.stdout.count("prompt (empty line to end): ") == 3
    assert "2 videos in" in done.stderr


def test_ctrl_c_keeps_what_is_finished(trained: Trained, tmp_path: Path) -> None:
    words = [SCRIPT, "--load", trained.run, f"args.output_dir={tmp_path}", *("--prompt", "x") * 5000]
    process = subprocess.Popen(
        [sys.executable, *map(str, words)], cwd=ROOT, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    for line in process.stderr:
        if "wrote" in line:
            break
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    rest = process.stderr.read()
    assert process.wait(timeout=60) == 130
    assert rest.splitlines()[-1].endswith("stopped; the videos that were finished stay")
    assert "Traceback" not in rest
    names = stems(tmp_path)
    assert names
    assert all(name.endswith("-x-seed42.mp4") for name in names)
    assert all(read_metadata(tmp_path / name)["prompt"] == "x" for name in names)


def test_a_mistake_ends_without_a_traceback(trained: Trained, tmp_path: Path) -> None:
    done = command(SCRIPT, "--load", trained.run, f"args.input_file={tmp_path / 'none.txt'}")
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.endswith(f"error: cannot read args.input_file {tmp_path / 'none.txt'}: No such file or directory")


def test_help_is_there_at_once() -> None:
    done = command(SCRIPT, "--help")
    assert done.returncode == 0
    for word in ("--base", "--load PATH", "--prompt TEXT", "--seed", "--print-config", "section.key=value", "torchrun"):
        assert word in done.stdout
