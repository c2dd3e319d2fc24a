"""What a run measures, counts and refuses on its way."""

import json
import math
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch

from sat.config import ConfigNode
from sat.data.video import write_mp4
from sat.mpu.launch import read_launch
from sat.mpu.recorder import Recorder
from sat.training import loop
from sat.training.checkpoint import load_weights
from sat.training.loop import train_joined
from sat.training.run import Job, Run
from sat.weights.finding import find_checkpoint
from tests.data.numbered import numbered_frames
from tests.ranks import run_ranks
from tests.tiny import only_run, records, tiny_config, train_on_rank

COMMON = ("args.global_batch_size=4", "args.lr_decay_style=constant", "args.warmup=0")
PIXELS_AS_LATENTS = (
    "data={target: data_video.SFTDataset, params: {video_size: [16, 16], fps: 8, max_num_frames: 5, skip_frms_num: 0}}",
    "model.network_config.params.in_channels=3",
    "model.network_config.params.out_channels=3",
)
"""Trains on files without a VAE: clips of three channels stand for latents."""


def clip_set(folder: Path, num_clips: int, broken: dict[int, bytes]) -> Path:
    """A folder of clips in the released layout, some of them replaced by other bytes."""
    for part in ("videos", "labels"):
        (folder / part).mkdir(parents=True)
    for number in range(num_clips):
        video = folder / "videos" / f"{number}.mp4"
        write_mp4(video, numbered_frames(6), 8)
        if number in broken:
            video.write_bytes(broken[number])
        (folder / "labels" / f"{number}.txt").write_text(f"clip {number}")
    return folder


# --- metrics ---------------------------------------------------------------------------------------------------------

TRAIN_KEYS = {
    *("kind", "step", "loss", "grad_norm", "lr", "samples", "tokens", "padding_share", "replaced"),
    *("step_time", "data_wait", "comm_wait", "tokens_per_s", "tflops", "mfu", "hfu", "mfu_measured", "mem_gb"),
}
TIMESTEPS = (100, 300, 500, 700, 900)


def test_the_record_of_a_run(tmp_path: Path) -> None:
    words = (*COMMON, "args.train_iters=5", "args.log_interval=2", "args.eval_interval=5", f"args.save={tmp_path}")
    run_ranks(train_on_rank, 2, (*words, "args.measure_matrix_rate=true"))
    run = only_run(tmp_path)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [(line["kind"], line["step"]) for line in lines] == [("train", 2), ("train", 4), ("train", 5), ("valid", 5)]
    for line in lines[:3]:
        by_timestep = {key for key in line if key.startswith("loss_")}
        assert set(line) - by_timestep == TRAIN_KEYS and by_timestep
        assert (line["samples"], line["padding_share"], line["replaced"], line["mfu"]) == (4, 0.0, 0, None)
        assert line["tokens"] == 4 * (3 * 2 * 2 + 16)
        assert 0 < line["data_wait"] < line["step_time"] and 0.1 < line["mem_gb"] < 100
        flops = 3 * 4 * (24 * 2 * 28 * 32**2 + 4 * 2 * 28**2 * 32)  # 2 layers, 28 tokens, width 32
        # Patches, text, time and modulation add a tenth at this size; tests/cogvideox/test_flops.py has them all.
        assert line["tflops"] == pytest.approx(1.1017 * flops / line["step_time"] / 2 / 1e12, rel=1e-4)
        assert line["tokens_per_s"] == pytest.approx(line["tokens"] / line["step_time"])
        assert 0 < line["comm_wait"] < line["step_time"] and 0 < line["mfu_measured"] < 1 and line["hfu"] is None
    valid = lines[3]
    assert set(valid) == {"kind", "step", "samples", "loss", "step_time", *(f"loss_{t}" for t in TIMESTEPS)}
    assert valid["loss"] == pytest.approx(sum(valid[f"loss_{t}"] for t in TIMESTEPS) / 5)


