"""ComfyUI's names: the keys that its model has, and both ways bit for bit."""

import pytest
import torch
from torch import nn

from sat.compat.comfy_names import comfy_from_diffusers, comfy_to_diffusers
from sat.errors import CheckpointError
from tests.cogvideox.test_diffusers import build_theirs
from tests.cogvideox.tiny import FORMS


def comfy_keys(form: str, num_layers: int = 2) -> set[str]:
    """The keys of ComfyUI's CogVideoXTransformer3DModel, as its constructor names its modules."""
    outside = ["patch_embed.proj", "patch_embed.text_proj", "time_embedding_linear_1", "time_embedding_linear_2"]
    outside += ["norm_final", "norm_out.linear", "norm_out.norm", "proj_out"]
    if "ofs_embed_dim" in FORMS[form]:
        outside += ["ofs_embedding_linear_1", "ofs_embedding_linear_2"]
    block = ["norm1.linear", "norm1.norm", "q", "k", "v", "norm_q", "norm_k", "attn_out"]
    block += ["norm2.linear", "norm2.norm", "ff_proj", "ff_out"]
    modules = [*outside, *(f"blocks.{layer}.{name}" for layer in range(num_layers) for name in block)]
    table = {"patch_embed.pos_embedding"} if "learned" in FORMS[form]["positions"] else set()
    return {f"{module}.{part}" for module in modules for part in ("weight", "bias")} | table


@pytest.mark.parametrize("form", FORMS)
def test_the_keys_are_those_of_their_model_and_go_both_ways(form: str) -> None:
    state = build_theirs(form).state_dict()
    there = comfy_from_diffusers(state)
    assert set(there) == comfy_keys(form)
    prefixed = {f"model.diffusion_model.{name}": value for name, value in there.items()}
    for back in (comfy_to_diffusers(there), comfy_to_diffusers(prefixed)):
        assert set(back) == set(state)
        assert all(torch.equal(back[name], value) for name, value in state.items())


def test_names_of_other_models_are_refused() -> None:
    state = nn.Linear(1, 1).state_dict()
    with pytest.raises(CheckpointError, match=r"ComfyUI has no place for the weight 'weight'"):
        comfy_from_diffusers(state)
    with pytest.raises(CheckpointError, match=r"this project has no place for the weight 'double_blocks\.0\.weight'"):
        comfy_to_diffusers({"double_blocks.0.weight": state["weight"]})
