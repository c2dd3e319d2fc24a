"""Whole conversions: every tensor comes back bit for bit, and what is wrong is refused with nothing left behind."""

import json
import logging
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from diffusers import AutoencoderKLCogVideoX, CogVideoXTransformer3DModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from sat.cogvideox import presets
from sat.compat.comfy_names import comfy_from_diffusers
from sat.compat.diffusers_names import DIT_POSITIONS, dit_to_diffusers, vae_to_diffusers
from sat.config import load_config
from sat.convert import checking, writing
from sat.convert.models import LEFTOVERS
from sat.convert.run import Request, convert
from sat.errors import CheckpointError, ConfigError, SatError
from sat.mpu.shards import cut_state, shard_rules
from sat.training.checkpoint import load_weights
from sat.training.preset import load_run_config
from sat.vae import save_vae_state
from sat.weights.from_diffusers import save_transformer
from sat.weights.survey import survey
from tests.cogvideox.tiny import FORMS, HEAD_DIM, TEXT_LENGTH, build
from tests.convert.tiny import PROJECTION, Tree, channels, make_vae, random_table, section
from tests.weights.released import PRESET_OF

Trees = Callable[[str], Tree]
Folders = Callable[[str], Path]
PREFIX = "model.diffusion_model."
UNUSED = "transformer.position_embeddings.weight"


