"""Reuse of layers on ranks that share a sample: all skip the same passes, those that one process skips."""

from pathlib import Path

import numpy as np
import pytest
import torch

from sat.cogvideox.engine import TrainedParts, build_engine
from sat.config import dump_config, load_config
from sat.mpu.launch import read_launch
from sat.mpu.recorder import Recorder
from sat.sampling.args import sample_args
from sat.sampling.prompts import parse_prompt
from sat.sampling.run import SamplingRun
from tests.ranks import run_ranks
from tests.tiny import tiny_config

SIZES = (
    "model.network_config.params.hidden_size=48",
    "model.network_config.params.num_attention_heads=3",
    "model.network_config.params.num_layers=3",
)
LAYOUTS = {
    "TP2": (2, ("args.model_parallel_size=2",)),
    "Ulysses2": (2, ("args.context_parallel_size=2", "args.context_parallel_mode=ulysses")),
    "guidance": (2, ("args.guidance_parallel=true",)),
    "TP2+SP": (2, ("args.model_parallel_size=2", "args.sequence_parallel=true")),
    "Ring3": (3, ("args.context_parallel_size=3", "args.context_parallel_mode=ring")),  # 28 tokens: with padding
}
SLOW = ("TP2+SP", "Ring3")
PROMPTS = ("a small blob moving left", "a large blob moving up")
TOLERANCE = 5e-5
"""On latents of up to 5. Measured worst: 8e-6; of the changes and errors 2e-7 of their size."""


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory as training leaves it, every weight random."""
    folder = tmp_path_factory.mktemp("run")
    config = tiny_config(*SIZES)
    torch.manual_seed(1)
    parts = TrainedParts(build_engine(config["model"]))
    module = {name: value + 0.05 * torch.randn_like(value) for name, value in parts.state_dict().items()}
    (folder / "1").mkdir()
    torch.save({"module": module}, folder / "1" / "mp_rank_00_model_states.pt")
    (folder / "latest").write_text("1")
    (folder / "training_config.yaml").write_text(dump_config(config))
    return folder


Reused = tuple[np.ndarray, list[bool], list[float], list[float]]


def sample_on_rank(rank: int, run: Path, out: Path, words: tuple[str, ...]) -> Reused:
    """Latents, and of each pass whether it was reused, the change and the error."""
    options = (f"args.load={run}", f"args.output_dir={out}", "args.only_save_latents=true", *words)
    config = load_config([run / "training_config.yaml"], ["args.reuse_threshold=0.52", *options])
    sampling = SamplingRun(config, sample_args(config), 7, Recorder(read_launch()))
    prompts = [parse_prompt(text, False) for text in PROMPTS]
    latents = sampling._sample_batch([0, 1], prompts, "")
    reuse = sampling.engine.reuse
    assert reuse is not None
    reused = [one.is_reused for one in reuse.passes]
    changes, errors = ([getattr(one, name) or 0.0 for one in reuse.passes] for name in ("change", "error"))
    return latents.numpy(), reused, changes, errors


@pytest.fixture(scope="module")
def alone(run_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Reused:
    return run_ranks(sample_on_rank, 1, run_dir, tmp_path_factory.mktemp("one"), ())[0]


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in LAYOUTS]
)
def test_all_ranks_skip_what_one_process_skips(run_dir: Path, alone: Reused, tmp_path: Path, name: str) -> None:
    world, words = LAYOUTS[name]
    latents, is_reused, changes, errors = alone
    assert set(is_reused) == {False, True}
    for own in run_ranks(sample_on_rank, world, run_dir, tmp_path, words):
        np.testing.assert_allclose(own[0], latents, rtol=0.0, atol=TOLERANCE)
        assert own[1] == is_reused
        assert own[2] == pytest.approx(changes, rel=1e-5)
        assert own[3] == pytest.approx(errors, rel=1e-5)
