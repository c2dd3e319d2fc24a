"""Training an image-to-video model from text-to-video weights: it starts with their loss."""

from pathlib import Path

import pytest
import torch

from sat.errors import ConfigError
from sat.training.args import train_args
from sat.training.checkpoint import load_weights
from tests.image_to_video import IMAGE_TO_VIDEO
from tests.ranks import run_ranks
from tests.tiny import only_run, records, tiny_config, train_on_rank

COMMON = ("args.global_batch_size=4", "model.scale_factor=0.7")
AT_REST = ("args.mode=finetune", "args.train_iters=2", "deepspeed.optimizer.params.lr=0")
PATCHES = "model.diffusion_model.mixins.patch_embed.proj.weight"


@pytest.mark.parametrize("more", [(), ("args.model_parallel_size=2",)], ids=["one rank", "tp 2"])
def test_the_loss_goes_on(tmp_path: Path, more: tuple[str, ...]) -> None:
    run_ranks(train_on_rank, 1, (*COMMON, "args.train_iters=3", f"args.save={tmp_path / 'text'}"))
    text = only_run(tmp_path / "text")
    load = f"args.load={text}"
    run_ranks(train_on_rank, 1, (*COMMON, *AT_REST, load, f"args.save={tmp_path / 'again'}"))
    words = (
        *COMMON,
        *IMAGE_TO_VIDEO,
        *AT_REST,
        load,
        "args.from_text_to_video=true",
        f"args.save={tmp_path / 'image'}",
    )
    run_ranks(train_on_rank, 1 + len(more), (*words, *more))
    own, expected = (records(only_run(tmp_path / name)) for name in ("image", "again"))
    assert [one["loss"] for one in own] == pytest.approx([one["loss"] for one in expected], rel=1e-5)
    kernel = load_weights(only_run(tmp_path / "image"))[PATCHES]
    assert torch.equal(kernel[:, :64], load_weights(text)[PATCHES]) and not kernel[:, 64:].any()
    run = only_run(tmp_path / "image")
    run_ranks(train_on_rank, 1 + len(more), (*words, *more, "args.train_iters=3", f"args.resume={run}"))
    assert [one["step"] for one in records(run)] == [1, 2, 3]


def test_it_is_for_new_runs() -> None:
    with pytest.raises(ConfigError, match=r"args.from_text_to_video needs the weights to start from"):
        train_args(tiny_config("args.from_text_to_video=true", "args.mode=finetune"))
