"""Adapter files load with diffusers' own `load_lora_weights` and give the outputs of our adapted network."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import CogVideoXPipeline
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from sat.convert.run import Request, convert
from sat.weights.from_diffusers import save_transformer
from sat.weights.lora import attach_loras, lora_of, read_lora, write_lora
from tests.cogvideox.tiny import TEXT_LENGTH, build
from tests.convert.test_pipelines import engine_of, noise_for, our_latents, their_latents
from tests.convert.test_run import assert_equal_states, write_yaml
from tests.convert.tiny import PROJECTION, TEXT_WIDTH, Tree, channels, section

Trees = Callable[[str], Tree]
Folders = Callable[[str], Path]
TOLERANCE = 1e-5
"""Absolute, on outputs of up to 4. Measured worst: 1.1e-6."""

FINAL = {"final_layer_config": {"target": "dit_video_concat.FinalLayerMixin", "params": {"eps": 1e-5}}}
"""Diffusers' epsilon in the last norm."""


def lora_config(rank: int, alpha: float) -> dict[str, Any]:
    return {"lora_config": {"target": "sat.model.finetune.lora2.LoraMixin", "params": {"r": rank, "lora_alpha": alpha}}}


def adapted(tree: Tree, form: str, rank: int, alpha: float) -> Any:
    """Our network on a tree's weights with random adapters, and diffusers' epsilon in its last norm."""
    modules = {"patch_embed_config": PROJECTION, **FINAL, **lora_config(rank, alpha)}
    network = build(form, seed=5, extra_modules=modules, **channels(form))
    network.load_state_dict(tree.state, strict=False)
    return network.eval()


def plain(tree: Tree, form: str) -> Any:
    """The same without adapters."""
    network = build(form, extra_modules={"patch_embed_config": PROJECTION, **FINAL}, **channels(form))
    network.load_state_dict(tree.state)
    return network.eval()


def write_run(folder: Path, tree: Tree, form: str, rank: int, alpha: float) -> Path:
    """A run as SAT leaves it: the whole checkpoint with the adapters in it."""
    save_transformer(adapted(tree, form, rank, alpha).state_dict(), folder)
    write_yaml(folder / "training_config.yaml", section(form, tree.path, modules=lora_config(rank, alpha)))
    return folder


def inputs_of(form: str) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        "x": torch.randn(1, 4, channels(form)["in_channels"], 6, 8, generator=generator),
        "context": torch.randn(1, TEXT_LENGTH, TEXT_WIDTH, generator=generator),
        "timesteps": torch.tensor([400]),
    }


def their_output(pipeline: CogVideoXPipeline, form: str) -> Tensor:
    inputs = inputs_of(form)
    rotary = pipeline._prepare_rotary_positional_embeddings(48, 64, 4, torch.device("cpu"))
    uses_rotary = pipeline.transformer.config.use_rotary_positional_embeddings
    with torch.no_grad():
        return pipeline.transformer(
            inputs["x"], inputs["context"], inputs["timesteps"], image_rotary_emb=rotary if uses_rotary else None
        ).sample


@pytest.mark.parametrize(
    ("form", "rank", "alpha"),
    [("2B", 4, 1.0), ("5B", 4, 1.0), ("5B", 4, 4.0), ("5B", 6, 4.0), ("5B", 2, 16.0), ("1.5-5B", 4, 2.0)],
)
def test_the_scale_is_alpha_over_rank(
    tree: Trees, folder: Folders, tmp_path: Path, form: str, rank: int, alpha: float
) -> None:
    run = write_run(tmp_path / "run", tree(form), form, rank, alpha)
    convert(Request(source=run, target=tmp_path / "lora", to="diffusers"))
    pipeline = CogVideoXPipeline.from_pretrained(folder(form))
    plain = their_output(pipeline, form)
    pipeline.load_lora_weights(tmp_path / "lora")
    ours = adapted(tree(form), form, rank, alpha)
    with torch.no_grad():
        expected = ours(**inputs_of(form))
    got = their_output(pipeline, form)
    torch.testing.assert_close(got, expected, rtol=0.0, atol=TOLERANCE)
    assert float((got - plain).abs().max()) > 0.01
    assert len(pipeline.transformer.peft_config["default_0"].target_modules) == 8


