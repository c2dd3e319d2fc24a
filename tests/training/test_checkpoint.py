"""Weights on disk: found by any of their names, read without running code, refused where they do not fit."""

import argparse
import collections
import json
import os
import pickle
import re
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sat.cogvideox.presets import describe_weights
from sat.config import instantiate_from_config, load_config
from sat.errors import CheckpointError
from sat.training.args import train_args
from sat.training.checkpoint import fit_weights, load_pickle, load_weights
from sat.training.systems import build_system
from sat.weights.finding import find_checkpoint, model_file
from tests.cogvideox.test_released import released_shapes
from tests.golden_files import golden_root
from tests.ranks import run_ranks
from tests.tiny import only_run, records, train_on_rank

ROOT = Path(__file__).parents[2]
COMMON = ("args.global_batch_size=4", "args.train_iters=2", "args.save_interval=1")
ALL_LOW = "deepspeed.optimizer.params.lr=0"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps on two ranks at ZeRO 2, a checkpoint at each."""
    folder = tmp_path_factory.mktemp("run")
    run_ranks(train_on_rank, 2, (*COMMON, "deepspeed.zero_optimization.stage=2", f"args.save={folder}"))
    return only_run(folder)


# --- layout ----------------------------------------------------------------------------------------------------------


def test_the_run_directory(run: Path) -> None:
    assert re.fullmatch(r"tiny-\d\d-\d\d-\d\d-\d\d", run.name)
    assert {path.name for path in run.iterdir()} == {
        *(".lock", "1", "2", "latest", "metrics.jsonl", "model_config.json", "run.json", "tensorboard"),
        "training_config.yaml",
    }
    assert (run / "latest").read_text() == "2"
    assert {path.name for path in (run / "2").iterdir()} == {
        *("mp_rank_00_model_states.pt", "optimizer_rank_00000.safetensors", "optimizer_rank_00001.safetensors"),
        *("training_state.json", "manifest.json"),
    }


def test_weights_are_plain_tensors_under_released_names(run: Path) -> None:
    content = torch.load(run / "2" / model_file(0), weights_only=True)
    assert set(content) == {"module", "iteration"} and content["iteration"] == 2
    names = set(content["module"])
    assert all(name.startswith("model.diffusion_model.") for name in names)
    assert "model.diffusion_model.transformer.layers.0.attention.query_key_value.weight" in names
    assert "model.diffusion_model.mixins.adaln_layer.adaLN_modulations.1.1.bias" in names
    for name, value in content["module"].items():
        assert type(value) is Tensor and value.untyped_storage().nbytes() == value.nbytes, name  # no part of a buffer


def test_a_run_is_enough_to_rebuild_its_model(run: Path) -> None:
    config = load_config([run / "training_config.yaml"])
    system = build_system(config, train_args(config))
    fit_weights(system.trained, [load_weights(run)], "the run", system.describe)
    sizes = json.loads((run / "model_config.json").read_text())
    assert (sizes["model_class"], sizes["num_layers"], sizes["hidden_size"]) == ("DiffusionTransformer", 2, 32)


def test_the_optimizer_state_covers_each_trained_element_once(run: Path) -> None:
    covered: dict[str, list[tuple[int, int, int]]] = collections.defaultdict(list)
    for file in sorted((run / "2").glob("optimizer_rank_*.safetensors")):
        for key, value in load_file(file).items():
            kind, name, *place = key.split("|")
            if place:
                covered[f"{kind}|{name}"].append((int(place[0]), value.numel(), int(place[1])))
    names = {key.split("|")[1] for key in covered}
    assert {key.split("|")[0] for key in covered} == {"master", "exp_avg", "exp_avg_sq"}
    assert len(covered) == 3 * len(names) and names < set(load_weights(run))
    for pieces in covered.values():
        end = 0
        for start, length, _ in sorted(pieces):
            assert start == end
            end += length
        assert {total for *_, total in pieces} == {end}


# --- finding ---------------------------------------------------------------------------------------------------------


def test_a_checkpoint_goes_by_three_names(run: Path) -> None:
    file = run / "1" / model_file(0)
    assert (find_checkpoint(run).path, find_checkpoint(run).step) == (run / "2", 2)
    assert (find_checkpoint(str(run / "1")).path, find_checkpoint(run / "1").step) == (run / "1", 1)
    assert (find_checkpoint(file).path, find_checkpoint(file).step) == (file, 0)
    first, named = load_weights(run / "1"), load_weights(file)
    assert all(torch.equal(first[name], value) for name, value in named.items())
    assert any(not torch.equal(first[name], value) for name, value in load_weights(run).items())


def test_released_folders_and_averages_have_no_plain_number(tmp_path: Path) -> None:
    for name in ("release", "1000-ema"):
        (tmp_path / name).mkdir()
        torch.save({"module": {}}, tmp_path / name / model_file(0))
    (tmp_path / "latest").write_text("release\n")
    assert (find_checkpoint(tmp_path).path.name, find_checkpoint(tmp_path).step) == ("release", 0)
    assert find_checkpoint(tmp_path / "1000-ema").step == 1000
    (tmp_path / "latest").write_text("1000-ema")
    assert find_checkpoint(tmp_path).path.name == "release"  # averages are no iteration


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda folder: folder / "nowhere",
            "there is no checkpoint .*nowhere; give a file, an iteration folder or a run",
        ),
        (
            lambda folder: folder,
            r"is no checkpoint: it has neither mp_rank_00_model_states.pt nor 'latest'; .* nothing",
        ),
        (
            lambda folder: (folder / "latest").write_text("7") and folder,
            r"holds no whole checkpoint: iteration 7 is not whole \(there is no such folder\)",
        ),
        (
            lambda folder: (folder / "model_index.json").write_text("{}") and folder,
            r"nor 'latest'.*a diffusers folder: convert it with `python tools/convert.py (\S+) (\S+)-sat --to sat` and "
            r"give \2-sat/transformer",
        ),
        (
            lambda folder: (
                (folder / "config.json").write_text('{"_class_name": "CogVideoXTransformer3DModel"}') and folder
            ),
            "a diffusers folder: convert it with",
        ),
        (lambda folder: (folder / "a.txt").write_text("7") and folder, r"nor 'latest'; it holds a.txt"),
    ],
)
def test_what_is_no_checkpoint_says_what_it_is(tmp_path: Path, make: Any, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        find_checkpoint(make(tmp_path))


# --- reading ---------------------------------------------------------------------------------------------------------

WEIGHTS = {"a.weight": torch.arange(6.0).view(2, 3), "b": torch.ones(3, dtype=torch.bfloat16)}


@pytest.mark.parametrize("wrap", [lambda w: {"module": w, "step": 3}, lambda w: {"state_dict": w}, lambda w: w])
@pytest.mark.parametrize("old_format", [False, True])
def test_forms_in_which_weights_come(tmp_path: Path, wrap: Any, old_format: bool) -> None:
    file = tmp_path / "weights.pt"
    torch.save(wrap(WEIGHTS), file, _use_new_zipfile_serialization=not old_format)
    loaded = load_weights(file)
    assert loaded.keys() == WEIGHTS.keys() and all(torch.equal(loaded[name], WEIGHTS[name]) for name in WEIGHTS)


def test_safetensors_too(tmp_path: Path) -> None:
    save_file(WEIGHTS, tmp_path / "weights.safetensors")
    assert all(torch.equal(load_weights(tmp_path / "weights.safetensors")[name], WEIGHTS[name]) for name in WEIGHTS)


def test_what_sat_and_deepspeed_put_beside_the_weights_is_allowed(tmp_path: Path) -> None:
    """Random states of Python and numpy, SAT's arguments, ordered dicts; the tensors come out, nothing runs."""
    content = {
        "module": collections.OrderedDict(WEIGHTS),
        "args": argparse.Namespace(lr=1.0, train_data=["a"]),
        "np_rng_state": np.random.RandomState(0).get_state(),
        "random_rng_state": (3, (1, 2, 3), None),
        "numbers": {"float": np.float64(1.5), "array": np.arange(3, dtype=np.int32)},
    }
    torch.save(content, tmp_path / "legacy.pt")
    loaded = load_pickle(tmp_path / "legacy.pt")
    assert loaded["args"].train_data == ["a"] and loaded["numbers"]["array"].tolist() == [0, 1, 2]
    assert load_weights(tmp_path / "legacy.pt").keys() == WEIGHTS.keys()


class Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (os.environ["BOMB"],)


@pytest.mark.parametrize("old_format", [False, True])
def test_what_could_run_code_is_refused_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, old_format: bool
) -> None:
    monkeypatch.setenv("BOMB", str(tmp_path / "exploded"))
    file = tmp_path / "bomb.pt"
    torch.save({"module": WEIGHTS, "more": Bomb()}, file, _use_new_zipfile_serialization=not old_format)
    with pytest.raises(CheckpointError, match=r"bomb\.pt asks to load posix\.mkdir, .* so it is refused"):
        load_weights(file)
    assert not (tmp_path / "exploded").exists()


def truncated(file: Path, share: float) -> Path:
    content = file.read_bytes()
    file.write_bytes(content[: int(share * len(content))])
    return file


@pytest.mark.parametrize(
    ("name", "make", "message"),
    [
        (
            "a.pt",
            lambda f: torch.save({"module": WEIGHTS}, f),
            "is half a file: its end is missing; copy or download it a",
        ),
        (
            "a.safetensors",
            lambda f: save_file(WEIGHTS, f),
            r"is not a whole safetensors file \(.*\); copy or download it",
        ),
    ],
)
@pytest.mark.parametrize("share", [0.5, 0.99])
def test_half_a_file_is_told_as_such(tmp_path: Path, name: str, make: Any, message: str, share: float) -> None:
    make(tmp_path / name)
    with pytest.raises(CheckpointError, match=rf"{name} {message}"):
        load_weights(truncated(tmp_path / name, share))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"cannot be read as a torch file \(.*\); copy or download it again"),
        (b"<!DOCTYPE html>", "is a web page, as a download link gives that asks for a log-in"),
        (b"version https://git-lfs.github.com/spec/v1", "is a Git LFS pointer, not the file that it points to"),
        (b"some text", "is not a torch file of weights|cannot be read as a torch file"),
        (pickle.dumps([1, 2], protocol=2), "is not a torch file of weights|cannot be read as a torch file"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "a.pt").write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        load_weights(tmp_path / "a.pt")


