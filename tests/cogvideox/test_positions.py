"""Positions at sizes that a checkpoint was not trained at: sliced, stretched or resampled, and said once."""

import logging
from typing import Any

import pytest
import torch
from diffusers.models.embeddings import get_3d_rotary_pos_embed
from diffusers.pipelines.cogvideo.pipeline_cogvideox import get_resize_crop_region_for_grid
from torch.testing import assert_close

from sat import config
from sat.cogvideox.mixins import sincos_table_3d
from sat.errors import ConfigError
from sat.ops.rotary import rotary_table_3d
from tests.cogvideox.test_diffusers import build_theirs, converted
from tests.cogvideox.tiny import HEAD_DIM, TEXT_LENGTH, build, make_inputs, network_config

GRIDS = [(3, 4, 3), (4, 3, 4), (2, 5, 2), (2, 2, 6), (4, 6, 8), (1, 3, 4)]
"""Frames, rows, columns; the tiny models' own is (4, 3, 4). Portrait, tall, wide, larger, itself."""


def rotary(**params: Any) -> dict[str, Any]:
    node = network_config("5B")["params"]["modules"]["pos_embed_config"]
    return {"pos_embed_config": {**node, "params": {**node["params"], **params}}}


@pytest.mark.parametrize("grid", GRIDS)
def test_a_slice_counts_from_zero(grid: tuple[int, int, int]) -> None:
    mixin = build("5B").get_mixin("pos_embed")
    own = mixin.tables(grid, TEXT_LENGTH, torch.device("cpu"), torch.float32)
    for table, expected in zip(own, rotary_table_3d(grid, HEAD_DIM)):
        assert torch.equal(table[TEXT_LENGTH:], expected)
    whole = rotary_table_3d((9, 9, 9), HEAD_DIM)[0].view(9, 9, 9, -1)
    t, h, w = grid
    assert torch.equal(own[0][TEXT_LENGTH:], whole[:t, :h, :w].reshape(t * h * w, -1))


@pytest.mark.parametrize("grid", GRIDS)
def test_interpolation_is_that_of_diffusers(grid: tuple[int, int, int]) -> None:
    mixin = build("5B", extra_modules=rotary(positions="interpolate")).get_mixin("pos_embed")
    own = mixin.tables(grid, TEXT_LENGTH, torch.device("cpu"), torch.float32)
    region = get_resize_crop_region_for_grid(grid[1:], 4, 3)
    expected = get_3d_rotary_pos_embed(HEAD_DIM, region, grid[1:], grid[0])
    for table, theirs in zip(own, expected):
        assert_close(table[TEXT_LENGTH:], theirs, rtol=0.0, atol=1e-6)  # measured 4e-7
    if grid[1:] == (3, 4):
        assert_close(own[0][TEXT_LENGTH:], rotary_table_3d(grid, HEAD_DIM)[0], rtol=0.0, atol=1e-6)


def test_the_network_at_another_size_is_theirs_with_interpolation() -> None:
    ours = build("5B", extra_modules=rotary(positions="interpolate"))
    theirs = build_theirs("5B")
    theirs.load_state_dict(converted("5B", ours.state_dict()), strict=True)
    inputs = make_inputs("5B", batch=1, frames=2, rows=8, columns=6)  # upright
    region = get_resize_crop_region_for_grid((4, 3), 4, 3)
    with torch.no_grad():
        output = ours(**inputs)
        tables = get_3d_rotary_pos_embed(HEAD_DIM, region, (4, 3), 2)
        expected = theirs(inputs["x"], inputs["context"], inputs["timesteps"], image_rotary_emb=tables).sample
        sliced = build("5B")(**inputs)
    assert_close(output, expected, atol=1e-5, rtol=1e-5)
    assert (output - sliced).abs().max() > 1e-3


@pytest.mark.parametrize("form", ["2B", "5B-I2V"])
def test_tables_of_another_grid_are_said_once(
    form: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(config, "_warned", set())
    network = build(form)
    with caplog.at_level(logging.WARNING, logger="sat"), torch.no_grad():
        network(**make_inputs(form))
        assert not caplog.records  # its own grid
        for _ in range(3):
            network(**make_inputs(form, rows=8, columns=6))
    assert len(caplog.records) == 1
    assert "(4, 3, 4)" in caplog.text and "(4, 4, 3)" in caplog.text


def test_a_fixed_table_is_computed_once_for_each_grid(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def counted(*arguments: Any) -> torch.Tensor:
        calls.append(arguments[0])
        return sincos_table_3d(*arguments)

    network = build("2B")
    monkeypatch.setattr("sat.cogvideox.mixins.sincos_table_3d", counted)
    with torch.no_grad():
        first = network(**make_inputs("2B", rows=8, columns=6))
        assert torch.equal(network(**make_inputs("2B", rows=8, columns=6)), first)
    assert calls == [(4, 4, 3)]


def test_a_learned_table_is_trained_at_another_grid_too() -> None:
    network = build("5B-I2V")
    network(**make_inputs("5B-I2V", rows=8, columns=6)).square().mean().backward()
    gradient = network.get_mixin("pos_embed").pos_embedding.grad
    assert gradient is not None and (gradient[0, TEXT_LENGTH:] != 0).any(dim=1).all()


def test_an_unknown_way_is_refused() -> None:
    with pytest.raises(ConfigError, match="positions is 'stretch'; give slice or interpolate"):
        build("5B", extra_modules=rotary(positions="stretch"))


@pytest.mark.parametrize("form", ["2B", "5B-I2V"])
def test_more_text_than_the_table_holds_is_refused(form: str) -> None:
    inputs = make_inputs(form)
    inputs["context"] = torch.cat([inputs["context"], inputs["context"]], dim=1)
    with pytest.raises(
        ConfigError, match=r"holds 7 text tokens, not 14; set text_length of pos_embed_config and max_l"
    ):
        build(form)(**inputs)
