"""The folders load in diffusers' pipelines as they are and give our sampler's latents."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    CogVideoXDDIMScheduler,
    CogVideoXDPMScheduler,
    CogVideoXImageToVideoPipeline,
    CogVideoXPipeline,
)
from torch import Tensor

from sat.cogvideox.engine import VideoDiffusionEngine, build_engine
from sat.config import load_config
from sat.sampling.like import overrides_like
from tests.convert.tiny import LATENTS, PROMPTS, SCALE, SGM, STEPS, TEXT_LENGTH, Tree

TOLERANCE = 3e-5
"""Absolute, on latents of up to 6. Measured worst: 6.7e-6."""
SAMPLERS = {"DDIM": "VideoDDIMSampler", "DPM": "VPSDEDPMPP2MSampler"}
SCHEDULERS = {"DDIM": CogVideoXDDIMScheduler, "DPM": CogVideoXDPMScheduler}

Trees = Callable[[str], Tree]
Folders = Callable[[str], Path]


def engine_of(tree: Tree, solver: str, is_dynamic: bool, *more: str) -> VideoDiffusionEngine:
    """Ours on a tree, as diffusers samples it."""
    words, _ = overrides_like(load_config([tree.yaml]), "diffusers")
    guider = "model.sampler_config.params.guider_config"
    if is_dynamic:  # `--like` takes the pipeline's default, which is constant
        words = [word for word in words if not word.startswith(guider)]
    words.append(f"model.sampler_config.target={SGM}.sampling.{SAMPLERS[solver]}")
    engine = build_engine(load_config([tree.yaml], [*words, *more])["model"])
    engine.network.load_state_dict(tree.state)
    return engine.eval()


class TheirNoise:
    """Noise in the order in which diffusers' DPM scheduler draws it: each step draws, and after the first twice."""

    def __init__(self, generator: torch.Generator) -> None:
        self.generator = generator

    def __call__(self, kind: str, step: int, like: Tensor) -> Tensor:
        if step > 0:
            torch.randn(like.shape, generator=self.generator)
        return torch.randn(like.shape, generator=self.generator)


def our_latents(
    engine: VideoDiffusionEngine, noise: Tensor, generator: torch.Generator, images: Tensor | None = None
) -> Tensor:
    cond = engine._conditions([PROMPTS[0]], noise, images)
    uncond = engine.conditioner.unconditional_like(cond)
    source = TheirNoise(generator)
    with torch.no_grad():
        return engine._sampler()(engine.denoise, noise, cond, uncond, source, **engine._constant_inputs())


def their_latents(pipeline: Any, noise: Tensor, generator: torch.Generator, is_dynamic: bool, **more: Any) -> Tensor:
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(
        prompt=PROMPTS[0],
        negative_prompt="",
        height=48,
        width=64,
        num_frames=13,
        num_inference_steps=STEPS,
        guidance_scale=SCALE,
        use_dynamic_cfg=is_dynamic,
        latents=noise,
        generator=generator,
        output_type="latent",
        return_dict=False,
        max_sequence_length=TEXT_LENGTH,
        **more,
    )[0]


def noise_for(form: str) -> Tensor:
    return torch.randn(1, *LATENTS, generator=torch.Generator().manual_seed(len(form)))


@pytest.mark.parametrize("is_dynamic", [False, True], ids=["constant", "dynamic"])
@pytest.mark.parametrize("solver", SAMPLERS)
@pytest.mark.parametrize("form", ["2B", "5B", "1.5-5B"])
def test_a_text_to_video_folder_gives_our_latents(
    tree: Trees, folder: Folders, form: str, solver: str, is_dynamic: bool
) -> None:
    pipeline = CogVideoXPipeline.from_pretrained(folder(form))
    pipeline.scheduler = SCHEDULERS[solver].from_config(pipeline.scheduler.config)
    noise = noise_for(form)
    expected = their_latents(pipeline, noise, torch.Generator().manual_seed(3), is_dynamic)
    got = our_latents(engine_of(tree(form), solver, is_dynamic), noise, torch.Generator().manual_seed(3))
    torch.testing.assert_close(got, expected, rtol=0.0, atol=TOLERANCE)


@pytest.mark.parametrize("is_dynamic", [False, True], ids=["constant", "dynamic"])
@pytest.mark.parametrize("solver", SAMPLERS)
@pytest.mark.parametrize("form", ["5B-I2V", "1.5-5B-I2V"])
def test_an_image_to_video_folder_gives_our_latents(
    tree: Trees, folder: Folders, form: str, solver: str, is_dynamic: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Theirs draws the image's latent from the VAE's posterior; ours takes its mean.
    name = "diffusers.pipelines.cogvideo.pipeline_cogvideox_image2video.retrieve_latents"
    monkeypatch.setattr(name, lambda output, generator: output.latent_dist.mode())
    pipeline = CogVideoXImageToVideoPipeline.from_pretrained(folder(form))
    pipeline.scheduler = SCHEDULERS[solver].from_config(pipeline.scheduler.config)
    image = torch.rand(1, 3, 48, 64, generator=torch.Generator().manual_seed(4))
    noise = noise_for(form)
    expected = their_latents(pipeline, noise, torch.Generator().manual_seed(3), is_dynamic, image=image)
    # 1.5: SAT's sampling leaves the image's latents as they are, diffusers divides them.
    words = ["model.image_scaling=divide"] if form == "1.5-5B-I2V" else []
    engine = engine_of(tree(form), solver, is_dynamic, *words)
    pixels = (image * 2.0 - 1.0).unsqueeze(1)  # b 1 3 H W
    got = our_latents(engine, noise, torch.Generator().manual_seed(3), pixels)
    torch.testing.assert_close(got, expected, rtol=0.0, atol=TOLERANCE)
