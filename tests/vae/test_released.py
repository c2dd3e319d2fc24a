"""The released VAE: every YAML that holds it builds on the meta device, with the released names, shapes and count."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from sat.config import instantiate_from_config, load_config
from tests.golden_files import CARRIED, golden_root

RELEASED: dict[str, Any] = json.loads((CARRIED / "vae" / "released_state_dict_keys.json").read_text())
ROOT = Path(__file__).parents[2]
FILES = [
    *sorted((golden_root().parent / "released_configs").glob("*/cogvideox*.yaml")),
    *sorted((ROOT / "configs").glob("cogvideox*.yaml")),
]


@pytest.mark.parametrize("file", FILES, ids=lambda file: f"{file.parent.name}/{file.stem}")
def test_a_released_vae_builds_with_released_names_and_shapes(file: Path) -> None:
    config = load_config([file], ["model.first_stage_config.params.ckpt_path=null"])
    with torch.device("meta"):
        vae = instantiate_from_config(config["model"]["first_stage_config"])
    assert {name: list(value.shape) for name, value in vae.state_dict().items()} == RELEASED["keys"]
    assert sum(parameter.numel() for parameter in vae.parameters()) == RELEASED["parameters"] == 215_583_907
    assert (vae.temporal_factor, vae.spatial_factor) == (4, 8)
    # 49 frames of 480 x 720, as the released models were trained on.
    assert vae.latent_shape((49, 3, 480, 720)) == (13, 16, 60, 90)


def test_there_are_files_to_test() -> None:
    assert {file.stem for file in FILES} >= {"cogvideox_2b", "cogvideox_5b"}
