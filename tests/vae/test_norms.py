"""Norm statistics: without copies, in slices, over an offset, in low precision."""

import pytest
import torch
from einops import rearrange
from torch import nn
from torch.testing import assert_close

from sat.errors import ConfigError
from sat.vae.norms import check_groups, group_statistics, norm_scale_and_shift
from tests.vae.tiny import make_hidden, randomize

LAYOUTS = (torch.contiguous_format, torch.channels_last_3d)
SHAPES = [
    *((batch, frames, 5, 7) for batch in (1, 3) for frames in (1, 2, 5)),
    (1, 1, 1, 1),
    (2, 1, 1, 7),
    (2, 3, 5, 1),
    (2, 1, 6, 6),
]
"""Batch, frames, rows, columns."""

TOLERANCE = {"atol": 5e-6, "rtol": 1e-5}
"""Measured worst: 1.7e-6, on values up to 10."""


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("slice_numel", [1 << 22, 300])
def test_scale_and_shift_are_those_of_the_norm(
    monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...], layout: torch.memory_format, slice_numel: int
) -> None:
    """Single frames in particular: torch takes a tensor with a size of 1 for one of either layout."""
    monkeypatch.setattr("sat.vae.causal_conv.SLICE_NUMEL", slice_numel)
    norm = nn.GroupNorm(4, 8, eps=1e-6)
    randomize(norm)
    hidden = make_hidden(shape, layout)
    scale, shift = norm_scale_and_shift(norm, hidden)
    assert_close(hidden * scale + shift, norm(hidden.contiguous()), **TOLERANCE)


@pytest.mark.parametrize("slice_numel", [1 << 22, 300])
def test_eps_counts_once_where_the_spread_is_small(monkeypatch: pytest.MonkeyPatch, slice_numel: int) -> None:
    monkeypatch.setattr("sat.vae.causal_conv.SLICE_NUMEL", slice_numel)
    norm = nn.GroupNorm(4, 8, eps=1e-6)
    hidden = make_hidden((2, 5, 4, 6), torch.channels_last_3d) * 5e-4  # variance 1e-6, as large as eps
    scale, shift = norm_scale_and_shift(norm, hidden)
    assert_close(hidden * scale + shift, norm(hidden), **TOLERANCE)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_statistics_stand_an_offset_that_dwarfs_the_spread(layout: torch.memory_format) -> None:
    norm = nn.GroupNorm(4, 8, eps=1e-6)
    hidden = make_hidden((1, 4, 8, 8), layout) + 100.0
    scale, shift = norm_scale_and_shift(norm, hidden)
    expected = norm.double()(hidden.double()).float()
    # hidden * scale + shift rounds at the size of 100: float32 leaves 1e-5 of that. Measured: 6.2e-6.
    assert_close(hidden * scale + shift, expected, atol=5e-5, rtol=0.0)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_sums_over_many_values_stay_exact(layout: torch.memory_format) -> None:
    """65,536 values a group, in 32 sums where channels lie innermost, against float64."""
    norm = nn.GroupNorm(4, 8, eps=1e-6)
    hidden = make_hidden((2, 8, 64, 64), layout) + 1.0
    groups = rearrange(hidden.double(), "b (g n) t h w -> b g (n t h w)", g=4)
    mean, var, _ = group_statistics(norm, hidden)
    # Measured: 9.7e-8 contiguous, 3.5e-8 with channels innermost.
    assert_close(mean, groups.mean(dim=2), atol=0.0, rtol=1e-6)
    assert_close(var, groups.var(dim=2, correction=0), atol=0.0, rtol=1e-6)


def test_statistics_of_low_precision_are_float32() -> None:
    norm = nn.GroupNorm(4, 8, eps=1e-6)
    hidden = make_hidden((1, 3, 4, 4), torch.channels_last_3d).bfloat16()
    for values in norm_scale_and_shift(norm.bfloat16(), hidden):
        assert values.dtype == torch.float32
    scale, shift = norm_scale_and_shift(norm.float(), hidden)
    assert_close(hidden * scale + shift, norm(hidden.float()), **TOLERANCE)


def test_channels_that_do_not_divide_into_groups() -> None:
    with pytest.raises(ConfigError, match=r"24 channels does not divide into 32 norm groups; make every ch \* ch_mult"):
        check_groups(32, 24)
