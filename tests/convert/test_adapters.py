"""Adapters through every dialect: the same update, the same scale, and the same bits where that can be."""

import json
from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from sat.compat.lora_names import DIFFUSERS_METADATA, LORA_TARGETS
from sat.convert.adapters import (
    SAT_ALPHA,
    Adapter,
    Adapters,
    adapters_from_names,
    adapters_from_sat,
    adapters_to_diffusers,
    adapters_to_kohya,
    adapters_to_sat,
    largest_difference,
    merge_adapters,
)
from sat.errors import CheckpointError
from tests.compat.test_comfy_names import comfy_keys

WIDTH, RANK = 12, 4
ATTENTION = tuple(f"transformer_blocks.{layer}.attn1.{part}" for layer in (0, 1) for part in ("to_q", "to_k", "to_v"))
ALL = (*ATTENTION, "transformer_blocks.0.attn1.to_out.0", "transformer_blocks.1.attn1.to_out.0")


def make(
    modules: tuple[str, ...] = ALL, rank: int = RANK, alpha: float = 1.0, dtype: torch.dtype = torch.float32
) -> Adapters:
    generator = torch.Generator().manual_seed(0)
    return {
        module: Adapter(
            torch.randn(rank, WIDTH, generator=generator).to(dtype),
            torch.randn(WIDTH, rank, generator=generator).to(dtype),
            alpha,
        )
        for module in modules
    }


def assert_same(got: Adapters, expected: Adapters) -> None:
    assert set(got) == set(expected)
    for module, adapter in expected.items():
        other = got[module]
        assert other.alpha == adapter.alpha, module
        for one, two in ((other.down, adapter.down), (other.up, adapter.up)):
            assert one.dtype == two.dtype and torch.equal(one, two), module


# --- SAT -------------------------------------------------------------------------------------------------------------


def test_sats_names_are_those_of_its_released_files() -> None:
    state, alpha = adapters_to_sat(make())
    assert (alpha, len(state)) == (1.0, 8 * 2)  # eight tensors a layer, as released
    layer = "transformer.layers.1.attention."
    shapes = {name: tuple(value.shape) for name, value in state.items() if name.startswith(layer)}
    assert shapes == {
        **{f"{layer}query_key_value.matrix_A.{block}": (RANK, WIDTH) for block in range(3)},
        **{f"{layer}query_key_value.matrix_B.{block}": (WIDTH, RANK) for block in range(3)},
        f"{layer}dense.matrix_A.0": (RANK, WIDTH),
        f"{layer}dense.matrix_B.0": (WIDTH, RANK),
    }


def test_sat_there_and_back_is_the_same_bit_for_bit() -> None:
    adapters = make(alpha=3.0)
    state, alpha = adapters_to_sat(adapters)
    assert_same(adapters_from_sat(state, alpha), adapters)
    prefixed = {f"model.diffusion_model.{name}": value for name, value in state.items()}
    assert_same(adapters_from_sat(prefixed, alpha), adapters)


def test_a_fused_projection_with_one_adapter_gets_zeros_for_the_others() -> None:
    adapters = make(("transformer_blocks.0.attn1.to_v",))
    state, alpha = adapters_to_sat(adapters)
    assert len(state) == 6
    back = adapters_from_sat(state, alpha)
    assert torch.equal(back["transformer_blocks.0.attn1.to_v"].update(), adapters[ALL[2]].update())
    assert not back["transformer_blocks.0.attn1.to_q"].update().any()


def test_unequal_ranks_and_alphas_become_one_with_the_same_updates() -> None:
    adapters = {**make(ALL[:2], rank=2, alpha=5.0), **make(ALL[2:4], rank=6, alpha=1.0)}
    state, alpha = adapters_to_sat(adapters)
    assert alpha == 6.0 and {len(value) for name, value in state.items() if "_A." in name} == {6}
    back = adapters_from_sat(state, alpha)
    for module, adapter in adapters.items():
        torch.testing.assert_close(back[module].update(), adapter.update(), rtol=1e-6, atol=1e-6)


def test_modules_that_sat_splits_otherwise_are_refused_with_the_way_out() -> None:
    with pytest.raises(CheckpointError, match=r"no place for an adapter on '\S+\.norm1\.linear'; .* --merge-lora"):
        adapters_to_sat(make(("transformer_blocks.0.norm1.linear",)))


