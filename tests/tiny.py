"""The smoke-test configuration for tests, and short ways to run it."""

import json
from pathlib import Path
from typing import Any

from sat.config import ConfigNode, load_config

ROOT = Path(__file__).resolve().parent.parent
TINY = ROOT / "configs" / "tiny.yaml"
SMALLER = (
    "model.network_config.params.hidden_size=32",
    "model.network_config.params.num_attention_heads=2",
    "model.network_config.params.time_embed_dim=32",
    "model.network_config.params.modules.pos_embed_config.params.hidden_size_head=16",
    "data.params.height=4",
    "data.params.width=4",
    "model.network_config.params.latent_height=4",
    "model.network_config.params.latent_width=4",
    "args.eval_interval=null",
)
"""A network that takes milliseconds a step."""

_IMAGE_TO_VIDEO = (
    "model.network_config.params.in_channels=32",
    "model.noised_image_input=true",
    "model.noised_image_dropout=0.05",
)
_PATCHES_OVER_TIME = "model.network_config.params.patch_size=[2, 2, 2]"
FORMS = {
    "5B": (),
    "2B": (
        "model.network_config.params.modules.pos_embed_config="
        "{target: dit_video_concat.Basic3DPositionEmbeddingMixin, params: {text_length: 16}}",
    ),
    "5B-I2V": _IMAGE_TO_VIDEO,
    "1.5-5B": (_PATCHES_OVER_TIME,),
    "1.5-5B-I2V": (*_IMAGE_TO_VIDEO, _PATCHES_OVER_TIME, "model.network_config.params.ofs_embed_dim=32"),
}
"""What makes the configuration that of a released model."""

_VAE_HALF = {"z_channels": 16, "ch": 8, "ch_mult": [1, 2, 2, 4], "num_res_blocks": 1, "norm_groups": 4}
VAE = {
    "target": "vae_modules.autoencoder.VideoAutoencoderInferenceWrapper",
    "params": {
        "regularizer_config": {"target": "vae_modules.regularizers.DiagonalGaussianRegularizer"},
        "encoder_config": {"target": "vae_modules.cp_enc_dec.ContextParallelEncoder3D", "params": _VAE_HALF},
        "decoder_config": {"target": "vae_modules.cp_enc_dec.ContextParallelDecoder3D", "params": _VAE_HALF},
    },
}
"""A VAE that fits the network, 8x8x4 compression, without weights."""


def tiny_config(*overrides: str) -> ConfigNode:
    """configs/tiny.yaml with a smaller network and further `key=value` words."""
    return load_config([TINY], [*SMALLER, *overrides])


def only_run(folder: Path) -> Path:
    """The one run directory in a folder."""
    (run,) = (path for path in folder.iterdir() if path.is_dir())
    return run


def records(run: Path, kind: str = "train") -> list[dict[str, Any]]:
    """The metrics of a run."""
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [record for record in map(json.loads, lines) if record["kind"] == kind]


def train_on_rank(rank: int, overrides: tuple[str, ...], seed: int = 7) -> None:
    """A training run as one rank of a test's process group."""
    import deepspeed

    from sat.training.loop import train_joined

    deepspeed.utils.logger.setLevel("ERROR")
    train_joined(tiny_config(*overrides), seed)
