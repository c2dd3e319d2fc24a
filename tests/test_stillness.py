"""Stillness, from the command line alone: a step at a learning rate of 0 leaves every video as it was, bit for bit."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

from sat.data.video import read_frames
from sat.sampling.cli import main as sample_video
from sat.training.checkpoint import load_weights
from tests.image_to_video import IMAGE_TO_VIDEO, clip_words, write_clips
from tests.sampling.conftest import log_as_it_was, train, write_parts  # noqa: F401 (a fixture)
from tests.tiny import SMALLER, TINY, only_run

LORA = (
    "model.network_config.params.modules.lora_config="
    "{target: sat.model.finetune.lora2.LoraMixin, params: {r: 4, lora_alpha: 4, targets: [qkv, dense, mlp]}}",
    "model.not_trainable_prefixes=[all]",
)
AT_REST = ("args.mode=finetune", "args.train_iters=1", "deepspeed.optimizer.params.lr=0")


class Bench:
    """One kind of model: how it is trained and what it is asked for."""

    def __init__(self, folder: Path, takes_image: bool) -> None:
        self.folder = folder
        clips = write_clips(folder / "clips")
        self.words = ("--base", TINY, write_parts(folder), *SMALLER, *clip_words(clips), "args.auto_warmup_steps=0")
        self.words = (*self.words, *(IMAGE_TO_VIDEO if takes_image else ()))
        self.prompt = "a red disc moving right" + (f"@@{clips / 'videos' / '0.mp4'}" if takes_image else "")
        # The weights of a fresh network, trained for two steps.
        self.base = self.train("base", "args.train_iters=2")

    def train(self, name: str, *more: str) -> Path:
        train(*self.words, f"args.save={self.folder / name}", "args.eval_interval=null", "args.num_workers=0", *more)
        return only_run(self.folder / name)

    def sample(self, name: str, *words: object) -> np.ndarray:
        """The frames of the video."""
        out = self.folder / f"out-{name}"
        sample_video([*map(str, words), "--prompt", self.prompt, "--seed", "7", f"args.output_dir={out}"])
        (video,) = out.glob("*.mp4")
        return read_frames(video, range(9))


@pytest.fixture(scope="module", params=["text", "image"])
def bench(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp(request.param), request.param == "image")


@pytest.fixture(scope="module")
def before(bench: Bench) -> np.ndarray:
    return bench.sample("before", "--load", bench.base)


def test_training_the_whole_model(bench: Bench, before: np.ndarray) -> None:
    after = bench.train("whole", *AT_REST, f"args.load={bench.base}")
    own, weights = load_weights(after), load_weights(bench.base)
    assert own.keys() == weights.keys() and all(torch.equal(own[name], weights[name]) for name in weights)
    assert np.array_equal(bench.sample("whole", "--load", after), before)


def test_training_adapters(bench: Bench, before: np.ndarray) -> None:
    after = bench.train("lora", *AT_REST, *LORA, f"args.load={bench.base}")
    assert np.array_equal(bench.sample("lora", "--load", after), before)  # the whole model with its adapters
    with safe_open(after / "1" / "lora.safetensors", framework="pt") as reader:
        assert (reader.metadata()["rank"], reader.metadata()["alpha"]) == ("4", "4.0")
        assert not any(reader.get_tensor(name).any() for name in reader.keys() if "matrix_B" in name)  # noqa: SIM118
    assert np.array_equal(bench.sample("adapters", "--load", bench.base, "--lora", after), before)


@pytest.mark.slow
def test_a_step_at_another_rate_is_seen(bench: Bench, before: np.ndarray) -> None:
    """The control: the comparison can fail."""
    moved = bench.train("moved", *AT_REST[:2], f"args.load={bench.base}")
    assert not np.array_equal(bench.sample("moved", "--load", moved), before)
