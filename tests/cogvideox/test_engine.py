"""The engine: what a training step is made of belongs to the sample, and parts that do not fit are refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sat.cogvideox.engine import KeyedNoise, TrainedParts, VideoDiffusionEngine, build_engine
from sat.cogvideox.presets import describe_weights
from sat.config import ConfigNode, instantiate_from_config, load_config
from sat.data.synthetic import SyntheticLatents
from sat.errors import ConfigError
from sat.mpu.random import sample_normal
from sat.training.checkpoint import fit_weights
from tests.tiny import TINY, VAE, tiny_config
from tools.make_tiny_t5 import make

SHAPE = (3, 16, 4, 4)
SEED = 5


def build(**changes: Any) -> VideoDiffusionEngine:
    """The engine of the smoke test, with some of its section's keys replaced."""
    torch.manual_seed(0)
    section = tiny_config()["model"]
    section.update({"latent_input": False, **changes})
    return build_engine(section).eval()


def batch_of(counters: list[int]) -> dict[str, Any]:
    samples = [SyntheticLatents(100, *SHAPE)[counter] for counter in counters]
    return {
        "latents": torch.stack([sample["latents"] for sample in samples]),
        "caption": [sample["caption"] for sample in samples],
        "counters": torch.tensor(counters),
    }


def pixels_of(counters: list[int]) -> dict[str, Any]:
    pixels = sample_normal(1, "pixels", counters, (9, 3, 32, 32)).tanh()
    return {"pixels": pixels, "caption": ["a clip"] * len(counters), "counters": torch.tensor(counters)}


# --- training inputs -------------------------------------------------------------------------------------------------


def test_inputs_are_the_same_however_samples_are_batched() -> None:
    engine = build()
    engine.loss_fn.offset_noise_level = 0.1
    whole = engine.training_inputs(batch_of([4, 5, 6, 7]), SEED, 4)
    parts = [engine.training_inputs(batch_of(counters), SEED, 4) for counters in ([4], [5, 6], [7])]
    for name in ("latents", "timesteps", "noise", "offset_noise"):
        assert torch.equal(getattr(whole, name), torch.cat([getattr(part, name) for part in parts])), name
    assert torch.equal(whole.cond["crossattn"], torch.cat([part.cond["crossattn"] for part in parts]))
    assert not torch.equal(engine.training_inputs(batch_of([4, 5, 6, 7]), SEED + 1, 4).noise, whole.noise)


def test_draws_of_a_sample_are_independent_of_each_other() -> None:
    """No two of them come from one stream: equal numbers would tie the noise to the latents."""
    engine = build(first_stage_config=VAE)
    engine.loss_fn.offset_noise_level = 0.1
    inputs = engine.training_inputs(pixels_of(list(range(4))), SEED, 4)
    posterior = sample_normal(SEED, "posterior", range(4), SHAPE)
    rows = torch.stack([inputs.noise.flatten(), posterior.flatten()])
    assert torch.corrcoef(rows)[0, 1].abs() < 0.06  # 4 standard deviations at 3,072 numbers are 0.07
    assert not torch.isin(inputs.offset_noise, inputs.noise).any()
    assert abs(inputs.noise.mean().item()) < 0.06
    assert inputs.noise.std().item() == pytest.approx(1.0, abs=0.05)


def test_text_is_dropped_at_its_rate_by_the_samples_own_stream() -> None:
    engine = build()
    counters = list(range(4000))
    inputs = engine.training_inputs(
        {"latents": torch.zeros(4000, 1, 1, 1, 1), "caption": ["x"] * 4000, "counters": torch.tensor(counters)}, SEED, 8
    )
    dropped = (inputs.cond["crossattn"] == 0).flatten(1).all(dim=1)
    assert dropped.double().mean().item() == pytest.approx(0.1, abs=0.015)  # the standard error is 0.005
    alone = [i for i in range(50) if not engine.training_inputs(batch_of([i]), SEED, 8).cond["crossattn"].any()]
    assert alone == torch.nonzero(dropped[:50]).flatten().tolist()
    # The drop says nothing about the timestep.
    times = inputs.timesteps.double()
    assert times[dropped].mean().item() == pytest.approx(times[~dropped].mean().item(), abs=60)


