"""Weights of the VAE on disk: what loads, and what is said of files that do not."""

import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from sat.config import instantiate_from_config
from sat.errors import CheckpointError
from sat.vae import VideoAutoencoder, load_vae, load_vae_state, save_vae_state
from sat.vae.checkpoint import describe_state
from tests.vae.tiny import SIZE, build_vae, make_latents, make_pixels

TOLERANCE = {"atol": 4e-5, "rtol": 1e-5}
"""Measured worst: 1.1e-5, on values up to 7."""

LOSS_KEYS = {"loss.logvar": torch.zeros(()), "loss.discriminator.to_logits.3.bias": torch.zeros(1)}
"""Training-only weights, as the released file has them."""


@pytest.fixture
def trained() -> VideoAutoencoder:
    return build_vae(seed=3)


def write(path: Path, content: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(content, path)
    return path


def released(folder: Path, vae: VideoAutoencoder, **more: Tensor) -> Path:
    """A file in the layout of the released 3d-vae.pt."""
    return write(folder / "3d-vae.pt", {"state_dict": {**vae.state_dict(), **more}, "global_step": 7})


def assert_same_weights(got: VideoAutoencoder, expected: VideoAutoencoder) -> None:
    for name, value in expected.state_dict().items():
        assert torch.equal(got.state_dict()[name], value), name


# --- what loads ------------------------------------------------------------------------------------------------------


def test_the_released_layout_loads_from_the_configuration(tmp_path: Path, trained: VideoAutoencoder) -> None:
    path = released(tmp_path, trained, **LOSS_KEYS)
    config = {
        "target": "vae_modules.autoencoder.VideoAutoencoderInferenceWrapper",
        "params": {
            "cp_size": 1,
            "ckpt_path": str(path),
            "ignore_keys": ["loss"],
            "loss_config": {"target": "torch.nn.Identity"},
            "regularizer_config": {"target": "vae_modules.regularizers.DiagonalGaussianRegularizer"},
            "encoder_config": {"target": "vae_modules.cp_enc_dec.ContextParallelEncoder3D", "params": SIZE},
            "decoder_config": {"target": "vae_modules.cp_enc_dec.ContextParallelDecoder3D", "params": SIZE},
        },
    }
    assert_same_weights(instantiate_from_config(config), trained)


def test_other_precisions_are_cast(tmp_path: Path, trained: VideoAutoencoder) -> None:
    path = write(tmp_path / "half.pt", {"state_dict": {k: v.bfloat16() for k, v in trained.state_dict().items()}})
    vae = build_vae()
    load_vae(vae, path)
    assert {parameter.dtype for parameter in vae.parameters()} == {torch.float32}
    assert_same_weights(vae, trained.bfloat16().float())


@pytest.mark.parametrize("prefix", ["", "first_stage_model."])
def test_runs_load_as_file_iteration_folder_and_root(tmp_path: Path, trained: VideoAutoencoder, prefix: str) -> None:
    state = {f"{prefix}{name}": value for name, value in trained.state_dict().items()}
    if prefix:
        state["model.diffusion_model.weight"] = torch.zeros(1)
    file = write(tmp_path / "run" / "300" / "mp_rank_00_model_states.pt", {"module": state, "step": 300})
    (tmp_path / "run" / "latest").write_text("300\n")
    for path in (file, file.parent, tmp_path / "run"):
        vae = build_vae()
        load_vae(vae, path)
        assert_same_weights(vae, trained)


def test_what_was_saved_loads(tmp_path: Path, trained: VideoAutoencoder) -> None:
    save_vae_state(trained.state_dict(), tmp_path / "3d-vae.pt")
    vae = build_vae()
    load_vae(vae, tmp_path / "3d-vae.pt")
    assert_same_weights(vae, trained)
    assert [entry.name for entry in tmp_path.iterdir()] == ["3d-vae.pt"]


def test_a_failed_save_leaves_the_old_file(
    tmp_path: Path, trained: VideoAutoencoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "3d-vae.pt"
    path.write_text("old")

    def fail(content: object, file: Path) -> None:
        file.write_text("half")
        raise OSError("no space left on device")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(OSError, match="no space left"):
        save_vae_state(trained.state_dict(), path)
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["3d-vae.pt"]


def test_a_network_of_images_is_inflated(tmp_path: Path) -> None:
    """Every frame of a clip is encoded as the images were, since its kernels look at their own frame alone."""
    images, clips = build_vae(seed=3, time_kernel=1), build_vae()
    load_vae(clips, released(tmp_path, images))
    pixels, latents = make_pixels(5, batch=2), make_latents(3, batch=2)
    with torch.no_grad():
        for rule in ("split", "parity"):
            got = clips.posterior(pixels, first_frame=rule).moments  # type: ignore[arg-type]
            assert_close(got, images.posterior(pixels).moments, **TOLERANCE)
        assert_close(clips.decode(latents), images.decode(latents), **TOLERANCE)


# --- refusals --------------------------------------------------------------------------------------------------------


def refusal(path: Path, vae: VideoAutoencoder | None = None, **options: Any) -> str:
    with pytest.raises(CheckpointError) as caught:
        load_vae(vae or build_vae(), path, **options)
    return str(caught.value)


def test_no_file_of_that_name(tmp_path: Path) -> None:
    assert "there is no file or folder" in refusal(tmp_path / "absent.pt")
    assert "check ckpt_path (relative paths start at" in refusal(tmp_path / "absent.pt")


def test_a_folder_without_weights(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("")
    message = refusal(tmp_path)
    assert "has no weights at" in message
    assert message.endswith("it holds notes.txt")


def test_half_a_file(tmp_path: Path, trained: VideoAutoencoder) -> None:
    path = released(tmp_path, trained)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert "is cut short (an archive without its end); copy or download it again" in refusal(path)


@pytest.mark.parametrize(
    "content, words",
    [
        (b"<!DOCTYPE html><html>", "is a web page, as a download link gives"),
        (b"\n <html>", "is a web page, as a download link gives"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "is a Git LFS pointer, not the file that it points to"),
        (b"", "(0 bytes) is no file that torch.save wrote"),
        (b"weights", "(7 bytes) is no file that torch.save wrote"),
    ],
)
def test_a_file_of_another_kind(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "3d-vae.pt"
    path.write_bytes(content)
    assert words in refusal(path)


def test_code_in_the_file_is_not_run(tmp_path: Path) -> None:
    class Harmful:
        def __reduce__(self) -> Any:
            return (os.mkdir, (str(tmp_path / "ran"),))

    for name, dump in (
        ("zip.pt", torch.save),
        ("plain.pt", lambda x, file: file.write_bytes(pickle.dumps(x, protocol=2))),
    ):
        dump({"state_dict": Harmful()}, tmp_path / name)
        assert "asks to load posix.mkdir, which is no tensor and could run any code" in refusal(tmp_path / name)
    assert not (tmp_path / "ran").exists()


def test_a_bare_state_dict(tmp_path: Path, trained: VideoAutoencoder) -> None:
    message = refusal(write(tmp_path / "bare.pt", trained.state_dict()))
    assert "has neither 'state_dict' nor 'module'" in message
    assert "looks like a bare state dict: save it again as {'state_dict': weights}" in message


def test_a_tensor_alone_and_a_state_without_tensors(tmp_path: Path) -> None:
    assert "holds a Tensor, not a dict with 'state_dict'" in refusal(write(tmp_path / "one.pt", torch.zeros(1)))
    assert "holds no tensors" in refusal(write(tmp_path / "empty.pt", {"state_dict": {"step": 1}}))


def test_missing_weights(tmp_path: Path, trained: VideoAutoencoder) -> None:
    state = {name: value for name, value in trained.state_dict().items() if ".mid." not in name}
    message = refusal(write(tmp_path / "part.pt", {"state_dict": state}))
    assert "does not fit the VAE: 48 missing: encoder.mid.block_1.norm1.weight, " in message
    assert "and 40 more" in message


def test_training_weights_without_ignore_keys(tmp_path: Path, trained: VideoAutoencoder) -> None:
    message = refusal(released(tmp_path, trained, **LOSS_KEYS))
    assert "2 not in the model: loss.logvar, loss.discriminator.to_logits.3.bias" in message
    assert message.endswith("they belong to training only; set ignore_keys: ['loss']")


def test_weights_of_another_width(tmp_path: Path) -> None:
    message = refusal(released(tmp_path, build_vae(ch=16)))
    assert "encoder.conv_in.conv.weight (16, 3, 3, 3, 3) instead of (8, 3, 3, 3, 3)" in message
    assert "looks like ch 16, ch_mult [1, 2, 2, 4], num_res_blocks 1, z_channels 4; the model is ch 8, " in message


def test_weights_of_another_depth(tmp_path: Path) -> None:
    message = refusal(released(tmp_path, build_vae(num_res_blocks=2)))
    assert "not in the model: " in message
    assert "num_res_blocks 2" in message


def test_weights_of_another_kind(tmp_path: Path) -> None:
    message = refusal(write(tmp_path / "dit.pt", {"module": {"model.weight": torch.zeros(1)}}))
    assert "the file looks like no VAE of this kind (model.weight)" in message


def test_a_kernel_that_spans_more_frames(tmp_path: Path, trained: VideoAutoencoder) -> None:
    message = refusal(released(tmp_path, trained), build_vae(time_kernel=1))
    assert "encoder.conv_in.conv.weight (8, 3, 3, 3, 3) instead of (8, 3, 1, 3, 3)" in message


def test_nothing_is_loaded_where_something_does_not_fit(tmp_path: Path, trained: VideoAutoencoder) -> None:
    state = trained.state_dict()
    del state["decoder.conv_out.conv.bias"]
    vae = build_vae()
    refusal(write(tmp_path / "part.pt", {"state_dict": state}), vae)
    assert_same_weights(vae, build_vae())


def test_weights_are_described_by_their_options() -> None:
    state = build_vae(ch_mult=(1, 2), num_res_blocks=3, temporal_compress_times=2).state_dict()
    assert describe_state(state) == "ch 8, ch_mult [1, 2], num_res_blocks 3, z_channels 4"
    assert describe_state({}) == "an empty state dict"


def test_state_is_read_without_a_model(tmp_path: Path, trained: VideoAutoencoder) -> None:
    state = load_vae_state(released(tmp_path, trained, **LOSS_KEYS))
    assert set(state) == {*trained.state_dict(), *LOSS_KEYS}
