"""Noise, prefixes and latents from files: what a run makes of them, and what is refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sat.cogvideox.engine import NETWORK_PREFIX, build_engine
from sat.cogvideox.output import to_frames
from sat.config import load_config
from sat.data.synthetic import SyntheticImages
from sat.data.video import write_mp4, write_png
from sat.errors import ConfigError, DataError
from sat.sampling.inputs import read_latents, read_tensor
from sat.sampling.run import sample
from tests.tiny import ROOT, tiny_config

SHAPE = (3, 16, 4, 4)
SGM = "sgm.modules.diffusionmodules"
DDIM = (
    f"model.sampler_config.target={SGM}.sampling.VideoDDIMSampler",
    f"model.sampler_config.params.guider_config={{target: {SGM}.guiders.IdentityGuider}}",
)


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """A tiny network of random weights, saved as training does."""
    network = build_engine(tiny_config()["model"]).network
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5 / parameter.shape[-1] ** 0.5)
    state = {f"{NETWORK_PREFIX}{name}": value for name, value in network.state_dict().items()}
    torch.save({"module": state}, tmp_path / "weights.pt")
    return tmp_path / "weights.pt"


def sampled(weights: Path, folder: Path, prompts: list[str], *overrides: str, seed: int = 0) -> list[Tensor]:
    words = (f"args.load={weights}", f"args.output_dir={folder}", "args.only_save_latents=true", *overrides)
    return [load_file(path)["latents"] for path in sample(tiny_config(*words), seed, prompts)]


def test_samples_start_from_the_noise_that_is_given(weights: Path, tmp_path: Path) -> None:
    save_file({"noise": torch.randn(SHAPE)}, tmp_path / "noise.safetensors")
    noise = f"args.initial_noise={tmp_path / 'noise.safetensors'}"
    first, second = sampled(weights, tmp_path / "a", ["a blob", "a blob"], *DDIM, noise)
    (other_seed,) = sampled(weights, tmp_path / "b", ["a blob"], *DDIM, noise, seed=1)
    (own_noise,) = sampled(weights, tmp_path / "c", ["a blob"], *DDIM)
    assert torch.equal(first, second) and torch.equal(first, other_seed)
    assert not torch.allclose(first, own_noise, atol=0.1)


@pytest.mark.parametrize("sampler", ["VPSDEDPMPP2MSampler", "HeunEDMSampler"])
def test_samples_begin_with_the_end_of_the_prefix(weights: Path, tmp_path: Path, sampler: str) -> None:
    latents = torch.randn(5, *SHAPE[1:])
    save_file({"latents": latents}, tmp_path / "before.safetensors")
    kept = (
        f"model.sampler_config.target={SGM}.sampling.{sampler}",
        "model.sampler_config.params.fixed_frames=2",
        f"args.prefix={tmp_path / 'before.safetensors'}",
    )
    for got in sampled(weights, tmp_path / "out", ["a blob", "another"], *kept):
        assert torch.equal(got[:2], latents[-2:])
        assert not torch.allclose(got[2], latents[-1], atol=0.1)


def test_inversion_finds_the_noise_of_a_sample(weights: Path, tmp_path: Path) -> None:
    engine = build_engine(tiny_config(*DDIM, "model.sampler_config.params.num_steps=20")["model"])
    state = torch.load(weights)["module"]
    engine.network.load_state_dict({name.removeprefix(NETWORK_PREFIX): value for name, value in state.items()})
    latents = engine.sample(["a blob"], [0], 7, SHAPE)
    noise = engine.invert(latents, ["a blob"], num_iterations=8)
    again = engine.sample(["a blob"], [0], 8, SHAPE, initial_noise=noise[0])
    assert (
        float((again - latents).square().mean().sqrt() / latents.std()) < 1e-5
    )  # measured 1.8e-7, and 3.2e-4 with one iteration


def test_inversion_needs_ddim() -> None:
    engine = build_engine(tiny_config()["model"])
    with pytest.raises(ConfigError, match=r"the sampler is VPSDEDPMPP2MSampler; set .*=sgm.*VideoDDIMSampler"):
        engine.invert(torch.zeros(1, *SHAPE), ["a blob"])


# --- files -----------------------------------------------------------------------------------------------------------


def image_engine() -> Any:
    return build_engine(load_config([ROOT / "configs" / "cogview3plus_tiny.yaml"])["model"])


def test_an_image_is_encoded(tmp_path: Path) -> None:
    engine, pixels = image_engine(), SyntheticImages(1, 64, 64)[0]["pixels"]
    write_png(tmp_path / "a.png", to_frames(pixels)[0])
    latents = read_latents(engine, tmp_path / "a.png", (1, 16, 8, 8))
    expected = engine.encode_first_stage(pixels.unsqueeze(0))[0]
    assert latents.shape == (1, 16, 8, 8)
    torch.testing.assert_close(latents, expected, rtol=0.0, atol=0.02)  # a picture has 256 levels


def test_the_end_of_a_clip_is_its_last_frames(tmp_path: Path) -> None:
    engine = image_engine()
    frames = to_frames(torch.linspace(-1, 1, 3).view(3, 1, 1, 1).expand(3, 3, 64, 64))
    write_mp4(tmp_path / "a.mp4", frames, 8)
    brightness = [
        float(read_latents(engine, tmp_path / "a.mp4", (1, 16, 8, 8), at_end)[0, 0].mean()) for at_end in (False, True)
    ]
    assert brightness[0] < -4 and brightness[1] > 4


def test_latents_are_taken_from_either_end(tmp_path: Path) -> None:
    latents = torch.randn(4, 16, 8, 8)
    save_file({"latents": latents}, tmp_path / "a.safetensors")
    for at_end, expected in ((False, latents[:2]), (True, latents[2:])):
        assert torch.equal(read_latents(None, tmp_path / "a.safetensors", (2, 16, 8, 8), at_end), expected)  # type: ignore[arg-type]


def test_unusable_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "broken.safetensors").write_bytes(b"nothing")
    save_file({"latents": torch.zeros(1, 16, 4, 4)}, tmp_path / "small.safetensors")
    write_mp4(tmp_path / "short.mp4", to_frames(torch.zeros(3, 3, 64, 64)), 8)
    shape = (2, 16, 8, 8)
    for file, message in (
        ("broken.safetensors", "broken.safetensors cannot be read as safetensors"),
        ("small.safetensors", r"the latents of .*small.safetensors are \(1, 16, 4, 4\); \(2, 16, 8, 8\) are needed"),
        ("short.mp4", "short.mp4 has 3 frames; 2 latent frames need 5"),
        ("none.mp4", "none.mp4 does not exist"),
    ):
        with pytest.raises(DataError, match=message):
            read_latents(image_engine(), tmp_path / file, shape)
    with pytest.raises(DataError, match="holds no tensor 'noise'; it holds latents"):
        read_tensor(tmp_path / "small.safetensors", "noise")
    with pytest.raises(DataError, match=r"'latents' of .* is \(1, 16, 4, 4\), the sample is \(2, 16, 8, 8\)"):
        read_tensor(tmp_path / "small.safetensors", "latents", shape)


def test_a_prefix_without_fixed_frames_is_refused(weights: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"args.prefix is set, but the sampler keeps no frames; .*fixed_frames"):
        sampled(weights, tmp_path / "out", ["a blob"], "args.prefix=before.mp4")


def test_fixed_frames_without_a_prefix_are_refused(weights: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="the sampler's fixed_frames is 2, and there is no prefix"):
        sampled(weights, tmp_path / "out", ["a blob"], "model.sampler_config.params.fixed_frames=2")
