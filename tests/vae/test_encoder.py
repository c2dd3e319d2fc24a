"""Frame counts of the encoder, its ways down, and its options."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.testing import assert_close

from sat.vae import Encoder3D, count_latent_frames
from sat.vae.causal_conv import FirstFrame, is_first_apart
from sat.vae.context import ChunkContext
from sat.vae.encoder import Downsample
from tests.vae.tiny import SIZE, randomize

FRAMES = {1: 1, 5: 2, 6: 2, 7: 2, 8: 2, 9: 3, 12: 3, 13: 4, 16: 4, 17: 5, 20: 5, 33: 9, 49: 13}
"""Pixel frames -> latent frames under both rules."""

TOLERANCE = {"atol": 2e-6, "rtol": 1e-5}
"""Measured worst: 0, as the operations are the same ones."""


@pytest.mark.parametrize("rule", ["split", "parity"])
def test_frame_counts(rule: FirstFrame) -> None:
    assert {frames: count_latent_frames(frames, 2, rule) for frames in FRAMES} == FRAMES


def test_frame_counts_of_few_frames_and_other_factors() -> None:
    assert [count_latent_frames(frames, 2, "parity") for frames in (1, 2, 3, 4)] == [1, 1, 1, 1]
    assert [count_latent_frames(frames, 2, "nosplit") for frames in (1, 2, 4, 8, 49)] == [1, 1, 1, 2, 12]
    assert [count_latent_frames(frames, 0) for frames in (1, 2, 5)] == [1, 2, 5]
    assert [count_latent_frames(frames, 1) for frames in (1, 3, 4, 5)] == [1, 2, 2, 3]
    assert count_latent_frames(17, 3) == 3


@pytest.mark.parametrize("frames", [2, 3, 4])
def test_a_clip_that_leaves_one_frame_to_pair(frames: int) -> None:
    message = rf"a clip of {frames} frames cannot be encoded .* give 1 frame or 4k \+ 1 \(5, 9, \.\.\.\), or .*parity"
    with pytest.raises(ValueError, match=message):
        count_latent_frames(frames, 2)
    with pytest.raises(ValueError, match=message):
        Encoder3D(**SIZE)(torch.zeros(1, 3, frames, 8, 8))


@pytest.mark.parametrize("rule", ["split", "nosplit", "parity"])
@pytest.mark.parametrize("frames", [1, 5, 6, 8, 9])
@torch.no_grad()
def test_the_encoder_gives_what_is_counted(rule: FirstFrame, frames: int) -> None:
    encoder = Encoder3D(**SIZE)
    moments = encoder(torch.zeros(2, 3, frames, 17, 31), None, rule)
    assert moments.shape == (2, 8, count_latent_frames(frames, 2, rule), 2, 3)


def plain_downsample(down: Downsample, hidden: Tensor, rule: FirstFrame) -> Tensor:
    """Pairs of frames averaged, then each frame padded below and to the right and convolved with a stride of 2."""
    if down.compress_time and hidden.shape[2] > 1:
        alone = int(is_first_apart(rule, hidden.shape[2]))
        pooled = F.avg_pool3d(hidden[:, :, alone:], (2, 1, 1))
        hidden = torch.cat([hidden[:, :, :alone], pooled], dim=2)
    frames = [hidden[:, :, index] for index in range(hidden.shape[2])]
    if down.conv is None:
        frames = [F.avg_pool2d(frame, 2) for frame in frames]
    else:
        weights = down.conv.weight, down.conv.bias
        frames = [F.conv2d(F.pad(frame, (0, 1, 0, 1)), *weights, stride=2) for frame in frames]
    return torch.stack(frames, dim=2)


@pytest.mark.parametrize("rule", ["split", "nosplit"])
@pytest.mark.parametrize("frames", [1, 3, 4, 6, 7])
@pytest.mark.parametrize("compress_time, with_conv", [(True, True), (True, False), (False, True)])
def test_the_way_down(
    monkeypatch: pytest.MonkeyPatch, rule: FirstFrame, frames: int, compress_time: bool, with_conv: bool
) -> None:
    down = Downsample(6, compress_time, with_conv)
    randomize(down)
    hidden = torch.randn(2, 6, frames, 5, 8, generator=torch.Generator().manual_seed(1))
    expected = plain_downsample(down, hidden, rule)
    assert_close(down(hidden, ChunkContext(rule)), expected, **TOLERANCE)
    monkeypatch.setattr("sat.vae.causal_conv.SLICE_NUMEL", 500)
    with torch.no_grad():
        assert_close(down(hidden, ChunkContext(rule)), expected, **TOLERANCE)


def test_options_change_the_network() -> None:
    assert Encoder3D(**SIZE).out_channels == 8
    assert Encoder3D(**SIZE, double_z=False).out_channels == 4
    assert Encoder3D(**SIZE, in_channels=1).conv_in.conv.weight.shape == (8, 1, 3, 3, 3)
    assert Encoder3D(**SIZE, time_kernel=1).mid.block_1.conv1.conv.weight.shape == (32, 32, 1, 3, 3)
    assert Encoder3D(**SIZE, temporal_compress_times=8).num_halvings == 3
    assert "down.0.downsample.conv.weight" not in Encoder3D(**SIZE, resamp_with_conv=False).state_dict()
    assert Encoder3D(**{**SIZE, "ch_mult": (1, 2)}, temporal_compress_times=2).spatial_factor == 2
