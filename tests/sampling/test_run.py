"""Sampling runs in this process: the same video for any batch size, checkpoint forms, latents, bad input."""

import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file

from sat.cogvideox.engine import build_engine
from sat.cogvideox.output import to_frames
from sat.conditioning.text import FrozenT5Embedder
from sat.config import load_config
from sat.data.video import probe, read_metadata, write_mp4
from sat.errors import CheckpointError, CommunicationError, ConfigError, SamplingError
from sat.sampling import run as sampling_run
from sat.sampling.args import sample_args
from sat.sampling.run import _batched, sample, wait_minutes
from tests.sampling.conftest import CAPTIONS, Trained
from tests.tiny import ROOT

SEED = 42


def latents_of(path: Path) -> torch.Tensor:
    return load_file(path)["latents"]


def sample_latents(trained: Trained, folder: Path, *words: str, seed: int = SEED, prompts: Any = CAPTIONS[:3]) -> Any:
    """Latents of each prompt, in order."""
    options = (f"args.output_dir={folder}", "args.only_save_latents=true", *words)
    return [latents_of(path) for path in sample(trained.config(*options), seed, prompts)]


@pytest.fixture(scope="module")
def reference(trained: Trained, tmp_path_factory: pytest.TempPathFactory) -> list[torch.Tensor]:
    """Latents of three prompts, each sampled alone."""
    return sample_latents(trained, tmp_path_factory.mktemp("reference"))


# --- the same video --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [2, 3, 8])
def test_a_prompts_video_does_not_depend_on_its_batch(
    trained: Trained, reference: list[torch.Tensor], tmp_path: Path, batch_size: int
) -> None:
    """To rounding: a matrix product of more rows may add in another order. Measured 5e-6, on latents of up to 5."""
    for own, alone in zip(sample_latents(trained, tmp_path, f"args.batch_size={batch_size}"), reference):
        torch.testing.assert_close(own, alone, rtol=0.0, atol=5e-5)


def test_the_same_seed_gives_the_same_latents_and_another_gives_others(
    trained: Trained, reference: list[torch.Tensor], tmp_path: Path
) -> None:
    again = sample_latents(trained, tmp_path / "again")
    assert all(torch.equal(*pair) for pair in zip(again, reference))
    other = sample_latents(trained, tmp_path / "other", seed=43)
    assert all((first - second).abs().max() > 0.1 for first, second in zip(other, reference))


def test_prompts_differ_by_text_and_by_number(trained: Trained, reference: list[torch.Tensor], tmp_path: Path) -> None:
    """The noise belongs to the prompt's number, so the same prompt given twice makes two videos."""
    twice = sample_latents(trained, tmp_path / "twice", prompts=[CAPTIONS[0]] * 2)
    assert torch.equal(twice[0], reference[0])
    assert (twice[1] - twice[0]).abs().max() > 0.1
    assert (twice[1] - reference[1]).abs().max() > 1e-4  # the same noise, another text
    assert (twice[1] - reference[1]).abs().max() < (twice[1] - twice[0]).abs().max()


# --- less work -------------------------------------------------------------------------------------------------------


