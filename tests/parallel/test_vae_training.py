"""Training runs on clips that processes share, of the VAE and of a transformer on top of one, against one process."""

from pathlib import Path
from typing import Any

import pytest
import torch

from sat.config import load_config
from sat.data.synthetic import SyntheticLatents
from sat.training.checkpoint import load_weights
from tests import tiny
from tests.parallel.layouts import Layout
from tests.ranks import run_ranks
from tests.tiny import ROOT, only_run, records

STEPS = 4
SIZE = "{z_channels: 4, ch: 8, ch_mult: [1, 2, 2, 4], num_res_blocks: 1, norm_groups: 4}"
COMMON = (
    "deepspeed.optimizer={type: AdamW, params: {lr: 1e-3, betas: [0.9, 0.95]}}",  # which takes every stage of ZeRO
    f"args.train_iters={STEPS}",
    f"args.save_interval={STEPS}",
    "args.global_batch_size=2",
    "args.eval_interval=2",
    "args.eval_iters=1",
    "args.eval_batch_size=2",
    "args.num_workers=0",
    f"model.params.encoder_config.params={SIZE}",
    f"model.params.decoder_config.params={SIZE}",
    "deepspeed.optimizer={type: SGD, params: {lr: 0.05}}",  # Adam would amplify the rounding of small gradients
    "data={target: tests.parallel.test_vae_training.Clips, params: {num_frames: 13}}",
)
RTOL = 1e-5
WEIGHT_ATOL = 1e-6

LAYOUTS = {"CP2": Layout(cp=2), "CP3": Layout(cp=3), "DP2xCP2": Layout(dp=2, cp=2)}
"""Four latents on two and three processes."""


class Clips(SyntheticLatents):
    """Blobs as pixels of 16 x 16."""

    def __init__(self, num_frames: int, data_dir: Any = None) -> None:
        super().__init__(num_samples=8, num_frames=num_frames, channels=3, height=16, width=16)

    def __getitem__(self, index: int) -> dict[str, Any]:
        item = super().__getitem__(index)
        return {**item, "pixels": item.pop("latents").tanh()}


def train_on_rank(rank: int, overrides: tuple[str, ...]) -> None:
    import deepspeed

    from sat.training.loop import train_joined

    deepspeed.utils.logger.setLevel("ERROR")
    train_joined(load_config([ROOT / "configs" / "demo_vae.yaml"], overrides), seed=7)


def train(folder: Path, layout: Layout, stage: int, *more: str) -> Path:
    options = (
        *COMMON,
        f"args.save={folder}",
        f"args.context_parallel_size={layout.cp}",
        f"deepspeed.train_micro_batch_size_per_gpu={2 // layout.dp}",
        f"deepspeed.zero_optimization.stage={stage}",
        *more,
    )
    run_ranks(train_on_rank, layout.world, options)
    return only_run(folder)


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tmp_path_factory.mktemp("reference"), Layout(), stage=1)


def cases() -> list[Any]:
    """All layouts at all stages of ZeRO; one by default, the rest slow."""
    return [
        pytest.param(name, stage, marks=() if (name, stage) == ("CP2", 2) else pytest.mark.slow)
        for name in LAYOUTS
        for stage in (0, 1, 2, 3)
    ]


@pytest.mark.parametrize(("name", "stage"), cases())
def test_losses_and_weights_are_those_of_one_process(reference: Path, tmp_path: Path, name: str, stage: int) -> None:
    run = train(tmp_path, LAYOUTS[name], stage)
    for kind, keys in (("train", ("loss", "l1", "kl", "grad_norm", "tokens")), ("valid", ("loss", "psnr"))):
        for key in keys:
            expected, got = (
                torch.tensor([float(record[key]) for record in records(one, kind)]) for one in (reference, run)
            )
            assert len(got) == (STEPS if kind == "train" else STEPS // 2)
            torch.testing.assert_close(got, expected, rtol=RTOL, atol=0.0, msg=lambda text, key=key: f"{key}: {text}")
    expected_weights, weights = load_weights(reference), load_weights(run)
    assert weights.keys() == expected_weights.keys()
    for key, value in expected_weights.items():
        torch.testing.assert_close(weights[key], value, rtol=0.0, atol=WEIGHT_ATOL)


# --- a transformer on top of a frozen VAE ----------------------------------------------------------------------------

VAE = f"""{{target: vae_modules.autoencoder.VideoAutoencoderInferenceWrapper, params: {{cp_size: 1,
  regularizer_config: {{target: vae_modules.regularizers.DiagonalGaussianRegularizer}},
  encoder_config: {{target: vae_modules.cp_enc_dec.ContextParallelEncoder3D, params: {SIZE}}},
  decoder_config: {{target: vae_modules.cp_enc_dec.ContextParallelDecoder3D, params: {SIZE}}}}}}}"""
TRANSFORMER = (
    "args.train_iters=2",
    "args.global_batch_size=2",
    "model.latent_input=false",
    f"model.first_stage_config={VAE}",
    "model.network_config.params.in_channels=4",
    "model.network_config.params.out_channels=4",
    "model.network_config.params.num_frames=13",
    "model.network_config.params.latent_height=2",
    "model.network_config.params.latent_width=2",
    "data={target: tests.parallel.test_vae_training.Clips, params: {num_frames: 13}}",
)


def train_transformer(folder: Path, layout: Layout) -> Path:
    micro = f"deepspeed.train_micro_batch_size_per_gpu={2 // layout.dp}"
    cp = f"args.context_parallel_size={layout.cp}"
    run_ranks(tiny.train_on_rank, layout.world, (*TRANSFORMER, micro, cp, f"args.save={folder}"))
    return only_run(folder)


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYOUTS)
def test_a_transformer_trained_on_pixels(tmp_path: Path, name: str) -> None:
    runs = [train_transformer(tmp_path / one, layout) for one, layout in (("alone", Layout()), (name, LAYOUTS[name]))]
    expected, got = (torch.tensor([record["loss"] for record in records(run)]) for run in runs)
    torch.testing.assert_close(got, expected, rtol=RTOL, atol=0.0)
