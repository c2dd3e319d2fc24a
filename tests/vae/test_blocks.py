"""Residual blocks, with and without gradients, and what all networks check alike."""

from functools import partial

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.testing import assert_close

from sat.errors import ConfigError
from sat.vae import Encoder3D
from sat.vae.blocks import IDENTITY_BRANCH_SCALE, ResidualBlock, count_halvings, shrink_branches
from sat.vae.context import ChunkContext
from sat.vae.decoder import SpatialNormSwish
from sat.vae.norms import NormSwish
from tests.vae.tiny import SIZE, make_hidden, make_latents, randomize

LAYOUTS = (torch.contiguous_format, torch.channels_last_3d)
TOLERANCE = {"atol": 5e-6, "rtol": 1e-5}
"""Measured worst: 1.7e-6, on values up to 10."""


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(2, 1, 4, 6), (1, 3, 4, 6), (2, 5, 2, 3)], ids=str)
@pytest.mark.parametrize("conditioned", [False, True])
def test_a_block_computes_the_same_with_and_without_gradients(
    monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...], layout: torch.memory_format, conditioned: bool
) -> None:
    monkeypatch.setattr("sat.vae.causal_conv.SLICE_NUMEL", 150)
    make_norm = partial(SpatialNormSwish, 4, 4, False, "released") if conditioned else partial(NormSwish, 4)
    block = ResidualBlock(8, 16, make_norm)
    randomize(block)
    latents = make_latents((shape[1] + 1) // 2, batch=shape[0]).transpose(1, 2)
    ctx = ChunkContext("split", latents=latents)
    hidden = make_hidden(shape, layout)
    before = hidden.clone()
    expected = block(hidden, ctx)
    assert expected.requires_grad
    with torch.no_grad():
        assert_close(block(hidden, ctx), expected, **TOLERANCE)
    assert torch.equal(hidden, before)  # what is done in place is done to no one else's values


def test_a_block_is_what_its_name_says() -> None:
    block = ResidualBlock(8, 16, partial(NormSwish, 4))
    randomize(block)
    hidden = make_hidden((1, 3, 4, 6), torch.contiguous_format)
    ctx = ChunkContext("split")

    def swished(norm: NormSwish, values: Tensor) -> Tensor:
        return F.silu(F.group_norm(values, 4, norm.weight, norm.bias, 1e-6))

    inner = block.conv1(swished(block.norm1, hidden))  # type: ignore[arg-type]
    expected = block.nin_shortcut(hidden) + block.conv2(swished(block.norm2, inner))  # type: ignore[arg-type]
    assert_close(block(hidden, ctx), expected, **TOLERANCE)


def test_dropout_acts_in_training_alone() -> None:
    block = ResidualBlock(8, 8, partial(NormSwish, 4), dropout=0.5)
    hidden, ctx = make_hidden((1, 2, 4, 4), torch.contiguous_format), ChunkContext("split")
    with torch.no_grad():
        assert not torch.equal(block(hidden, ctx), block(hidden, ctx))
        assert torch.equal(block.eval()(hidden, ctx), block(hidden, ctx))


def test_branches_are_shrunk_under_identity() -> None:
    torch.manual_seed(0)
    encoder = Encoder3D(**SIZE)
    before = encoder.mid.block_1.conv2.conv.weight.clone()
    shrink_branches(encoder)
    assert torch.equal(encoder.mid.block_1.conv2.conv.weight, before * IDENTITY_BRANCH_SCALE)


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("times, expected", [(1, 0), (2, 1), (4, 2), (8, 3)])
def test_halvings_of_time(times: int, expected: int) -> None:
    assert count_halvings((1, 2, 2, 4), times) == expected


@pytest.mark.parametrize("times", [0, 3, -4])
def test_times_that_are_no_power_of_two(times: int) -> None:
    with pytest.raises(ConfigError, match=rf"temporal_compress_times is {times}; give a power of two"):
        count_halvings((1, 2, 2, 4), times)


def test_more_halvings_than_levels() -> None:
    with pytest.raises(ConfigError, match=r"halves time 2 times, but ch_mult has 2 levels and so 1 places to do it"):
        count_halvings((1, 2), 4)