def test_a_pipeline_with_adapters_gives_our_latents(tree: Trees, folder: Folders, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", tree("1.5-5B"), "1.5-5B", 4, 2.0)
    convert(Request(source=run, target=tmp_path / "lora", to="diffusers"))
    pipeline = CogVideoXPipeline.from_pretrained(folder("1.5-5B"))
    pipeline.load_lora_weights(tmp_path / "lora")
    noise = noise_for("1.5-5B")
    expected = their_latents(pipeline, noise, torch.Generator().manual_seed(3), False)
    engine = engine_of(tree("1.5-5B"), "DPM", False)
    engine.model.diffusion_model = adapted(tree("1.5-5B"), "1.5-5B", 4, 2.0)
    got = our_latents(engine, noise, torch.Generator().manual_seed(3))
    torch.testing.assert_close(got, expected, rtol=0.0, atol=3e-5)


def test_what_diffusers_saves_comes_to_sat_with_its_alpha(tree: Trees, folder: Folders, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model_state_dict

    pipeline = CogVideoXPipeline.from_pretrained(folder("5B"))
    targets = ["to_q", "to_k", "to_v", "to_out.0"]
    pipeline.transformer.add_adapter(LoraConfig(r=4, lora_alpha=8, target_modules=targets, init_lora_weights=False))
    expected = their_output(pipeline, "5B")
    state, settings = get_peft_model_state_dict(pipeline.transformer), pipeline.transformer.peft_config["default"]
    CogVideoXPipeline.save_lora_weights(
        tmp_path / "theirs", state, transformer_lora_adapter_metadata=settings.to_dict()
    )
    lines = convert(Request(source=tmp_path / "theirs", target=tmp_path / "lora.safetensors", to="sat"))
    assert "adapters on 8 modules, rank 4, scale alpha / rank = 2" in lines
    ours = plain(tree("5B"), "5B")
    attach_loras(ours, [read_lora(tmp_path / "lora.safetensors")])  # as `sample_video.py --lora` does
    with torch.no_grad():
        got = ours(**inputs_of("5B"))
    torch.testing.assert_close(got, expected, rtol=0.0, atol=TOLERANCE)


def assert_same_files(one: Path, two: Path) -> None:
    with safe_open(one, framework="pt") as first, safe_open(two, framework="pt") as second:
        assert first.metadata() == second.metadata()
    assert_equal_states(load_file(one), load_file(two))


def test_the_file_beside_a_run_gives_what_the_run_gives(tree: Trees, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", tree("5B"), "5B", 4, 2.0)
    convert(Request(source=run, target=tmp_path / "of_run.safetensors", to="diffusers"))
    state = adapted(tree("5B"), "5B", 4, 2.0).state_dict()
    write_lora(run / "1" / "lora.safetensors", lora_of(state, 2.0, "the run"))
    source = run / "1" / "lora.safetensors"
    convert(Request(source=source, target=tmp_path / "of_file.safetensors", to="diffusers"))
    assert_same_files(tmp_path / "of_run.safetensors", tmp_path / "of_file.safetensors")
    convert(Request(source=tmp_path / "of_file.safetensors", target=tmp_path / "back.safetensors", to="sat"))
    assert_same_files(tmp_path / "back.safetensors", source)


def test_comfyuis_file_goes_to_diffusers_with_the_same_outputs(tree: Trees, folder: Folders, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", tree("5B"), "5B", 4, 1.0)
    convert(Request(source=run, target=tmp_path / "comfy.safetensors", to="comfy"))
    # As trainers of the kohya family leave it: half precision, alpha a tensor.
    state = {name: value.half() for name, value in load_file(tmp_path / "comfy.safetensors").items()}
    save_file(state, tmp_path / "half.safetensors")
    convert(Request(source=tmp_path / "half.safetensors", target=tmp_path / "lora", to="diffusers", dtype="fp32"))
    pipeline = CogVideoXPipeline.from_pretrained(folder("5B"))
    pipeline.load_lora_weights(tmp_path / "lora")
    with torch.no_grad():
        expected = adapted(tree("5B"), "5B", 4, 1.0)(**inputs_of("5B"))
    got = their_output(pipeline, "5B")
    torch.testing.assert_close(got, expected, rtol=0.0, atol=5e-5)  # half precision; measured: 1.0e-5
