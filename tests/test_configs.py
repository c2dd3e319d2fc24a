"""The YAML files that we ship: every model with every kind of run, and those of the releases with each other."""

from pathlib import Path

import pytest
import torch

from sat.cogvideox.engine import build_engine
from sat.cogvideox.presets import PRESETS, Preset
from sat.config import ConfigNode, load_config
from sat.data.dataset import SFTDataset
from sat.model.finetune.lora2 import lora_layers
from sat.sampling.args import sample_args, sampling_fps, sampling_precision, sampling_sizes, takes_image
from sat.training.adapters import lora_alpha
from sat.training.args import deepspeed_config, train_args
from sat.training.optim import freeze
from tests.golden_files import golden_root

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
RELEASED = golden_root().parent / "released_configs"
RELEASED_MODELS = sorted(RELEASED.glob("*/cogvideox*.yaml"))

every_preset = pytest.mark.parametrize("preset", PRESETS, ids=lambda preset: preset.name)


def files(preset: Preset, *overlays: str) -> list[Path]:
    return [CONFIGS / preset.config, *(CONFIGS / f"{name}.yaml" for name in overlays)]


def precision_of(preset: Preset) -> str:
    return "fp16" if preset.name.endswith("2B") else "bf16"


def check_training(config: ConfigNode, preset: Preset, lr: float) -> None:
    args = train_args(config)
    assert (args.mode, args.train_iters, args.checkpoint_activations) == ("finetune", 1000, True)
    deepspeed = deepspeed_config(config, args, dp_size=8, device_type="cuda")
    assert (deepspeed.precision, deepspeed.lr, deepspeed.gradient_clipping) == (precision_of(preset), lr, 0.1)
    assert deepspeed.micro_batch_size * deepspeed.grad_accum_steps * 8 == 16


@every_preset
def test_fine_tuning(preset: Preset, tmp_path: Path) -> None:
    config = load_config(files(preset, "sft"))
    check_training(config, preset, 1e-5)
    is_1_5 = preset.patch_size[0] > 1
    params = config["data"]["params"].plain()
    assert params["video_size"] == ([768, 1360] if is_1_5 else [480, 720])
    assert (params["fps"], params["max_num_frames"]) == ((16, 81) if is_1_5 else (8, 49))
    (tmp_path / "videos").mkdir()
    (tmp_path / "videos" / "a.mp4").touch()
    assert len(SFTDataset(tmp_path, **params, missing_caption="empty")) == 1


@every_preset
def test_lora(preset: Preset) -> None:
    config = load_config(files(preset, "sft", "lora"))
    check_training(config, preset, 1e-3)
    with torch.device("meta"):
        engine = build_engine(config["model"], with_encoders=False)
    assert lora_alpha(config) == 1.0
    assert len(lora_layers(engine.network)) == 2 * preset.num_layers
    freeze(engine, engine.not_trainable_prefixes)
    trained = [name for name, parameter in engine.named_parameters() if parameter.requires_grad]
    assert len(trained) == 8 * preset.num_layers  # 240 of 2B, 336 of 5B
    assert all("matrix_" in name for name in trained)


@every_preset
def test_inference(preset: Preset) -> None:
    config = load_config(files(preset, "inference"))
    args = sample_args(config)
    sizes = sampling_sizes(config, args)
    is_1_5 = preset.patch_size[0] > 1
    assert (sizes.num_frames, sizes.height, sizes.width) == ((81, 768, 1360) if is_1_5 else (49, 480, 720))
    assert sampling_fps(config, args) == (16 if is_1_5 else 8)
    assert sampling_precision(config, args) == precision_of(preset)
    assert takes_image(config, args) == (preset.in_channels == 32)


@pytest.mark.skipif(not RELEASED_MODELS, reason="the released configurations do not lie beside the project")
@pytest.mark.parametrize("file", RELEASED_MODELS, ids=lambda file: f"{file.parent.name}/{file.stem}")
def test_released_files_build_an_engine_for_each_of_their_runs(file: Path) -> None:
    """Each generation's model, with its sft.yaml and its inference.yaml."""
    config = load_config([file, file.parent / "sft.yaml"])
    train_args(config)
    assert deepspeed_config(config, train_args(config), 8, "cuda").precision == "bf16"
    with torch.device("meta"):
        engine = build_engine(config["model"], with_encoders=False)
    takes = "i2v" in file.stem
    assert (engine.image_conditioner is not None) == takes
    if engine.image_conditioner is not None:
        is_1_5 = "1.5" in file.stem
        assert engine.image_conditioner.drop_rate == 0.05
        assert engine.image_conditioner.scaling == ("none" if is_1_5 else "multiply")
        assert not engine.image_conditioner.everywhere

    config = load_config([file, file.parent / "inference.yaml"])
    args = sample_args(config)
    if file.parent.name == "main" and "1.5" not in file.stem:
        config["args"].pop("sampling_num_frames")  # that file speaks of 1.5 alone
        args = sample_args(config)
    assert sampling_sizes(config, args).num_frames == (81 if "1.5" in file.stem else 49)
    assert takes_image(config, args) == takes
