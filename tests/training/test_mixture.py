"""Training on mixtures: the same samples and losses at any layout, exact after a resume, the realised mix recorded."""

import json
import shutil
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sat.config import load_config
from sat.data.mixture import Mixture
from sat.data.video import write_png
from sat.errors import ConfigError
from sat.training.args import train_args
from sat.training.checkpoint import load_weights
from sat.training.data import TrainingData, ValidationData, build_dataset
from sat.training.mix import RealisedMix
from tests.data.packed import mp4, write_shard
from tests.marks import rest_is_slow
from tests.ranks import run_ranks
from tests.test_docs import blocks
from tests.tiny import ROOT, TINY, VAE, only_run, records, tiny_config, train_on_rank
from tests.training.test_data import FILES
from tests.training.test_loop import clip_set

STEPS = 6
TEXT = 16
SHAPE = "channels: 16, height: 4, width: 4"
LATENTS = "target: sat.data.synthetic.SyntheticLatents"
MIXTURE = (
    "data={target: sat.data.mixture.Mixture, params: {sets: {"
    f"images: {{{LATENTS}, params: {{num_samples: 3, num_frames: 1, {SHAPE}}}}}, "
    f"clips: {{{LATENTS}, params: {{num_samples: 20, num_frames: 3, {SHAPE}, "
    "sizes: [[3, 4, 4], [5, 4, 4], [2, 4, 4]]}}}, weights: {images: 0.5, clips: 0.5}}}"
)
PACK = "data.params.pack={max_tokens: 70}"
COMMON = (MIXTURE, f"args.train_iters={STEPS}", "args.global_batch_size=4", f"args.save_interval={STEPS}")
LOSS_RTOL = 1e-5
"""As in the other tests of layouts: the worst seen is 2e-7."""


def train(folder: Path, world: int, *words: str) -> Path:
    micro = ("deepspeed.train_micro_batch_size_per_gpu=1",)
    run_ranks(train_on_rank, world, (*COMMON, *micro, f"args.save={folder}", *words))
    return only_run(folder)


def shares(record: dict[str, Any]) -> dict[str, float]:
    return {key: value for key, value in record.items() if "_share_" in key}


def assert_equal(run: Path, reference: Path) -> None:
    for own, other in zip(records(run), records(reference), strict=True):
        torch.testing.assert_close(own["loss"], other["loss"], rtol=LOSS_RTOL, atol=0.0)
        assert (own["samples"], own["tokens"]) == (other["samples"], other["tokens"])
        assert shares(own) == shares(other) and len(shares(own)) == 4


