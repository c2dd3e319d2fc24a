"""Our transformer against diffusers' on converted weights: outputs, and the gradient of every parameter."""

from typing import Any

import pytest
import torch
from diffusers import CogVideoXTransformer3DModel
from diffusers.models.embeddings import get_3d_rotary_pos_embed
from torch.testing import assert_close

from sat.cogvideox.mixins import FINAL_NORM_EPSILON
from sat.compat.diffusers_names import DIT_LEFT_OUT, DIT_POSITIONS, dit_from_diffusers, dit_to_diffusers
from sat.errors import CheckpointError
from tests.cogvideox.tiny import FORMS, HEAD_DIM, HEADS, TEXT_LENGTH, TEXT_WIDTH, build, make_inputs

GRADIENT_SHARE = 1e-5
"""Of a tensor's largest entry. Measured worst over all forms and parameters: 1.4e-6."""


def build_theirs(form: str) -> CogVideoXTransformer3DModel:
    options = FORMS[form]
    theirs = CogVideoXTransformer3DModel(
        num_attention_heads=HEADS,
        attention_head_dim=HEAD_DIM,
        in_channels=options["in_channels"],
        out_channels=4,
        time_embed_dim=20,
        ofs_embed_dim=options.get("ofs_embed_dim"),
        text_embed_dim=TEXT_WIDTH,
        num_layers=2,
        sample_width=8,
        sample_height=6,
        sample_frames=13,
        patch_size=2,
        patch_size_t=None if options["patch_size"][0] == 1 else options["patch_size"][0],
        max_text_seq_length=TEXT_LENGTH,
        spatial_interpolation_scale=1.875,
        use_rotary_positional_embeddings=options["positions"] != "sincos",
        use_learned_positional_embeddings="learned" in options["positions"],
    )
    # The only number in which the two differ: their output norm takes 1e-5.
    theirs.norm_out.norm.eps = FINAL_NORM_EPSILON
    return theirs


def their_rotary(form: str, frames: int, rows: int, columns: int) -> Any:
    if FORMS[form]["positions"] == "sincos":
        return None
    o, p, q = FORMS[form]["patch_size"]
    grid = (rows // p, columns // q)
    return get_3d_rotary_pos_embed(HEAD_DIM, ((0, 0), grid), grid, frames // o)


def converted(form: str, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return dit_to_diffusers(state, FORMS[form]["patch_size"], "learned" in FORMS[form]["positions"])


@pytest.mark.parametrize("form", FORMS)
def test_outputs_and_all_gradients_are_theirs(form: str) -> None:
    ours, theirs = build(form), build_theirs(form)
    theirs.load_state_dict(converted(form, ours.state_dict()), strict=True)
    inputs = make_inputs(form)
    cotangent = torch.randn(2, 4, 4, 6, 8, generator=torch.Generator().manual_seed(2))

    output = ours(**inputs)
    (output * cotangent).mean().backward()
    expected = theirs(
        inputs["x"],
        inputs["context"],
        inputs["timesteps"],
        ofs=inputs.get("ofs"),
        image_rotary_emb=their_rotary(form, 4, 6, 8),
        return_dict=False,
    )[0]
    (expected * cotangent).mean().backward()
    # Measured worst over the forms: 9.5e-7.
    assert_close(output, expected, atol=5e-6, rtol=5e-6)

    gradients = {name: p.grad for name, p in ours.named_parameters() if p.grad is not None and name != DIT_POSITIONS}
    own = converted(form, gradients)
    for name, parameter in theirs.named_parameters():
        assert parameter.grad is not None
        if name.endswith("norm_k.bias") and form == "2B":
            # Without rotary positions the bias of the key norm cannot change the softmax: zero up to rounding.
            assert_close(own[name], torch.zeros_like(own[name]), atol=1e-9, rtol=0.0)
            continue
        allowed = GRADIENT_SHARE * float(parameter.grad.abs().max())
        assert_close(own[name], parameter.grad, atol=allowed, rtol=0.0, msg=lambda text, name=name: f"{name}: {text}")
    assert set(own) == set(dict(theirs.named_parameters()))


@pytest.mark.parametrize("form", ["2B", "5B", "1.5-5B"])
def test_smaller_grids_agree_too(form: str) -> None:
    ours, theirs = build(form), build_theirs(form)
    theirs.load_state_dict(converted(form, ours.state_dict()), strict=True)
    # 2B: diffusers computes sin-cos positions for the new grid, as ours does when rows or columns differ.
    inputs = make_inputs(form, batch=1, frames=2, rows=4, columns=6)
    with torch.no_grad():
        output = ours(**inputs)
        rotary = their_rotary(form, 2, 4, 6)
        expected = theirs(inputs["x"], inputs["context"], inputs["timesteps"], image_rotary_emb=rotary)
    assert_close(output, expected.sample, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_names_go_both_ways_bit_for_bit(form: str) -> None:
    state = build(form).state_dict()
    back = dit_from_diffusers(converted(form, state))
    left_out = set(DIT_LEFT_OUT) if "learned" in FORMS[form]["positions"] else {*DIT_LEFT_OUT, DIT_POSITIONS}
    assert set(back) == set(state) - left_out
    for name, value in back.items():
        assert torch.equal(value, state[name]), name


@pytest.mark.parametrize("form", FORMS)
def test_their_names_go_both_ways_bit_for_bit(form: str) -> None:
    state = build_theirs(form).state_dict()
    back = converted(form, dit_from_diffusers(state))
    assert set(back) == set(state)
    for name, value in back.items():
        assert torch.equal(value, state[name]), name


def test_adapters_must_be_folded_in_first() -> None:
    state = {"transformer.layers.0.attention.query_key_value.matrix_A.0": torch.zeros(1)}
    with pytest.raises(CheckpointError, match=r"no place for the weight .*fold adapters into the weights first"):
        dit_to_diffusers(state, 2, False)


def test_a_name_that_is_not_theirs_is_refused() -> None:
    with pytest.raises(CheckpointError, match=r"this project has no place for the weight 'unet\.conv_in\.weight'"):
        dit_from_diffusers({"unet.conv_in.weight": torch.zeros(1)})
