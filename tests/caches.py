"""A small model with both encoders in files, and clips for it, for tests of the caches."""

import json
from pathlib import Path
from typing import Any

import torch

from sat.config import instantiate_from_config
from tests.image_to_video import clip_words, write_clips
from tests.tiny import VAE
from tools.make_tiny_t5 import make

T5_TARGET = "sgm.modules.encoders.modules.FrozenT5Embedder"


def write_vae(path: Path, seed: int = 0) -> Path:
    """Random weights of tests.tiny's VAE in a file."""
    torch.manual_seed(seed)
    torch.save({"state_dict": instantiate_from_config(VAE).state_dict()}, path)
    return path


def vae_word(weights: Path) -> str:
    """The section of a VAE with such weights."""
    section: dict[str, Any] = {**VAE, "params": {**VAE["params"], "ckpt_path": str(weights)}}
    return f"model.first_stage_config={json.dumps(section)}"


def model_words(folder: Path) -> tuple[str, ...]:
    """What makes configs/tiny.yaml a model with a VAE and a T5 that are written to a folder."""
    make(["a red disc moving right", "a blue square moving right"], folder / "t5")
    entry = f"{{target: {T5_TARGET}, ucg_rate: 0.3, params: {{model_dir: {folder / 't5'}, max_length: 16}}}}"
    return (
        vae_word(write_vae(folder / "vae.pt")),
        f"model.conditioner_config.params.emb_models=[{entry}]",
        "model.network_config.params.modules.patch_embed_config.params.text_hidden_size=64",
        "model.en_and_decode_n_samples_a_time=1",
        "model.scale_factor=0.7",
        "args.global_batch_size=4",
        "args.train_iters=3",
    )


def data_words(folder: Path, count: int = 4, num_frames: int = 9) -> tuple[str, ...]:
    """Clips in a new folder, and what makes a run read them."""
    return clip_words(write_clips(folder, count, num_frames))