def test_validation_inputs_are_fixed_and_whole() -> None:
    engine = build()
    inputs = engine.validation_inputs(batch_of([0, 1, 2]), 300, SEED)
    again = engine.validation_inputs(batch_of([0, 1, 2]), 300, SEED)
    assert inputs.timesteps.tolist() == [300] * 3
    assert torch.equal(inputs.noise, again.noise)
    assert torch.equal(inputs.cond["crossattn"], engine.conditioner(batch_of([0, 1, 2])["caption"])["crossattn"])
    assert not torch.equal(inputs.noise, engine.validation_inputs(batch_of([0, 1, 2]), 700, SEED).noise)
    assert not torch.equal(inputs.noise, engine.training_inputs(batch_of([0, 1, 2]), SEED, 4).noise)


def test_sampling_noise_belongs_to_the_sample_and_the_step() -> None:
    like = torch.zeros(2, *SHAPE)
    noise = KeyedNoise(SEED, [3, 9])
    drawn = noise("step", 1, like)
    assert drawn.shape == like.shape
    assert torch.equal(KeyedNoise(SEED, [9])("step", 1, like[:1]), drawn[1:])
    others = [noise("step", 2, like), noise("prefix", 1, like), KeyedNoise(SEED + 1, [3, 9])("step", 1, like)]
    assert not any(torch.equal(other, drawn) for other in others)
    assert not torch.equal(drawn[0], drawn[1])


# --- pixels and latents ----------------------------------------------------------------------------------------------


def test_cached_moments_give_the_latents_of_the_pixels() -> None:
    engine = build(first_stage_config=VAE, scale_factor=0.7)
    batch = pixels_of([3, 8])
    moments = engine.first_stage_model.posterior(batch["pixels"]).moments.detach()
    cached = {"moments": moments, "caption": batch["caption"], "counters": batch["counters"]}
    direct = engine.training_inputs(batch, SEED, 4).latents
    assert direct.shape == (2, *SHAPE)
    torch.testing.assert_close(engine.training_inputs(cached, SEED, 4).latents, direct, rtol=0.0, atol=1e-6)
    noise = sample_normal(SEED, "posterior", [3, 8], SHAPE)
    expected = 0.7 * engine.first_stage_model.encode(batch["pixels"], noise=noise)
    torch.testing.assert_close(direct, expected, rtol=0.0, atol=1e-6)


def test_scale_factor_goes_in_and_comes_out() -> None:
    engine = build(first_stage_config=VAE, scale_factor=0.5)
    latents = batch_of([0])["latents"]
    assert torch.equal(engine.training_inputs(batch_of([0]), SEED, 4).latents, 0.5 * latents)
    pixels = torch.cat(list(engine.decode_first_stage(0.5 * latents)), dim=1)
    assert torch.equal(pixels, engine.first_stage_model.decode_chunked(latents))
    mean = engine.encode_first_stage(pixels)
    assert torch.equal(mean, 0.5 * engine.first_stage_model.encode(pixels))


def test_clips_may_be_encoded_a_few_at_a_time() -> None:
    whole = build(first_stage_config=VAE)
    few = build(first_stage_config=VAE, en_and_decode_n_samples_a_time=2)
    pixels = pixels_of([0, 1, 2])["pixels"]
    noise = sample_normal(SEED, "posterior", range(3), SHAPE)
    for given in (None, noise):
        expected = whole.encode_first_stage(pixels, given)
        torch.testing.assert_close(few.encode_first_stage(pixels, given), expected, rtol=0.0, atol=1e-5)


def test_latents_that_come_as_clips_are_only_scaled() -> None:
    engine = build(latent_input=True, scale_factor=2.0)
    batch = batch_of([0])
    batch["pixels"] = batch.pop("latents")
    assert torch.equal(engine.training_inputs(batch, SEED, 4).latents, 2.0 * batch["pixels"])


# --- the trained parts -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def t5_section(tmp_path_factory: pytest.TempPathFactory) -> ConfigNode:
    """The model section with a tiny T5 that is trained."""
    folder = tmp_path_factory.mktemp("t5") / "t5"
    make(["a small blob moving left"], folder)
    target = "sgm.modules.encoders.modules.FrozenT5Embedder"
    entry = f"{{target: {target}, is_trainable: true, params: {{model_dir: {folder}, max_length: 16}}}}"
    width = "model.network_config.params.modules.patch_embed_config.params.text_hidden_size=64"
    return tiny_config(f"model.conditioner_config.params.emb_models=[{entry}]", width)["model"]


def test_loss_is_that_of_the_inputs_and_trains_the_network_alone() -> None:
    engine = build()
    parts = TrainedParts(engine)
    inputs = engine.training_inputs(batch_of([0, 1]), SEED, 2)
    loss = parts(inputs)["loss"]
    expected = engine.loss_fn(
        engine.model, engine.denoiser, inputs.latents, inputs.cond, inputs.timesteps, inputs.noise
    )
    assert loss.shape == (2,)
    assert torch.equal(loss, expected)
    loss.mean().backward()
    unread = [
        name for name, parameter in parts.named_parameters() if parameter.requires_grad and parameter.grad is None
    ]
    assert unread == []
    assert all(name.startswith("model.diffusion_model.") for name in parts.state_dict())


