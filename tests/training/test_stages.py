"""Progressive training: stages follow each other in one run, and it goes on from anywhere in them."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from sat.cogvideox.mixins import sincos_table_3d
from sat.config import load_config, load_yaml
from sat.errors import ConfigError
from sat.training.checkpoint import load_weights
from sat.training.optimizer_state import StoredState
from sat.training.stages import plan_stages, stage_lines
from tests.ranks import run_ranks
from tests.tiny import FORMS, ROOT, SMALLER, only_run, records, tiny_config, train_on_rank

COMMON = ("args.global_batch_size=4", "args.save_interval=2", "args.train_iters=null", "args.eval_interval=null")
STAGES = (
    "stages=["
    "{name: images, args: {train_iters: 3, lr_decay_style: constant}, data: {params: {num_frames: 1}}}, "
    "{name: clips, args: {train_iters: 4, global_batch_size: 2}, data: {params: {num_frames: 3, width: 6}}}, "
    "{name: packs, args: {train_iters: 2}, data: {params: {sizes: [[1, 4, 4], [3, 4, 6]], pack: {max_tokens: 60}}}}"
    "]"
)
SMALL = ("data.params.height=4", "data.params.width=4")
"""The first stage's, as configs/tiny.yaml has larger clips than the others here."""
NAMES = ["images"] * 3 + ["clips"] * 4 + ["packs"] * 2


def train(folder: Path, *words: str, world: int = 1) -> Path:
    run_ranks(train_on_rank, world, (*COMMON, STAGES, f"args.save={folder}", *words))
    return only_run(folder)


def losses(run: Path) -> list[float]:
    return [record["loss"] for record in records(run)]


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tmp_path_factory.mktemp("stages"))


def test_one_command_runs_all_stages(reference: Path) -> None:
    found = records(reference)
    assert [record["step"] for record in found] == list(range(1, 10))
    assert [record["stage"] for record in found] == NAMES
    assert [record["samples"] for record in found[:7]] == [4] * 3 + [2] * 4
    assert [record["tokens"] for record in found[:7]] == [4 * (16 + 4)] * 3 + [2 * (16 + 3 * 6)] * 4
    assert found[0]["lr"] == found[2]["lr"] and found[3]["lr"] != found[6]["lr"]
    assert found[7]["padding_share"] > 0  # rows of the plan, which have room


def test_a_stage_begins_with_the_weights_and_the_optimizer_at_the_end_of_the_one_before(
    reference: Path, tmp_path: Path
) -> None:
    """Its first step at no learning rate and no gradient: weights stay, Adam's moments decay by its betas."""
    assert (reference / "3").is_dir() and (reference / "7").is_dir()  # at no multiple of save_interval
    still = ("stages.1.args.train_iters=1", "deepspeed.optimizer.params.lr=0")
    run = train(tmp_path, *still, "stages.1.deepspeed={gradient_clipping: 1.0e-30}")
    first, second = load_weights(run / "3" / "mp_rank_00_model_states.pt"), load_weights(run / "4")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    before, after = StoredState(run / "3"), StoredState(run / "4")
    for kind, beta in {"exp_avg": 0.9, "exp_avg_sq": 0.95}.items():
        moments = {name: value for name in first if (value := before.whole(name, kind, 0)) is not None}
        assert moments and all(value.any() for value in moments.values())
        for name, value in moments.items():
            torch.testing.assert_close(after.whole(name, kind, 0), beta * value, rtol=1e-6, atol=1e-30)
    state = json.loads((reference / "7" / "training_state.json").read_text())
    assert state["stage"] == "clips" and state["samples"] == 8


def test_the_optimizer_is_forgotten_where_a_stage_says_so(reference: Path, tmp_path: Path) -> None:
    run = train(tmp_path, "stages.1.keep_optimizer=false")
    assert losses(run)[:4] == losses(reference)[:4]  # the fourth is that of the weights as they were
    assert losses(run)[4] != losses(reference)[4]


STORED = {
    "2B": FORMS["2B"],
    "5B-I2V": (
        "model.network_config.params.modules.pos_embed_config.params.learnable_pos_embed=true",
        *FORMS["5B-I2V"],
    ),
}
"""Those that store positions for one grid."""
TABLE = "model.diffusion_model.mixins.pos_embed.pos_embedding"
GROWN = (
    "data: {params: {num_frames: 4, height: 6, width: 6}}, model: {"
    "conditioner_config: {params: {emb_models: [{input_key: txt, target: sat.conditioning.text.ByteEmbedder, "
    "params: {width: 32, max_length: 20}}]}}, network_config: {params: {num_frames: 13, latent_height: 6, "
    "latent_width: 6, modules: {pos_embed_config: {params: {text_length: 20}}}}}}"
)
"""Grid 3 x 2 x 2 -> 4 x 3 x 3, and more text."""


