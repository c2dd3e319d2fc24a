"""`--like`: with the knobs set, diffusers' pipelines give our latents; the table; whose word wins."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderKLCogVideoX,
    CogVideoXDDIMScheduler,
    CogVideoXImageToVideoPipeline,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
    CogView3PlusPipeline,
)
from torch import Tensor, nn

from sat.cogvideox.engine import VideoDiffusionEngine, build_engine
from sat.compat.diffusers_names import cogview3_to_diffusers, vae_to_diffusers
from sat.config import ConfigNode, load_config
from sat.sampling import cli
from sat.sampling.like import KNOBS, SYSTEMS, System, overrides_like
from tests.cogvideox.test_diffusers import build_theirs, converted
from tests.cogvideox.tiny import TEXT_LENGTH, TEXT_WIDTH, build, network_config
from tests.cogview3 import test_diffusers as image
from tests.cogview3.tiny import build as build_image_network
from tests.cogview3.tiny import network_config as image_config
from tests.tiny import ROOT
from tests.vae.tiny import SIZE, build_vae

SGM = "sgm.modules.diffusionmodules"
STEPS, SCALE = 10, 6.0
TOLERANCE = 2e-5
"""Absolute, on latents of up to 4.4. Measured worst: 4.3e-6."""


class LearnedEmbedder(nn.Module):
    """A stand-in for T5: text states drawn for each prompt, the empty one too."""

    width, max_length = TEXT_WIDTH, TEXT_LENGTH

    def forward(self, prompts: Sequence[str]) -> Tensor:
        generators = [torch.Generator().manual_seed(sum(prompt.encode()) + 1) for prompt in prompts]
        return torch.stack([torch.randn(self.max_length, self.width, generator=one) for one in generators])


def model_config(network: dict[str, Any], shift: float, size_keys: Sequence[str] = ()) -> ConfigNode:
    """A model section with the released samplers' form: DDIM, dynamic guidance."""
    schedule = {"target": f"{SGM}.discretizer.ZeroSNRDDPMDiscretization", "params": {"shift_scale": shift}}
    sizes = [
        {"input_key": key, "target": "sat.conditioning.size.SizeEmbedder", "params": {"outdim": image.CONDITION_DIM}}
        for key in size_keys
    ]
    model = {
        "network_config": network,
        "denoiser_config": {
            "target": f"{SGM}.denoiser.DiscreteDenoiser",
            "params": {"scaling_config": {"target": f"{SGM}.denoiser_scaling.VideoScaling"}},
        },
        "conditioner_config": {
            "target": "sgm.modules.GeneralConditioner",
            "params": {"emb_models": [{"target": f"{__name__}.LearnedEmbedder"}, *sizes]},
        },
        "sampler_config": {
            "target": f"{SGM}.sampling.VideoDDIMSampler",
            "params": {
                "num_steps": STEPS,
                "discretization_config": schedule,
                "guider_config": {
                    "target": f"{SGM}.guiders.DynamicCFG",
                    "params": {"scale": SCALE, "exp": 5, "num_steps": STEPS},
                },
            },
        },
    }
    model["denoiser_config"]["params"]["discretization_config"] = schedule
    return load_config([], [f"model={ConfigNode.plain(_node(model))}"])


def _node(values: dict[str, Any]) -> ConfigNode:
    node = ConfigNode()
    node.update(values)
    return node


def engine_like(config: ConfigNode, system: System, weights: dict[str, Tensor]) -> VideoDiffusionEngine:
    words, _ = overrides_like(config, system)
    engine = build_engine(load_config([], [f"model={config['model'].plain()}", *words])["model"])
    engine.network.load_state_dict(weights)
    return engine.eval()


def scheduler(shift: float) -> CogVideoXDDIMScheduler:
    return CogVideoXDDIMScheduler(
        snr_shift_scale=shift,
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        prediction_type="v_prediction",
        clip_sample=False,
    )


def their_sample(pipeline: Any, noise: Tensor, negative: Tensor, height: int, width: int, **options: Any) -> Tensor:
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(
        prompt_embeds=LearnedEmbedder()(["a blob"]),
        negative_prompt_embeds=negative,
        height=height,
        width=width,
        num_inference_steps=STEPS,
        guidance_scale=SCALE,
        latents=noise,
        output_type="latent",
        return_dict=False,
        **options,
    )[0]


