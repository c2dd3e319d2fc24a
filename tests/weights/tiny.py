"""Tiny trees in the released and in diffusers' layout, for a test to serve, damage and convert."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from sat.config import instantiate_from_config
from tests.cogvideox.tiny import build

FORMS = {
    "cogvideox-2b": "2B",
    "cogvideox-5b": "5B",
    "cogvideox-5b-i2v": "5B-I2V",
    "cogvideox1.5-5b": "1.5-5B",
    "cogvideox1.5-5b-i2v": "1.5-5B-I2V",
}
"""Name of a released model -> its form in tests.cogvideox.tiny."""


def network(form: str, seed: int = 0) -> torch.nn.Module:
    """A tiny network of a form, on latents of 16 channels as released."""
    image = 16 if "I2V" in form else 0
    return build(form, seed=seed, in_channels=16 + image, out_channels=16)


def write_transformer(folder: Path, form: str, iteration: str = "1000", seed: int = 0) -> dict[str, torch.Tensor]:
    """The released layout; returns the network's state dict."""
    state = network(form, seed).state_dict()
    (folder / iteration).mkdir(parents=True)
    module = {f"model.diffusion_model.{name}": value for name, value in state.items()}
    torch.save({"module": module}, folder / iteration / "mp_rank_00_model_states.pt")
    (folder / "latest").write_text(f"{iteration}\n")
    return state


def vae_state(seed: int = 0) -> dict[str, torch.Tensor]:
    """Weights of a tiny VAE of four levels under our names."""
    sizes = {"ch": 8, "ch_mult": [1, 1, 1, 1], "num_res_blocks": 1, "z_channels": 4, "norm_groups": 4}
    torch.manual_seed(seed)
    halves = {
        half: instantiate_from_config(
            {"target": f"vae_modules.cp_enc_dec.ContextParallel{half.title()}3D", "params": sizes}
        )
        for half in ("encoder", "decoder")
    }
    return {f"{half}.{name}": value for half, module in halves.items() for name, value in module.state_dict().items()}


def write_vae(folder: Path) -> dict[str, torch.Tensor]:
    """The released layout; returns the state dict."""
    folder.mkdir(parents=True)
    state = vae_state()
    torch.save({"state_dict": state}, folder / "3d-vae.pt")
    return state


def write_text_encoder(encoder: Path, tokenizer: Path, num_shards: int = 2) -> None:
    """T5's files in one folder or two. The tokenizer's model is no real one."""
    names = ["shared.weight", "encoder.block.0.layer.0.SelfAttention.q.weight", "encoder.final_layer_norm.weight"]
    for folder in (encoder, tokenizer):
        folder.mkdir(parents=True, exist_ok=True)
    (encoder / "config.json").write_text(json.dumps({"model_type": "t5", "d_model": 4}))
    shards = {}
    for index in range(num_shards):
        file = f"model-{index + 1:05d}-of-{num_shards:05d}.safetensors"
        own = names[index::num_shards]
        save_file({name: torch.full((8, 4), float(index)) for name in own}, encoder / file)
        shards |= dict.fromkeys(own, file)
    (encoder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    (tokenizer / "spiece.model").write_bytes(b"\n\x0c\n\x05<pad>\x15\x00\x00\x00\x00\x18\x03" * 20)
    for name in ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"):
        (tokenizer / name).write_text("{}")


def write_tree(folder: Path, form: str = "5B") -> Path:
    """A whole released tree."""
    write_transformer(folder / "transformer", form)
    write_vae(folder / "vae")
    write_text_encoder(folder / "t5-v1_1-xxl", folder / "t5-v1_1-xxl")
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    """Path -> content of all files below a folder."""
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}