def test_a_text_encoder_is_trained_and_saved_where_it_is_trainable(t5_section: ConfigNode) -> None:
    engine = build_engine(t5_section)
    parts = TrainedParts(engine)
    inputs = engine.training_inputs(batch_of([0, 1]), SEED, 2)
    assert inputs.cond == {}
    parts(inputs)["loss"].mean().backward()
    weight = "conditioner.embedders.0.transformer.encoder.block.0.layer.0.SelfAttention.q.weight"
    assert parts.get_parameter(weight).grad.any()
    assert weight in parts.state_dict()


def test_a_trained_text_encoder_is_loaded_again(t5_section: ConfigNode) -> None:
    def states(engine: VideoDiffusionEngine) -> Tensor:
        return engine.conditioner(["a small blob moving left"])["crossattn"]

    trained = build_engine(t5_section)
    with torch.no_grad():
        for parameter in trained.conditioner.parameters():
            parameter.mul_(1.5)
    saved = TrainedParts(trained).state_dict()
    loaded = build_engine(t5_section)
    assert not torch.allclose(states(loaded), states(trained))
    parts = TrainedParts(loaded)
    assert fit_weights(parts, [parts.own_weights(saved)], "file", describe_weights) == []
    assert torch.equal(states(loaded), states(trained))


def test_weights_of_frozen_parts_are_passed_over() -> None:
    parts = TrainedParts(build())
    own = parts.state_dict()
    more = {"first_stage_model.encoder.x": torch.zeros(1), "conditioner.embedders.0.transformer.x": torch.zeros(1)}
    assert parts.own_weights({**own, **more}).keys() == own.keys()
    bare = {name.removeprefix("model.diffusion_model."): value for name, value in own.items()}
    assert parts.own_weights({**bare, **more}).keys() == own.keys()


# --- what does not fit -----------------------------------------------------------------------------------------------


def test_a_text_encoder_of_another_width_is_refused() -> None:
    entry = {"target": "sat.conditioning.text.ByteEmbedder", "params": {"width": 24, "max_length": 16}}
    with pytest.raises(ConfigError, match="gives states of width 24, patch_embed_config has text_hidden_size 32; set"):
        build(conditioner_config={"target": "sgm.modules.GeneralConditioner", "params": {"emb_models": [entry]}})


def test_a_vae_with_other_latents_is_refused() -> None:
    halves = {
        name: {**VAE["params"][name], "params": {**VAE["params"][name]["params"], "z_channels": 4}}
        for name in ("encoder_config", "decoder_config")
    }
    with pytest.raises(ConfigError, match=r"VAE has 4 latent channels .*, the network's out_channels is 16; give both"):
        build(first_stage_config={**VAE, "params": {**VAE["params"], **halves}})


@pytest.mark.parametrize(
    ("key", "action", "message"),
    [
        ("loss_fn_config", lambda engine: engine.training_inputs(batch_of([0]), SEED, 1), "no loss_fn_config, which"),
        ("sampler_config", lambda engine: engine.sample(["x"], [0], SEED, SHAPE), "no sampler_config, which sampling"),
        ("conditioner_config", lambda engine: engine.sample(["x"], [0], SEED, SHAPE), "no conditioner_config, which"),
        ("conditioner_config", lambda engine: engine.training_inputs(batch_of([0]), 5, 1), "no conditioner_config, "),
        ("first_stage_config", lambda engine: engine.encode_first_stage(torch.zeros(1)), "no first_stage_config, so"),
        (
            "first_stage_config",
            lambda engine: list(engine.decode_first_stage(torch.zeros(1))),
            "no first_stage_config, so latents cannot be decoded; save them with only_save_latents",
        ),
    ],
)
def test_a_part_that_is_not_there_is_named(key: str, action: Any, message: str) -> None:
    engine = build(**{key: None})
    with pytest.raises(ConfigError, match=message):
        action(engine)


def test_an_engine_builds_without_its_encoders(tmp_path: Path) -> None:
    """The files that they need may be anywhere else."""
    config = load_config([TINY], ["model.first_stage_config={target: nowhere.Vae}"])
    engine = build_engine(config["model"], with_encoders=False)
    assert engine.conditioner is None
    assert engine.first_stage_model is None
    assert instantiate_from_config(VAE) is not None