def assert_equal_states(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert set(got) == set(expected)
    for name, value in expected.items():
        assert got[name].dtype == value.dtype and torch.equal(got[name], value), name


def network_of(path: Path) -> dict[str, Tensor]:
    return {name.removeprefix(PREFIX): value for name, value in load_weights(path).items()}


def beside(target: Path) -> list[str]:
    """What stands where a target was to come."""
    return [entry.name for entry in target.parent.iterdir()] if target.parent.exists() else []


def write_yaml(file: Path, model: dict[str, Any]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(yaml.safe_dump({"model": model}), encoding="utf-8")
    return file


# --- there and back --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
def test_sat_to_diffusers_and_back_is_the_same_bit_for_bit(
    tree: Trees, folder: Folders, tmp_path: Path, form: str
) -> None:
    lines = convert(Request(source=folder(form), target=tmp_path / "back", to="sat"))
    assert_equal_states(network_of(tmp_path / "back" / "transformer"), tree(form).state)
    assert_equal_states(load_weights(tmp_path / "back" / "vae" / "3d-vae.pt"), tree(form).vae)
    for file in (tree(form).path / "t5-v1_1-xxl").iterdir():
        assert (tmp_path / "back" / "t5-v1_1-xxl" / file.name).read_bytes() == file.read_bytes()
    assert sum("bit for bit" in line for line in lines) == 2
    assert not survey(tmp_path / "back").problems()
    own, theirs = load_config([tmp_path / "back" / "model.yaml"])["model"], load_config([tree(form).yaml])["model"]
    network = own["network_config"]["params"], theirs["network_config"]["params"]
    for key in ("hidden_size", "num_layers", "num_attention_heads", "num_frames", "latent_height", "patch_size"):
        assert network[0][key] == network[1][key]
    assert own["scale_factor"] == theirs["scale_factor"]
    levels = [one["sampler_config"]["params"]["discretization_config"]["params"] for one in (own, theirs)]
    assert levels[0] == levels[1]


@pytest.mark.parametrize("form", FORMS)
def test_diffusers_to_sat_and_back_is_the_same_bit_for_bit(folder: Folders, tmp_path: Path, form: str) -> None:
    convert(Request(source=folder(form), target=tmp_path / "sat", to="sat"))
    yaml_file = tmp_path / "sat" / "model.yaml"
    convert(Request(source=tmp_path / "sat", target=tmp_path / "again", to="diffusers", base=[yaml_file]))
    files = sorted(file.relative_to(folder(form)) for file in folder(form).rglob("*") if file.is_file())
    assert files == sorted(f.relative_to(tmp_path / "again") for f in (tmp_path / "again").rglob("*") if f.is_file())
    for file in files:
        first, second = folder(form) / file, tmp_path / "again" / file
        if file.suffix == ".safetensors":
            assert_equal_states(load_file(first), load_file(second))
        else:
            assert first.read_bytes() == second.read_bytes(), file


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", ["2B", "5B"])
def test_what_diffusers_has_no_place_for_comes_back_from_a_file_beside(
    tree: Trees, tmp_path: Path, form: str, dtype: torch.dtype
) -> None:
    state = {name: value.to(dtype) for name, value in random_table(tree(form).state).items()}
    save_transformer(state, tmp_path / "transformer")
    request = Request(source=tmp_path / "transformer", target=tmp_path / "d", to="diffusers", base=[tree(form).yaml])
    convert(request)
    # 2B's fixed positions are made anew, bit for bit; the table that nothing reads is not.
    assert (tmp_path / "d" / LEFTOVERS).is_file() == (form == "5B")
    convert(Request(source=tmp_path / "d", target=tmp_path / "back", to="sat"))
    assert_equal_states(network_of(tmp_path / "back" / "transformer"), state)
    if form == "5B":
        assert set(load_file(tmp_path / "d" / LEFTOVERS)) == {UNUSED}
        (tmp_path / "d" / LEFTOVERS).unlink()
        convert(Request(source=tmp_path / "d", target=tmp_path / "without", to="sat"))
        without = network_of(tmp_path / "without" / "transformer")
        assert not without[UNUSED].any()
        assert_equal_states({**without, UNUSED: state[UNUSED]}, state)


def test_the_layout_of_release_1_comes_back_too(tree: Trees, tmp_path: Path) -> None:
    state = random_table(tree("5B").state)
    kernel = "mixins.patch_embed.proj.weight"
    state[kernel] = state[kernel].unflatten(1, (-1, 2, 2))
    state |= {f"mixins.pos_embed.freqs_{part}": torch.randn(48, HEAD_DIM) for part in ("sin", "cos")}
    save_transformer(state, tmp_path / "transformer")
    convert(Request(source=tmp_path / "transformer", target=tmp_path / "d", to="diffusers", base=[tree("5B").yaml]))
    convert(Request(source=tmp_path / "d", target=tmp_path / "back", to="sat"))
    assert_equal_states(network_of(tmp_path / "back" / "transformer"), state)


def test_a_fixed_table_that_is_not_theirs_is_refused(tree: Trees, tmp_path: Path) -> None:
    state = {**tree("2B").state, DIT_POSITIONS: tree("2B").state[DIT_POSITIONS] * 1.01}
    save_transformer(state, tmp_path / "transformer")
    with pytest.raises(CheckpointError, match=r"disagree, nothing was written: stored positions and those that"):
        convert(Request(source=tmp_path, target=tmp_path / "d", to="diffusers", base=[tree("2B").yaml]))
    assert beside(tmp_path / "d") == ["transformer"]


# --- what there may be -----------------------------------------------------------------------------------------------


def test_a_run_needs_nothing_else(tree: Trees, tmp_path: Path) -> None:
    """training_config.yaml describes the model and says where its VAE and T5 are."""
    save_transformer(tree("5B").state, tmp_path / "run")
    shutil.copyfile(tree("5B").yaml, tmp_path / "run" / "training_config.yaml")
    convert(Request(source=tmp_path / "run", target=tmp_path / "d", to="diffusers"))
    parts = {"transformer", "vae", "scheduler", "text_encoder", "tokenizer"}
    assert {entry.name for entry in (tmp_path / "d").iterdir()} == {*parts, "model_index.json", LEFTOVERS}


@pytest.mark.parametrize(
    ("weights", "place", "expected"),
    [
        ("auto", "run", "averaged"),
        ("ema", "run", "averaged"),
        ("raw", "run", "trained"),
        ("auto", "run/1", "trained"),
        ("auto", "run/1-ema", "averaged"),
        ("ema", "run/1", "averaged"),
        ("raw", "run/1-ema", "trained"),
    ],
)
def test_of_a_run_the_averaged_weights_are_taken_unless_told_otherwise(
    tree: Trees, tmp_path: Path, weights: Any, place: str, expected: str
) -> None:
    states = {"trained": tree("5B").state, "averaged": {n: v * 0.5 for n, v in tree("5B").state.items()}}
    save_transformer(states["trained"], tmp_path / "run")
    save_transformer(states["averaged"], tmp_path / "other")
    (tmp_path / "other" / "1").rename(tmp_path / "run" / "1-ema")
    request = Request(
        source=tmp_path / place,
        target=tmp_path / "out",
        to="sat",
        base=[tree("5B").yaml],
        weights=weights,
        check="none",
    )
    convert(request)
    assert_equal_states(network_of(tmp_path / "out" / "transformer"), states[expected])


def write_shards(folder: Path, state: dict[str, Tensor], network: Any, size: int) -> None:
    folder.mkdir(parents=True)
    for rank in range(size):
        part = cut_state(state, shard_rules(network), rank, size)
        module = {f"{PREFIX}{name}": value.clone() for name, value in part.items()}
        torch.save({"module": module}, folder / f"mp_rank_{rank:02d}_model_states.pt")


def test_tensor_parallel_shards_are_joined(tree: Trees, tmp_path: Path) -> None:
    network = build("5B", extra_modules={"patch_embed_config": PROJECTION}, **channels("5B"))
    write_shards(tmp_path / "shards" / "1000", tree("5B").state, network, 3)
    convert(Request(source=tmp_path / "shards" / "1000", target=tmp_path / "out", to="sat", base=[tree("5B").yaml]))
    assert_equal_states(network_of(tmp_path / "out" / "transformer"), tree("5B").state)
    (tmp_path / "shards" / "1000" / "mp_rank_01_model_states.pt").unlink()
    with pytest.raises(CheckpointError, match=r"tensor-parallel rank 1 is missing: it has ranks \[0, 2\]"):
        convert(Request(source=tmp_path / "shards" / "1000", target=tmp_path / "x", to="sat", base=[tree("5B").yaml]))


def test_large_weights_come_in_shards_that_diffusers_loads(
    tree: Trees, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writing, "SHARD_BYTES", 100_000)
    request = Request(source=tree("5B").path, target=tmp_path / "d", to="diffusers", base=[tree("5B").yaml])
    convert(request)
    files = sorted((tmp_path / "d" / "transformer").glob("*.safetensors"))
    assert len(files) > 2 and files[0].name == f"diffusion_pytorch_model-00001-of-{len(files):05d}.safetensors"
    theirs = CogVideoXTransformer3DModel.from_pretrained(tmp_path / "d" / "transformer")
    assert_equal_states(dict(theirs.state_dict()), dit_to_diffusers(tree("5B").state, 2, False))
    assert not survey(tmp_path / "d" / "transformer").problems()
    convert(Request(source=tmp_path / "d", target=tmp_path / "back", to="sat"))
    assert_equal_states(network_of(tmp_path / "back" / "transformer"), tree("5B").state)
    index = tmp_path / "d" / "transformer" / "diffusion_pytorch_model.safetensors.index.json"
    convert(Request(source=index, target=tmp_path / "too", to="sat", check="none"))
    assert_equal_states(network_of(tmp_path / "too" / "transformer"), tree("5B").state)
    files[1].unlink()
    with pytest.raises(CheckpointError, match=rf"the shard {files[1].name} is missing, one of the {len(files)} that"):
        convert(Request(source=tmp_path / "d", target=tmp_path / "again", to="sat"))


def test_a_precision_can_be_asked_for(tree: Trees, tmp_path: Path) -> None:
    request = Request(
        source=tree("2B").path, target=tmp_path / "d", to="diffusers", base=[tree("2B").yaml], dtype="bf16"
    )
    convert(request)
    for part in ("transformer", "vae"):
        (file,) = (tmp_path / "d" / part).glob("*.safetensors")
        assert {value.dtype for value in load_file(file).values()} == {torch.bfloat16}


def test_only_some_layers_are_run_where_that_is_asked(tree: Trees, tmp_path: Path) -> None:
    lines = convert(
        Request(source=tree("5B-I2V").path, target=tmp_path / "d", to="diffusers", base=[tree("5B-I2V").yaml], check=1)
    )
    assert any("the first 1 of 2 layers" in line for line in lines)
    assert any("all 65 tensors read back" in line for line in lines)


def test_an_image_scaling_that_diffusers_lacks_is_told(tree: Trees, tmp_path: Path) -> None:
    for form, is_told in (("1.5-5B-I2V", True), ("5B-I2V", False), ("1.5-5B", False)):
        request = Request(
            source=tree(form).path, target=tmp_path / form, to="diffusers", base=[tree(form).yaml], check="none"
        )
        assert any("divides the image's latents by 0.7" in line for line in convert(request)) == is_told


def scaled_yaml(tree: Trees, file: Path, scaling: str | None) -> Path:
    model = yaml.safe_load(tree("1.5-5B-I2V").yaml.read_text())["model"]
    return write_yaml(file, model if scaling is None else {**model, "image_scaling": scaling})


@pytest.mark.parametrize("own", ["multiply", "divide", None])
def test_the_scale_of_the_images_latents_survives_both_ways(tree: Trees, tmp_path: Path, own: str | None) -> None:
    base = scaled_yaml(tree, tmp_path / "own.yaml", own)
    source = tree("1.5-5B-I2V").path / "transformer"
    convert(Request(source=source, target=tmp_path / "d", to="diffusers", base=[base], check="none"))
    lines = convert(Request(source=tmp_path / "d", target=tmp_path / "s", to="sat", check="none"))
    assert load_config([tmp_path / "s" / "model.yaml"])["model"].get("image_scaling") == own
    assert any(f"image_scaling: {own}" in line for line in lines) == (own is not None)


def test_diffusers_own_folder_of_1_5_divides_and_says_so(folder: Folders, tmp_path: Path) -> None:
    shutil.copytree(folder("1.5-5B-I2V"), tmp_path / "d", ignore=shutil.ignore_patterns(LEFTOVERS))
    lines = convert(Request(source=tmp_path / "d", target=tmp_path / "s", to="sat", check="none"))
    assert load_config([tmp_path / "s" / "model.yaml"])["model"]["image_scaling"] == "divide"
    assert "the image's latents are scaled with image_scaling: divide; the released configuration says none" in lines


def test_a_tree_of_released_size_keeps_what_its_run_changed(
    tree: Trees, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tiny model stands for the released one: its own YAML is the released one, of which a run changed two keys."""
    form = "1.5-5B-I2V"
    monkeypatch.setattr(presets.TransformerKind, "has_released_size", True)
    released = PRESET_OF[form].config
    for module in ("sat.convert.run", "sat.training.preset"):
        monkeypatch.setattr(f"{module}.CONFIGS", tmp_path)
    write_yaml(tmp_path / released, yaml.safe_load(tree(form).yaml.read_text())["model"])
    plain = Request(source=tree(form).path, target=tmp_path / "a", to="sat", base=[tmp_path / released], check="none")
    convert(plain)
    assert not (tmp_path / "a" / "model.yaml").exists()
    changed = scaled_yaml(tree, tmp_path / "changed.yaml", "multiply")
    lines = convert(replace(plain, target=tmp_path / "b", base=[changed]))
    assert any(f"not as {released} in image_scaling: {tmp_path / 'b'}" in line for line in lines)
    config = load_run_config([], [f"args.load={tmp_path / 'b' / 'transformer'}"])
    assert config["model"]["image_scaling"] == "multiply"
    assert "image_scaling" not in load_run_config([], [f"args.load={tmp_path / 'a' / 'transformer'}"])["model"]
    assert survey(tmp_path / "b").config == str(tmp_path / "b" / "model.yaml")


def test_a_large_model_runs_two_layers(tree: Trees, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checking, "AUTO_NUMBERS", 1)
    monkeypatch.setattr(checking, "AUTO_LAYERS", 1)
    lines = convert(Request(source=tree("5B").path, target=tmp_path / "c", to="sat", base=[tree("5B").yaml]))
    assert any("the first 1 of 2 layers" in line for line in lines)


# --- ComfyUI ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("nodes", ["core", "wrapper"])
@pytest.mark.parametrize("form", FORMS)
def test_comfyui_and_back_is_the_same_bit_for_bit(
    tree: Trees, tmp_path: Path, form: str, nodes: Any, caplog: pytest.LogCaptureFixture
) -> None:
    base, models = [tree(form).yaml], tmp_path / "models"
    convert(Request(source=tree(form).path, target=models, to="comfy", base=base, nodes=nodes, check="none"))
    files = sorted(str(file.relative_to(models)) for file in models.rglob("*.safetensors"))
    assert files == ["diffusion_models/models.safetensors", "vae/models_vae.safetensors"]
    theirs = dit_to_diffusers(tree(form).state, FORMS[form]["patch_size"], form == "5B-I2V")
    expected = comfy_from_diffusers(theirs) if nodes == "core" else theirs
    assert_equal_states(load_file(models / files[0]), expected)
    assert_equal_states(load_file(models / files[1]), vae_to_diffusers(tree(form).vae, 4))
    assert ("other positions than those" in caplog.text) == (nodes == "core" and not form.startswith("1.5"))
    convert(Request(source=models, target=tmp_path / "back", to="sat", base=base, check="none"))
    back = network_of(tmp_path / "back" / "transformer")
    if UNUSED in back:  # a single file has no place for it either
        assert not back.pop(UNUSED).any()
    assert_equal_states(back, {name: value for name, value in tree(form).state.items() if name != UNUSED})


def test_a_target_that_names_a_file_is_one_file(tree: Trees, tmp_path: Path) -> None:
    file = tmp_path / "mine.safetensors"
    lines = convert(Request(source=tree("1.5-5B").path, target=file, to="comfy", base=[tree("1.5-5B").yaml]))
    assert file.is_file() and beside(file) == ["mine.safetensors"]
    assert any("compared" in line or "our transformer and diffusers'" in line for line in lines)


# --- a VAE alone -----------------------------------------------------------------------------------------------------


def test_a_vae_alone_goes_every_way(tree: Trees, tmp_path: Path) -> None:
    source, base = tree("5B").path / "vae" / "3d-vae.pt", [tree("5B").yaml]
    lines = convert(Request(source=source, target=tmp_path / "vae", to="diffusers", base=base))
    assert sum("our VAE's" in line for line in lines) == 2
    theirs = AutoencoderKLCogVideoX.from_pretrained(tmp_path / "vae")
    assert theirs.config.scaling_factor == 0.7 and not theirs.config.invert_scale_latents
    assert_equal_states(dict(theirs.state_dict()), vae_to_diffusers(tree("5B").vae, 4))
    convert(Request(source=tmp_path / "vae", target=tmp_path / "back.pt", to="sat", base=base))
    assert_equal_states(load_weights(tmp_path / "back.pt"), tree("5B").vae)
    convert(Request(source=tmp_path / "vae", target=tmp_path / "c.safetensors", to="comfy", base=base))
    assert_equal_states(load_file(tmp_path / "c.safetensors"), vae_to_diffusers(tree("5B").vae, 4))


def test_a_vaes_scale_factor_is_asked_for(tree: Trees, tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"factor by which latents are scaled is not in a VAE's weights.*--base configs"
    ):
        convert(Request(source=tree("5B").path / "vae", target=tmp_path / "vae", to="diffusers"))


def test_weights_of_the_training_loss_are_left_out(tree: Trees, tmp_path: Path) -> None:
    save_vae_state({**tree("5B").vae, "loss.logvar": torch.zeros(())}, tmp_path / "3d-vae.pt")
    convert(Request(source=tmp_path / "3d-vae.pt", target=tmp_path / "out.pt", to="sat", base=[tree("5B").yaml]))
    assert_equal_states(load_weights(tmp_path / "out.pt"), tree("5B").vae)


# --- adapters --------------------------------------------------------------------------------------------------------

LORA = {"lora_config": {"target": "sat.model.finetune.lora2.LoraMixin", "params": {"r": 4, "lora_alpha": 2.0}}}


def lora_network(form: str = "5B") -> Any:
    return build(form, extra_modules={"patch_embed_config": PROJECTION, **LORA}, **channels(form))


@pytest.fixture(scope="module")
def lora_run(tmp_path_factory: pytest.TempPathFactory, tree: Trees) -> Path:
    """A run whose weights hold adapters and, frozen, those of the tree."""
    run_dir = tmp_path_factory.mktemp("lora") / "run"
    network = lora_network()
    network.load_state_dict(tree("5B").state, strict=False)
    save_transformer(network.state_dict(), run_dir)
    write_yaml(run_dir / "training_config.yaml", section("5B", tree("5B").path, modules=LORA))
    return run_dir


@pytest.mark.parametrize("to", ["sat", "diffusers", "comfy"])
def test_a_run_with_adapters_gives_a_file_of_them_which_comes_back(lora_run: Path, tmp_path: Path, to: Any) -> None:
    file = tmp_path / "lora.safetensors"
    lines = convert(Request(source=lora_run, target=file, to=to))
    assert "adapters on 8 modules, rank 4, scale alpha / rank = 0.5" in lines
    assert lines[-2].endswith("largest difference 0.0e+00")
    assert "our transformer and diffusers' with the adapters loaded, 8 of 8 modules" in lines[-1]
    convert(Request(source=file, target=tmp_path / "back.safetensors", to="sat"))
    expected = {
        name.removeprefix(PREFIX): value for name, value in load_weights(lora_run).items() if ".matrix_" in name
    }
    assert_equal_states(load_file(tmp_path / "back.safetensors"), expected)
    with safe_open(tmp_path / "back.safetensors", framework="pt") as reader:
        metadata = reader.metadata()
    assert {key: metadata[key] for key in ("rank", "alpha", "targets")} == {
        "rank": "4",
        "alpha": "2.0",
        "targets": "qkv,dense",
    }


def test_tensor_parallel_adapters_are_joined(lora_run: Path, tree: Trees, tmp_path: Path) -> None:
    state = network_of(lora_run)
    write_shards(tmp_path / "run" / "1000", state, lora_network(), 3)
    (tmp_path / "run" / "latest").write_text("1000")
    shutil.copyfile(lora_run / "training_config.yaml", tmp_path / "run" / "training_config.yaml")
    for source, target in ((lora_run, "whole"), (tmp_path / "run", "joined")):
        convert(Request(source=source, target=tmp_path / f"{target}.safetensors", to="diffusers"))
    assert_equal_states(load_file(tmp_path / "joined.safetensors"), load_file(tmp_path / "whole.safetensors"))


def test_folded_in_they_give_the_outputs_of_the_adapted_network(lora_run: Path, tree: Trees, tmp_path: Path) -> None:
    convert(Request(source=lora_run, target=tmp_path / "merged", to="sat", merge=True))
    convert(Request(source=lora_run, target=tmp_path / "lora.safetensors", to="diffusers"))
    # The same, of adapters alone and the model that they belong to, in another layout.
    convert(Request(source=tree("5B").path, target=tmp_path / "base", to="diffusers", base=[tree("5B").yaml]))
    file, base = tmp_path / "lora.safetensors", tmp_path / "base"
    convert(Request(source=file, target=tmp_path / "too", to="sat", merge=True, merge_base=base))
    merged = network_of(tmp_path / "merged" / "transformer")
    assert_equal_states(merged, network_of(tmp_path / "too" / "transformer"))
    assert set(merged) == set(tree("5B").state)
    adapted = lora_network()
    adapted.load_state_dict(network_of(lora_run))
    plain = build_like(merged)
    generator = torch.Generator().manual_seed(0)
    inputs = {
        "x": torch.randn(1, 4, 16, 6, 8, generator=generator),
        "timesteps": torch.tensor([300]),
        "context": torch.randn(1, TEXT_LENGTH, 64, generator=generator),
    }
    with torch.no_grad():
        outputs, before = adapted(**inputs), build_like(tree("5B").state)(**inputs)
        torch.testing.assert_close(plain(**inputs), outputs, rtol=0.0, atol=5e-6)  # measured: 4.8e-7
    assert float((outputs - before).abs().max()) > 0.05  # and the adapters do something


def build_like(state: dict[str, Tensor]) -> Any:
    network = build("5B", extra_modules={"patch_embed_config": PROJECTION}, **channels("5B"))
    network.load_state_dict(state)
    return network


def test_alpha_may_be_given_where_a_file_does_not_say_it(lora_run: Path, tmp_path: Path) -> None:
    source = tmp_path / "mute.safetensors"
    adapters = {name: value for name, value in load_weights(lora_run).items() if ".matrix_" in name}
    save_file(adapters, source)
    refuse(tmp_path, r"mute\.safetensors does not say its alpha, .* give --lora-alpha \(1 is SAT's", source=source)
    lines = convert(Request(source=source, target=tmp_path / "b.safetensors", to="comfy", lora_alpha=8.0))
    assert "adapters on 8 modules, rank 4, scale alpha / rank = 2" in lines


def test_alpha_of_pefts_own_folder_is_found(lora_run: Path, tmp_path: Path) -> None:
    convert(Request(source=lora_run, target=tmp_path / "lora.safetensors", to="diffusers"))
    (tmp_path / "peft").mkdir()
    (tmp_path / "lora.safetensors").rename(tmp_path / "peft" / "adapter_model.safetensors")
    (tmp_path / "peft" / "adapter_config.json").write_text(json.dumps({"r": 4, "lora_alpha": 16}))
    lines = convert(Request(source=tmp_path / "peft", target=tmp_path / "out.safetensors", to="sat"))
    assert "adapters on 8 modules, rank 4, scale alpha / rank = 4" in lines


# --- refusals --------------------------------------------------------------------------------------------------------


def refuse(tmp_path: Path, message: str, **request: Any) -> None:
    target = tmp_path / "out" / "target"
    with pytest.raises(SatError, match=message):
        convert(Request(**{"target": target, "to": "diffusers", **request}))
    assert beside(target) == []


def test_a_target_that_is_there_is_left_alone(tree: Trees, tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("precious")
    with pytest.raises(CheckpointError, match=r"mine is there already; move it away, or give another place"):
        convert(Request(source=tree("5B").path, target=tmp_path / "mine", to="diffusers", base=[tree("5B").yaml]))
    assert (tmp_path / "mine").read_text() == "precious"


def test_places_without_weights_are_refused(tmp_path: Path, t5: Path) -> None:
    refuse(tmp_path, r"there is no file or folder .*nowhere", source=tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    refuse(tmp_path, r"empty holds no transformer, VAE or adapters to convert, but nothing", source=tmp_path / "empty")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "notes.txt").write_text("x")
    refuse(
        tmp_path, r"notes holds no transformer, VAE or adapters to convert, but notes\.txt", source=tmp_path / "notes"
    )
    refuse(tmp_path, r"holds no transformer, VAE or adapters to convert, but .*T5", source=t5)
    page = tmp_path / "3d-vae.pt"
    page.write_text("<!DOCTYPE html>")
    refuse(tmp_path, r"3d-vae\.pt is a web page", source=page)
    save_file({"unet.weight": torch.zeros(1)}, tmp_path / "other.safetensors")
    refuse(tmp_path, r"it holds no weights of a kind known here", source=tmp_path / "other.safetensors")


def test_nothing_describes_an_unknown_size(tree: Trees, tmp_path: Path) -> None:
    save_transformer(tree("5B").state, tmp_path / "t")
    refuse(tmp_path, r"is no released one but a transformer in the form of CogVideoX-5B.*--base", source=tmp_path / "t")
    theirs = dit_to_diffusers(tree("5B").state, 2, False)
    save_file(theirs, tmp_path / "bare.safetensors")
    refuse(
        tmp_path,
        r"there is no config\.json beside it.*give its model section with",
        source=tmp_path / "bare.safetensors",
    )


def test_generations_that_do_not_belong_together_are_refused(tree: Trees, folder: Folders, tmp_path: Path) -> None:
    message = r"does not fit the model: it looks like a transformer in the form of CogVideoX1\.5-5B.*\n.*patch_embed"
    refuse(tmp_path, message, source=tree("1.5-5B").path, base=[tree("5B").yaml])
    shutil.copytree(folder("1.5-5B"), tmp_path / "mixed")
    shutil.copyfile(folder("5B") / "transformer" / "config.json", tmp_path / "mixed" / "transformer" / "config.json")
    refuse(tmp_path, message, source=tmp_path / "mixed", to="sat")


def test_a_folder_of_two_transformers_asks_which(tree: Trees, tmp_path: Path) -> None:
    for task in ("t2v", "i2v"):
        save_transformer(tree("5B").state, tmp_path / "both" / f"transformer_{task}")
    refuse(tmp_path, r"both holds 2 models, in transformer_t2v and transformer_i2v; give one", source=tmp_path / "both")


def test_parts_that_do_not_fit_together_are_refused(tree: Trees, tmp_path: Path) -> None:
    vae = make_vae()
    vae["decoder.conv_in.conv.weight"] = vae["decoder.conv_in.conv.weight"][:, :4]
    save_vae_state(vae, tmp_path / "vae.pt")
    request: dict[str, Any] = {"source": tree("5B").path, "base": [tree("5B").yaml]}
    refuse(tmp_path, r"the VAE has 4 latent channels, the transformer makes 16", vae=tmp_path / "vae.pt", **request)
    refuse(tmp_path, r"there is no VAE in", vae=tree("5B").path / "transformer", **request)
    shutil.copytree(tree("5B").path / "t5-v1_1-xxl", tmp_path / "t5")
    config = json.loads((tmp_path / "t5" / "config.json").read_text())
    (tmp_path / "t5" / "config.json").write_text(json.dumps({**config, "d_model": 32}))
    refuse(
        tmp_path, r"T5 in .* has states of width 32, the transformer takes 64", text_encoder=tmp_path / "t5", **request
    )
    request["text_encoder"] = tmp_path / "out"
    refuse(tmp_path, r"is no folder of T5 v1\.1: there is no config\.json", **request)


def test_adapters_are_merged_only_where_that_makes_sense(lora_run: Path, tree: Trees, tmp_path: Path) -> None:
    file = tmp_path / "lora.safetensors"
    convert(Request(source=lora_run, target=file, to="diffusers"))
    refuse(
        tmp_path,
        r"holds adapters without the model that they belong to; give it: --merge-lora BASE",
        source=file,
        merge=True,
    )
    refuse(
        tmp_path,
        r"--merge-lora .*3d-vae\.pt holds a VAE, no transformer to fold into",
        source=file,
        merge=True,
        merge_base=tree("5B").path / "vae" / "3d-vae.pt",
    )
    base = [tree("5B").yaml]
    refuse(tmp_path, r"holds no adapters to fold in; leave out", source=tree("5B").path, merge=True, base=base)
    refuse(tmp_path, r"holds a VAE; there are no adapters", source=tree("5B").path / "vae", merge=True, base=base)
    refuse(tmp_path, r"takes no BASE here", source=lora_run, merge=True, merge_base=tree("5B").path)
    refuse(
        tmp_path,
        r"have one on 'transformer_blocks\.1\.\S+', which the model does not have",
        source=file,
        merge=True,
        merge_base=one_layer(tmp_path, tree),
        base=[write_yaml(tmp_path / "one.yaml", section("5B", tree("5B").path, num_layers=1))],
    )


def one_layer(tmp_path: Path, tree: Trees) -> Path:
    network = build("5B", num_layers=1, extra_modules={"patch_embed_config": PROJECTION}, **channels("5B"))
    save_transformer(network.state_dict(), tmp_path / "one")
    return tmp_path / "one"


def test_averaged_weights_are_asked_for_only_where_there_are_some(tree: Trees, tmp_path: Path) -> None:
    save_transformer(tree("5B").state, tmp_path / "run")
    refuse(
        tmp_path, r"run has no averaged weights: there is no 1-ema/mp_rank_00", source=tmp_path / "run", weights="ema"
    )
    file = tmp_path / "run" / "1" / "mp_rank_00_model_states.pt"
    refuse(tmp_path, r"--weights raw chooses between a run's folders; .* is one file", source=file, weights="raw")


def test_a_trained_text_encoder_is_not_lost_silently(tree: Trees, tmp_path: Path) -> None:
    module = {f"{PREFIX}{name}": value for name, value in tree("5B").state.items()}
    module["conditioner.embedders.0.transformer.shared.weight"] = torch.zeros(2, 2)
    torch.save({"module": module}, tmp_path / "trained.pt")
    message = r"trained\.pt holds a text encoder that was trained with it, which is not converted"
    refuse(tmp_path, message, source=tmp_path / "trained.pt", base=[tree("5B").yaml])


# --- the check can fail ----------------------------------------------------------------------------------------------


def test_a_mapping_that_is_wrong_is_caught_and_nothing_is_written(
    tree: Trees, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sat.compat import diffusers_names

    scrambled = tuple(
        (ours, {name: tuple(reversed(blocks)) for name, blocks in targets.items()})
        for ours, targets in diffusers_names.DIT_BLOCKS
    )
    monkeypatch.setattr(diffusers_names._blocks_to_diffusers, "__defaults__", (scrambled,))
    refuse(tmp_path, r"the two classes disagree, nothing was written", source=tree("5B").path, base=[tree("5B").yaml])


def test_a_file_that_was_written_wrong_is_caught(tree: Trees, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def save_wrong(state: dict[str, Tensor], *rest: Any) -> None:
        save_file({name: value + 1e-3 if "proj_out" in name else value for name, value in state.items()}, *rest)

    monkeypatch.setattr(writing, "save_file", save_wrong)
    message = r"the transformer: proj_out\.\w+ is not what was to be written"
    refuse(tmp_path, message, source=tree("5B").path, base=[tree("5B").yaml])


def test_without_diffusers_the_comparison_must_be_left_out(
    tree: Trees, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", None)
    request: dict[str, Any] = {"source": tree("5B").path, "base": [tree("5B").yaml]}
    refuse(tmp_path, r"needs: pip install diffusers; or leave it out with --check none", **request)
    lines = convert(Request(target=tmp_path / "d", to="diffusers", check="none", **request))
    assert "not compared with diffusers' classes (--check none)" in lines


def test_a_full_disk_leaves_nothing(tree: Trees, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writing, "save_file", fail)
    refuse(tmp_path, r"cannot write .*target: No space left", source=tree("5B").path, base=[tree("5B").yaml])


def test_files_may_be_read_by_all_that_the_umask_lets(folder: Folders) -> None:
    mask = os.umask(0)
    os.umask(mask)
    files = [file for file in folder("5B").rglob("*") if file.is_file() and file.name != "model_index.json"]
    assert {file.stat().st_mode & 0o777 for file in files if "text_encoder" not in file.parts} == {0o666 & ~mask}
    assert folder("5B").stat().st_mode & 0o777 == 0o777 & ~mask


def test_progress_is_logged(tree: Trees, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "sat"):
        convert(Request(source=tree("5B").path, target=tmp_path / "d", to="diffusers", base=[tree("5B").yaml]))
    assert "holds a transformer, a VAE, a text encoder" in caplog.text