def test_a_file_without_weights_says_so(tmp_path: Path) -> None:
    torch.save({"epoch": 3, "weights": WEIGHTS}, tmp_path / "a.pt")
    with pytest.raises(
        CheckpointError, match="holds no state dict: there is neither 'module' nor 'state_dict' in it, nor"
    ):
        load_weights(tmp_path / "a.pt")


# --- another generation or size --------------------------------------------------------------------------------------


NAMES = {
    "2B": "CogVideoX-2B",
    "5B": "CogVideoX-5B",
    "5B-I2V": "CogVideoX-5B-I2V",
    "1.5-5B": "CogVideoX1.5-5B",
    "1.5-5B-I2V": "CogVideoX1.5-5B-I2V",
}


@cache
def weights_like(form: str) -> dict[str, Tensor]:
    """Names and shapes of a released model's weights, in a few bytes: each tensor is one number seen many times."""
    shapes = released_shapes(form)
    return {f"model.diffusion_model.{name}": torch.zeros(()).expand(shape) for name, shape in shapes.items()}


def network_on_meta(form: str) -> torch.nn.Module:
    config = load_config([ROOT / "configs" / f"{form}.yaml"])
    with torch.device("meta"):
        return instantiate_from_config(config["model"]["network_config"])


@pytest.mark.parametrize("form", NAMES)
def test_weights_of_a_released_model_are_known_by_name(form: str) -> None:
    preset = NAMES[form]
    weights = weights_like(form)
    assert describe_weights({name: value.shape for name, value in weights.items()}) == preset
    if not form.startswith("1.5"):
        kernel = weights["model.diffusion_model.mixins.patch_embed.proj.weight"]
        older = {**weights, "model.diffusion_model.mixins.patch_embed.proj.weight": kernel.view(len(kernel), -1, 2, 2)}
        described = describe_weights({name: value.shape for name, value in older.items()})
        assert described == f"{preset} in the layout of release 1.0"


@pytest.mark.parametrize(
    ("loaded", "built", "differs"),
    [
        ("2B", "cogvideox_5b", r"patch_embed.proj.weight: \(1920, 64\) in the file, \(3072, 64\)"),
        (
            "1.5-5B",
            "cogvideox_5b",
            r"patch_embed.proj.weight: \(3072, 128\) in the file, \(3072, 64\) in",
        ),
        ("5B-I2V", "cogvideox_5b", r"not in the model \(1\): mixins.pos_embed.pos_embedding"),
        ("5B", "cogvideox_2b", r"missing \(1\): mixins.pos_embed.pos_embedding"),
    ],
)
def test_weights_of_another_model_are_refused_by_name(loaded: str, built: str, differs: str) -> None:
    weights = {name.removeprefix("model.diffusion_model."): value for name, value in weights_like(loaded).items()}
    own = "CogVideoX-5B" if built.endswith("5b") else "CogVideoX-2B"
    with pytest.raises(CheckpointError) as caught:
        fit_weights(network_on_meta(built), [weights], "the file", describe_weights)
    message = str(caught.value)
    assert message.startswith(
        f"the file does not fit the model: it looks like {NAMES[loaded]}, and the configuration builds {own}\n"
    )
    assert re.search(differs, message), message