# --- diffusers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("alpha", [1.0, 64.0, 3.0])
def test_diffusers_files_carry_the_scale_in_the_matrices(alpha: float, dtype: torch.dtype) -> None:
    adapters = make(rank=128, alpha=alpha, dtype=dtype)
    state, metadata = adapters_to_diffusers(adapters)
    assert metadata == {SAT_ALPHA: str(alpha)}
    for module, adapter in adapters.items():
        down, up = (state[f"transformer.{module}.lora_{letter}.weight"].float() for letter in "AB")
        torch.testing.assert_close(up @ down, adapter.update(), rtol=1e-5, atol=1e-5)  # what their loader adds
    back = adapters_from_names(state, metadata)
    if alpha in (1.0, 64.0):  # alpha / 128 is a power of two: exact
        assert_same(back, adapters)
    assert largest_difference(adapters, back) < 1e-5


def test_halves_too_small_for_their_precision_are_scaled_in_float32() -> None:
    up = torch.full((WIDTH, 128), 2.0**-20, dtype=torch.float16)  # 2^-27 is below the smallest float16
    adapters = {ALL[0]: Adapter(torch.ones(128, WIDTH, dtype=torch.float16), up, 1.0)}
    state, metadata = adapters_to_diffusers(adapters)
    assert state[f"transformer.{ALL[0]}.lora_B.weight"].dtype == torch.float32
    assert_same(adapters_from_names(state, metadata), adapters)


SETTINGS = {"transformer.r": 4, "transformer.lora_alpha": 2, "transformer.alpha_pattern": {"attn1.to_q": 8}}


@pytest.mark.parametrize(
    ("metadata", "alpha", "expected"),
    [
        ({}, None, {"to_q": 4.0, "to_k": 4.0}),  # the rank: what their loader takes
        ({DIFFUSERS_METADATA: json.dumps(SETTINGS)}, None, {"to_q": 8.0, "to_k": 2.0}),
        ({DIFFUSERS_METADATA: json.dumps({"lora_alpha": 16})}, None, {"to_q": 16.0, "to_k": 16.0}),
        ({DIFFUSERS_METADATA: json.dumps(SETTINGS)}, 1.0, {"to_q": 1.0, "to_k": 1.0}),
        ({DIFFUSERS_METADATA: "{"}, None, {"to_q": 4.0, "to_k": 4.0}),
    ],
)
def test_alpha_of_their_files_comes_from_where_they_keep_it(
    metadata: Mapping[str, str], alpha: float | None, expected: Mapping[str, float]
) -> None:
    state, _ = adapters_to_diffusers(make(ALL[:2], alpha=float(RANK)))
    adapters = adapters_from_names(state, metadata, alpha)
    assert {module.rpartition(".")[2]: adapter.alpha for module, adapter in adapters.items()} == expected


@pytest.mark.parametrize(
    ("start", "down", "up"),
    [
        ("transformer.", ".lora_A.weight", ".lora_B.weight"),
        ("", ".lora_A.weight", ".lora_B.weight"),
        ("base_model.model.", ".lora_A.default.weight", ".lora_B.default.weight"),
        ("transformer.", ".lora.down.weight", ".lora.up.weight"),
        ("diffusion_model.", ".lora_down.weight", ".lora_up.weight"),
    ],
)
def test_every_spelling_of_their_names_is_read(start: str, down: str, up: str) -> None:
    adapters = make(alpha=float(RANK))
    state: dict[str, Tensor] = {}
    for module, adapter in adapters.items():
        state |= {f"{start}{module}{down}": adapter.down, f"{start}{module}{up}": adapter.up}
    assert_same(adapters_from_names(state, {}), adapters)


# --- kohya and ComfyUI -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("has_comfy_names", [True, False])
def test_kohyas_names_have_an_alpha_beside_each_module(has_comfy_names: bool) -> None:
    adapters = make(alpha=2.0)
    state = adapters_to_kohya(adapters, has_comfy_names)
    assert len(state) == 3 * len(adapters)
    root = "lora_unet_blocks_1_attn_out" if has_comfy_names else "lora_unet_transformer_blocks_1_attn1_to_out_0"
    assert {f"{root}.lora_down.weight", f"{root}.lora_up.weight", f"{root}.alpha"} <= set(state)
    assert float(state[f"{root}.alpha"]) == 2.0
    assert_same(adapters_from_names(state, {}), adapters)
    doubled = {name.replace("lora_unet_", "lora_unet__"): value for name, value in state.items()}  # VideoX-Fun's
    assert_same(adapters_from_names(doubled, {}), adapters)