@pytest.mark.parametrize("words", [(), (PACK,)], ids=["plain", "packed"])
def test_layouts_and_resuming_change_nothing(tmp_path: Path, words: tuple[str, ...]) -> None:
    reference = train(tmp_path / "one", 1, *words)
    assert_equal(train(tmp_path / "two", 2, *words), reference)
    stopped = train(tmp_path / "half", 1, *words, "args.train_iters=2", f"args.lr_decay_iters={STEPS}")
    assert len(records(stopped)) == 2
    run_ranks(train_on_rank, 2, (*COMMON, *words, "deepspeed.train_micro_batch_size_per_gpu=1", f"args.load={stopped}"))
    assert_equal(stopped, reference)


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, ...]:
    """A data section of three sets: a folder, tar shards with captions of another name, and images."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = clip_set(tmp_path / "folder", 5, {3: b"no video"})
    members = {f"{n}.{kind}": value for n in range(4) for kind, value in (("mp4", mp4(tmp_path, 9, 16)), ("long", "t"))}
    shard = write_shard(tmp_path / "a.tar", members)
    for number in range(3):
        write_png(tmp_path / f"{number}.png", np.full((32, 32, 3), 80 * number, dtype=np.uint8))
    rows = [json.dumps({"video": f"{number}.png", "caption": f"image {number}"}) for number in range(3)]
    (tmp_path / "images.jsonl").write_text("\n".join(rows))
    params = "video_size: [32, 32], skip_frms_num: 0, short_clips: keep, read_headers: true"
    sets = {
        "folder": f"data_dir: {folder}, fps: 8, max_num_frames: 5",
        "shards": f"data_dir: {shard}, fps: 16, max_num_frames: 9, caption_key: long",
        "images": f"data_dir: {tmp_path}/images.jsonl, fps: 1, max_num_frames: 1",
    }
    written = ", ".join(
        f"{name}: {{target: data_video.SFTDataset, params: {{{own}, {params}}}}}" for name, own in sets.items()
    )
    more = "weights: {folder: 2, shards: 1, images: 1}, pack: {max_tokens: 70}"
    return (
        f"data={{target: sat.data.mixture.Mixture, params: {{sets: {{{written}}}, {more}}}}}",
        "model.latent_input=false",
        f"model.first_stage_config={json.dumps(VAE)}",
        f"args.train_iters={STEPS}",
        "args.global_batch_size=2",
        "args.save_interval=1",
        "args.log_interval=4",
    )


@pytest.mark.parametrize("stopped_at", rest_is_slow([1, 3, 4], [3]))
def test_a_mixture_of_files_goes_on_bit_for_bit(files: tuple[str, ...], tmp_path: Path, stopped_at: int) -> None:
    """Wherever it was stopped, weights, losses and the recorded mix are those of a run that was not."""
    run_ranks(train_on_rank, 1, (*files, f"args.save={tmp_path}/whole"))
    whole = only_run(tmp_path / "whole")
    run = tmp_path / "part" / whole.name
    shutil.copytree(whole, run)
    for folder in run.iterdir():
        if folder.name.isdecimal() and int(folder.name) > stopped_at:
            shutil.rmtree(folder)
    (run / "latest").write_text(str(stopped_at))
    (run / "metrics.jsonl").write_text("".join((run / "metrics.jsonl").read_text().splitlines(True)[: stopped_at // 4]))
    run_ranks(train_on_rank, 1, (*files, f"args.save={tmp_path}/part"))
    same = ("step", "loss", "grad_norm", "samples", "tokens")
    for own, other in zip(records(run), records(whole), strict=True):
        assert {name: own[name] for name in same} == {name: other[name] for name in same}
        assert shares(own) == shares(other) and len(shares(own)) == 6
    last = load_weights(whole / str(STEPS)), load_weights(run / str(STEPS))
    assert all(torch.equal(last[0][name], last[1][name]) for name in last[0])


def test_the_realised_mix_is_what_was_drawn_since_the_line_before(tmp_path: Path) -> None:
    run = train(tmp_path, 2, "args.log_interval=2")
    config = tiny_config(*COMMON)
    batches = TrainingData(config, train_args(config), 7, 4, 1, 0, 1).batches(0)
    assert len(records(run)) == 3
    for record in records(run):
        samples = {"images": 0, "clips": 0}
        tokens = dict(samples)
        for batch in islice(batches, 2 * 4):
            (name,) = batch["set"]
            samples[name] += 1
            tokens[name] += batch["latents"].shape[1] * 4 + TEXT
        for name in samples:
            assert record[f"samples_share_{name}"] == samples[name] / sum(samples.values())
            assert record[f"tokens_share_{name}"] == tokens[name] / sum(tokens.values())


def test_weights_by_tokens_give_the_sets_their_share_of_tokens(fresh_log: None) -> None:
    """Over whole blocks and epochs; the clips are of three sizes."""
    words = (*COMMON, "data.params.weights_by=tokens", "data.params.weights={images: 0.3, clips: 0.7}")
    for more in ((), (PACK,)):
        config = tiny_config(*words, *more)
        data = TrainingData(config, train_args(config), 7, 4, 1, 0, 1)
        sizes = [size[0] for part in data.dataset.datasets for size in part.latent_sizes()]  # type: ignore[attr-defined]
        tokens = {"images": 0, "clips": 0}
        for counter in range(64 * 100):
            index = data.order[counter]
            tokens["clips" if index < 20 else "images"] += TEXT + 4 * sizes[index]
        assert tokens["images"] / sum(tokens.values()) == pytest.approx(0.3, abs=2e-3)  # measured 3e-4
        told = [line for line in data.summary() if line.startswith("set ")]
        assert told[0] == "set clips: 20 clips, 61.0% of the samples, 70.0% of the tokens"
        assert told[1].endswith("of the samples, 30.0% of the tokens"), told


def test_a_mixture_validates_on_sets_of_its_own(fresh_log: None, caplog: pytest.LogCaptureFixture) -> None:
    def validation(*words: str) -> ValidationData | None:
        config = tiny_config(*COMMON, "args.eval_interval=1", "args.eval_batch_size=1", "args.eval_iters=4", *words)
        return ValidationData.build(config, train_args(config), 0, 4, 1, 0, 1)

    assert validation() is None
    assert caplog.messages == ["args.eval_interval is 1 without effect: data.params.valid_sets is not set"]
    image = f"{{{LATENTS}, params: {{num_samples: 5, num_frames: 1, {SHAPE}}}}}"
    clip = f"{{{LATENTS}, params: {{num_samples: 5, num_frames: 3, {SHAPE}}}}}"
    data = validation(f"data.params.valid_sets={{a: {image}, b: {clip}}}")
    assert data is not None
    assert [batch["set"] + batch["key"] for batch, _ in data.batches()] == [
        ["a", "synthetic/0"],
        ["b", "synthetic/0"],
        ["a", "synthetic/1"],
        ["b", "synthetic/1"],
    ]
    assert [batch["set"] + batch["key"] for _, batch, _ in data.first(5)] == [
        *([name, f"synthetic/{turn}"] for turn in (0, 1) for name in "ab"),
        ["a", "synthetic/2"],  # the videos of log_sample may be more than the clips of the loss
    ]


def test_the_mixture_of_the_page_is_planned(files: tuple[str, ...], tmp_path: Path, fresh_log: None) -> None:
    """The YAML of docs/data.md, its sets' places put here."""
    (text,) = (block for block in blocks(ROOT / "docs" / "data.md", "yaml") if "Mixture" in block)
    page = tmp_path / "page.yaml"
    here = text.replace("images.jsonl", f"{tmp_path}/images.jsonl").replace("shards/{000..099}", f"{tmp_path}/a")
    page.write_text(here)
    config = load_config([TINY, page], ["args.global_batch_size=2"])
    data = TrainingData(config, train_args(config), 7, 2, 1, 0, 1)
    assert data.set_names == ["clips", "images"] and data.plan is not None
    told = [line for line in data.summary() if line.startswith("set ")]
    assert [line.split(", ")[-1] for line in told] == ["70.0% of the tokens", "30.0% of the tokens"]


