"""What --plan counts is what runs; what it says of layouts, devices and changes."""

import re
import subprocess
import sys
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch

from sat.cogvideox.traffic import LayerSizes, Sent, layer_traffic
from sat.config import load_config
from sat.errors import ConfigError
from sat.model.activations import Activations
from sat.mpu.state import get_parallel_state
from sat.training.cli import main as train_video
from sat.training.devices import named_device
from sat.training.planning.dry import NOTHING
from sat.training.planning.layouts import Layout, choose, sensible_layouts
from sat.training.planning.passes import Pieces, Work, pretend_layout, pretend_ranks, run_parts, take_apart
from sat.training.planning.run import describe_job, plan
from sat.training.preview import clip_sizes
from tests.marks import rest_is_slow
from tests.tiny import ROOT

MODEL = [ROOT / "configs" / "cogvideox_5b.yaml", ROOT / "configs" / "sft.yaml"]
SMALL = (
    *(f"model.network_config.params.{key}" for key in ("hidden_size=512", "num_attention_heads=8", "num_layers=4")),
    "data.params.video_size=[64,96]",
    "data.params.max_num_frames=9",
    "model.first_stage_config=null",
)


def small(*words: str) -> Any:
    return load_config(MODEL, [*SMALL, *words])


def work_of(config: Any) -> Work:
    clip = clip_sizes(config)
    assert clip is not None
    return Work(config["model"], clip, 4096, 1, torch.bfloat16)


CHOICES = ("keep", "recompute", "keep_attention", "recompute_every_2", "offload")
BYTES = 1e-3
"""The worst ratio below differs from one by 3e-4; nothing else differs."""


@cache
def pieces_of(*words: str) -> Pieces:
    return take_apart(work_of(small(*words)), get_parallel_state())


@pytest.mark.parametrize("choice", rest_is_slow(CHOICES, ("keep_attention", "recompute_every_2")))
def test_any_network_follows_from_one_layer_of_each_kind(choice: str) -> None:
    """A network of five layers, run as it is."""
    depth = 5
    work, activations = work_of(small()), Activations.parse(choice)
    planned = pieces_of().whole(activations.groups(depth))
    parts = run_parts(work, get_parallel_state(), depth, activations)
    last = (parts[0], *parts[-2:])
    for found, measured in ((planned.activations, parts), (planned.last_activations, last)):
        assert found == pytest.approx(max(part.peak for part in measured) - planned.inputs, rel=BYTES)
    assert planned.forward == sum((part.counted for part in parts[: depth + 2]), NOTHING)
    assert planned.backward == sum((part.counted for part in parts[depth + 2 :]), NOTHING)


@pytest.mark.parametrize("choice", ["keep_attention", "recompute_every_2"])
def test_groups_of_layers_follow_too(choice: str) -> None:
    """Six layers: two groups of two, a layer left over, and one that keeps all."""
    depth, activations = 6, Activations.parse(choice)
    work = replace(work_of(small()), group_size=2, skipped=1)
    planned = pieces_of().whole(activations.groups(depth, 2, 1))
    parts = run_parts(work, get_parallel_state(), depth, activations)
    assert planned.activations == pytest.approx(max(part.peak for part in parts) - planned.inputs, rel=BYTES)
    assert planned.backward.products == sum(part.counted.products for part in parts[depth + 2 :])


def test_operations_are_those_of_the_formula() -> None:
    config = small("args.checkpoint_activations=false")
    job, _ = describe_job(config, named_device("h200"), 1)
    run = take_apart(job.work, get_parallel_state()).whole(job.work.groups("keep"))
    both = run.forward + run.backward
    assert both.products + both.attention_forward + both.attention_backward == job.clip_flops


SPLITS = [{"tp": 2}, {"tp": 4}, {"cp": 2}, {"cp": 4}]


@pytest.mark.parametrize("split", rest_is_slow(SPLITS, ({"tp": 2}, {"cp": 4})), ids=str)
def test_bytes_are_those_of_the_formula(split: dict[str, int]) -> None:
    """Layers' traffic, by the formulas that other tests compare with real collectives."""
    config, tp, cp = small(), split.get("tp", 1), split.get("cp", 1)
    work = work_of(config)
    with pretend_ranks(4):
        parallel = pretend_layout(work, tp, cp)
        layer = take_apart(work, parallel).layers["all"]
    sizes = LayerSizes(
        batch=1,
        tokens=work.clip.video_tokens + work.clip.text_length,
        hidden_size=512,
        num_heads=8,
        time_embed_dim=512,
        tp=tp,
        sequence_parallel=tp > 1,
        ulysses=cp,
    )
    sent = sum(layer_traffic(sizes).values(), Sent())
    assert [layer.forward.sent_bytes, layer.backward.sent_bytes] == [sent.forward, sent.backward]


