"""Filling a cache ahead of time: by several processes, after a kill, for new clips; what is stale, damaged or bad."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load

from sat.cogvideox.engine import build_engine
from sat.data.cache import ABOUT, text_key
from tests.caches import data_words, model_words, vae_word, write_vae
from tests.data.packed import write_shard
from tests.image_to_video import write_clips
from tests.marks import rest_is_slow
from tests.ranks import launched, run_processes
from tests.tiny import ROOT, SMALLER, TINY, tiny_config
from tools.precompute import main

NEW = {"found": 0, "computed": 4, "unusable": 0}
OLD = {"found": 4, "computed": 0, "unusable": 0}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    return model_words(tmp_path_factory.mktemp("model"))


@pytest.fixture
def words(model: tuple[str, ...], tmp_path: Path) -> tuple[str, ...]:
    """The model, four clips with a caption each in tmp_path/clips, and a cache in tmp_path/cache."""
    words = data_words(tmp_path / "clips")
    for number in range(4):
        (tmp_path / "clips" / "labels" / f"{number}.txt").write_text(f"clip {number}")
    return (*SMALLER, *model, *words, "args.cache=all", f"args.cache_dir={tmp_path / 'cache'}")


@pytest.fixture
def fill(
    fresh_log: None, words: tuple[str, ...], capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., dict[str, Any]]:
    """Run the tool in this process; returns its report, with what it logged under `log`."""
    environment = dict(os.environ)

    def run(*more: str) -> dict[str, Any]:
        capfd.readouterr()
        try:
            main(["--base", str(TINY), *words, *more])
        except SystemExit as stop:
            return {"log": capfd.readouterr().err, "code": stop.code}
        finally:
            os.environ.clear()
            os.environ.update(environment)
        captured = capfd.readouterr()
        return {**json.loads(captured.out), "log": captured.err}

    return run


def shards(cache: Path, kind: str = "latents") -> list[Path]:
    return sorted(cache.glob(f"{kind}-*/*.safetensors"))


def entries_of(cache: Path, kind: str = "latents") -> dict[str, torch.Tensor]:
    """Every tensor of a kind, and that none stands in two shards."""
    found: dict[str, torch.Tensor] = {}
    for path in shards(cache, kind):
        own = load(path.read_bytes())
        assert not found.keys() & own.keys()
        found |= own
    return found


def test_entries_are_what_the_encoders_give(
    fill: Callable[..., dict[str, Any]], words: tuple[str, ...], tmp_path: Path
) -> None:
    report = fill("args.num_workers=2")
    assert (report["latents"], report["text"]) == (NEW, NEW)
    config = tiny_config(*words)
    engine = build_engine(config["model"])
    texts = entries_of(tmp_path / "cache", "text")
    for number in range(4):
        states = engine.conditioner([f"clip {number}"])["crossattn"][0]
        assert torch.equal(texts[f"{text_key(f'clip {number}')}/states"], states)
    latents = entries_of(tmp_path / "cache")
    moments = torch.stack([value for name, value in latents.items() if name.endswith("moments")])
    assert len(latents) == 8 and moments.shape == (4, 3, 32, 4, 4)
    mean, logvar = moments.double().chunk(2, dim=2)
    std = ((mean.square() + logvar.exp()).mean() - mean.mean().square()).sqrt().item()
    assert report["latent_std"] == pytest.approx(std, rel=1e-9)
    assert report["scale_factor"] == pytest.approx(1 / std, rel=1e-9)


def test_only_what_is_new_is_computed(fill: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    clips = tmp_path / "clips"
    fill()
    before = shards(tmp_path / "cache")
    again = fill()
    assert (again["latents"], again["text"]) == (OLD, OLD)

    more = write_clips(tmp_path / "more", 6)
    shutil.copy(more / "videos" / "5.mp4", clips / "videos")
    (clips / "labels" / "5.txt").write_text("clip 0")
    assert fill()["latents"] == {"found": 4, "computed": 1, "unusable": 0}
    (clips / "labels" / "5.txt").write_text("another caption")
    report = fill()
    assert report["latents"] == {"found": 5, "computed": 0, "unusable": 0}
    assert report["text"] == {"found": 4, "computed": 1, "unusable": 0}

    # The bytes count, not the name or the time.
    for part, suffix in (("videos", "mp4"), ("labels", "txt")):
        (clips / part / f"5.{suffix}").rename(clips / part / f"moved.{suffix}")
    os.utime(clips / "videos" / "0.mp4", (1, 1))
    assert fill()["latents"] == {"found": 5, "computed": 0, "unusable": 0}
    stat = (clips / "videos" / "1.mp4").stat()
    shutil.copy(more / "videos" / "4.mp4", clips / "videos" / "1.mp4")
    os.utime(clips / "videos" / "1.mp4", ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    assert fill()["latents"] == {"found": 4, "computed": 1, "unusable": 0}
    assert set(before) <= set(shards(tmp_path / "cache"))


@pytest.mark.parametrize(
    "change",
    ["video_size=[16, 16]", "size_mode=keep", "fps=4", "max_num_frames=5", "skip_frms_num=1", "short_clips=keep"],
)
def test_another_reading_is_another_entry(fill: Callable[..., dict[str, Any]], change: str) -> None:
    fill("args.cache=latents")
    changed = (f"data.params.{change}", "args.cache=latents")
    assert fill(*changed)["latents"] == NEW
    assert fill(*changed)["latents"] == OLD
    assert fill("args.cache=latents")["latents"] == OLD


def test_clips_of_the_same_bytes_share_an_entry(fill: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    shutil.copy(tmp_path / "clips" / "videos" / "0.mp4", tmp_path / "clips" / "videos" / "1.mp4")
    assert fill()["latents"] == {"found": 1, "computed": 3, "unusable": 0}
    assert len(entries_of(tmp_path / "cache")) == 6


# --- stale, damaged, bad ---------------------------------------------------------------------------------------------


def test_entries_of_other_weights_are_not_used(fill: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    fill()
    other = vae_word(write_vae(tmp_path / "other.pt", seed=1))
    refused = fill(READ_ONLY, other)["log"]
    assert "lacks the latents of 4 of 4 clips, e.g. clips/videos/" in refused
    assert (
        "run tools/precompute.py with this configuration and args.cache_read_only=false. There is latents-" in refused
    )
    assert "of another encoder (weights " in refused
    report = fill(other)
    assert (report["latents"], report["text"]) == (NEW, OLD)
    assert "of another encoder (weights " in report["log"] and ", now " in report["log"]
    assert fill()["latents"] == fill(other)["latents"] == OLD
    longer = "model.conditioner_config.params.emb_models.0.params.max_length=17"
    more = ("model.network_config.params.modules.pos_embed_config.params.text_length=17", longer)
    report = fill(*more)
    assert (report["latents"], report["text"]) == (OLD, NEW)
    assert "of another encoder (encoder 0 max_length 16, now 17)" in report["log"]
    fill("model.conditioner_config.params.emb_models.0.params.dtype=bf16")
    about = [json.loads(path.read_text()) for path in (tmp_path / "cache").glob(f"text-*/{ABOUT}")]
    assert sorted(one["encoder 0 dtype"] for one in about) == ["bfloat16", "float32", "float32"]


READ_ONLY = "args.cache_read_only=true"


def test_a_cache_that_is_only_read(fill: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    assert "cache lacks the latents of 4 of 4 clips, e.g. clips/videos/0.mp4; run tools/" in fill(READ_ONLY)["log"]
    assert not (tmp_path / "cache").exists()
    fill("args.cache=latents")
    before = sorted((tmp_path / "cache").rglob("*"))
    refused = fill(READ_ONLY)
    assert refused["code"] == 2 and "lacks the text of 4 of 4 clips, e.g. 'clip 0'; run" in refused["log"]
    shutil.copytree(tmp_path / "clips", tmp_path / "elsewhere")  # other paths, whose hashes are not kept
    for options in ((READ_ONLY,), (READ_ONLY, f"args.train_data=[{tmp_path / 'elsewhere'}]")):
        assert fill(*options, "args.cache=latents")["latents"] == OLD
    assert sorted((tmp_path / "cache").rglob("*")) == before


def test_a_folder_that_cannot_be_written(fill: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    told = fill(f"args.cache_dir={tmp_path / 'file'}")
    assert told["code"] == 2 and "file cannot be written (Not a directory); give a folder that can" in told["log"]


@pytest.mark.parametrize("damage", ["cut", "noise", "empty"])
def test_a_damaged_shard_is_computed_anew(fill: Callable[..., dict[str, Any]], tmp_path: Path, damage: str) -> None:
    fill()
    before = entries_of(tmp_path / "cache")
    (shard,) = shards(tmp_path / "cache")
    content = shard.read_bytes()
    shard.write_bytes({"cut": content[:-1], "noise": b"\xff" * len(content), "empty": b""}[damage])
    told = fill(READ_ONLY)
    assert told["code"] == 2 and f"{shard} " in told["log"]
    assert "delete it, and what it held is computed anew at the next start" in told["log"]
    report = fill()
    assert (report["latents"], report["text"]) == (NEW, OLD)
    assert "at the next start: removed" in report["log"] and not shard.exists()
    after = entries_of(tmp_path / "cache")
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_a_clip_that_cannot_be_used_is_tried_once(fill: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    videos, labels = tmp_path / "clips" / "videos", tmp_path / "clips" / "labels"
    (videos / "1.mp4").write_bytes(b"no video")
    (labels / "2.txt").write_text("")
    report = fill()
    assert report["latents"] == {"found": 0, "computed": 3, "unusable": 1}
    assert "1 cannot be used (e.g. " in report["log"] and "2.txt is empty)" in report["log"]
    assert fill()["latents"] == {"found": 3, "computed": 0, "unusable": 1}
    assert fill(READ_ONLY)["latents"] == {"found": 3, "computed": 0, "unusable": 1}
    (labels / "2.txt").write_text("now with a caption")
    shutil.copy(videos / "0.mp4", videos / "1.mp4")
    assert fill()["latents"] == {"found": 3, "computed": 1, "unusable": 0}


# --- several processes, kills ----------------------------------------------------------------------------------------


def fill_as_launched(words: tuple[str, ...]) -> None:
    main(["--base", str(TINY), *words])


def test_two_processes_share_the_clips(
    fill: Callable[..., dict[str, Any]], words: tuple[str, ...], tmp_path: Path
) -> None:
    """Twelve clips, four of them twice: no entry stands in two shards, and all are what one process makes."""
    more = write_clips(tmp_path / "more", 12)
    for number in range(12):
        shutil.copy(more / "videos" / f"{number % 8}.mp4", tmp_path / "clips" / "videos" / f"{number}.mp4")
        (tmp_path / "clips" / "labels" / f"{number}.txt").write_text(f"clip {number % 8}")
    run_processes(fill_as_launched, launched(2), words)
    written = [shards(tmp_path / "cache", kind) for kind in ("latents", "text")]
    assert all(1 <= len(own) <= 2 for own in written)
    own = {kind: entries_of(tmp_path / "cache", kind) for kind in ("latents", "text")}
    assert (len(own["latents"]), len(own["text"])) == (16, 8)
    shutil.rmtree(tmp_path / "cache")
    fill()
    for kind, expected in own.items():
        alone = entries_of(tmp_path / "cache", kind)
        assert alone.keys() == expected.keys()
        assert all(torch.equal(alone[name], expected[name]) for name in alone)


CLOSE = {"rtol": 0.0, "atol": 5e-5}
"""A rank adds up its frames, then those of all. Measured 1.3e-6."""


def test_processes_that_share_clips_give_the_same(
    fill: Callable[..., dict[str, Any]], words: tuple[str, ...], tmp_path: Path
) -> None:
    (tmp_path / "clips" / "videos" / "1.mp4").write_bytes(b"no video")
    run_processes(fill_as_launched, launched(4), (*words, "args.context_parallel_size=2"))
    shared = entries_of(tmp_path / "cache")
    assert fill(READ_ONLY)["latents"] == OLD
    shutil.rmtree(tmp_path / "cache")
    fill()
    alone = entries_of(tmp_path / "cache")
    assert shared.keys() == alone.keys() and len(alone) == 6
    for name in alone:
        torch.testing.assert_close(shared[name], alone[name], **CLOSE)


def test_clips_of_tar_shards_and_of_a_mixture(
    fill: Callable[..., dict[str, Any]], words: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is known of a clip's bytes is the same wherever they are."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "indexes"))
    fill()
    members: dict[str, bytes | str] = {}
    for number in range(4):
        members[f"{number}.mp4"] = (tmp_path / "clips" / "videos" / f"{number}.mp4").read_bytes()
        members[f"{number}.txt"] = f"clip {number}"
    shard = write_shard(tmp_path / "0.tar", members)
    assert fill(f"args.train_data=[{shard}]")["latents"] == OLD
    assert len(list((tmp_path / "cache" / "files").iterdir())) == 2

    params = "video_size: [32, 32], fps: 8, max_num_frames: {}, skip_frms_num: 0"
    sets = ", ".join(
        f"{name}: {{target: data_video.SFTDataset, params: {{data_dir: {place}, {params.format(count)}}}}}"
        for name, place, count in (("files", tmp_path / "clips", 9), ("tar", shard, 5))
    )
    mixture = ("args.train_data=null", f"data={{target: sat.data.mixture.Mixture, params: {{sets: {{{sets}}}}}}}")
    for expected in ({"found": 4, "computed": 4, "unusable": 0}, {"found": 8, "computed": 0, "unusable": 0}):
        assert fill(*mixture)["latents"] == expected
    members["3.mp4"] = members["0.mp4"]
    write_shard(shard, members)
    assert fill(*mixture)["latents"] == {"found": 8, "computed": 0, "unusable": 0}


def test_a_vae_that_encodes_otherwise_has_entries_of_its_own(fill: Callable[..., dict[str, Any]]) -> None:
    fill("args.cache=latents")
    for change in ("frames_per_chunk=4", "tile={height: 16, width: 16}"):
        words = ("args.cache=latents", f"model.first_stage_config.params.{change}")
        report = fill(*words)
        assert report["latents"] == NEW and change.partition("=")[0] in report["log"]
        assert fill(*words)["latents"] == OLD


SLOW = """
import sys, time
sys.path[:0] = [sys.argv[1]]
import sat.training.caches as caches, sat.training.fill as fill
fill.SHARD_BYTES = 1
write = fill.write_safetensors
def slowly(path, *rest):
    write(path, *rest)
    whole = path.read_bytes()
    for content in (whole[: len(whole) // 2], whole):
        path.write_bytes(content)
        time.sleep(0.1)
fill.write_safetensors = slowly
from tools.precompute import main
main(sys.argv[2:])
"""


@pytest.mark.parametrize("num_shards", rest_is_slow([1, 3], [1]))
def test_a_job_that_is_killed_goes_on(
    fill: Callable[..., dict[str, Any]], words: tuple[str, ...], tmp_path: Path, num_shards: int
) -> None:
    job = subprocess.Popen(
        [sys.executable, "-c", SLOW, str(ROOT), "--base", str(TINY), *words],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
    )
    try:
        until = time.monotonic() + 60
        while len(shards(tmp_path / "cache")) < num_shards:
            assert job.poll() is None and time.monotonic() < until, job.communicate()[1]
            time.sleep(0.01)
    finally:
        job.send_signal(signal.SIGKILL)
        job.communicate()
    kept = {path: path.stat().st_mtime_ns for path in shards(tmp_path / "cache")}
    assert num_shards <= len(kept) < 4
    report = fill()
    assert report["latents"] == {"found": len(kept), "computed": 4 - len(kept), "unusable": 0}
    assert "removed" not in report["log"]  # nothing of it was damaged
    assert all(path.stat().st_mtime_ns == time_of for path, time_of in kept.items())
    after = entries_of(tmp_path / "cache")
    shutil.rmtree(tmp_path / "cache")
    fill()
    whole = entries_of(tmp_path / "cache")
    assert after.keys() == whole.keys() and all(torch.equal(after[name], whole[name]) for name in whole)


def test_what_a_killed_writer_left_goes_after_a_day(fill: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    fill()
    folder = shards(tmp_path / "cache")[0].parent
    old, young = folder / ".old.safetensors.unfinished", folder / ".young.safetensors.unfinished"
    for path in (old, young):
        path.write_bytes(b"half")
    os.utime(old, (1, time.time() - 100_000))
    fill()
    assert young.exists() and not old.exists()


def test_a_collective_that_fails_ends_with_its_rank(
    fill: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("[gloo/transport/tcp/pair.cc] Connection closed by peer")

    monkeypatch.setattr("tools.precompute.fill_stage", broken)
    report = fill()
    assert report["code"] == 2 and "error: a collective failed at rank 0" in report["log"]