def test_a_prompt_is_encoded_once_in_a_run(
    trained: Trained, reference: list[torch.Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[str]] = []
    forward = FrozenT5Embedder.forward

    def watched(self: FrozenT5Embedder, prompts: list[str]) -> torch.Tensor:
        asked.append(list(prompts))
        return forward(self, prompts)

    monkeypatch.setattr(FrozenT5Embedder, "forward", watched)
    words = ("model.conditioner_config.params.unconditional=empty_prompt",)
    sample_latents(trained, tmp_path, *words, prompts=[CAPTIONS[0], CAPTIONS[1], CAPTIONS[0]])
    assert asked == [[CAPTIONS[0]], [""], [CAPTIONS[1]]]


@pytest.mark.parametrize("threshold", [0.0, 1e9])
def test_reuse_says_what_it_did_and_leaves_its_mark(
    trained: Trained,
    reference: list[torch.Tensor],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    threshold: float,
) -> None:
    words = (f"args.output_dir={tmp_path}", "args.only_save_latents=true", f"args.reuse_threshold={threshold}")
    (path,) = sample(trained.config(*words), SEED, CAPTIONS[:1])
    (line,) = (line for line in capsys.readouterr().err.splitlines() if "reuse at threshold" in line)
    with safe_open(path, framework="pt") as reader:
        assert reader.metadata().get("reuse threshold") == (f"{threshold:g}" if threshold else None)
    if threshold:
        assert "4 of 5 passes of the network reused layers, 4 of 10 layer passes (40%) were skipped" in line
        assert "error of its output" in line and "over 2 of the reused passes" in line
    else:
        assert "0 of 5 passes" in line
        assert torch.equal(latents_of(path), reference[0])


# --- ranks that do not hear from each other ---------------------------------------------------------------------------


def test_a_collective_that_fails_ends_with_rank_and_step(
    trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> Path:
        raise RuntimeError("[gloo/transport/tcp/pair.cc] Connection closed by peer")

    monkeypatch.setattr(sampling_run.SamplingRun, "_write", broken)
    with pytest.raises(CommunicationError, match=r"(?s)a collective failed at rank 0.*, step 4, .*closed by peer"):
        sample_latents(trained, tmp_path, prompts=CAPTIONS[:1])


@pytest.mark.parametrize("word", ["model_parallel_size=2", "context_parallel_size=2", "guidance_parallel=true"])
def test_processes_that_share_a_video_wait_for_each_other_less_long(trained: Trained, word: str) -> None:
    alone, together = (sample_args(trained.config(*words)) for words in ((), (f"args.{word}",)))
    assert wait_minutes(together) == 60 < wait_minutes(alone)


# --- checkpoints -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["4", "4/mp_rank_00_model_states.pt"])
def test_a_folder_and_a_file_are_the_run_they_are_in(
    trained: Trained, reference: list[torch.Tensor], tmp_path: Path, place: str
) -> None:
    (own,) = sample_latents(trained, tmp_path, f"args.load={trained.run / place}", prompts=CAPTIONS[:1])
    assert torch.equal(own, reference[0])


def test_an_earlier_iteration_gives_another_video(
    trained: Trained, reference: list[torch.Tensor], tmp_path: Path
) -> None:
    (own,) = sample_latents(trained, tmp_path, f"args.load={trained.run / '2'}", prompts=CAPTIONS[:1])
    assert not torch.equal(own, reference[0])


# --- files -----------------------------------------------------------------------------------------------------------


def test_a_video_is_the_decoded_latents_with_what_made_it(
    trained: Trained, reference: list[torch.Tensor], tmp_path: Path
) -> None:
    (path,) = sample(trained.config(f"args.output_dir={tmp_path}"), SEED, CAPTIONS[:1])
    info = probe(path, count=True)
    assert (info.num_frames, info.height, info.width, info.fps) == (9, 32, 32, 8.0)
    assert read_metadata(path) == {
        "prompt": CAPTIONS[0],
        "seed": "42",
        "index": "0",
        "sampler": "VPSDEDPMPP2MSampler",
        "steps": "5",
        "guidance": "DynamicCFG(scale=6, exp=5, num_steps=5, schedule=released, two_passes=False)",
        "checkpoint": str(trained.run / "4"),
        "scale_factor": "1.0",
    }
    with av.open(str(path)) as container:  # without our reader
        assert container.metadata["prompt"] == CAPTIONS[0]
        assert container.streams.video[0].codec_context.name == "h264"
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]
    engine = build_engine(trained.config()["model"])
    frames = np.concatenate([to_frames(chunk[0]) for chunk in engine.decode_first_stage(reference[0].unsqueeze(0))])
    write_mp4(tmp_path / "expected.mp4", frames, 8, read_metadata(path))
    assert path.read_bytes() == (tmp_path / "expected.mp4").read_bytes()


def test_saved_latents_say_what_made_them(trained: Trained, tmp_path: Path) -> None:
    options = (f"args.output_dir={tmp_path}", "args.only_save_latents=true", "model.scale_factor=0.7")
    # The VAE is neither built nor read.
    options = (*options, "model.first_stage_config.params.ckpt_path=nowhere")
    (path,) = sample(trained.config(*options), SEED, CAPTIONS[:1])
    with safe_open(path, framework="pt") as reader:
        metadata = reader.metadata()
        assert reader.get_tensor("latents").shape == (3, 16, 4, 4)
    assert (metadata["prompt"], metadata["scale_factor"]) == (CAPTIONS[0], "0.7")
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


def test_sizes_of_the_video_may_be_chosen(trained: Trained, tmp_path: Path) -> None:
    words = ("args.sampling_image_size=[48, 32]", "args.sampling_num_frames=5", "args.sampling_fps=16")
    (path,) = sample(trained.config(f"args.output_dir={tmp_path}", *words), SEED, CAPTIONS[:1])
    info = probe(path, count=True)
    assert (info.num_frames, info.height, info.width, info.fps) == (17, 48, 32, 16.0)


@pytest.mark.parametrize("frames", [1, 5, 13])
def test_any_number_of_frames_can_be_decoded(trained: Trained, tmp_path: Path, frames: int) -> None:
    (path,) = sample(trained.config(f"args.output_dir={tmp_path}", f"args.num_frames={frames}"), SEED, CAPTIONS[:1])
    assert path.suffix == (".png" if frames == 1 else ".mp4")
    assert probe(path, count=True).num_frames == frames


def test_frames_cover_the_range_of_bytes() -> None:
    pixels = torch.tensor([-1.5, -1.0, 0.0, 1.0, 1.5]).view(1, 1, 1, 5).expand(2, 3, 1, 5)
    frames = to_frames(pixels)
    assert (frames.shape, frames.dtype) == ((2, 1, 5, 3), np.uint8)
    assert frames[0, 0, :, 0].tolist() == [0, 0, 128, 255, 255]


@given(st.integers(0, 40), st.integers(1, 9), st.integers(1, 8))
def test_every_prompt_belongs_to_one_process(count: int, size: int, world_size: int) -> None:
    prompts = [f"prompt {index}" for index in range(count)]
    shares = [list(_batched(prompts, size, rank, world_size)) for rank in range(world_size)]
    assert Counter(pair for share in shares for batch in share for pair in batch) == Counter(enumerate(prompts))
    assert all(1 <= len(batch) <= size for share in shares for batch in share)
    lengths = [sum(map(len, share)) for share in shares]
    assert max(lengths) - min(lengths) <= 1


# --- precision -------------------------------------------------------------------------------------------------------


def test_bf16_follows_fp32(trained: Trained, reference: list[torch.Tensor], tmp_path: Path) -> None:
    (own,) = sample_latents(trained, tmp_path, "args.bf16=true", prompts=CAPTIONS[:1])
    assert own.dtype == torch.float32
    worst = (own - reference[0]).abs().max().item() / reference[0].abs().max().item()
    assert 0.0 < worst < 0.05  # measured 1.1 %


def test_latents_that_are_not_finite_are_refused(trained: Trained, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained.run, run)
    file = run / "4" / "mp_rank_00_model_states.pt"
    content = torch.load(file, weights_only=True)
    content["module"]["model.diffusion_model.mixins.final_layer.linear.bias"].fill_(1e6)
    torch.save(content, file)
    for written in (run / "4").iterdir():  # what is left is a folder as it is released: no checksum tells of the change
        if written != file:
            written.unlink()
    with pytest.raises(SamplingError, match=r"latents of prompt 1 are not finite in fp16; .*use args.bf16=true"):
        sample_latents(trained, tmp_path / "out", f"args.load={run}", "args.fp16=true", prompts=CAPTIONS[:1])


# --- bad input -------------------------------------------------------------------------------------------------------


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is wrong must be found before the model is built."""

    def refuse(*_: object) -> None:
        raise AssertionError("the model is built before the mistake is found")

    monkeypatch.setattr(sampling_run, "build_engine", refuse)


@pytest.mark.usefixtures("no_model")
def test_half_a_checkpoint_is_refused(trained: Trained, tmp_path: Path) -> None:
    whole = (trained.run / "4" / "mp_rank_00_model_states.pt").read_bytes()
    file = tmp_path / "mp_rank_00_model_states.pt"
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match=r"mp_rank_00_model_states.pt is half a file: its end is missing"):
        sample_latents(trained, tmp_path / "out", f"args.load={file}")


@pytest.mark.usefixtures("no_model")
def test_a_folder_that_cannot_be_written_is_refused(trained: Trained, tmp_path: Path) -> None:
    in_the_way = tmp_path / "file"
    in_the_way.touch()
    for folder in (in_the_way, in_the_way / "outputs", "/proc"):  # not even root may write to the last
        with pytest.raises(ConfigError, match=f"cannot write to args.output_dir {folder}: .*; give a folder that can"):
            sample(trained.config(f"args.output_dir={folder}"), SEED, CAPTIONS[:1])


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["args.input_file=nowhere.txt"], "cannot read args.input_file nowhere.txt: No such file or directory"),
        (["args.bf16=true", "args.fp16=true"], "args.bf16 and args.fp16 are both on; choose one"),
        (["args.load=null"], "args.load is not set; give a file, an iteration folder or a run directory"),
        (["args.sampling_image_size=[30, 32]"], "height 30 is not a multiple of 16"),
    ],
)
def test_mistakes_are_found_before_the_model_is_built(trained: Trained, words: list[str], message: str) -> None:
    prompts = None if "input_file" in words[0] else CAPTIONS[:1]
    with pytest.raises(ConfigError, match=message):
        sample(trained.config(*words), SEED, prompts)


@pytest.mark.parametrize("name", ["2B", "5B"])
def test_weights_of_another_model_are_named(trained: Trained, tmp_path: Path, name: str) -> None:
    """A file with a released model's names and shapes, and one number for all of them."""
    with torch.device("meta"):
        section = load_config([ROOT / "configs" / f"cogvideox_{name.lower()}.yaml"])["model"]
        released = build_engine(section, with_encoders=False).model.state_dict(prefix="model.")
    number = torch.zeros(())
    weights = {key: number.expand(value.shape) for key, value in released.items()}
    torch.save({"module": weights}, tmp_path / "weights.pt")
    with pytest.raises(CheckpointError) as refused:
        sample_latents(trained, tmp_path / "out", f"args.load={tmp_path / 'weights.pt'}")
    message = str(refused.value)
    assert (
        f"it looks like CogVideoX-{name}, and the configuration builds a transformer in the form of CogVideoX-5B"
        in message
    )
    assert "of hidden_size 32, 2 layers" in message


def test_weights_that_lack_some_need_force(trained: Trained, tmp_path: Path) -> None:
    content = torch.load(trained.run / "4" / "mp_rank_00_model_states.pt", weights_only=True)
    del content["module"]["model.diffusion_model.mixins.final_layer.linear.bias"]
    torch.save(content, tmp_path / "weights.pt")
    words = (f"args.load={tmp_path / 'weights.pt'}",)
    with pytest.raises(CheckpointError, match=r"missing \(1\): mixins.final_layer.linear.bias"):
        sample_latents(trained, tmp_path / "out", *words)
    (own,) = sample_latents(trained, tmp_path / "out", *words, "args.force_inference=true", prompts=CAPTIONS[:1])
    assert own.isfinite().all()


def test_a_run_that_trained_the_vae_is_no_video_model(trained: Trained) -> None:
    words = ["model={target: vae_modules.autoencoder.VideoAutoencodingEngine, params: {}}"]
    with pytest.raises(ConfigError, match="no network_config: this is no video model that could be sampled"):
        sample(trained.config(*words), SEED, CAPTIONS[:1])
