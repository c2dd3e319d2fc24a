"""Video files of one's own, without a text in sight: train on them, sample and play the result."""

from pathlib import Path

import numpy as np
import pytest

from sat.data.video import probe, read_frames, read_metadata, write_mp4
from tests.golden_files import golden_root
from tests.launch import run
from tests.tiny import only_run, records

VIDEOS = golden_root().parent / "videos"


def moving_bars(height: int, width: int, num_frames: int) -> np.ndarray:
    """uint8 (t h w 3)."""
    columns = np.arange(width)[None, None, :] + 4 * np.arange(num_frames)[:, None, None]
    grey = np.broadcast_to(columns % 32 * 8, (num_frames, height, width))
    return np.repeat(grey[..., None], 3, axis=-1).astype(np.uint8)


def whole_way(folder: Path, clips: Path, steps: int, vae_steps: int, *words: str) -> tuple[Path, Path]:
    """The three commands of configs/clips.yaml; returns the transformer's run and the sampled file."""
    data = (f"args.train_data=[{clips}]", *words)
    bases = {
        "vae": ("configs/demo_vae.yaml", "configs/clips.yaml"),
        "clips": ("configs/tiny.yaml", "configs/tiny_vae.yaml", "configs/clips.yaml"),
    }
    for name in bases:
        (folder / name).mkdir()
    vae = (*data, f"args.train_iters={vae_steps}", f"args.save={folder / 'vae'}")
    run("python", "train_video.py", folder / "vae", "--base", *bases["vae"], *vae)
    weights = f"model.first_stage_config.params.ckpt_path={only_run(folder / 'vae')}"
    transformer = (*data, weights, f"args.train_iters={steps}", f"args.save={folder / 'clips'}")
    output = run("python", "train_video.py", folder / "clips", "--base", *bases["clips"], *transformer)
    assert "clips kept" in output
    trained = only_run(folder / "clips")
    sampled = ("--load", str(trained), "--prompt", "a horse", f"args.output_dir={folder / 'out'}")
    run("python", "sample_video.py", folder / "out", *sampled)
    (file,) = (folder / "out").glob("*.mp4")
    return trained, file


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "out").mkdir()
    return tmp_path


def test_a_folder_of_files_without_texts(folder: Path) -> None:
    """Clips three times as wide as high keep that ratio: 16x64 pixels for the area of 32x48."""
    (folder / "mine").mkdir()
    for number in range(3):
        write_mp4(folder / "mine" / f"{number}.mp4", moving_bars(32, 96, 12), 8)
    trained, file = whole_way(folder, folder / "mine", 20, 1, "data.params.video_size=[32, 48]")
    train = records(trained)
    assert [record["step"] for record in train] == list(range(1, 21))
    assert {record["tokens"] for record in train} == {2 * (3 * 1 * 4 + 16)}  # 3 latent frames of 2x8 in patches of 2x2
    losses = [record["loss"] for record in train]
    assert sum(losses[-5:]) < sum(losses[:5])
    assert all(record["replaced"] == 0 for record in train)
    info = probe(file, count=True)
    assert (info.num_frames, info.fps, info.height, info.width) == (9, 8.0, 32, 48)
    assert read_frames(file, range(9)).std() > 1
    assert read_metadata(file)["checkpoint"] == str(trained / "20")


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(not VIDEOS.is_dir(), reason="the clips are not beside the project")
def test_the_clips_beside_the_project(folder: Path) -> None:
    """As a user types it: a few steps of the VAE and 20 of the transformer, at 2:3 as filmed."""
    trained, file = whole_way(folder, VIDEOS, 20, 4)
    assert {record["tokens"] for record in records(trained)} == {2 * (3 * 4 * 6 + 16)}
    info = probe(file, count=True)
    assert (info.num_frames, info.height, info.width) == (9, 64, 96)
    assert read_frames(file, range(9)).std() > 1