# --- args.train_data_weights -----------------------------------------------------------------------------------------


def test_the_released_weights_repeat_folders(tmp_path: Path) -> None:
    folders = [str(clip_set(tmp_path / name, count, {})) for name, count in (("a", 2), ("b", 3))]
    words = [FILES, "args.train_iters=1", f"args.train_data=[{','.join(folders)}]", "args.train_data_weights=[3, 1]"]
    config = load_config([], words)
    data = TrainingData(config, train_args(config), 0, 1, 1, 0, 1)
    assert isinstance(data.dataset, Mixture) and data.set_names == folders
    assert data.order.epoch_size == 9
    drawn = [data.order[counter] for counter in range(9 * 64)]
    assert [drawn.count(clip) for clip in range(5)] == [192, 192, 64, 64, 64]


@pytest.mark.parametrize(
    ("paths", "weights", "message"),
    [
        (["a", "b"], [1.0], r"args.train_data_weights is \[1.0\], and args.train_data is .*; give one weight for each"),
        (None, [1.0], "and args.train_data is None; give one weight for each path, each path once"),
        (["a", "a"], [1.0, 2.0], "give one weight for each path, each path once"),
        (["a", "b"], [0.0, 0.0], r"is \[0.0, 0.0\]; give numbers of 0 or more that do not sum to 0"),
        (["a", "b"], [2.0, -1.0], r"is \[2.0, -1.0\]; give numbers of 0 or more"),
    ],
)
def test_weights_that_do_not_fit_the_folders(paths: list[str] | None, weights: list[float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_dataset(load_config([], [FILES])["data"], paths, weights=weights)


@pytest.mark.parametrize(("key", "sets"), [("train_data", "sets"), ("valid_data", "valid_sets")])
def test_folders_beside_a_mixture(key: str, sets: str) -> None:
    message = rf"args.{key} is \['a'\], and data.target .* is a mixture, whose folders stand in data.params.{sets}"
    with pytest.raises(ConfigError, match=message):
        build_dataset(tiny_config(MIXTURE)["data"], "a", f"args.{key}")


# --- counting --------------------------------------------------------------------------------------------------------


def test_counts_go_on_from_a_checkpoint_and_begin_anew_after_a_line() -> None:
    before = RealisedMix(["a", "b"])
    before.add(before.count({"set": ["a", "a", "a"]}, [10, 10, 10]))
    mix, state = RealisedMix(["a", "b"]), before.state()
    mix.load(state)
    mix.add(mix.count({"set": ["b"]}, [10]))
    assert state == {"samples": {"a": 3, "b": 0}, "tokens": {"a": 30, "b": 0}}  # which is being saved meanwhile
    taken = mix.take()
    assert taken.shares == {
        "samples_share_a": 0.75,
        "samples_share_b": 0.25,
        "tokens_share_a": 0.75,
        "tokens_share_b": 0.25,
    }
    assert str(taken) == "mix, samples (tokens): a 75.0% (75.0%), b 25.0% (25.0%)"
    assert mix.state() == RealisedMix(["a", "b"]).state()
    assert RealisedMix([]).take().shares == {}
