"""What users get wrong, told in one message: what, where and how to mend it, with exit code 2 and no traceback.

Each case goes through the command line as typed, in this process; nothing of a model is built for most of them.
"""

import os
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

from sat.sampling.cli import main as sample
from sat.training.cli import main as train
from sat.weights.finding import model_file
from tests.ranks import run_ranks
from tests.tiny import SMALLER, TINY, only_run, train_on_rank
from tests.training.test_checkpoint import weights_like
from tests.training.test_loop import PIXELS_AS_LATENTS, clip_set

SHORT = (*SMALLER, "args.train_iters=1", "args.global_batch_size=4", "args.num_workers=0")
FILES = (*SHORT, *PIXELS_AS_LATENTS)
T5 = "model.conditioner_config.params.emb_models.0"
_HALF = "params: {z_channels: 16, ch: 16, norm_groups: 4}"
VAE = (
    "model.first_stage_config={target: vae_modules.autoencoder.VideoAutoencoderInferenceWrapper, params: {"
    "ckpt_path: FOLDER/weights.pt, "
    "regularizer_config: {target: vae_modules.regularizers.DiagonalGaussianRegularizer}, "
    f"encoder_config: {{target: vae_modules.cp_enc_dec.ContextParallelEncoder3D, {_HALF}}}, "
    f"decoder_config: {{target: vae_modules.cp_enc_dec.ContextParallelDecoder3D, {_HALF}}}}}}}"
)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one step."""
    folder = tmp_path_factory.mktemp("run")
    run_ranks(train_on_rank, 1, (*SHORT, f"args.save={folder}"))
    return only_run(folder)


@pytest.fixture
def told(
    fresh_log: None, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., str]]:
    """Run a command that must be refused; returns what it says, on one line."""
    environment = dict(os.environ)
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)  # each command wraps it once more

    def refuse(command: Callable[[list[str]], None], *words: str) -> str:
        with pytest.raises(SystemExit) as caught:
            command(list(words))
        assert caught.value.code == 2
        printed = capfd.readouterr().err
        assert "Traceback" not in printed
        return " ".join(printed.split("error: ", 1)[1].split())

    yield refuse
    os.environ.clear()
    os.environ.update(environment)


@dataclass
class Case:
    """What is typed, after `prepare` has made what it names in a folder called FOLDER, and what is told."""

    words: tuple[str, ...]
    message: str
    prepare: Callable[[Path], object] = field(default=lambda folder: None)
    base: tuple[str, ...] = (str(TINY),)


def yaml(text: str) -> Callable[[Path], object]:
    return lambda folder: (folder / "mine.yaml").write_text(text)


def cut(file: Path, share: float) -> None:
    content = file.read_bytes()
    file.write_bytes(content[: int(share * len(content))])


def broken_clips(folder: Path) -> None:
    """A set whose only clip lacks its second half."""
    clip_set(folder / "set", 1, {})
    cut(folder / "set" / "videos" / "0.mp4", 0.95)


def clips_without_a_caption(folder: Path) -> None:
    clip_set(folder / "set", 3, {})
    (folder / "set" / "labels" / "1.txt").unlink()


def t5_folder(*names: str) -> Callable[[Path], object]:
    def make(folder: Path) -> None:
        (folder / "t5").mkdir()
        for name in names:
            (folder / "t5" / name).write_text("{}")

    return make


def weights_file(form: str) -> Callable[[Path], object]:
    return lambda folder: torch.save({"module": weights_like(form)}, folder / "weights.pt")


def half_of_a_file(folder: Path) -> None:
    torch.save({"module": {"a": torch.zeros(1000)}}, folder / "weights.pt")
    cut(folder / "weights.pt", 0.5)


MINE = (str(TINY), "FOLDER/mine.yaml")
LOADS_FILE = (*SHORT, "args.mode=finetune", "args.load=FOLDER/weights.pt")
T5_WORDS = (f"{T5}.target=sgm.modules.encoders.modules.FrozenT5Embedder", f"{T5}.params={{model_dir: FOLDER/t5}}")

CASES = {
    "a misspelt key of args": Case(
        (),
        r"unknown key args.train_itres \(FOLDER/mine.yaml line 2\); did you mean 'train_iters'\?$",
        yaml("args:\n  train_itres: 3"),
        MINE,
    ),
    "a misspelt key of the network": Case(
        (),
        r"unknown key model.network_config.params.num_layer \(FOLDER/mine.yaml line 4\); did you mean 'num_layers'\?; ",
        yaml("model:\n  network_config:\n    params:\n      num_layer: 3"),
        MINE,
    ),
    "a misspelt part of the model": Case(
        ("model.netwrok_config={}",),
        r"unknown key model.netwrok_config \(the command line\); did you mean 'network_config'",
    ),
    "a misspelt key of the data": Case(
        ("data.params.heigth=4",),
        r"unknown key data.params.heigth \(the command line\); did you mean 'height'\?; sat.data",
    ),
    "a misspelt key of deepspeed": Case(
        ("deepspeed.zero_optimisation.stage=1",),
        r"unknown key deepspeed.zero_optimisation .*; did you mean 'zero_optimizat",
    ),
    "a misspelt key within deepspeed": Case(
        ("deepspeed.zero_optimization.stag=1",),
        r"unknown key deepspeed.zero_optimization.stag .*; did you mean 'stage'",
    ),
    "a misspelt section": Case(
        (),
        r"unknown section modle \(FOLDER/mine.yaml line 1\); did you mean 'model'\?; sections: args, model, da",
        yaml("modle:\n  a: 1"),
        MINE,
    ),
    "a misspelt target": Case(
        (),
        r"data.target \(FOLDER/mine.yaml line 2\): target 'data_video.SFTDatset' .*; did you mean 'data_video.SFTDa",
        yaml("data:\n  target: data_video.SFTDatset"),
        MINE,
    ),
    "frames that are not 4k + 1": Case(
        (),
        r"model.network_config.params.num_frames \(FOLDER/mine.yaml line 1\): 8 frames are not 4k \+ 1, .* 5 or 9",
        yaml("model: {network_config: {params: {num_frames: 8}}}"),
        MINE,
    ),
    "latents of other channels": Case(
        ("data.params.channels=8",),
        r"data.params.channels \(the command line\) is 8 and model.network_config.params.out_channels \(.*tiny.yaml "
        r"line \d+\) is 16; give both the same",
    ),
    "latents that do not divide": Case(
        ("data.params.height=7",),
        r"data.params.height \(the .* line\) is 7 latents, which do not divide into patches of 2 ",
    ),
    "heads that do not divide": Case(
        ("model.network_config.params.num_attention_heads=5",),
        r"hidden_size \(.*tiny.yaml line \d+\) is 96, which does not divide by .*num_attention_heads \(the command ",
    ),
    "heads of two sizes": Case(
        ("model.network_config.params.modules.pos_embed_config.params.hidden_size_head=16",),
        r"hidden_size_head \(the command line\) is 16, and .*hidden_size \(.*\) 96 over .* 3 gives heads of 32; le",
    ),
    "two lengths of text": Case(
        (f"{T5}.params.max_length=8",),
        r"max_length \(the command line\) is 8 and .*text_length \(.*line \d+\) is 16; give both",
    ),
    "a data folder that is missing": Case(
        (*FILES, "args.train_data=[FOLDER/nowhere]"),
        "no data at FOLDER/nowhere: give a folder with clips, or a manifest that",
    ),
    "a data folder that is empty": Case(
        (*FILES, "args.train_data=[FOLDER/set]"),
        r"no clips in FOLDER/set: looked for files that end in \.mp4",
        lambda folder: (folder / "set").mkdir(),
    ),
    "no data folder": Case(FILES, "args.train_data is not set, and data_video.SFTDataset reads files; give a list"),
    "a folder for data that read none": Case(
        (*SHORT, "args.train_data=[FOLDER]"),
        r"args.train_data is \['FOLDER'\], and data.target .* reads no files; leave one",
    ),
    "a truncated mp4": Case(
        (*FILES, "args.train_data=[FOLDER/set]"),
        r"set/videos/0\.mp4 was cut short: \d+ bytes are missing",
        broken_clips,
    ),
    "a truncated mp4 in a data worker": Case(
        (*FILES, "args.train_data=[FOLDER/set]", "args.num_workers=1"),
        r"set/videos/0\.mp4 was cut short: \d+ bytes are missing",
        broken_clips,
    ),
    "a text file that is missing": Case(
        (*FILES, "args.train_data=[FOLDER/set]"),
        r"1 of 3 clips of FOLDER/set have no caption; write one for each, list clips and captions in a manifest .*, or "
        r"train without captions: data.params.missing_caption=empty. The first: set/videos/1.mp4: looked for labels",
        clips_without_a_caption,
    ),
    "clips without any text": Case(
        (*FILES, "args.train_data=[FOLDER/set/videos]"),
        r"no clip can be used FOLDER/set/videos: 0 of 2 clips kept 2 dropped, no caption: .* captions: write one for .*"
        "data.params.missing_caption=empty",
        lambda folder: [
            clip_set(folder / "set", 2, {}),
            *((folder / "set" / "labels" / f"{i}.txt").unlink() for i in (0, 1)),
        ],
    ),
    "weights of another size": Case(
        LOADS_FILE,
        "FOLDER/weights.pt does not fit the model: it looks like CogVideoX-2B, and the configuration builds a tra"
        r"nsformer in the form of CogVideoX-5B of hidden_size 32, 2 layers.* \(1920, 64\) in the file, \(32, 64\) in",
        weights_file("2B"),
    ),
    "weights of another generation": Case(
        LOADS_FILE,
        "it looks like CogVideoX1.5-5B-I2V, and the configuration builds",
        weights_file("1.5-5B-I2V"),
    ),
    "weights of a diffusers model": Case(
        LOADS_FILE,
        r"it looks like diffusers CogVideoX transformer weights \(convert them first\), and the configuration builds",
        lambda folder: torch.save({"transformer_blocks.0.norm1.linear.weight": torch.zeros(2)}, folder / "weights.pt"),
    ),
    "weights that are not there": Case(
        LOADS_FILE,
        "there is no checkpoint FOLDER/weights.pt; give a file, an iteration folder or a run directory",
    ),
    "half a file of weights": Case(
        LOADS_FILE,
        "FOLDER/weights.pt is half a file: its end is missing; copy or download it again",
        half_of_a_file,
    ),
    "a web page in the place of weights": Case(
        LOADS_FILE,
        "FOLDER/weights.pt is a web page, .*; download it again",
        lambda folder: (folder / "weights.pt").write_text("<html>"),
    ),
    "VAE weights that are not there": Case(
        (*SHORT, VAE), "there is no file or folder FOLDER/weights.pt; check ckpt_path"
    ),
    "half a file of VAE weights": Case(
        (*SHORT, VAE), r"FOLDER/weights.pt \(\d+ bytes\) is cut short .*; copy or download it again", half_of_a_file
    ),
    "a T5 folder that is missing": Case(
        (*SHORT, *T5_WORDS),
        "there is no T5 folder FOLDER/t5; set model_dir of the FrozenT5Embedder to a folder with",
    ),
    "a T5 folder without its tokenizer": Case(
        (*SHORT, *T5_WORDS),
        r"the T5 folder FOLDER/t5 lacks spiece.model, tokenizer_config.json; the released layout has the encoder's "
        r"config.json and weights and the tokenizer's spiece.model",
        t5_folder("config.json", "model.safetensors"),
    ),
    "a T5 folder without its weights": Case(
        (*SHORT, *T5_WORDS),
        r"the T5 folder FOLDER/t5 lacks model\*.safetensors",
        t5_folder("config.json", "spiece.model", "tokenizer_config.json"),
    ),
    "fp16 and bf16": Case(
        (*SHORT, "deepspeed.fp16.enabled=true", "deepspeed.bf16.enabled=true"),
        r"deepspeed.bf16 and deepspeed.fp16 are both enabled; enable one \(2B was trained in fp16, 5B in bf16\)",
    ),
    "a batch that the micro batch does not divide": Case(
        (*SHORT, "args.global_batch_size=3"),
        r"args.global_batch_size 3 is not a multiple of 2 \(micro batch 2 x 1 data-parallel processes\); change it or ",
    ),
    "an output directory that cannot be written": Case(
        (*SHORT, "args.save=FOLDER/file/runs"),
        "cannot write to args.save FOLDER/file/runs: Not a directory; give a folder that can be written",
        lambda folder: (folder / "file").touch(),
    ),
    "a configuration that is missing": Case(
        (), "cannot read the configuration FOLDER/a.yaml: No such file", base=("FOLDER/a.yaml",)
    ),
    "weights for a configuration": Case(
        (),
        "the configuration FOLDER/weights.pt is not a text file; --base takes YAML files",
        lambda folder: torch.save({"module": torch.zeros(100)}, folder / "weights.pt"),
        ("FOLDER/weights.pt",),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_it_is_told(told: Callable[..., str], tmp_path: Path, name: str) -> None:
    case = CASES[name]
    case.prepare(tmp_path)
    words = [word.replace("FOLDER", str(tmp_path)) for word in ("--base", *case.base, *case.words)]
    message = told(train, *words)
    assert re.search(case.message.replace("FOLDER", re.escape(str(tmp_path))), message), message


def test_half_a_checkpoint_to_go_on_from(told: Callable[..., str], run: Path, tmp_path: Path) -> None:
    state = run / "1" / "optimizer_rank_00000.safetensors"
    whole = state.read_bytes()
    try:
        cut(state, 0.5)
        message = told(train, "--base", str(TINY), *SHORT, "args.train_iters=2", f"args.load={run}")
    finally:
        state.write_bytes(whole)
    assert re.search(rf"iteration 1 is not whole \({state.name} has [\d,]+ bytes of {len(whole):,}\)", message), message


def test_weights_alone_to_go_on_from(told: Callable[..., str], run: Path) -> None:
    message = told(train, "--base", str(TINY), *SHORT, f"args.load={run / '1' / model_file(0)}")
    assert (
        "holds weights only, no training state to continue from; set args.mode=finetune to start a new run" in message
    )


def test_more_processes_than_the_batch_can_feed() -> None:
    message = r"2 processes cannot share a global batch of 1; start fewer processes or raise args\.global_batch_size"
    with pytest.raises(AssertionError, match=message):
        run_ranks(train_on_rank, 2, ("args.train_iters=1", "args.global_batch_size=1"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["args.bf16=true", "args.fp16=true"],
            r"args.bf16 and args.fp16 are both on; choose one \(2B was trained in fp16",
        ),
        (["args.output_dir=FOLDER/file/out"], "cannot write to args.output_dir FOLDER/file/out: Not a directory"),
        (
            ["args.sampling_image_size=[60, 64]"],
            r"height 60 is not a multiple of 16 .*; give 48 or 64",
        ),
        (["args.input_fil=a"], r"unknown key args.input_fil \(the command line\); did you mean 'input_file'\?"),
    ],
)
def test_sampling_tells_too(
    told: Callable[..., str], run: Path, tmp_path: Path, words: list[str], message: str
) -> None:
    (tmp_path / "file").touch()
    words = [word.replace("FOLDER", str(tmp_path)) for word in words]
    told_message = told(sample, "--load", str(run), "--prompt", "a", *words)
    assert re.search(message.replace("FOLDER", str(tmp_path)), told_message), told_message