@pytest.mark.parametrize(
    ("form", "shift", "size"),
    [
        ("2B", 3.0, (13, 48, 64)),
        ("5B", 1.0, (13, 48, 64)),
        ("5B", 1.0, (9, 80, 48)),  # upright, not the trained size
        ("1.5-5B", 1.0, (13, 48, 64)),
        ("1.5-5B", 1.0, (9, 48, 48)),  # three latent frames, one of padding
    ],
)
def test_like_diffusers_gives_the_latents_of_its_pipeline(form: str, shift: float, size: tuple[int, ...]) -> None:
    ours = build(form)
    theirs: CogVideoXTransformer3DModel = build_theirs(form)
    theirs.norm_out.norm.eps = 1e-5  # its own, which build_theirs changes
    theirs.load_state_dict(converted(form, ours.state_dict()))
    pipeline = CogVideoXPipeline(
        tokenizer=None, text_encoder=None, vae=None, transformer=theirs, scheduler=scheduler(shift)
    )
    num_frames, height, width = size
    shape = ((num_frames - 1) // 4 + 1, 4, height // 8, width // 8)
    config = model_config(network_config(form), shift)
    engines = {system: engine_like(config, system, ours.state_dict()) for system in SYSTEMS}
    padded = engines["diffusers"].padded_shape(shape)
    noise = torch.randn(1, *padded, generator=torch.Generator().manual_seed(1))
    expected = their_sample(pipeline, noise, LearnedEmbedder()([""]), height, width, num_frames=num_frames)
    if expected.shape[1] > shape[0]:  # it takes the padding off where it decodes
        expected = expected[:, expected.shape[1] - shape[0] :]
    got = {
        system: engine.sample(["a blob"], [0], 0, shape, initial_noise=noise[0]) for system, engine in engines.items()
    }
    torch.testing.assert_close(got["diffusers"], expected, rtol=0.0, atol=TOLERANCE)
    assert (got["sat"] - expected).abs().max() > 100 * TOLERANCE
    # At these weights the epsilon changes less than the tolerance.
    assert engines["diffusers"].network.get_mixin("final_layer").norm_final.eps == theirs.norm_out.norm.eps


@pytest.mark.parametrize(
    ("form", "num_frames", "scaling"),
    [("5B-I2V", 13, "multiply"), ("1.5-5B-I2V", 9, "divide"), ("1.5-5B-I2V", 13, "divide")],
)
def test_like_diffusers_continues_an_image_as_its_pipeline_does(form: str, num_frames: int, scaling: str) -> None:
    """The VAE's posterior is made so narrow that it does not matter that they draw from it."""
    ours, theirs = build(form), build_theirs(form)
    theirs.norm_out.norm.eps = 1e-5
    theirs.load_state_dict(converted(form, ours.state_dict()))
    vae, their_vae = build_vaes(invert=scaling == "divide")
    pipeline = CogVideoXImageToVideoPipeline(
        tokenizer=None, text_encoder=None, vae=their_vae, transformer=theirs, scheduler=scheduler(1.0)
    )
    config = model_config(network_config(form), 1.0)
    config["model"].update({"noised_image_input": True, "scale_factor": 0.7})
    engines = {system: engine_like(config, system, ours.state_dict()) for system in SYSTEMS}
    assert engines["diffusers"].image_conditioner.scaling == scaling  # type: ignore[union-attr]
    shape = ((num_frames - 1) // 4 + 1, 4, 6, 8)
    noise = torch.randn(1, *engines["sat"].padded_shape(shape), generator=torch.Generator().manual_seed(1))
    pixels = torch.rand(1, 3, 48, 64, generator=torch.Generator().manual_seed(2)) * 2 - 1
    negative = LearnedEmbedder()([""])
    expected = their_sample(pipeline, noise, negative, 48, 64, num_frames=num_frames, image=(pixels + 1) / 2)
    expected = expected[:, expected.shape[1] - shape[0] :]
    for system, engine in engines.items():
        engine.first_stage_model = vae
        got = engine.sample(["a blob"], [0], 0, shape, initial_noise=noise[0], images=pixels[None])
        if system == "diffusers":
            torch.testing.assert_close(got, expected, rtol=0.0, atol=TOLERANCE)
        else:
            assert (got - expected).abs().max() > 100 * TOLERANCE


def build_vaes(invert: bool) -> tuple[Any, Any]:
    """Ours and theirs with the same weights and a scale factor of 0.7."""
    ours = build_vae()
    with torch.no_grad():
        ours.encoder.conv_out.conv.bias[SIZE["z_channels"] :] -= 60.0
    theirs = AutoencoderKLCogVideoX(
        block_out_channels=tuple(SIZE["ch"] * factor for factor in SIZE["ch_mult"]),
        layers_per_block=SIZE["num_res_blocks"],
        latent_channels=SIZE["z_channels"],
        norm_num_groups=SIZE["norm_groups"],
        scaling_factor=0.7,
        invert_scale_latents=invert,
    )
    theirs.load_state_dict(vae_to_diffusers(ours.state_dict(), len(SIZE["ch_mult"])), strict=True)
    return ours, theirs.eval()


def test_like_diffusers_gives_the_latents_of_its_image_pipeline() -> None:
    ours, theirs = build_image_network(), image.build_theirs()
    theirs.load_state_dict(cogview3_to_diffusers(ours.state_dict()))
    pipeline = CogView3PlusPipeline(
        tokenizer=None, text_encoder=None, vae=None, transformer=theirs, scheduler=scheduler(4.0)
    )
    noise = torch.randn(1, 4, 12, 16, generator=torch.Generator().manual_seed(1))
    text = LearnedEmbedder()(["a blob"])
    expected = their_sample(pipeline, noise, torch.zeros_like(text), 96, 128)
    config = model_config(image_config(), 4.0, image.SIZES)
    guider = "model.sampler_config.params.guider_config"
    constant = f"{guider}={{target: {SGM}.guiders.VanillaCFG, params: {{scale: {SCALE}}}}}"
    config = load_config([], [f"model={config['model'].plain()}", constant])
    engine = engine_like(config, "diffusers", ours.state_dict())
    got = engine.sample(["a blob"], [0], 0, (1, 4, 12, 16), initial_noise=noise)
    torch.testing.assert_close(got[:, 0], expected, rtol=0.0, atol=TOLERANCE)


# --- the table -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("system", SYSTEMS)
def test_every_knob_is_named_with_both_ways_and_ours(system: System) -> None:
    config = load_config([ROOT / "configs" / "cogvideox_5b.yaml"])
    _, lines = overrides_like(config, system)
    assert lines[0].startswith(f"sampling like {system}")
    named = [knob for knob in KNOBS if "1.0" in knob.models and not knob.of_images]
    assert len(lines) == 1 + len(named)
    for knob, line in zip(named, lines[1:], strict=True):
        assert all(part in line for part in (knob.name, f"sat: {knob.sat}", f"diffusers: {knob.diffusers}", "here: "))
    for knob in KNOBS:
        assert knob.here or (knob.key and None not in (knob.sat_value, knob.diffusers_value)), knob.name
        assert set(knob.models) <= {"1.0", "1.5", "image"}


def test_the_kinds_of_model_have_their_own_knobs() -> None:
    names = {}
    for kind, network in (("1.0", network_config("5B")), ("1.5", network_config("1.5-5B")), ("image", image_config())):
        words, _ = overrides_like(model_config(network, 1.0, image.SIZES), "diffusers")
        names[kind] = {word.partition("=")[0].split(".")[-1] for word in words}
    assert names["1.5"] == {"unconditional", "levels", "guider_config", "eps"}
    assert names["1.0"] == {*names["1.5"], "positions"}
    fixed, _ = overrides_like(model_config(network_config("2B"), 1.0), "diffusers")
    assert not any("positions" in word for word in fixed)
    images = model_config(network_config("1.5-5B-I2V"), 1.0)
    images["model"]["noised_image_input"] = True
    assert {"model.image_scaling=divide", "model.image_scaling=none"} == {
        word for system in SYSTEMS for word in overrides_like(images, system)[0] if "image_scaling" in word
    }
    assert names["image"] == {"levels", "use_final_layernorm"}


def test_parts_that_are_not_there_are_left_alone() -> None:
    words, lines = overrides_like(load_config([], ["model.network_config.params.patch_size=2"]), "sat")
    assert words == ["model.network_config.params.modules.final_layer_config.params.eps=1.0e-06"]
    assert "nothing to set: the configuration lacks that part" in "\n".join(lines)


def test_a_constant_guider_stays_and_a_dynamic_one_keeps_its_scale() -> None:
    config = model_config(network_config("5B"), 1.0)
    for system, target in (("diffusers", "VanillaCFG"), ("sat", "DynamicCFG")):
        words, _ = overrides_like(config, system)  # type: ignore[arg-type]
        changed = load_config([], [f"model={config['model'].plain()}", *words])
        guider = changed["model"]["sampler_config"]["params"]["guider_config"]
        assert guider["target"].endswith(target) and guider["params"]["scale"] == SCALE
    words, _ = overrides_like(changed, "diffusers")
    constant = load_config([], [f"model={changed['model'].plain()}", *words])
    again, _ = overrides_like(constant, "diffusers")
    assert not any("guider" in word for word in again)


def test_the_users_own_words_win(capsys: pytest.CaptureFixture[str]) -> None:
    config = str(ROOT / "configs" / "tiny.yaml")
    own = "model.conditioner_config.params.unconditional=zero"
    cli.main(["--base", config, "--like", "diffusers", "--print-config", own])
    shown = capsys.readouterr()
    assert "unconditional: zero" in shown.out
    assert "levels: table" in shown.out and "eps: 1.0e-05" in shown.out
    assert "unconditional branch of guidance" in shown.err


def test_an_unknown_system_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["--base", "configs/tiny.yaml", "--like", "comfy"])
    assert "invalid choice: 'comfy' (choose from" in capsys.readouterr().err