def at_the_grown_grid(form: str, table: torch.Tensor) -> torch.Tensor:
    """A table, or a moment of it, by the rule of other grids."""
    text, video = table.view(1, -1, 32).split([16, 12], dim=1)
    if form == "2B":
        grown = sincos_table_3d((4, 3, 3), 32).unsqueeze(0)
    else:
        volume = video.view(1, 3, 2, 2, 32).permute(0, 4, 1, 2, 3)
        grown = F.interpolate(volume, size=(4, 3, 3), mode="trilinear", align_corners=True)
        grown = grown.permute(0, 2, 3, 4, 1).reshape(1, 36, 32)
    return torch.cat([text, torch.zeros(1, 4, 32), grown], dim=1)


@pytest.mark.parametrize("form", STORED)
def test_stored_positions_follow_the_grid_of_a_stage(form: str, tmp_path: Path) -> None:
    """The second stage has other sides, frames and text; its one step has no learning rate and no gradient."""
    stages = (
        f"stages=[{{args: {{train_iters: 3}}}}, {{args: {{train_iters: 1}}, {GROWN}, deepspeed: {{"
        "gradient_clipping: 1.0e-30, optimizer: {params: {lr: 0}}}}]"
    )
    options = ("deepspeed.train_micro_batch_size_per_gpu=1", "data.params.num_frames=3", f"args.save={tmp_path}")
    run_ranks(train_on_rank, 2, (*COMMON, *STORED[form], stages, *options))
    run = only_run(tmp_path)
    first, second = (load_weights(run / step / "mp_rank_00_model_states.pt") for step in ("3", "4"))
    assert first.keys() == second.keys() and TABLE in first
    assert all(torch.equal(first[name], second[name]) for name in first if name != TABLE)
    assert torch.equal(second[TABLE], at_the_grown_grid(form, first[TABLE]))
    before, after = StoredState(run / "3"), StoredState(run / "4")
    moment = before.whole(TABLE, "exp_avg", 0)
    assert (moment is None) == (form == "2B")  # a fixed table is not trained
    if moment is not None:
        assert moment.view(-1, 32)[16:].any(dim=1).all() and first[TABLE].any()
        expected = 0.9 * at_the_grown_grid(form, moment).flatten()
        torch.testing.assert_close(after.whole(TABLE, "exp_avg", 0), expected, rtol=1e-6, atol=1e-30)
    if form == "5B-I2V":
        finetune(tmp_path, run, second[TABLE])


def finetune(folder: Path, run: Path, expected: torch.Tensor) -> None:
    """A new run from the first stage's checkpoint, at the grid of the second."""
    words = load_config([run / "training_config.yaml"])["model"].plain()  # of the second stage
    options = (f"args.load={run / '3'}", "args.mode=finetune", "args.train_iters=1", f"args.save={folder / 'tuned'}")
    still = (
        "deepspeed.optimizer.params.lr=0",
        "data.params={num_samples: 9, num_frames: 4, channels: 16, height: 6, width: 6}",
    )
    run_ranks(train_on_rank, 1, (*COMMON, f"model={json.dumps(words)}", *options, *still))
    assert torch.equal(load_weights(only_run(folder / "tuned"))[TABLE], expected)


@pytest.mark.parametrize("step", [2, 3, 6, 7, 8])
def test_a_broken_run_goes_on_within_and_between_stages(reference: Path, tmp_path: Path, step: int) -> None:
    run = tmp_path / reference.name
    shutil.copytree(reference, run)
    for folder in run.iterdir():
        if folder.name.isdecimal() and int(folder.name) > step:
            shutil.rmtree(folder)
    (run / "latest").write_text(str(step))
    assert train(tmp_path) == run
    assert losses(run) == losses(reference)
    last = load_weights(reference / "9"), load_weights(run / "9")
    assert all(torch.equal(last[0][name], last[1][name]) for name in last[0])


def test_a_finished_run_stays_finished(reference: Path, tmp_path: Path) -> None:
    run = tmp_path / reference.name
    shutil.copytree(reference, run)
    assert train(tmp_path) == run
    assert losses(run) == losses(reference)


