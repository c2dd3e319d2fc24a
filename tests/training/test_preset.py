"""Weights that name their model: the right YAML is found."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from sat.cogvideox import presets
from sat.cogvideox.presets import Preset
from sat.config import ConfigNode, dump_config, instantiate_from_config, load_config
from sat.errors import CheckpointError, ConfigError
from sat.sampling import cli as sampling
from sat.training import cli as training
from sat.training import preset
from sat.training.preset import load_run_config
from tests.tiny import ROOT, TINY, tiny_config
from tests.weights.released import PRESET_OF, write_all_released


def write_yaml(file: Path, text: str) -> Path:
    file.write_text(text)
    return file


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_all_released(tmp_path_factory.mktemp("released"))


# --- the model that weights ask for ----------------------------------------------------------------------------------


@pytest.mark.parametrize("form", PRESET_OF)
def test_the_model_is_found_by_the_shapes(released, form):
    load = released[form] / "transformer"
    for path in (load, load / "1000", load / "1000" / "mp_rank_00_model_states.pt"):
        config = load_run_config([ROOT / "configs" / "sft.yaml"], [f"args.load={path}"])
        expected = load_config([ROOT / "configs" / PRESET_OF[form].config, ROOT / "configs" / "sft.yaml"])
        assert config["model"].plain() == expected["model"].plain()
        assert config["data"].plain() == expected["data"].plain()
        assert Path(config["model"].origins["network_config"].file).name == PRESET_OF[form].config


def test_size_and_precision_come_with_the_model(released):
    config = load_run_config([], [f"args.load={released['1.5-5B'] / 'transformer'}"])
    assert config["data"]["params"].plain() == {"video_size": [768, 1360], "fps": 16, "max_num_frames": 81}
    assert config["deepspeed"]["bf16"]["enabled"] is True


def test_adapters_among_the_weights_become_part_of_the_model(released, tmp_path):
    """A released-size checkpoint of SAT's LoRA training, without the run's configuration beside it."""
    released_file = released["2B"] / "transformer" / "1000" / "mp_rank_00_model_states.pt"
    module = dict(torch.load(released_file, weights_only=True)["module"])
    module["model.diffusion_model.transformer.layers.0.mlp.dense_h_to_4h.matrix_A.0"] = torch.zeros(1).expand(8, 1920)
    torch.save({"module": module}, tmp_path / "weights.pt")
    config = load_run_config([], [f"args.load={tmp_path / 'weights.pt'}"])
    lora = config["model"]["network_config"]["params"]["modules"]["lora_config"]
    assert lora["params"] == {"r": 8, "targets": ["mlp"]}


def test_a_model_that_is_given_stays(released, tmp_path):
    load = f"args.load={released['2B'] / 'transformer'}"
    config = load_run_config([ROOT / "configs" / "cogvideox_5b.yaml"], [load])
    assert config["model"]["network_config"]["params"]["num_layers"] == 42
    config = load_run_config([TINY], [])
    assert config["model"]["network_config"]["params"]["num_layers"] == 2
    vae = write_yaml(tmp_path / "vae.yaml", "model: {target: vae_modules.autoencoder.VideoAutoencodingEngine}\n")
    assert list(load_run_config([vae], [load])["model"]) == ["target"]


def test_single_values_of_the_model_are_laid_over_it(released, tmp_path):
    overlay = write_yaml(tmp_path / "run.yaml", "model:\nargs: {}\n")
    words = [
        f"args.load={released['5B'] / 'transformer'}",
        "model.scale_factor=0.5",
        "model.conditioner_config.params.emb_models.0.ucg_rate=0.3",
        "model.first_stage_config=null",
    ]
    model = load_run_config([overlay], words)["model"]
    assert model["scale_factor"] == 0.5 and model["first_stage_config"] is None
    assert model["conditioner_config"]["params"]["emb_models"][0]["ucg_rate"] == 0.3
    assert model["conditioner_config"]["params"]["emb_models"][0]["params"]["max_length"] == 226


def paths_of(config: ConfigNode) -> tuple[str, str]:
    model = config["model"]
    embedder = model["conditioner_config"]["params"]["emb_models"][0]
    return model["first_stage_config"]["params"]["ckpt_path"], embedder["params"]["model_dir"]


def test_vae_and_text_encoder_are_those_of_the_tree(released, tmp_path):
    tree = shutil.copytree(released["5B"], tmp_path / "tree")
    load = f"args.load={tree / 'transformer'}"
    assert paths_of(load_run_config([], [load])) == ("vae/3d-vae.pt", "t5-v1_1-xxl")
    (tree / "vae").mkdir()
    (tree / "vae" / "3d-vae.pt").write_text("")
    (tree / "t5-v1_1-xxl").mkdir()
    assert paths_of(load_run_config([], [load])) == (str(tree / "vae" / "3d-vae.pt"), str(tree / "t5-v1_1-xxl"))
    own = ["model.first_stage_config.params.ckpt_path=mine.pt"]
    assert paths_of(load_run_config([], [load, *own])) == ("mine.pt", str(tree / "t5-v1_1-xxl"))
    explicit = [ROOT / "configs" / "cogvideox_5b.yaml"]
    assert paths_of(load_run_config(explicit, [load])) == ("vae/3d-vae.pt", "t5-v1_1-xxl")


def test_a_run_has_its_own_model(tmp_path):
    run = tmp_path / "run"
    (run / "20").mkdir(parents=True)
    torch.save({"module": {}}, run / "20" / "mp_rank_00_model_states.pt")
    (run / "latest").write_text("20")
    (run / "training_config.yaml").write_text(dump_config(tiny_config("args.train_iters=7")))
    for load in (run, run / "20", run / "20" / "mp_rank_00_model_states.pt"):
        config = load_run_config([ROOT / "configs" / "sft.yaml"], [f"args.load={load}"])
        assert config["model"].plain() == tiny_config()["model"].plain()
        assert config["args"]["train_iters"] == 1000  # what it trains is this run's affair


def test_weights_of_no_released_model_ask_for_a_yaml(tmp_path):
    torch.save({"module": {"mixins.patch_embed.proj.weight": torch.zeros(48, 64)}}, tmp_path / "w.pt")
    message = (
        r"names no model, and .*w\.pt is no released one but a CogVideoX-like .*; give its model section with --base"
    )
    with pytest.raises(ConfigError, match=message):
        load_run_config([], [f"args.load={tmp_path / 'w.pt'}"])
    (tmp_path / "w.pt").write_text("<html>")
    with pytest.raises(CheckpointError, match="is a web page"):
        load_run_config([], [f"args.load={tmp_path / 'w.pt'}"])
    with pytest.raises(CheckpointError, match="there is no checkpoint"):
        load_run_config([], [f"args.load={tmp_path / 'nowhere'}"])


# --- the scripts -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("script", "words"),
    [(training, ["configs/sft.yaml"]), (sampling, ["configs/inference.yaml", "args.sampling_num_frames=22"])],
    ids=["train", "sample"],
)
def test_the_scripts_take_the_model_of_the_weights(released, monkeypatch, capsys, script, words):
    monkeypatch.chdir(ROOT)
    load = released["1.5-5B"] / "transformer"
    script.main(["--base", *words, f"args.load={load}", "--print-config"])
    printed = capsys.readouterr()
    assert "patch_size: [2, 2, 2]" in printed.out
    assert f"taking that of {ROOT}/configs/cogvideox1.5_5b.yaml, by the weights in {load}" in printed.err


def test_weights_alone_give_the_sample_that_their_yaml_gives(tmp_path, monkeypatch):
    """A released tree of a small model: sampled without any YAML as with its own, number for number."""
    config = tiny_config("model.latent_input=false")
    network: Any = instantiate_from_config(config["model"]["network_config"])
    (tmp_path / "transformer" / "1").mkdir(parents=True)
    module = {f"model.diffusion_model.{name}": value for name, value in network.state_dict().items()}
    torch.save({"module": module}, tmp_path / "transformer" / "1" / "mp_rank_00_model_states.pt")
    (tmp_path / "transformer" / "latest").write_text("1")
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "small.yaml").write_text(dump_config({"model": config["model"].plain()}))
    monkeypatch.setattr(preset, "CONFIGS", tmp_path / "configs")
    monkeypatch.setattr(presets, "PRESETS", (Preset("Small", "small.yaml", 32, 2, 16, (1, 2, 2), False, False),))

    common = ["--load", str(tmp_path / "transformer"), "--prompt", "a red square", "args.only_save_latents=true"]
    sampling.main([*common, f"args.output_dir={tmp_path / 'alone'}"])
    sampling.main(
        ["--base", str(tmp_path / "configs" / "small.yaml"), *common, f"args.output_dir={tmp_path / 'given'}"]
    )
    latents = [load_file(next((tmp_path / name).glob("*.safetensors")))["latents"] for name in ("alone", "given")]
    assert torch.equal(*latents) and latents[0].std() > 0.1
