"""SAT's model section and diffusers' JSON files: the five released models, both ways, and what cannot be said."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLCogVideoX, CogVideoXDDIMScheduler, CogVideoXDPMScheduler, CogVideoXTransformer3DModel

from sat.cogvideox.presets import PRESETS, Preset
from sat.compat.diffusers_names import dit_to_diffusers
from sat.config import ConfigNode, instantiate_from_config, load_config
from sat.convert import descriptions
from sat.errors import ConfigError
from sat.training.fit import build_on_meta
from tests.tiny import ROOT
from tests.weights.released import PRESET_OF, released_shapes

CONFIGS = ROOT / "configs"
RELEASED_VAE = {"ch": 128, "ch_mult": [1, 2, 2, 4], "num_res_blocks": 3, "z_channels": 16}
IDS = [preset.name for preset in PRESETS]


def section_of(preset: Preset, *words: str) -> ConfigNode:
    return load_config([CONFIGS / preset.config], words)["model"]


def build_theirs(config: dict[str, Any]) -> CogVideoXTransformer3DModel:
    with torch.device("meta"):
        return CogVideoXTransformer3DModel(**{name: value for name, value in config.items() if name != "_class_name"})


@pytest.mark.parametrize("form", PRESET_OF)
def test_released_weights_fit_the_class_that_their_config_builds(form: str) -> None:
    preset, section = PRESET_OF[form], section_of(PRESET_OF[form])
    shapes = {name: torch.empty(shape, device="meta") for name, shape in released_shapes(form).items()}
    theirs = dit_to_diffusers(shapes, preset.patch_size, descriptions.has_learned_positions(section))
    expected = build_theirs(descriptions.transformer_config(section)).state_dict()
    assert {name: value.shape for name, value in theirs.items()} == {name: v.shape for name, v in expected.items()}


@pytest.mark.parametrize("preset", PRESETS, ids=IDS)
def test_a_section_made_of_their_files_builds_the_same_network(preset: Preset) -> None:
    section = section_of(preset)
    files = (
        descriptions.transformer_config(section),
        descriptions.vae_config(section, RELEASED_VAE),
        descriptions.scheduler_config(section),
    )
    back = descriptions.section_from_diffusers(*files, CONFIGS)
    networks = [build_on_meta(one["network_config"]).state_dict() for one in (section, back)]
    assert {name: value.shape for name, value in networks[0].items()} == {n: v.shape for n, v in networks[1].items()}
    assert files == (
        descriptions.transformer_config(back),
        descriptions.vae_config(back, RELEASED_VAE),
        descriptions.scheduler_config(back),
    )


@pytest.mark.parametrize("preset", PRESETS, ids=IDS)
def test_the_numbers_of_the_released_models(preset: Preset) -> None:
    section = section_of(preset)
    vae, scheduler = descriptions.vae_config(section, RELEASED_VAE), descriptions.scheduler_config(section)
    is_2b, is_1_5 = preset.name == "CogVideoX-2B", preset.name.startswith("CogVideoX1.5")
    assert vae["scaling_factor"] == (1.15258426 if is_2b else 0.7)
    assert vae["invert_scale_latents"] == is_1_5
    assert scheduler["snr_shift_scale"] == (3.0 if is_2b else 1.0)
    config = descriptions.transformer_config(section)
    assert (config["sample_height"], config["sample_width"]) == ((96, 170) if is_1_5 else (60, 90))
    assert config["max_text_seq_length"] == (224 if is_1_5 else 226)
    with torch.device("meta"):
        AutoencoderKLCogVideoX(**{name: value for name, value in vae.items() if name != "_class_name"})
    index = descriptions.model_index(section, ["transformer", "vae", "scheduler"])
    assert index["_class_name"] == (
        "CogVideoXImageToVideoPipeline" if preset.in_channels == 32 else "CogVideoXPipeline"
    )
    assert index["text_encoder"] == [None, None] and index["vae"] == ["diffusers", "AutoencoderKLCogVideoX"]


@pytest.mark.parametrize(
    ("sampler", "expected"),
    [
        ("VideoDDIMSampler", CogVideoXDDIMScheduler),
        ("VPSDEDPMPP2MSampler", CogVideoXDPMScheduler),
        ("VPODEDPMPP2MSampler", CogVideoXDDIMScheduler),
    ],
)
def test_the_scheduler_is_that_of_the_sampler_with_its_levels(sampler: str, expected: type) -> None:
    word = f"model.sampler_config.target=sgm.modules.diffusionmodules.sampling.{sampler}"
    config = descriptions.scheduler_config(section_of(PRESETS[0], word))
    assert config.pop("_class_name") == expected.__name__
    levels = load_config([CONFIGS / PRESETS[0].config])["model"]["denoiser_config"]["params"]["discretization_config"]
    table = instantiate_from_config(levels).table()
    theirs = expected(**config).alphas_cumprod.sqrt().float()
    torch.testing.assert_close(theirs, table, rtol=0.0, atol=1e-6)


def test_interpolation_may_stand_where_release_1_has_it() -> None:
    place = "model.network_config.params.modules.pos_embed_config.params.{}_interpolation=1.5"
    section = section_of(PRESETS[0], place.format("height"), place.format("width"))
    assert descriptions.transformer_config(section)["spatial_interpolation_scale"] == 1.5


PARAMS = "model.network_config.params"


@pytest.mark.parametrize(
    ("word", "message"),
    [
        (f"{PARAMS}.use_SwiGLU=true", r"cannot have network_config\.params\.use_SwiGLU = True; there it is False"),
        (f"{PARAMS}.elementwise_affine=false", r"elementwise_affine = False; there it is True"),
        (f"{PARAMS}.num_classes=10", r"num_classes = 10; there it is None"),
        (f"{PARAMS}.transformer_args.layernorm_order=sandwich", r"layernorm_order = sandwich; there it is pre"),
        (f"{PARAMS}.modules.adaln_layer_config.params.qk_ln=false", r"qk_ln = False; there it is True"),
        (f"{PARAMS}.modules.pos_embed_config.params.theta=500", r"theta = 500; there it is 10000"),
        (f"{PARAMS}.patch_size=[1,2,4]", r"one number for rows and columns; the network's patch is \[1, 2, 4\]"),
        (f"{PARAMS}.height_interpolation=2.0", r"positions are stretched by 2\.0 and 1\.0"),
        ("model.network_config.target=my.Network", r"network is 'my\.Network'; only CogVideoX transformers are"),
    ],
)
def test_what_diffusers_cannot_be_told_is_refused(word: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        descriptions.transformer_config(section_of(PRESETS[1], word))


def test_stretched_positions_of_1_5_are_refused() -> None:
    word = f"{PARAMS}.modules.pos_embed_config.params.positions=interpolate"
    with pytest.raises(ConfigError, match=r"diffusers does not stretch the rotary positions of 1\.5"):
        descriptions.transformer_config(section_of(PRESETS[3], word))
    assert descriptions.transformer_config(section_of(PRESETS[1], word))


@pytest.mark.parametrize(
    ("preset", "own", "is_inverted", "back"),
    [
        (PRESETS[2], "divide", True, "divide"),
        (PRESETS[4], "multiply", False, "multiply"),
        (PRESETS[4], "divide", True, "divide"),
        (PRESETS[4], "none", True, "divide"),  # diffusers has no such rule: the file beside keeps it
        (PRESETS[3], "none", True, None),  # it takes no image
    ],
)
def test_the_scaling_of_the_image_goes_along(preset: Preset, own: str, is_inverted: bool, back: str | None) -> None:
    section = section_of(preset, f"model.image_scaling={own}")
    vae = descriptions.vae_config(section, RELEASED_VAE)
    assert vae["invert_scale_latents"] == is_inverted
    again = descriptions.section_from_diffusers(descriptions.transformer_config(section), vae, {}, CONFIGS)
    assert again.get("image_scaling") == back


def test_schedules_that_diffusers_lacks_are_refused() -> None:
    word = "model.denoiser_config.params.discretization_config.params.post_shift=true"
    with pytest.raises(ConfigError, match=r"diffusers' schedulers have no post_shift"):
        descriptions.scheduler_config(section_of(PRESETS[1], word))


def test_the_yaml_of_a_new_tree_names_its_own_vae_and_t5() -> None:
    section = descriptions.of_tree(section_of(PRESETS[1]), Path("a/vae.pt"), Path("a/t5"))
    assert section["first_stage_config"]["params"]["ckpt_path"] == "a/vae.pt"
    assert section["conditioner_config"]["params"]["emb_models"][0]["params"]["model_dir"] == "a/t5"


@pytest.mark.parametrize("preset", PRESETS, ids=IDS)
def test_a_section_made_of_their_files_says_what_the_released_one_says(preset: Preset) -> None:
    section = section_of(preset)
    files = (
        descriptions.transformer_config(section),
        descriptions.vae_config(section, RELEASED_VAE),
        descriptions.scheduler_config(section),
    )
    found = descriptions.differences(descriptions.section_from_diffusers(*files, CONFIGS), section)
    assert found == (["image_scaling"] if preset.name == "CogVideoX1.5-5B-I2V" else [])  # it divides


def test_places_and_adapters_are_no_differences() -> None:
    own = section_of(PRESETS[1], "model.scale_factor=0.5", "model.first_stage_config.params.ckpt_path=else.pt")
    own["network_config"]["params"]["modules"]["lora_config"] = {"target": "sat.model.finetune.lora2.LoraMixin"}
    own["conditioner_config"]["params"]["emb_models"][0]["ucg_rate"] = 0.2
    found = descriptions.differences(own, section_of(PRESETS[1]))
    assert found == ["conditioner_config.params.emb_models.0.ucg_rate", "scale_factor"]
    assert "lora_config" not in descriptions.of_tree(own, Path("v"), Path("t"))["network_config"]["params"]["modules"]
