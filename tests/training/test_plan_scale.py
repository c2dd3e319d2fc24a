"""Manifests of many rows are scanned and planned in seconds, in memory that follows from the rows' own bytes."""

import json
import resource
import time
from pathlib import Path

import numpy as np
import pytest

from sat.data.dataset import SFTDataset
from sat.data.sampler import ShuffledEpochs
from sat.training.plan import PlanArgs, RowPlan, TokenCount, latent_sizes

RESOLUTIONS = ((256, 384), (480, 720), (768, 1360))


def write_manifest(path: Path, num_rows: int) -> Path:
    """Images and clips of 1 to 145 frames (log-normal) at three resolutions, their sizes in the rows."""
    rng = np.random.default_rng(0)
    frames = np.clip(rng.lognormal(3.3, 0.9, num_rows), 1, 145).astype(int).tolist()
    rates = rng.choice([8, 16, 23.976, 25, 29.97, 30], num_rows).tolist()
    sides = rng.integers(len(RESOLUTIONS), size=num_rows).tolist()
    with path.open("w") as file:
        for number, (n, fps, which) in enumerate(zip(frames, rates, sides)):
            height, width = RESOLUTIONS[which]
            video = f"clips/{number:08}.{'png' if n == 1 else 'mp4'}"
            row = {"video": video, "num_frames": n, "fps": fps, "height": height, "width": width}
            file.write(json.dumps({**row, "caption": f"a caption of a usual length, that of clip {number}"}) + "\n")
    return path


def plan(manifest: Path) -> tuple[RowPlan, dict[str, float]]:
    """The plan of a set, and CPU seconds of each part of the way to it and through its first epoch."""
    seconds, begun = {}, time.process_time()

    def stop(name: str) -> None:
        nonlocal begun
        begun, seconds[name] = time.process_time(), time.process_time() - begun

    data = SFTDataset(manifest, (480, 720), 8, 49, skip_frms_num=0, size_mode="native", short_clips="keep")
    stop("scan")
    sizes = latent_sizes(data)
    stop("sizes")
    count = TokenCount((1, 2, 2), 226)
    rows = RowPlan("pack", PlanArgs(max_tokens=18_000), sizes, count, 3072, 64, lambda k, _: ShuffledEpochs(len(k), 0))
    stop("plan")
    assert sum(len(row.indices) for row in rows.planner.epoch_rows(0)) == len(data)
    stop("epoch")
    return rows, seconds


def test_a_hundred_thousand_rows(tmp_path: Path) -> None:
    _, seconds = plan(write_manifest(tmp_path / "clips.jsonl", 100_000))
    assert sum(seconds.values()) < 8, seconds  # measured 2


@pytest.mark.slow
def test_a_million_rows(tmp_path: Path) -> None:
    """Memory: the rows themselves twice, as they are joined, numbers of each clip, and some windows of rows."""
    manifest = write_manifest(tmp_path / "clips.jsonl", 1_000_000)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    _, seconds = plan(manifest)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    assert sum(seconds.values()) < 60, seconds  # measured 20
    assert grown < 2 * manifest.stat().st_size / 2**20 + 200