@pytest.mark.parametrize(
    ("names", "looks"),
    [
        (["transformer_blocks.0.attn1.to_q.weight"], r"diffusers CogVideoX transformer weights \(convert them first\)"),
        (["something.else"], "no CogVideoX transformer"),
    ],
)
def test_other_weights_are_described_too(names: list[str], looks: str) -> None:
    with pytest.raises(CheckpointError, match=f"it looks like {looks}, and the configuration builds"):
        fit_weights(torch.nn.Linear(1, 1), [{name: torch.zeros(1) for name in names}], "the file", describe_weights)


# --- finetuning ------------------------------------------------------------------------------------------------------


def test_finetuning_starts_from_a_file_an_iteration_or_a_run(run: Path, tmp_path: Path) -> None:
    """At learning rate 0 what is saved is what was loaded; steps count from 1, and the optimizer starts anew."""
    for number, (load, source) in enumerate(
        ((run / "1" / model_file(0), run / "1"), (run / "1", run / "1"), (run, run / "2"))
    ):
        words = ("args.mode=finetune", f"args.load={load}", ALL_LOW, f"args.save={tmp_path / str(number)}")
        run_ranks(train_on_rank, 1, (*COMMON, *words))
        other = only_run(tmp_path / str(number))
        assert [record["step"] for record in records(other)] == [1, 2]
        weights = load_weights(other)
        assert all(torch.equal(weights[name], value) for name, value in load_weights(source).items())


def test_a_file_may_lack_what_a_mixin_adds_and_nothing_else(run: Path, tmp_path: Path) -> None:
    lora = (
        "model.network_config.params.modules.lora_config={target: sat.model.finetune.lora2.LoraMixin, params: {r: 2}}"
    )
    words = ("args.mode=finetune", f"args.load={run}", f"args.save={tmp_path / 'runs'}")
    run_ranks(train_on_rank, 1, (*COMMON, *words, lora, "model.not_trainable_prefixes=[all]"))
    loaded, tuned = load_weights(run), load_weights(only_run(tmp_path / "runs"))
    for name, value in loaded.items():
        plain = name if name in tuned else re.sub(r"\.(weight|bias)$", r".original.\1", name)
        assert torch.equal(tuned[plain], value), name
    torch.save(
        {"module": {name: value for name, value in loaded.items() if "dense.weight" not in name}}, tmp_path / "a.pt"
    )
    words = ("args.mode=finetune", f"args.load={tmp_path / 'a.pt'}")
    with pytest.raises(AssertionError, match=r"missing \(2\): transformer.layers.0.attention.dense"):
        run_ranks(train_on_rank, 1, (*COMMON, *words))
    run_ranks(train_on_rank, 1, (*COMMON, *words, "args.force_train=true"))


# --- files written by the reference ----------------------------------------------------------------------------------

RECORDED = golden_root() / "dit" / "checkpoints"
recorded = pytest.mark.skipif(not RECORDED.is_dir(), reason="the recordings are not beside the project")


@recorded
@pytest.mark.parametrize("form", ["single_process", "model_parallel_2", "training_run"])
def test_released_layouts_start_a_run(tmp_path: Path, form: str) -> None:
    """Pickles of SAT and DeepSpeed included: what is loaded comes out again, bit for bit, in one file."""
    folder = RECORDED / form / "transformer" if (RECORDED / form / "transformer").is_dir() else RECORDED / form
    model = load_config([RECORDED / "config.yaml"])["model"].plain()
    words = [
        *("args.mode=finetune", f"args.load={folder}", ALL_LOW, f"args.save={tmp_path}"),
        f"model.network_config={json.dumps(model['network_config'])}",
        "model.conditioner_config.params.emb_models.0.params={width: 16, max_length: 8}",
        "model.network_config.params.modules.pos_embed_config.params.text_length=8",
        "data.params={num_samples: 8, num_frames: 3, channels: 16, height: 4, width: 6}",
    ]
    run_ranks(train_on_rank, 1, (*COMMON, *words))
    expected = load_weights(RECORDED / "single_process" / "transformer")
    saved = load_weights(only_run(tmp_path))
    assert saved.keys() == expected.keys()
    assert all(torch.equal(saved[name], value) for name, value in expected.items())