def test_the_plan_of_a_released_model() -> None:
    command = [sys.executable, ROOT / "train_video.py", "--base", *MODEL, "--plan", "--device", "h200", "--world", "2"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "operations of a clip, forward and backward: 996.6 T; encoding its frames 149 T" in done.stdout
    assert "as configured: " in done.stdout and "chosen: " in done.stdout and "because: " in done.stdout


def test_the_smallest_change_is_named() -> None:
    network = "model.network_config.params"
    wide = (
        *(f"{network}.{key}" for key in ("hidden_size=3072", "num_attention_heads=48", "num_layers=16")),
        "data.params.video_size=[480,720]",
    )
    text = plan(small("args.checkpoint_activations=false", "data.params.max_num_frames=49", *wide), "A100", 1)
    assert "DOES NOT FIT" in text
    assert re.search(r"smallest change that makes it fit: \S+=\S+ \([\d.]+ GiB", text)  # one key alone


def test_what_cannot_fit_is_refused_with_what_would_help() -> None:
    config = load_config(MODEL, ["model.first_stage_config=null", "model.network_config.params.num_layers=60"])
    with pytest.raises(ConfigError, match=r"nothing fits: the least is [\d.]+ GiB .* Smallest change: \d+ devices"):
        plan(config, "4090", 1)


def test_devices_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ConfigError, match="3 devices do not divide into model_parallel_size 2"):
        plan(small("args.model_parallel_size=2"), "h200", 3)


def test_a_model_without_a_network_is_refused() -> None:
    with pytest.raises(ConfigError, match="--plan is for the video model"):
        plan(load_config([ROOT / "configs" / "tiny_vae.yaml"]), "h200")


def test_a_pack_and_adapters_are_planned() -> None:
    pack = "data={target: data_video.SFTDataset, params: {video_size: [64, 96], max_num_frames: 9, fps: 8, "
    lora = ROOT / "configs" / "lora.yaml"
    config = load_config([*MODEL, lora], [*SMALL, pack + "skip_frms_num: 0, pack: {max_tokens: 900}}}"])
    job, configured = describe_job(config, named_device("h100"), 1)
    assert job.work.is_packed and job.work.samples == 900 // (3 * 4 * 6 + 226)
    assert configured == Layout(stage=2, activations="recompute")
    assert "chosen: " in plan(config, "h100", 1)


def test_an_optimizer_of_whole_matrices_is_given_no_parts() -> None:
    muon = ("deepspeed.optimizer={type: sat.ops.Muon, params: {lr: 0.01}}", "deepspeed.zero_optimization.stage=0")
    fp32 = ("deepspeed.fp16.enabled=false", "deepspeed.bf16.enabled=false")
    job, configured = describe_job(small(*muon, *fp32), named_device("h200"), 2)
    possible = {layout for layout in sensible_layouts(2, configured) if job.is_possible(layout)}
    assert configured in possible and {layout.context_parallel_size for layout in possible} == {1, 2}
    assert {(layout.stage, layout.model_parallel_size) for layout in possible} == {(0, 1)}


@pytest.mark.parametrize(("cache", "left"), [("none", (1, 1, 1)), ("text", (1, 0, 1)), ("all", (0, 0, 0))])
def test_what_a_cache_holds_needs_no_encoder(cache: str, left: tuple[int, int, int]) -> None:
    sizes = [word for word in SMALL if not word.startswith("model.first")]
    config = load_config(MODEL, [*sizes, f"args.cache={cache}", "args.cache_dir=somewhere"])
    encoders = describe_job(config, named_device("h200"), 1)[0].encoders
    assert tuple(map(bool, (encoders.vae_bytes, encoders.text_bytes, encoders.encoding_bytes))) == left


def test_nothing_is_chosen_where_nothing_fits() -> None:
    assert choose([]) is None


def test_every_stage_is_planned(capsys: pytest.CaptureFixture[str]) -> None:
    stages = (
        "stages=[{name: small, args: {train_iters: 2}}, "
        "{name: large, args: {train_iters: 2}, data: {params: {video_size: [96, 96]}}}]"
    )
    words = [*SMALL, "args.save=x", "args.train_iters=null", "args.train_data=[configs]", stages]
    train_video(["--base", *map(str, MODEL), *words, "--plan", "--device", "h200"])
    printed = capsys.readouterr().out
    assert printed.index("stage small") < printed.index("64x96 pixels") < printed.index("stage large")
    assert printed.index("stage large") < printed.index("96x96 pixels")
