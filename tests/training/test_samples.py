"""Videos sampled during training are those of sample_video.py from the same weights and seed, bit for bit."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from sat.config import load_config
from sat.data.video import read_frames, read_metadata
from sat.sampling.run import sample
from tests.image_to_video import IMAGE_TO_VIDEO, clip_words, write_clips
from tests.ranks import run_ranks
from tests.sampling.conftest import write_parts
from tests.tiny import VAE, only_run, records, train_on_rank

LORA = (
    "model.network_config.params.modules.lora_config="
    "{target: sat.model.finetune.lora2.LoraMixin, params: {r: 4, lora_alpha: 32}}",
    "model.not_trainable_prefixes=[all]",
)
COMMON = (
    "args.train_iters=4",
    "args.global_batch_size=2",
    "args.eval_interval=2",
    "args.save_interval=2",
    "model.sampler_config.params.num_steps=4",
    "model.sampler_config.params.guider_config.params.num_steps=4",
)


def sampled_again(run: Path, out: Path, step: int, *words: str) -> list[Path]:
    """What the script makes of a saved step and the run's own list of prompts."""
    options = (
        f"args.load={run / str(step)}",
        f"args.output_dir={out}",
        f"args.input_file={run / 'samples/prompts.txt'}",
    )
    return sample(load_config([run / "training_config.yaml"], [*options, *words]), 7)


@pytest.mark.parametrize("more", [(), LORA, ("deepspeed.bf16.enabled=true",)], ids=["whole", "lora", "bf16"])
def test_latents_of_text_to_video(tmp_path: Path, more: tuple[str, ...]) -> None:
    words = (*COMMON, "args.log_sample=2", f"args.save={tmp_path / 'runs'}", *more)
    run_ranks(train_on_rank, 1, words, 7)
    run = only_run(tmp_path / "runs")
    for step in (2, 4):
        own = sorted((run / "samples" / str(step)).iterdir())
        again = sampled_again(run, tmp_path / str(step), step, "args.only_save_latents=true")
        assert [path.name for path in own] == [path.name for path in again] and len(own) == 2
        for first, second in zip(own, again):
            assert torch.equal(load_file(first)["latents"], load_file(second)["latents"])
    before, after = (load_file(run / "samples" / step / own[0].name)["latents"] for step in ("2", "4"))
    assert not torch.equal(before, after)  # it shows the weights of its step
    assert own[0].name.startswith("00000-a-") and own[0].name.endswith("seed7.safetensors")


@pytest.mark.slow
def test_videos_of_image_to_video(tmp_path: Path) -> None:
    """Also on two ranks at ZeRO stage 3, which share the samples; three of them, so that one rank has one more."""
    clips = write_clips(tmp_path / "clips")
    parts = write_parts(tmp_path)
    words = (*IMAGE_TO_VIDEO, *clip_words(clips), *COMMON, "args.log_sample=3", f"args.save={tmp_path / 'runs'}")
    vae = load_config([parts])["model"]["first_stage_config"]["params"]["ckpt_path"]
    words = (
        *words,
        f"model.first_stage_config={{target: {VAE['target']}, params: {VAE['params'] | {'ckpt_path': vae}}}}",
    )
    words = (*words, "deepspeed.zero_optimization.stage=3", "deepspeed.train_micro_batch_size_per_gpu=1")
    run_ranks(train_on_rank, 2, words, 7)
    run = only_run(tmp_path / "runs")
    again = sampled_again(run, tmp_path / "out", 4)
    own = sorted((run / "samples" / "4").iterdir())
    assert [path.name for path in own] == [path.name for path in again] and len(own) == 3
    for first, second in zip(own, again):
        assert np.array_equal(read_frames(first, range(9)), read_frames(second, range(9)))
    assert len({read_frames(path, range(9)).tobytes() for path in own}) == 3
    metadata = read_metadata(own[1])
    assert (metadata["seed"], metadata["index"], metadata["step"]) == ("7", "1", "4")
    lines = (run / "samples" / "prompts.txt").read_text().splitlines()
    assert lines[1] == f"{metadata['prompt']}@@{run / 'samples' / 'image-00001.png'}"


def test_videos_of_processes_that_share_clips(tmp_path: Path) -> None:
    """Both decode, one writes: nobody waits for the other."""
    vae = load_config([write_parts(tmp_path)])["model"]["first_stage_config"]["params"]["ckpt_path"]
    stage = f"model.first_stage_config={{target: {VAE['target']}, params: {VAE['params'] | {'ckpt_path': vae}}}}"
    words = (*COMMON, stage, "args.log_sample=2", "args.context_parallel_size=2", f"args.save={tmp_path / 'runs'}")
    run_ranks(train_on_rank, 2, words, 7)
    own = sorted((only_run(tmp_path / "runs") / "samples" / "4").iterdir())
    assert [path.suffix for path in own] == [".mp4", ".mp4"]


def test_training_does_not_notice(tmp_path: Path) -> None:
    for name, count in (("with", 2), ("without", 0)):
        run_ranks(train_on_rank, 1, (*COMMON, f"args.log_sample={count}", f"args.save={tmp_path / name}"), 7)
    first, second = (records(only_run(tmp_path / name)) for name in ("with", "without"))
    assert [record["loss"] for record in first] == [record["loss"] for record in second]


def test_it_needs_a_validation(tmp_path: Path) -> None:
    words = (*COMMON, "args.eval_interval=null", "args.log_sample=1", f"args.save={tmp_path}")
    with pytest.raises(
        AssertionError, match=r"args.log_sample samples the video model at each validation.*eval_interval"
    ):
        run_ranks(train_on_rank, 1, words, 7)
