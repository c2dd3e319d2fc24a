"""Adapters on the command line: one, several, at any strength, and what does not fit."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from sat.cogvideox.engine import NETWORK_PREFIX, build_engine
from sat.config import dump_config
from sat.model.finetune.lora2 import merge_lora
from sat.sampling import run as sampling_run
from sat.sampling.cli import build_parser, main
from sat.weights.lora import LoraFile, lora_of, write_lora
from tests.tiny import tiny_config

LORA = "model.network_config.params.modules.lora_config={{target: sat.model.finetune.lora2.LoraMixin, params: {}}}"


def network_of(seed: int, *overrides: str) -> Any:
    network = build_engine(tiny_config(*overrides)["model"]).network
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            is_gain = name.endswith("weight") and parameter.dim() == 1
            parameter.copy_(1.0 + 0.2 * noise if is_gain else noise / parameter.shape[-1] ** 0.5)
    return network


def save(network: Any, folder: Path, *overrides: str) -> Path:
    """As a run leaves it."""
    (folder / "1").mkdir(parents=True)
    module = {f"{NETWORK_PREFIX}{name}": value for name, value in network.state_dict().items()}
    torch.save({"module": module}, folder / "1" / "mp_rank_00_model_states.pt")
    (folder / "latest").write_text("1")
    (folder / "training_config.yaml").write_text(dump_config(tiny_config(*overrides)))
    return folder


class Files:
    """A base model, two adapters for it, and the models with one of them folded in."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        base = network_of(0)
        self.base = save(base, folder / "base")
        self.loras, self.merged, self.networks = [], [], []
        for number, params in enumerate(("{r: 4, lora_alpha: 8}", "{r: 2, lora_alpha: 2, targets: [qkv, mlp]}")):
            network = network_of(number + 1, LORA.format(params))
            network.load_state_dict(base.state_dict(), strict=False)
            alpha = float(params.split("lora_alpha: ")[1][0])
            self.loras.append(folder / f"{number}.safetensors")
            write_lora(self.loras[-1], lora_of(network.state_dict(), alpha, "a test"))
            self.networks.append(save(network, folder / f"whole-{number}", LORA.format(params)))
            merge_lora(network)
            self.merged.append(save(network, folder / f"merged-{number}"))

    def sample(self, load: Path, *words: object) -> Tensor:
        out = self.folder / "out"
        main(
            [
                *("--load", str(load), "--prompt", "a small blob moving left", *map(str, words)),
                *(f"args.output_dir={out}", "args.only_save_latents=true"),
            ]
        )
        (path,) = out.iterdir()
        latents = load_file(path)["latents"]
        path.unlink()
        return latents


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return Files(tmp_path_factory.mktemp("lora"))


TOLERANCE = {"rtol": 0.0, "atol": 1e-4}
"""On latents of up to 8, after ten steps that carry rounding on. Measured worst: 8.1e-6."""


def test_the_file_is_all_that_it_takes(files: Files, capsys: pytest.CaptureFixture[str]) -> None:
    own = files.sample(files.base, "--lora", files.loras[0])
    report = "0.safetensors: 16/16 modules, rank 4, alpha 8, on qkv, dense; mean |dW| / |W| 2"
    assert report in capsys.readouterr().err
    base = files.sample(files.base)
    assert (own - base).abs().max() > 0.1
    torch.testing.assert_close(own, files.sample(files.merged[0]), **TOLERANCE)
    assert torch.equal(own, files.sample(files.networks[0]))  # SAT's form: the whole model with its adapters
    assert torch.equal(own, files.sample(files.base, "--lora", files.networks[0]))  # adapters out of that form
    assert torch.equal(own, files.sample(files.base, "--lora", files.loras[0], "--lora-scale", "1"))


def test_the_scale_of_a_call(files: Files) -> None:
    base = files.sample(files.base)
    assert torch.equal(files.sample(files.base, "--lora", files.loras[0], "--lora-scale", "0"), base)
    half = files.sample(files.base, "--lora", files.loras[0], "--lora-scale", "0.5")
    network = network_of(1, LORA.format("{r: 4, lora_alpha: 4}"))
    network.load_state_dict(network_of(0).state_dict(), strict=False)
    halved = save(network, files.folder / "halved", LORA.format("{r: 4, lora_alpha: 4}"))
    assert torch.equal(half, files.sample(halved))


def test_several_at_once(files: Files) -> None:
    words = ("--lora", files.loras[0], "--lora", files.loras[1])
    both = files.sample(files.base, *words, "--lora-scale", "1", "--lora-scale", "-0.5")
    network = network_of(0)
    state = network.state_dict()
    for lora, scale in zip(files.merged, (1.0, -0.5)):
        merged = torch.load(lora / "1" / "mp_rank_00_model_states.pt", weights_only=True)["module"]
        base = network_of(0).state_dict()
        for name, value in base.items():
            state[name] += scale * (merged[f"{NETWORK_PREFIX}{name}"] - value)
    expected = files.sample(save(network, files.folder / "both"))
    torch.testing.assert_close(both, expected, **TOLERANCE)
    for number in (0, 1):
        scales = ["0", "0"]
        scales[number] = "1"
        alone = files.sample(files.base, *words, *(word for scale in scales for word in ("--lora-scale", scale)))
        torch.testing.assert_close(alone, files.sample(files.merged[number]), **TOLERANCE)


def test_what_made_a_video_is_written_down(files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, str]] = []
    monkeypatch.setattr(sampling_run, "write_latents", lambda *args: seen.append(args[-1]) or args[1])
    files_out = ("--lora", str(files.loras[1]), "--lora-scale", "0.25")
    main(
        [
            *("--load", str(files.base), "--prompt", "a", *files_out, "args.only_save_latents=true"),
            f"args.output_dir={files.folder / 'none'}",
        ]
    )
    assert seen[0][f"lora {files.loras[1]}"] == "scale 0.25"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nothing", r"nothing.safetensors does not fit the model: 0/2 modules do"),
        ("nowhere", r"there is no checkpoint .*nowhere.safetensors"),
        ("base/1", r"holds no adapters: none of its \d+ tensors"),
    ],
)
def test_what_does_not_fit_ends_in_one_message(
    files: Files, name: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    matrices = {f"transformer.layers.9.attention.dense.matrix_{letter}.0": torch.zeros(2, 2) for letter in "AB"}
    write_lora(files.folder / "nothing.safetensors", LoraFile("", matrices, 1.0, ""))
    path = files.folder / (name if "/" in name else f"{name}.safetensors")
    with pytest.raises(SystemExit) as stopped:
        files.sample(files.base, "--lora", path)
    assert stopped.value.code == 2
    assert re.search(message, capsys.readouterr().err)


def test_adapters_on_adapters_are_refused(files: Files, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        files.sample(files.networks[0], "--lora", files.loras[1])
    assert "the loaded weights have adapters of their own; load the base model's weights" in capsys.readouterr().err


def test_scales_go_with_their_files() -> None:
    options = build_parser().parse_args(["--lora", "a", "--lora-scale", "0.5", "--lora", "b", "--lora-scale", "2"])
    assert (options.lora, options.lora_scale) == (["a", "b"], [0.5, 2.0])