def test_tensorboard_has_the_same_numbers(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator").EventAccumulator
    run_ranks(train_on_rank, 1, (*COMMON, "args.train_iters=3", "args.eval_interval=3", f"args.save={tmp_path}"))
    run = only_run(tmp_path)
    events = accumulator(str(run / "tensorboard"))
    events.Reload()
    for kind, name in (("train", "loss"), ("train", "lr"), ("valid", "loss_900")):
        shown = [(event.step, event.value) for event in events.Scalars(f"{kind}/{name}")]
        assert shown == [(record["step"], pytest.approx(record[name])) for record in records(run, kind)]


# --- validation ------------------------------------------------------------------------------------------------------


def validation(folder: Path, world: int, *words: str) -> list[dict[str, Any]]:
    folder.mkdir()
    run_ranks(train_on_rank, world, (*COMMON, "args.eval_interval=1", *words, f"args.save={folder}"))
    return records(only_run(folder), "valid")


def test_validation_is_the_same_at_every_call_and_layout(tmp_path: Path) -> None:
    still = ("args.train_iters=2", "args.eval_iters=2", "deepspeed.optimizer.params.lr=0")
    found = [
        validation(tmp_path / f"{world}x{micro}", world, *still, f"deepspeed.train_micro_batch_size_per_gpu={micro}")
        for world, micro in ((1, 4), (1, 1), (2, 2))
    ]
    for first, again in found:
        assert first["samples"] == again["samples"] == 8  # two global batches
        for name in ("loss", *(f"loss_{t}" for t in TIMESTEPS)):
            assert first[name] == again[name]
            assert first[name] == pytest.approx(found[0][0][name], rel=1e-6)  # measured 1e-7
    assert len({found[0][0][f"loss_{t}"] for t in TIMESTEPS}) == 5


def test_validation_drops_no_text_and_takes_the_timesteps_given(tmp_path: Path) -> None:
    rate = "model.conditioner_config.params.emb_models.0.ucg_rate"
    words = ("args.train_iters=1", "deepspeed.optimizer.params.lr=0", "args.eval_timesteps=[10, 500]")
    always, never = (validation(tmp_path / str(value), 1, *words, f"{rate}={value}")[0] for value in (1.0, 0.0))
    assert {name for name in always if name.startswith("loss_")} == {"loss_10", "loss_500"}
    assert always["loss"] == never["loss"]


def read_badly_on_one_rank(rank: int, words: tuple[str, ...]) -> None:
    loop.bad_clips = lambda batch: [("clip 3", "cannot be read")] if rank else []
    train_on_rank(rank, words)


@pytest.mark.parametrize("axis", ["model", "context"])
def test_ranks_that_share_clips_must_read_the_same(tmp_path: Path, axis: str) -> None:
    words = (*COMMON, f"args.{axis}_parallel_size=2", "args.train_iters=2", f"args.save={tmp_path}")
    with pytest.raises(AssertionError, match=r"step 1: ranks that share clips .* rank 1: clip 3 \(cannot be read\)"):
        run_ranks(read_badly_on_one_rank, 2, words)


def first_run(config: ConfigNode) -> Run:
    """The first stage of a run, built within the test's process."""
    with ExitStack() as resources:
        job = Job(config, 7, read_launch(), Recorder(read_launch()), resources)
        start, stages = job.begin()
        return Run(job, stages[0], start, resources)


def loss_by_hand(rank: int, words: tuple[str, ...]) -> float:
    """The mean loss at one timestep, sample by sample."""
    config = tiny_config(*words)
    run = first_run(config)
    losses = []
    for index in range(4):
        item = run.data.dataset[index]
        batch = {
            "latents": item["latents"].unsqueeze(0),
            "caption": [item["caption"]],
            "counters": torch.tensor([index]),
        }
        inputs = run.system.validation_inputs(batch, "500", 7)
        assert inputs.timesteps.tolist() == [500]
        losses.append(run.stepper.evaluate(inputs)["loss"].item())
    return sum(losses) / 4


def test_validation_measures_the_first_samples(tmp_path: Path) -> None:
    words = ("args.train_iters=1", "args.eval_iters=1", "deepspeed.optimizer.params.lr=0")
    (record,) = validation(tmp_path / "run", 1, *words)
    (expected,) = run_ranks(loss_by_hand, 1, (*COMMON, *words))
    assert record["loss_500"] == pytest.approx(expected, rel=1e-6)


# --- activation checkpointing ----------------------------------------------------------------------------------------


def test_recomputing_activations_changes_no_number(tmp_path: Path) -> None:
    found = []
    for value in ("false", "true"):
        folder = tmp_path / value
        words = ("args.train_iters=4", f"args.checkpoint_activations={value}", f"args.save={folder}")
        run_ranks(train_on_rank, 1, (*COMMON, *words))
        found.append([(record["loss"], record["grad_norm"]) for record in records(only_run(folder))])
    assert found[0] == found[1]


# --- bad clips and bad numbers ---------------------------------------------------------------------------------------


def test_bad_clips_of_all_ranks_are_replaced_counted_and_listed(tmp_path: Path) -> None:
    """Eight clips, two of them broken, two ranks: an epoch of two steps meets each once."""
    folder = clip_set(tmp_path / "set", 8, {1: b"", 6: b"not a video"})
    words = ("args.train_iters=4", f"args.train_data=[{folder}]", f"args.save={tmp_path / 'runs'}")
    run_ranks(train_on_rank, 2, (*COMMON, *PIXELS_AS_LATENTS, *words))
    run = only_run(tmp_path / "runs")
    assert [sum(record["replaced"] for record in records(run)[start : start + 2]) for start in (0, 2)] == [2, 2]
    assert all(record["samples"] == 4 for record in records(run))
    listed = {row["key"]: row["reason"] for row in map(json.loads, (run / "quarantine.jsonl").read_text().splitlines())}
    assert listed.keys() == {"set/videos/1.mp4", "set/videos/6.mp4"}
    assert "is empty (0 bytes)" in listed["set/videos/1.mp4"]


def test_too_many_bad_clips_stop_all_ranks_after_a_save(tmp_path: Path) -> None:
    folder = clip_set(tmp_path / "set", 12, dict.fromkeys(range(8), b""))
    words = ("args.train_iters=50", f"args.train_data={folder}", f"args.save={tmp_path / 'runs'}")
    with pytest.raises(AssertionError) as caught:
        run_ranks(train_on_rank, 2, (*COMMON, *PIXELS_AS_LATENTS, *words))
    message = str(caught.value)
    for rank in (0, 1):
        assert f"rank {rank}:" in message
    assert message.count("clips cannot be used, more than the 3 allowed. Mend or remove them, or raise args.") == 2
    run = only_run(tmp_path / "runs")
    last = records(run)[-1]["step"]
    assert last < 50 and find_checkpoint(run).step == last


def test_two_folders_are_one_set_and_the_table_names_both(tmp_path: Path) -> None:
    folders = [clip_set(tmp_path / name, 2, {}) for name in ("a", "b")]
    words = (f"args.train_data=[{folders[0]}, {folders[1]}]", "args.epochs=3")
    (lines,) = run_ranks(summary_of_run, 1, (*COMMON, *PIXELS_AS_LATENTS, *words, "args.train_iters=null"))
    assert lines == [
        "4 samples, 3 steps = 3.00 epochs",
        f"{folders[0]}: 2 of 2 clips kept",
        f"{folders[1]}: 2 of 2 clips kept",
    ]


def test_the_table_at_the_start_says_what_was_dropped_and_why(tmp_path: Path) -> None:
    folder = clip_set(tmp_path / "set", 4, {2: b"not a video"})
    words = (f"args.train_data={folder}", "args.train_iters=1", "data.params.read_headers=true")
    (lines,) = run_ranks(summary_of_run, 1, (*COMMON, *PIXELS_AS_LATENTS, *words))
    assert lines[1] == f"{folder}: 3 of 4 clips kept"
    assert lines[2].startswith("        1 dropped, unreadable: e.g. set/videos/2.mp4 (")


def summary_of_run(rank: int, words: tuple[str, ...]) -> list[str]:
    config = tiny_config(*words)
    return first_run(config).data.summary()


def test_padding_is_the_share_of_repeated_frames(tmp_path: Path) -> None:
    folder = clip_set(tmp_path / "set", 4, {})  # 6 frames: 5 are used
    words = ("args.train_iters=1", f"args.train_data={folder}", "data.params.max_num_frames=9")
    run_ranks(train_on_rank, 1, (*COMMON, *PIXELS_AS_LATENTS, *words, f"args.save={tmp_path / 'runs'}"))
    (record,) = records(only_run(tmp_path / "runs"))
    assert record["padding_share"] == pytest.approx(4 / 9)


def test_a_loss_that_is_no_number_stops_the_run(tmp_path: Path) -> None:
    words = (
        "args.train_iters=9",
        "args.save_interval=1",
        "deepspeed.optimizer.params.lr=1e30",
        f"args.save={tmp_path}",
    )
    with pytest.raises(
        AssertionError, match=r"3 steps in a row, from \d on, had a loss or gradients .* No checkpoint was"
    ):
        run_ranks(train_on_rank, 1, (*COMMON, *words, "args.max_skipped_steps=3", f"args.save={tmp_path}"))
    run = only_run(tmp_path)
    finite = [record["loss"] is not None and math.isfinite(record["loss"]) for record in records(run)]
    assert finite[0] and finite[-1] is ("skipped" not in records(run)[-1])


def test_without_a_folder_nothing_is_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run_ranks(train_in, 1, str(tmp_path), (*COMMON, "args.train_iters=2"))
    assert list(tmp_path.iterdir()) == []


def train_in(rank: int, folder: str, words: tuple[str, ...]) -> None:
    import os

    os.chdir(folder)
    train_joined(tiny_config(*words), 7)


# --- averaged weights ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("world", "stage", "precision"), [(1, 0, "fp32"), (2, 1, "fp32"), (2, 2, "fp32"), (2, 2, "bf16")]
)
def test_averaged_weights_stand_beside_each_checkpoint(tmp_path: Path, world: int, stage: int, precision: str) -> None:
    """The file's average is that of the weights which the run saved at each step."""
    words = (
        *("args.train_iters=4", "args.save_interval=1", f"args.save={tmp_path}"),
        *("deepspeed.optimizer.type=sat.ops.FusedEmaAdam", f"deepspeed.zero_optimization.stage={stage}"),
        *("deepspeed.train_micro_batch_size_per_gpu=2", f"deepspeed.bf16.enabled={precision == 'bf16'}"),
        "model.not_trainable_prefixes=[model.diffusion_model.time_embed]",
    )
    run_ranks(train_on_rank, world, (*COMMON, *words))
    run = only_run(tmp_path)
    assert (run / "latest").read_text() == "4"
    steps = [load_weights(run / str(step)) for step in range(1, 5)]
    averages = [load_weights(run / f"{step}-ema") for step in range(1, 5)]
    rtol, atol = (0.0, 1e-6) if precision == "fp32" else (2e-2, 2e-3)  # bf16 rounds weights and averages to 3 digits
    for name in steps[0]:
        shadow = averages[0][name].float()
        for step in range(2, 5):
            decay = (1 + step) / (10 + step)
            shadow = decay * shadow + (1 - decay) * steps[step - 1][name].float()
            torch.testing.assert_close(averages[step - 1][name].float(), shadow, rtol=rtol, atol=atol, msg=name)
        assert averages[0][name].dtype == steps[0][name].dtype
        if "time_embed" in name:
            assert torch.equal(averages[3][name], steps[3][name])
    assert any(not torch.equal(averages[3][name], steps[3][name]) for name in steps[0])
