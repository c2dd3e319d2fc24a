"""The released models: every YAML builds on the meta device, with the released names, shapes and counts."""

from pathlib import Path
from typing import Any

import pytest
import torch

from sat.cogvideox.presets import PRESETS, Preset, describe_weights
from sat.config import instantiate_from_config, load_config
from sat.training.optim import freeze
from tests.cogvideox.tiny import build, make_inputs
from tests.golden_files import golden_root
from tests.weights.released import NETWORKS, released_shapes

ROOT = Path(__file__).parents[2]
RELEASED = golden_root().parent / "released_configs"
FORMS = {
    "cogvideox1.5_5b": "1.5-5B",
    "cogvideox1.5_5b_i2v": "1.5-5B-I2V",
    "cogvideox_2b": "2B",
    "cogvideox_5b": "5B",
    "cogvideox_5b_i2v": "5B-I2V",
}
"""Name of a model's file, without `_lora` -> the released model."""


def model_files() -> list[Path]:
    """The YAML files of whole released models: those that users hold, where they lie beside the project, and ours."""
    files = [*sorted(RELEASED.glob("*/cogvideox*.yaml")), *sorted((ROOT / "configs").glob("cogvideox*.yaml"))]
    return [file for file in files if file.stem.removesuffix("_lora") in FORMS]


def build_on_meta(file: Path) -> Any:
    with torch.device("meta"):
        return instantiate_from_config(load_config([file])["model"]["network_config"])


@pytest.mark.parametrize("file", model_files(), ids=lambda file: f"{file.parent.name}/{file.stem}")
def test_a_released_model_builds_with_released_names_and_shapes(file: Path) -> None:
    network = build_on_meta(file)
    form = FORMS[file.stem.removesuffix("_lora")]
    shapes = {name: list(value.shape) for name, value in network.state_dict().items()}
    adapters = {name: shape for name, shape in shapes.items() if "matrix_" in name}
    plain = {name.replace(".original.", "."): shape for name, shape in shapes.items() if name not in adapters}
    assert plain == released_shapes(form)
    assert sum(torch.Size(shape).numel() for shape in plain.values()) == NETWORKS[form]["state_dict_elements"]
    trained = sum(p.numel() for name, p in network.named_parameters() if p.requires_grad and name not in adapters)
    assert trained == NETWORKS[form]["trainable"]
    assert describe_weights({name: tuple(shape) for name, shape in plain.items()}).endswith(form)

    assert bool(adapters) == file.stem.endswith("_lora")
    if adapters:
        freeze(network, ["all"])
        left = {name: p.numel() for name, p in network.named_parameters() if p.requires_grad}
        rank = network.get_mixin("lora").r
        assert set(left) == set(adapters)
        # Three pairs for q, k, v and one for the output, each of 2 · rank · width numbers.
        assert sum(left.values()) == NETWORKS[form]["layers"] * 4 * 2 * rank * network.hidden_size


def test_all_released_models_are_there() -> None:
    files = [file for file in model_files() if file.parent == ROOT / "configs"]
    assert {FORMS[file.stem.removesuffix("_lora")] for file in files} == set(FORMS.values())


@pytest.mark.parametrize("form", ["2B", "5B", "5B-I2V"])
def test_the_patch_layout_of_release_1_loads(form: str) -> None:
    trained = build(form)
    state = trained.state_dict()
    kernel = state["mixins.patch_embed.proj.weight"]
    older = {**state, "mixins.patch_embed.proj.weight": kernel.reshape(len(kernel), -1, 2, 2)}
    if form != "2B":
        older |= {f"mixins.pos_embed.freqs_{part}": torch.zeros(48, 16) for part in ("sin", "cos")}
    loaded = build(form, seed=1, patch_size=2)
    loaded.load_state_dict(older, strict=True)
    inputs = make_inputs(form)
    with torch.no_grad():
        assert torch.equal(loaded(**inputs), trained(**inputs))


def leaves(node: Any, path: str = "") -> dict[str, Any]:
    """Dotted path -> value of everything in a configuration."""
    if isinstance(node, dict):
        return {key: value for name, item in node.items() for key, value in leaves(item, f"{path}.{name}").items()}
    if isinstance(node, list) and any(isinstance(item, dict) for item in node):
        return {key: value for n, item in enumerate(node) for key, value in leaves(item, f"{path}.{n}").items()}
    return {path.removeprefix("."): node}


OUR_OWN = ("ckpt_path", "model_dir", "patch_size")
"""Values of a model's YAML that we write in our own way."""


@pytest.mark.skipif(not RELEASED.is_dir(), reason="the released configurations do not lie beside the project")
@pytest.mark.parametrize("form", FORMS)
def test_our_yaml_holds_the_released_values(form: str) -> None:
    released = RELEASED / ("main" if form.startswith("cogvideox1.5") else "v1.0") / f"{form}.yaml"
    theirs = leaves(load_config([released])["model"].plain())
    ours = leaves(load_config([ROOT / "configs" / f"{form}.yaml"])["model"].plain())
    if form.startswith("cogvideox1.5"):
        # The released grid is the capacity of a table; ours is the clip that the model was trained on.
        sizes = [ours.pop(f"network_config.params.latent_{side}") for side in ("height", "width")]
        assert [8 * size for size in sizes] == [768, 1360]
    for path, value in ours.items():
        key = path.rpartition(".")[2]
        if path in theirs and key not in OUR_OWN:
            assert value == theirs[path], path
    unknown = {path for path in ours if path not in theirs}
    # In release 1.0 the interpolation stands with the table, as here; the rest only spells out a default.
    assert all(path.endswith(("shift_scale", "interpolation")) for path in unknown), unknown
    assert {ours[path] for path in unknown if path.endswith("shift_scale")} <= {1.0}


@pytest.mark.parametrize("preset", PRESETS, ids=lambda preset: preset.name)
def test_each_preset_names_its_yaml(preset: Preset) -> None:
    model = load_config([ROOT / "configs" / preset.config])["model"]
    params = model["network_config"]["params"]
    sizes = (params["hidden_size"], params["num_layers"], params["in_channels"], tuple(params["patch_size"]))
    assert sizes == (preset.hidden_size, preset.num_layers, preset.in_channels, preset.patch_size)
    assert model.get("noised_image_input", False) == (preset.in_channels == 32)
