"""Weights against the model of a configuration: a misfit is told before anything takes memory."""

import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from sat.config import ConfigNode, instantiate_from_config, load_config
from sat.errors import CheckpointError
from sat.training.fit import check_model
from sat.training.systems import DiffusionSystem
from sat.weights.finding import find_checkpoint
from tests.marks import rest_is_slow
from tests.tiny import ROOT, tiny_config
from tests.weights.released import PRESET_OF, write_all_released


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_all_released(tmp_path_factory.mktemp("released"))


def nothing(name: str) -> bool:
    return False


def config_of(form: str, *overrides: str) -> ConfigNode:
    return load_config([ROOT / "configs" / PRESET_OF[form].config], overrides)


@pytest.mark.parametrize(
    ("form", "wrong"), list(zip(PRESET_OF, ["5B", "1.5-5B", "1.5-5B-I2V", "1.5-5B-I2V", "5B-I2V"]))
)
def test_the_right_yaml_passes_and_a_wrong_one_names_the_right(released, form, wrong):
    checkpoint = find_checkpoint(released[form] / "transformer")
    check_model(config_of(form), checkpoint, nothing)
    started = time.perf_counter()
    with pytest.raises(CheckpointError) as error:
        check_model(config_of(wrong), checkpoint, nothing)
    message = str(error.value)
    assert f"it looks like {PRESET_OF[form].name}" in message
    assert f"the configuration builds {PRESET_OF[wrong].name}" in message
    assert (
        f"{PRESET_OF[wrong].config} line " in message and f"use --base configs/{PRESET_OF[form].config}, or" in message
    )
    assert time.perf_counter() - started < 10.0  # nothing of 11 or 22 GB was made; measured: 0.3 s


def test_what_may_be_missing_may_be_missing_here_too(released, tmp_path):
    content = torch.load(released["5B"] / "transformer" / "1000" / "mp_rank_00_model_states.pt", weights_only=True)
    module = {name: value for name, value in content["module"].items() if "query_layernorm_list" not in name}
    torch.save({"module": module}, tmp_path / "w.pt")
    checkpoint = find_checkpoint(tmp_path / "w.pt")
    with pytest.raises(CheckpointError, match=r"missing \(84\): mixins\.adaln_layer\.query_layernorm_list"):
        check_model(config_of("5B"), checkpoint, nothing)
    check_model(config_of("5B"), checkpoint, lambda name: "mixins." in name)


@pytest.mark.parametrize(("form", "image"), [("5B", "5B-I2V"), ("1.5-5B", "1.5-5B-I2V")])
def test_an_image_model_may_start_from_text_to_video_weights(released, form, image):
    checkpoint, may_miss = find_checkpoint(released[form] / "transformer"), DiffusionSystem.may_miss
    check_model(config_of(image), checkpoint, may_miss, from_text_to_video=True)
    with pytest.raises(
        CheckpointError, match=r"to start an image-to-video model from them, set args.from_text_to_video"
    ):
        check_model(config_of(image), checkpoint, may_miss)
    with pytest.raises(CheckpointError, match=r"leave args.from_text_to_video out"):
        check_model(config_of(form), checkpoint, may_miss, from_text_to_video=True)


LORA = (
    "model.network_config.params.modules.lora_config.target=sat.model.finetune.lora2.LoraMixin",
    "model.network_config.params.modules.lora_config.params.r=4",
)


def test_adapters_on_one_side_only_are_told(tmp_path):
    tiny = tiny_config()
    network = instantiate_from_config(tiny_config(*LORA)["model"]["network_config"])
    torch.save({"module": network.state_dict()}, tmp_path / "w.pt")
    with pytest.raises(CheckpointError, match="the weights hold LoRA adapters; add modules"):
        check_model(tiny, find_checkpoint(tmp_path / "w.pt"), nothing)
    check_model(tiny_config(*LORA), find_checkpoint(tmp_path / "w.pt"), nothing)
    plain = instantiate_from_config(tiny["model"]["network_config"])
    torch.save({"module": plain.state_dict()}, tmp_path / "w.pt")
    check_model(tiny_config(*LORA), find_checkpoint(tmp_path / "w.pt"), lambda name: "matrix_" in name)


def test_shards_are_compared_by_what_they_share(released, tmp_path):
    folder = tmp_path / "1000"
    shutil.copytree(released["5B"] / "transformer" / "1000", folder)
    content = torch.load(folder / "mp_rank_00_model_states.pt", weights_only=True)
    halved = {
        name: value[: len(value) // 2] if "dense_h_to_4h" in name else value
        for name, value in content["module"].items()
    }
    for rank in (0, 1):
        torch.save({"module": halved}, folder / f"mp_rank_{rank:02d}_model_states.pt")
    check_model(config_of("5B"), find_checkpoint(folder), nothing)
    with pytest.raises(CheckpointError, match=r"looks like CogVideoX-5B, and .* builds CogVideoX1\.5-5B-I2V"):
        check_model(config_of("1.5-5B-I2V"), find_checkpoint(folder), nothing)


class NeedsNumbers(torch.nn.Module):
    """A user's network that cannot be built without memory."""

    def __init__(self) -> None:
        super().__init__()
        self.size = int(torch.ones(3).sum())


def test_models_that_cannot_be_compared_are_left_to_the_loading(released):
    checkpoint = find_checkpoint(released["5B"] / "transformer")
    own = tiny_config()
    own["model"]["network_config"] = {"target": f"{__name__}.NeedsNumbers"}
    check_model(own, checkpoint, nothing)
    check_model(load_config([ROOT / "configs" / "demo_vae.yaml"]), checkpoint, nothing)


@pytest.mark.parametrize("script", rest_is_slow(["train_video.py", "sample_video.py"], ["train_video.py"]))
def test_the_scripts_stop_at_a_wrong_yaml(released, script):
    words = ["--base", "configs/cogvideox_2b.yaml", f"args.load={released['5B'] / 'transformer'}"]
    words += (
        ["--prompt", "a", "args.only_save_latents=true"]
        if "sample" in script
        else ["args.mode=finetune", "deepspeed.fp16.enabled=false"]
    )
    done = subprocess.run([sys.executable, script, *words], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2 and "use --base configs/cogvideox_5b.yaml, or leave" in done.stderr, done.stderr
