"""The image as a condition: its noise, its place, its scale, and that all of it belongs to the sample."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from sat.cogvideox.engine import VideoDiffusionEngine, build_engine
from sat.conditioning.image import (
    IMAGE_SCALINGS,
    ImageConditioner,
    add_image_noise,
    released_image_scaling,
    scale_image_latents,
    spread_over_clip,
)
from sat.errors import ConfigError
from sat.mpu.random import sample_normal
from tests.tiny import VAE, tiny_config

SHAPE = (3, 16, 4, 4)
SEED = 5
SCALE = 0.7


def build(*overrides: str, **changes: Any) -> VideoDiffusionEngine:
    """A tiny image-to-video engine."""
    torch.manual_seed(0)
    section = tiny_config("model.network_config.params.in_channels=32", *overrides)["model"]
    own = {"latent_input": False, "noised_image_input": True, "scale_factor": SCALE, "first_stage_config": VAE}
    section.update({**own, **changes})
    engine = build_engine(section).eval()
    with torch.no_grad():
        for parameter in engine.network.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return engine


def batch_of(counters: list[int]) -> dict[str, Any]:
    pixels = sample_normal(1, "pixels", counters, (9, 3, 32, 32)).tanh()
    return {"pixels": pixels, "caption": ["a clip"] * len(counters), "counters": torch.tensor(counters)}


def concat(engine: VideoDiffusionEngine, batch: dict[str, Any]) -> Any:
    return engine.training_inputs(batch, SEED, 4).cond["concat"]


# --- the parts -------------------------------------------------------------------------------------------------------


def test_noise_is_that_of_the_paper() -> None:
    """sigma = exp(N(-3, 0.5²)): median 0.05, 95 % in 0.019 .. 0.133 of images in [-1, 1]."""
    counters = range(4000)
    log_sigmas = sample_normal(SEED, "image sigma", counters, ())
    noise = sample_normal(SEED, "image noise", counters, (1, 1, 2, 2))
    images = torch.full((4000, 1, 1, 2, 2), 0.25)
    sigmas = ((add_image_noise(images, log_sigmas, noise) - images) / noise)[:, 0, 0, 0, 0].sort().values
    assert sigmas[2000].item() == pytest.approx(math.exp(-3), rel=0.03)
    assert sigmas[100].item() == pytest.approx(0.0187, rel=0.06) and sigmas[3900].item() == pytest.approx(
        0.1326, rel=0.06
    )


def test_an_image_stands_at_the_first_frame_or_at_all() -> None:
    image = torch.randn(1, 2, 3, 4)
    first = spread_over_clip(image, 4)
    assert torch.equal(first[:1], image) and not first[1:].any() and first.shape == (4, 2, 3, 4)
    assert torch.equal(spread_over_clip(image, 4, everywhere=True), image.repeat(4, 1, 1, 1))
    assert torch.equal(spread_over_clip(image, 1), image)


def test_each_scaling_says_what_it_does() -> None:
    latents = torch.randn(1, 2, 3, 4)
    assert torch.equal(scale_image_latents(latents, 0.7, "multiply"), latents * 0.7)
    assert torch.equal(scale_image_latents(latents, 0.7, "none"), latents)
    assert torch.equal(scale_image_latents(latents, 0.7, "divide"), latents / 0.7)
    assert (released_image_scaling(1), released_image_scaling(2)) == ("multiply", "none")


# --- training --------------------------------------------------------------------------------------------------------


def test_the_condition_is_the_first_frame_with_noise_on_it() -> None:
    engine, batch = build(), batch_of([3])
    condition = concat(engine, batch)
    assert condition.shape == (1, *SHAPE) and not condition[0, 1:].any()
    sigma = math.exp(-3 + 0.5 * sample_normal(SEED, "image sigma", [3], ()).item())
    noisy = batch["pixels"][:, :1] + sigma * sample_normal(SEED, "image noise", [3], (1, 3, 32, 32))
    posterior = sample_normal(SEED, "image posterior", [3], (1, 16, 4, 4))
    expected = SCALE * engine.first_stage_model.encode(noisy, noise=posterior)
    assert_close(condition[:, :1], expected, rtol=0.0, atol=1e-5)
    clean = SCALE * engine.first_stage_model.encode(batch["pixels"][:, :1], noise=posterior)
    assert (condition[:, :1] - clean).abs().max() > 1e-4


def test_the_condition_shows_the_image_and_no_other() -> None:
    """The condition must go with the image: of several clips it is most like its own first frame."""
    engine = build(noised_image_dropout=0.0)
    with torch.no_grad():
        engine.first_stage_model.encoder.conv_out.conv.bias[16:] -= 10.0  # a posterior as narrow as a trained VAE's
    batch = batch_of(list(range(6)))
    conditions = concat(engine, batch)[:, 0].flatten(1)
    own = engine.first_stage_model.encode(batch["pixels"][:, :1])[:, 0].flatten(1)
    matches = torch.corrcoef(torch.cat([conditions - conditions.mean(0), own - own.mean(0)]))[:6, 6:]
    assert matches.argmax(dim=1).tolist() == list(range(6))
    assert matches.diagonal().min() > 0.9  # measured 0.97


def test_it_is_the_same_however_samples_are_batched() -> None:
    engine = build(noised_image_dropout=0.3)
    whole = concat(engine, batch_of([4, 5, 6, 7]))
    parts = torch.cat([concat(engine, batch_of(counters)) for counters in ([4], [5, 6], [7])])
    assert_close(parts, whole, rtol=0.0, atol=1e-6)


def test_images_are_left_out_one_by_one_at_their_rate() -> None:
    conditioner = ImageConditioner(scale_factor=1.0, scaling="multiply", drop_rate=0.05)
    counters = list(range(4000))
    latents = torch.ones(4000, 2, 1, 1, 1)
    conditions = conditioner.of_batch(None, {}, latents, SEED, "", counters, is_training=True)
    assert isinstance(conditions, Tensor)
    dropped = (conditions == 0).flatten(1).all(dim=1)
    assert dropped.double().mean().item() == pytest.approx(0.05, abs=0.012)  # the standard error is 0.0034
    batches = dropped.view(-1, 8)
    assert (batches.any(dim=1) & ~batches.all(dim=1)).sum() > 100  # not whole batches, as in the released code
    kept = conditioner.of_batch(None, {}, latents, SEED, "", counters, is_training=False)
    assert isinstance(kept, Tensor) and kept[:, 0].all()


def test_validation_shows_the_image_as_it_is() -> None:
    engine, batch = build(noised_image_dropout=1.0), batch_of([0, 1])
    assert not concat(engine, batch).any()
    condition = engine.validation_inputs(batch, 300, SEED).cond["concat"]
    posterior = sample_normal(SEED, "valid 300 image posterior", [0, 1], (1, 16, 4, 4))
    expected = SCALE * engine.first_stage_model.encode(batch["pixels"][:, :1], noise=posterior)
    assert_close(condition[:, :1], expected, rtol=0.0, atol=1e-5)


@pytest.mark.parametrize("scaling", IMAGE_SCALINGS)
def test_training_and_sampling_scale_alike(scaling: str) -> None:
    """Without noise the condition of training is that of sampling, for each rule."""
    engine = build(image_scaling=scaling)
    latents = sample_normal(1, "latents", [2], SHAPE)
    batch = {"latents": latents, "caption": ["a clip"], "counters": torch.tensor([2])}
    assert_close(concat(engine, batch)[0, 0], scale_image_latents(latents[0, 0], SCALE, scaling))  # type: ignore[arg-type]
    pixels = batch_of([2])["pixels"][:, :1]
    seen: list[Tensor] = []
    engine.network.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["concat_images"]), with_kwargs=True
    )
    engine.sample(["a clip"], [0], SEED, SHAPE, images=pixels)
    raw = engine.first_stage_model.encode(pixels)[0, 0]
    assert seen[0].shape == (2, *SHAPE)  # both halves of guidance have it
    assert torch.equal(seen[0][0], seen[0][1]) and not seen[0][:, 1:].any()
    assert_close(seen[0][0, 0], scale_image_latents(raw, SCALE, scaling))  # type: ignore[arg-type]


def test_an_image_at_every_frame() -> None:
    engine = build(noised_image_all_concat=True)
    condition = concat(engine, batch_of([3]))[0]
    assert condition[0].any() and torch.equal(condition[0], condition[2])


def test_the_first_frame_of_padded_clips_is_the_images_place() -> None:
    engine = build("model.network_config.params.patch_size=[2, 2, 2]")
    inputs = engine.training_inputs(batch_of([3]), SEED, 4)
    assert inputs.cond["concat"].shape == inputs.latents.shape == (1, 4, *SHAPE[1:])  # type: ignore[union-attr]
    assert inputs.cond["concat"][0, 0].any() and not inputs.cond["concat"][0, 1:].any()


def test_packed_clips_of_different_sizes_have_a_condition_each() -> None:
    """k clips in one row are k clips alone: conditions, losses."""
    engine = build("model.network_config.params.patch_size=[2, 2, 2]", noised_image_dropout=0.5)
    clips = [batch_of([4])["pixels"][0], batch_of([5])["pixels"][0, :5, :, :16], batch_of([6])["pixels"][0]]
    packed = {"pixels": clips, "caption": ["a clip"] * 3, "counters": torch.tensor([4, 5, 6])}
    inputs = engine.training_inputs(packed, SEED, 4)
    losses = loss_of(engine, inputs)
    for number, clip in enumerate(clips):
        alone = {"pixels": clip.unsqueeze(0), "caption": ["a clip"], "counters": torch.tensor([4 + number])}
        own = engine.training_inputs(alone, SEED, 4)
        assert_close(inputs.cond["concat"][number], own.cond["concat"][0], rtol=0.0, atol=1e-6)
        own_loss = loss_of(engine, type(own)(**{**vars(own), "timesteps": inputs.timesteps[number : number + 1]}))
        assert_close(losses[number], own_loss[0], rtol=1e-5, atol=0.0)


def loss_of(engine: VideoDiffusionEngine, inputs: Any) -> Tensor:
    return engine.loss_fn(  # type: ignore[misc]
        engine.model, engine.denoiser, inputs.latents, inputs.cond, inputs.timesteps, inputs.noise, **inputs.more
    )


# --- sampling --------------------------------------------------------------------------------------------------------


def test_the_sample_depends_on_the_image_and_on_nothing_beside_it() -> None:
    engine = build()
    images = batch_of([0, 1])["pixels"][:, :1]
    both = engine.sample(["a clip"] * 2, [0, 1], SEED, SHAPE, images=images)
    alone = engine.sample(["a clip"], [1], SEED, SHAPE, images=images[1:])
    other = engine.sample(["a clip"], [1], SEED, SHAPE, images=images[:1])
    assert_close(both[1:], alone, rtol=0.0, atol=1e-5)
    assert (alone - other).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"noised_image_dropout": 1.5}, "noised_image_dropout is 1.5; give a probability"),
        ({"image_scaling": "half"}, "image_scaling is 'half'; give one of multiply, none, divide"),
    ],
)
def test_wrong_options_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(**changes)


def test_a_network_without_room_for_the_image_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"the network has in_channels 16, .* set in_channels to 32"):
        build("model.network_config.params.in_channels=16")


def test_a_missing_image_and_one_too_many_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"the model continues an image .*, and there is none"):
        build().sample(["a clip"], [0], SEED, SHAPE)
    text_only = build("model.network_config.params.in_channels=16", noised_image_input=False)
    with pytest.raises(ConfigError, match="an image is given, and the model takes none"):
        text_only.sample(["a clip"], [0], SEED, SHAPE, images=torch.zeros(1, 1, 3, 32, 32))
