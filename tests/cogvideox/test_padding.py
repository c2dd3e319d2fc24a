"""Frames beyond a clip's own: put in front for the network, and no trace of them after sampling."""

from typing import Any

import pytest
import torch
from torch import Tensor

from sat.cogvideox.engine import VideoDiffusionEngine, build_engine
from sat.cogvideox.padding import drop_front, num_padding, pad_front
from sat.mpu.random import sample_normal
from tests.tiny import VAE, tiny_config

SHAPE = (16, 4, 4)
SEED = 3


def build(patch_frames: int = 2, **changes: Any) -> VideoDiffusionEngine:
    torch.manual_seed(0)
    section = tiny_config(f"model.network_config.params.patch_size=[{patch_frames}, 2, 2]")["model"]
    section.update({"latent_input": False, **changes})
    engine = build_engine(section).eval()
    with torch.no_grad():
        for parameter in engine.network.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return engine


def batch_of(counters: list[int], num_frames: int) -> dict[str, Any]:
    latents = sample_normal(1, "latents", counters, (num_frames, *SHAPE))
    return {"latents": latents, "caption": ["a clip"] * len(counters), "counters": torch.tensor(counters)}


@pytest.mark.parametrize("num_frames, patch, count", [(21, 2, 1), (22, 2, 0), (1, 2, 1), (13, 1, 0), (4, 3, 2)])
def test_padding_completes_the_last_patch(num_frames: int, patch: int, count: int) -> None:
    clips = torch.randn(2, num_frames, 3, 4, 5)
    padded = pad_front(clips, patch)
    assert num_padding(num_frames, patch) == count and padded.shape[1] == num_frames + count
    assert torch.equal(padded[:, count:], clips) and torch.equal(drop_front(padded, num_frames), clips)
    assert all(torch.equal(padded[:, place], clips[:, 0]) for place in range(count))
    rows = pad_front(list(clips), patch)
    assert all(torch.equal(row, whole) for row, whole in zip(rows, padded))


@pytest.mark.parametrize("num_frames", [3, 4])
def test_training_takes_any_number_of_frames(num_frames: int) -> None:
    engine, batch = build(), batch_of([5, 8], num_frames)
    inputs = engine.training_inputs(batch, SEED, 4)
    assert isinstance(inputs.latents, Tensor) and isinstance(inputs.noise, Tensor)
    assert inputs.latents.shape == inputs.noise.shape == (2, 4, *SHAPE)
    assert torch.equal(inputs.latents[:, 4 - num_frames :], batch["latents"])
    if num_frames == 3:
        assert torch.equal(inputs.latents[:, 0], inputs.latents[:, 1])
        assert not torch.equal(inputs.noise[:, 0], inputs.noise[:, 1])
    loss = engine.loss_fn(engine.model, engine.denoiser, inputs.latents, inputs.cond, inputs.timesteps, inputs.noise)
    assert loss.isfinite().all()


def test_samples_have_the_frames_that_were_asked_for() -> None:
    engine = build()
    odd = engine.sample(["a clip"], [0], SEED, (3, *SHAPE))
    whole = engine.sample(["a clip"], [0], SEED, (4, *SHAPE))
    assert odd.shape == (1, 3, *SHAPE) and whole.shape == (1, 4, *SHAPE)
    assert torch.equal(odd, whole[:, 1:])  # the network sees four frames either way


def test_given_noise_has_the_padded_shape() -> None:
    engine = build()
    assert engine.padded_shape((3, *SHAPE)) == (4, *SHAPE)
    noise = sample_normal(SEED, "sample", [0], (4, *SHAPE))[0]
    given = engine.sample(["a clip"], [0], SEED, (3, *SHAPE), initial_noise=noise)
    assert torch.equal(given, engine.sample(["a clip"], [0], SEED, (3, *SHAPE)))


def test_a_prefix_stands_behind_the_padding() -> None:
    engine = build()
    engine.sampler.fixed_frames = 3
    prefix = torch.randn(2, *SHAPE)
    latents = engine.sample(["a clip"], [0], SEED, (3, *SHAPE), prefix=prefix)
    assert torch.equal(latents[0, :2], prefix)
    assert not torch.equal(latents[0, 2], prefix[1])


@pytest.mark.parametrize(
    ("patch_frames", "preset", "num_latents", "frames"),
    [(2, None, 3, 9), (2, None, 4, 13), (2, "main_shipped", 3, 12), (1, None, 3, 9), (1, None, 4, 13), (1, None, 2, 5)],
)
def test_every_latent_is_decoded(patch_frames: int, preset: str | None, num_latents: int, frames: int) -> None:
    vae = {**VAE, "params": {**VAE["params"], "decode_preset": preset}}
    engine = build(patch_frames, first_stage_config=vae)
    latents = torch.randn(1, num_latents, *SHAPE)
    pixels = torch.cat(list(engine.decode_first_stage(latents)), dim=1)
    assert pixels.shape == (1, frames, 3, 32, 32)
    if patch_frames == 2 and num_latents > 2:  # as the released script, which is given the padding too
        released = preset or "main_intended"
        padded = torch.cat([torch.randn(1, 1, *SHAPE), latents], dim=1)
        assert torch.equal(pixels, engine.first_stage_model.decode_chunked(padded, released))
