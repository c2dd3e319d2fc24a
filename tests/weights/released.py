"""Files that look like the released ones, in names and shapes, and take no room: one number stands for each tensor."""

import json
from pathlib import Path
from typing import Any

import torch

from sat.cogvideox.presets import PRESETS
from tests.golden_files import CARRIED

NETWORKS: dict[str, Any] = json.loads((CARRIED / "released_networks.json").read_text())
PREFIX = "model.diffusion_model."
PRESET_OF = dict(zip(("2B", "5B", "5B-I2V", "1.5-5B", "1.5-5B-I2V"), PRESETS))
"""Name of a released model in the recording -> its preset."""


def released_shapes(form: str) -> dict[str, list[int]]:
    """Every name and shape of a released network; the recording lists those of the first two layers."""
    shapes = {}
    for name, shape in NETWORKS[form]["keys_of_a_two_layer_build"].items():
        for part in (".layers.1.", "adaLN_modulations.1.", "_layernorm_list.1."):
            if part in name:
                for layer in range(2, NETWORKS[form]["layers"]):
                    shapes[name.replace(part, part.replace("1", str(layer)))] = shape
        shapes[name] = shape
    return shapes


def write_released(folder: Path, form: str, is_release_1: bool = False, dtype: torch.dtype = torch.bfloat16) -> Path:
    """A folder `transformer` as released, whose tensors are all one number, seen in many places."""
    shapes = released_shapes(form)
    if is_release_1:
        width, inputs = shapes["mixins.patch_embed.proj.weight"]
        shapes["mixins.patch_embed.proj.weight"] = [width, inputs // 4, 2, 2]
        if form != "2B":
            shapes |= {f"mixins.pos_embed.freqs_{part}": [17550, 64] for part in ("sin", "cos")}
    number = torch.zeros(1, dtype=dtype)
    module = {f"{PREFIX}{name}": number.expand(torch.Size(shape).numel()).view(shape) for name, shape in shapes.items()}
    (folder / "1000").mkdir(parents=True)
    torch.save({"module": module}, folder / "1000" / "mp_rank_00_model_states.pt")
    (folder / "latest").write_text("1000")
    return folder


def write_all_released(folder: Path) -> dict[str, Path]:
    """Form -> a tree with such a transformer; that of 5B-I2V in the layout of release 1.0."""
    for form in PRESET_OF:
        write_released(folder / form / "transformer", form, is_release_1=form == "5B-I2V")
    return {form: folder / form for form in PRESET_OF}
