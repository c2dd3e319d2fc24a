"""Tiny models of each released form as whole trees: transformer, VAE, T5, and the YAML that describes them."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from sat.config import instantiate_from_config
from sat.vae import save_vae_state
from sat.weights.from_diffusers import save_transformer
from tests.cogvideox.tiny import TEXT_LENGTH, build, network_config
from tests.tiny import VAE
from tests.vae.tiny import randomize
from tools.make_tiny_t5 import make

PROMPTS = ("a blob moving right", "")
SGM = "sgm.modules.diffusionmodules"
TEXT_WIDTH = 64
"""Of the tiny T5."""
STEPS, SCALE = 10, 6.0
LATENTS = (4, 16, 6, 8)
"""t c h w of a clip: 13 frames of 48 x 64 pixels."""
SHIFTS = {"2B": 3.0}
SCALES = {"2B": 1.15258426}
PROJECTION = {
    "target": "dit_video_concat.ImagePatchEmbeddingMixin",
    "params": {"text_hidden_size": TEXT_WIDTH},
}


@dataclass(frozen=True)
class Tree:
    """A tree on disk and what is in it."""

    path: Path
    yaml: Path
    state: dict[str, Tensor]
    """The transformer's, under bare names."""
    vae: dict[str, Tensor]


def channels(form: str) -> dict[str, int]:
    """in_channels and out_channels, as released."""
    return {"in_channels": 32 if "I2V" in form else 16, "out_channels": 16}


def section(form: str, folder: Path, num_layers: int = 2, modules: dict[str, Any] | None = None) -> dict[str, Any]:
    """A model section of a form, with the VAE and T5 in a folder."""
    schedule = {
        "target": f"{SGM}.discretizer.ZeroSNRDDPMDiscretization",
        "params": {"shift_scale": SHIFTS.get(form, 1.0)},
    }
    network = network_config(form, num_layers, {"patch_embed_config": PROJECTION, **(modules or {})}, **channels(form))
    return {
        "scale_factor": SCALES.get(form, 0.7),
        "noised_image_input": "I2V" in form,
        "network_config": network,
        "denoiser_config": {
            "target": f"{SGM}.denoiser.DiscreteDenoiser",
            "params": {
                "scaling_config": {"target": f"{SGM}.denoiser_scaling.VideoScaling"},
                "discretization_config": schedule,
            },
        },
        "conditioner_config": {
            "target": "sgm.modules.GeneralConditioner",
            "params": {
                "emb_models": [
                    {
                        "input_key": "txt",
                        "target": "sgm.modules.encoders.modules.FrozenT5Embedder",
                        "params": {"model_dir": str(folder / "t5-v1_1-xxl"), "max_length": TEXT_LENGTH},
                    }
                ]
            },
        },
        "first_stage_config": {**VAE, "params": {**VAE["params"], "ckpt_path": str(folder / "vae" / "3d-vae.pt")}},
        "sampler_config": {
            "target": f"{SGM}.sampling.VPSDEDPMPP2MSampler",
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


def make_vae() -> dict[str, Tensor]:
    """A VAE of 16 latent channels with random numbers in every weight."""
    vae = instantiate_from_config(VAE)
    randomize(vae)
    return dict(vae.state_dict())


def write_tree(folder: Path, form: str, t5: Path | None = None) -> Tree:
    """The released tree; t5: a folder to link, else one is made."""
    state = build(form, extra_modules={"patch_embed_config": PROJECTION}, **channels(form)).state_dict()
    save_transformer(state, folder / "transformer")
    vae = make_vae()
    (folder / "vae").mkdir()
    save_vae_state(vae, folder / "vae" / "3d-vae.pt")
    if t5 is None:
        make(list(PROMPTS[:1]), folder / "t5-v1_1-xxl")
    else:
        (folder / "t5-v1_1-xxl").symlink_to(t5)
    file = folder / "model.yaml"
    file.write_text(yaml.safe_dump({"model": section(form, folder)}), encoding="utf-8")
    return Tree(folder, file, state, vae)


def random_table(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state dict whose unused position table holds random numbers, as in released files."""
    name = "transformer.position_embeddings.weight"
    if name not in state:
        return state
    return {**state, name: torch.randn(state[name].shape, generator=torch.Generator().manual_seed(9))}