@pytest.mark.parametrize("stage", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_two_processes_and_a_layout_that_changes_with_the_stage(reference: Path, tmp_path: Path, stage: int) -> None:
    words = ("stages.1.args.context_parallel_size=2", f"deepspeed.zero_optimization.stage={stage}")
    run = train(tmp_path, *words, "deepspeed.train_micro_batch_size_per_gpu=1", world=2)
    assert losses(run) == pytest.approx(losses(reference), rel=1e-5)


def test_the_run_directory_tells_the_stage_and_the_job(reference: Path) -> None:
    current, job = load_yaml(reference / "training_config.yaml"), load_yaml(reference / "stages.yaml")
    assert "stages" not in current and current["data"]["params"]["pack"] == {"max_tokens": 60}
    assert [stage["name"] for stage in job["stages"]] == ["images", "clips", "packs"]


def test_ends_of_stages_are_kept(tmp_path: Path) -> None:
    run = train(tmp_path, "args.keep_last=1")
    assert sorted(int(folder.name) for folder in run.iterdir() if folder.name.isdecimal()) == [3, 7, 9]


@pytest.mark.slow
def test_a_run_that_is_killed_in_each_stage_has_the_losses_of_one_that_is_not(reference: Path, tmp_path: Path) -> None:
    words = [*SMALLER, *COMMON, STAGES, f"args.save={tmp_path}", "--seed", "7"]
    command = [sys.executable, "train_video.py", "--base", "configs/tiny.yaml", *words]
    for killed_at in (2, 5, 8):
        job = subprocess.Popen(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"})
        while job.poll() is None and (not any(tmp_path.iterdir()) or len(records_so_far(tmp_path)) < killed_at):
            time.sleep(0.01)
        job.send_signal(signal.SIGKILL)
        assert job.wait() in (0, -signal.SIGKILL)
    subprocess.run(command, cwd=ROOT, check=True)
    assert losses(only_run(tmp_path)) == losses(reference)


def records_so_far(folder: Path) -> list[str]:
    """Whole lines of the metrics, none before the file is there."""
    found = list(folder.glob("*/metrics.jsonl"))
    return found[0].read_text().splitlines() if found else []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["stages={}"], r"stages \(the command line\) is a mapping; give a list of stages"),
        (["stages=[]"], "is empty; give a list of stages, or leave it out"),
        (["stages=[1]"], r"stage 1 is a number \(1\); give a mapping"),
        (["stages=[{args: 3}]"], r"stages\[0\].args .* is a number \(3\); give a mapping of keys"),
        (["stages=[{agrs: {}}]"], r"unknown key stages\[0\].agrs .*did you mean 'args'"),
        (["stages=[{args: {train_iters: 2, save: x}}]"], r"stages\[0\].args.save .* is of the whole run"),
        (["stages=[{args: {}}]"], r"stages\[0\].args.train_iters is not set; every stage says how many steps"),
        (["stages=[{keep_optimizer: 1, args: {train_iters: 2}}]"], "keep_optimizer .* is 1; give true or false"),
        (
            [
                "stages=[{args: {train_iters: 2}}, "
                "{args: {train_iters: 2}, deepspeed: {optimizer: {type: sat.ops.FusedEmaAdam}}}]"
            ],
            r"stage '2' has another optimizer \(sat.ops.FusedEmaAdam\) than '1' .* \(AdamW\), .* keep_optimizer: false",
        ),
        (
            ["stages=[{name: a, args: {train_iters: 2}}, {name: a, args: {train_iters: 2}}]"],
            "2 are called 'a'; give each a name of its own",
        ),
        (["stages=[{args: {train_iters: 2}}, {args: {train_iters: 2}}]"], "args.save is not set, and a stage begins"),
        (
            [
                "args.save=x",
                "stages=[{name: big, args: {train_iters: 2}, data: {params: {video_size: [64, 96]}}},"
                "{name: small, args: {train_iters: 2}, data: {params: {video_size: [64, 64]}}}]",
            ],
            r"stage 'small' shrinks: its data.params.video_size is \[64, 64\], that of 'big' before it \[64, 96\]",
        ),
        (
            [
                "args.save=x",
                "stages=[{args: {train_iters: 2}, data: {params: {pack: {max_tokens: 60}}}},"
                "{args: {train_iters: 2}, data: {params: {pack: {max_tokens: 50}}}}]",
            ],
            "stage '2' shrinks: its max_tokens is 50, that of '1' before it 60",
        ),
        (
            [
                "args.save=x",
                "stages=[{args: {train_iters: 2}}, {args: {train_iters: 2}, data: {params: {num_frames: 2}}}]",
            ],
            "stage '2' shrinks: its data.params.num_frames is 2, that of '1' before it 3",
        ),
        (
            [
                "args.save=x",
                "stages=[{args: {train_iters: 2}, data: {params: {sizes: [[1, 4, 4], [3, 4, 6]]}}},"
                "{args: {train_iters: 2}, data: {params: {sizes: [[3, 4, 4], [1, 2, 2]]}}}]",
            ],
            r"stage '2' shrinks: its data.params' height and width is \[4, 4\], that of '1' before it \[4, 6\]",
        ),
        (
            [
                "args.save=x",
                "data={target: sat.data.mixture.Mixture, params: {repeats: {a: 1, b: 0}, sets: {"
                "a: {target: data_video.SFTDataset, params: {video_size: [32, 32], max_num_frames: 9, fps: 8}},"
                "b: {target: data_video.SFTDataset, params: {video_size: [32, 32], max_num_frames: 17, fps: 8}}}}}",
                "stages=[{args: {train_iters: 2}, data: {params: {repeats: {a: 1, b: 1}}}}, {args: {train_iters: 2}}]",
            ],
            "stage '2' shrinks: its data.params.max_num_frames is 9, that of '1' before it 17",
        ),
    ],
)
def test_stages_that_make_no_sense_are_refused(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        plan_stages(tiny_config("args.train_iters=null", *words), 7)


def test_the_numbers_of_a_later_stage_are_checked_before_the_first_one_runs(tmp_path: Path) -> None:
    model = "{network_config: {params: {hidden_size: 65}}}"
    stages = f"stages=[{{args: {{train_iters: 2}}}}, {{args: {{train_iters: 2}}, model: {model}}}]"
    with pytest.raises(AssertionError, match=r"hidden_size .*is 65, which does not divide"):
        run_ranks(train_on_rank, 1, (*COMMON, stages, f"args.save={tmp_path}"))
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("later", "message"),
    [
        ("train_data: [NOWHERE]}, data: {target: data_video.SFTDataset}", "no data at .*/nowhere"),
        ("cache: latents, cache_dir: NOWHERE}", "args.cache is latents, and model.latent_input says"),
        (
            "}, model: {conditioner_config: {params: {emb_models: [{"
            "target: sgm.modules.encoders.modules.FrozenT5Embedder, params: {model_dir: NOWHERE, max_length: 16}}]}}}",
            "/nowhere",
        ),
        ("global_batch_size: 3}", "args.global_batch_size 3 is not a multiple of 2"),
        ("model_parallel_size: 2}", "1 processes do not divide into model_parallel_size 2"),
        ("}, data: {params: {pack: {max_tokens: 10}}}", "max_tokens 10 holds no clip: the smallest has 20 tokens"),
        ("}, data: {params: {bucket: {max_tokens: 90}}}", "with data.params.bucket a row is a batch of its own"),
        ("}, deepspeed: {zero_optimization: {stag: 1}}", "unknown key .*stag.*did you mean 'stage'"),
        (
            "}, data: {target: data_video.SFTDataset, params: {data_dir: EMPTY, read_headers: true, "
            "pack: {max_tokens: 16}}}",
            "max_tokens is 16, and the text of a clip takes 16 tokens; raise it",
        ),
    ],
    ids=["data", "cache", "t5", "batch", "layout", "rows", "bucket", "deepspeed", "rows of clips to be opened"],
)
def test_what_a_later_stage_lacks_stops_the_first_one(tmp_path: Path, later: str, message: str) -> None:
    later = later.replace("NOWHERE", str(tmp_path / "nowhere")).replace("EMPTY", str(tmp_path))
    stages = f"stages=[{{args: {{train_iters: 1}}}}, {{args: {{train_iters: 1, {later}}}]"
    with pytest.raises(AssertionError, match=message):
        run_ranks(train_on_rank, 1, (*COMMON, stages, f"args.save={tmp_path / 'runs'}"))
    assert not (tmp_path / "runs").exists()


def test_the_printed_configuration_tells_the_size_of_each_stage() -> None:
    stages = (
        "stages=[{name: short, args: {train_iters: 2}, data: {params: {max_num_frames: 5}}},"
        "{name: long, args: {train_iters: 3}, data: {params: {max_num_frames: 9}}}]"
    )
    lines = stage_lines(plan_stages(tiny_config("args.save=x", stages), 7))
    assert lines[0] == "stage short: steps 1 to 2" and "5 frames" in lines[1]
    assert "stage long: steps 3 to 5" in lines


def test_each_stage_draws_from_streams_of_its_own() -> None:
    stages = plan_stages(load_config([ROOT / "configs" / "tiny.yaml"], [*COMMON, STAGES, *SMALL, "args.save=x"]), 7)
    assert stages[0].seed == 7 and len({stage.seed for stage in stages}) == 3
    assert [(stage.first_step, stage.last_step) for stage in stages] == [(0, 3), (3, 7), (7, 9)]