def test_comfyui_finds_every_adapter_in_its_key_map() -> None:
    # comfy/lora.py, model_lora_keys_unet: the model's keys without `.weight`, dots as underscores after `lora_unet_`.
    key_map = {f"lora_unet_{key.removesuffix('.weight').replace('.', '_')}" for key in comfy_keys("1.5-5B-I2V")}
    modules = tuple(pattern.format(layer=1) for pattern in LORA_TARGETS)
    state = adapters_to_kohya(make(modules), has_comfy_names=True)
    assert len(state) == 3 * len(LORA_TARGETS)
    assert {name.partition(".")[0] for name in state} <= key_map


def test_comfyuis_own_dotted_names_are_read() -> None:
    adapters = make(("transformer_blocks.1.ff.net.2",), alpha=1.0)
    root, adapter = "diffusion_model.blocks.1.ff_out", adapters["transformer_blocks.1.ff.net.2"]
    state = {f"{root}.lora_A.weight": adapter.down, f"{root}.lora_B.weight": adapter.up}
    assert_same(adapters_from_names({**state, f"{root}.alpha": torch.tensor(1.0)}, {}), adapters)


# --- merging, and what is wrong --------------------------------------------------------------------------------------


def test_merging_adds_the_update_and_leaves_the_rest() -> None:
    adapters = make(ALL[:1], alpha=2.0)
    state = {f"{ALL[0]}.weight": torch.randn(WIDTH, WIDTH).bfloat16(), "proj_out.weight": torch.ones(1)}
    merged = merge_adapters(state, adapters)
    assert merged["proj_out.weight"] is state["proj_out.weight"]
    expected = state[f"{ALL[0]}.weight"].float() + adapters[ALL[0]].up @ adapters[ALL[0]].down * 2.0 / RANK
    assert torch.equal(merged[f"{ALL[0]}.weight"], expected.bfloat16())


def test_adapters_of_another_model_are_refused() -> None:
    adapters = make(ALL[:1])
    with pytest.raises(CheckpointError, match=r"have one on '\S+\.attn1\.to_q', which the model does not have"):
        merge_adapters({}, adapters)
    with pytest.raises(CheckpointError, match=r"is for a weight of \(12, 12\), the model's is \(8, 12\); they belong"):
        merge_adapters({f"{ALL[0]}.weight": torch.zeros(8, 12)}, adapters)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({f"transformer.{ALL[0]}.lora_B.weight": None}, r"on 'transformer_blocks\.0\.attn1\.to_q' has only one of its"),
        ({f"transformer.{ALL[0]}.lora_A.weight": torch.ones(3, 12)}, r"has matrices of \(3, 12\) and \(12, 4\), which"),
        (
            {"transformer.transformer_blocks.0.attn1.to_z.lora_A.weight": torch.ones(4, 12)},
            r"no module .* has the adapter '\S+to_z\.lora_A\.weight'; did you mean '\S+to_\w\.lora_A\.weight'",
        ),
        ({"text_encoder.x.lora_A.weight": torch.ones(4, 12)}, r"no module of a CogVideoX transformer has the adapter"),
    ],
)
def test_halves_misfits_and_unknown_names_are_refused(changes: Mapping[str, Tensor | None], message: str) -> None:
    state, metadata = adapters_to_diffusers(make())
    changed = {name: value for name, value in {**state, **changes}.items() if value is not None}
    with pytest.raises(CheckpointError, match=message):
        adapters_from_names(changed, metadata)


def test_sat_names_that_are_no_modules_are_refused() -> None:
    with pytest.raises(CheckpointError, match=r"no place for the adapter 'transformer\.layers\.0\.other\.matrix_A\.0'"):
        adapters_from_sat({"transformer.layers.0.other.matrix_A.0": torch.ones(4, 12)}, 1.0)
