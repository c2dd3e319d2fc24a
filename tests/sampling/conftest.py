"""A run directory as training leaves it, with the VAE and the text encoder that its configuration names."""

import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from sat.config import ConfigNode, instantiate_from_config, load_config
from sat.data.synthetic import DIRECTIONS, SIZES
from sat.training.cli import main
from sat.vae import save_vae_state
from tests.ranks import run_processes
from tests.tiny import ROOT, SMALLER, TINY, VAE, only_run
from tools.make_tiny_t5 import make

CAPTIONS = [f"a {size} blob moving {direction}" for size in SIZES for direction in DIRECTIONS]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


@dataclass(frozen=True)
class Trained:
    """What sampling starts from."""

    run: Path
    """The run directory, with the iterations 2 and 4."""
    parts: Path
    """The configuration of its encoders."""

    def config(self, *overrides: str) -> ConfigNode:
        """The configuration of the run, with further `key=value` words."""
        return load_config([self.run / "training_config.yaml"], [f"args.load={self.run}", *overrides])


def command(*words: object, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run Python from the project's root, as a user would."""
    return subprocess.run(
        [sys.executable, *map(str, words)],
        cwd=ROOT,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=120,
        **options,
    )


def train(*words: object) -> None:
    """Run train_video.py's command line to its end, in a process that has torch and DeepSpeed loaded."""
    run_processes(main, [ENVIRONMENT], [str(word) for word in words])


def write_parts(folder: Path) -> Path:
    """A T5, a VAE of random weights, and the configuration that names them, laid over configs/tiny.yaml."""
    make(CAPTIONS, folder / "t5")
    torch.manual_seed(0)
    save_vae_state(instantiate_from_config(VAE).state_dict(), folder / "3d-vae.pt")
    embedder = {
        "input_key": "txt",
        "ucg_rate": 0.1,
        "target": "sgm.modules.encoders.modules.FrozenT5Embedder",
        "params": {"model_dir": str(folder / "t5"), "max_length": 16},
    }
    steps = {"num_steps": 5, "guider_config": {"params": {"num_steps": 5}}}
    model = {
        "network_config": {"params": {"modules": {"patch_embed_config": {"params": {"text_hidden_size": 64}}}}},
        "conditioner_config": {"params": {"emb_models": [embedder]}},
        "first_stage_config": {**VAE, "params": {**VAE["params"], "ckpt_path": str(folder / "3d-vae.pt")}},
        "sampler_config": {"params": steps},
    }
    parts = folder / "parts.yaml"
    parts.write_text(yaml.safe_dump({"model": model}), encoding="utf-8")
    return parts


@pytest.fixture(autouse=True)
def log_as_it_was() -> Iterator[None]:
    """A run in the test's own process sends the log to that test's stderr; the next test finds it as it was."""
    logger = logging.getLogger("sat")
    handlers, level, propagate = logger.handlers[:], logger.level, logger.propagate
    yield
    logger.handlers[:], logger.propagate = handlers, propagate
    logger.setLevel(level)


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    folder = tmp_path_factory.mktemp("trained")
    parts = write_parts(folder)
    options = ("args.train_iters=4", "args.save_interval=2", f"args.save={folder / 'runs'}")
    train("--base", TINY, parts, *SMALLER, *options)
    return Trained(only_run(folder / "runs"), parts)
