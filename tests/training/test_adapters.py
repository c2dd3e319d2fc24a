"""The adapters of a training run: a file of their own, whole at any layout, found by every path that leads to them."""

import logging
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from sat.errors import CheckpointError
from sat.training.adapters import load_lora
from sat.training.checkpoint import load_weights
from sat.weights.whole import problem_of
from tests.ranks import run_ranks
from tests.tiny import only_run, train_on_rank

LORA = (
    "model.network_config.params.modules.lora_config="
    "{target: sat.model.finetune.lora2.LoraMixin, params: {r: 4, lora_alpha: 2.5, targets: [qkv, dense, mlp]}}",
    "model.not_trainable_prefixes=[all]",
    "args.train_iters=2",
    "args.global_batch_size=4",
    "args.save_interval=1",
    "deepspeed.optimizer.type=sat.ops.FusedEmaAdam",
)
PREFIX = "model.diffusion_model."
MODULES = 2 * 2 * (3 + 1 + 1 + 1)


def train(folder: Path, world: int, *more: str) -> Path:
    run_ranks(train_on_rank, world, (*LORA, f"args.save={folder}", *more))
    return only_run(folder)


def as_sats_own(run: Path, folder: Path) -> Path:
    """A run directory of SAT: the weights of all ranks, `latest`, and the configuration."""
    (folder / "2").mkdir(parents=True)
    for file in (run / "2").glob("mp_rank_*"):
        shutil.copy(file, folder / "2")
    for name in ("latest", "training_config.yaml"):
        shutil.copy(run / name, folder)
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tmp_path_factory.mktemp("one"), 1)


def test_every_save_has_the_adapters_alone(run: Path) -> None:
    weights = load_weights(run)
    lora = load_lora(run, "raw")
    assert (lora.rank, lora.alpha, lora.targets) == (4, 2.5, ("qkv", "dense", "mlp"))
    assert lora.base_model == "a transformer in the form of CogVideoX-5B of hidden_size 32, 2 layers"
    assert len(lora.weights) == MODULES
    assert all(torch.equal(value, weights[f"{PREFIX}{name}"]) for name, value in lora.weights.items())
    assert any(value.any() for name, value in lora.weights.items() if "matrix_B" in name)
    assert problem_of(run / "2") is None
    assert '"lora.safetensors"' in (run / "2" / "manifest.json").read_text()
    trained = sum(value.numel() for value in lora.weights.values())
    assert (run / "2" / "lora.safetensors").stat().st_size < 4 * trained * 1.01 + 10_000


def test_averages_have_their_own(run: Path) -> None:
    averaged, last = load_lora(run / "2-ema"), load_lora(run, "raw")
    assert all(torch.equal(value, averaged.weights[name]) for name, value in load_lora(run).weights.items())
    assert averaged.weights.keys() == last.weights.keys()
    assert any(not torch.equal(value, last.weights[name]) for name, value in averaged.weights.items())


def test_every_path_leads_to_them(run: Path, tmp_path: Path) -> None:
    expected = load_lora(run, "raw").weights
    first = load_lora(run / "1", "raw").weights
    assert any(not torch.equal(value, expected[name]) for name, value in first.items())
    shutil.copy(run / "2" / "lora.safetensors", tmp_path / "mine.safetensors")
    for path in (run / "2", run / "2" / "lora.safetensors", tmp_path / "mine.safetensors"):
        assert all(torch.equal(value, expected[name]) for name, value in load_lora(path, "raw").weights.items())


def test_sats_own_checkpoints_have_no_such_file(run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The whole model with its adapters; alpha stands in the configuration, or is SAT's default."""
    expected = load_lora(run, "raw")
    old = as_sats_own(run, tmp_path / "old")
    for path in (old, old / "2", old / "2" / "mp_rank_00_model_states.pt"):
        lora = load_lora(path)
        assert (lora.alpha, lora.base_model) == (2.5, expected.base_model)
        assert all(torch.equal(value, expected.weights[name]) for name, value in lora.weights.items())
    (old / "training_config.yaml").unlink()
    with caplog.at_level(logging.INFO, logger="sat"):
        assert load_lora(old).alpha == 1.0
    assert "alpha of the adapters in" in caplog.text and "SAT's default, 1" in caplog.text
    bare = {name.removeprefix(PREFIX): value for name, value in load_weights(old).items()}
    torch.save(bare, tmp_path / "bare.pt")
    assert load_lora(tmp_path / "bare.pt").weights.keys() == expected.weights.keys()


@pytest.mark.parametrize("stage", [1, 3])
def test_ranks_write_them_whole(run: Path, tmp_path: Path, stage: int) -> None:
    """Two tensor-parallel ranks hold a part each of most matrices; the file is that of one process to rounding."""
    split = train(tmp_path, 2, "args.model_parallel_size=2", f"deepspeed.zero_optimization.stage={stage}")
    lora, expected = load_lora(split, "raw"), load_lora(run, "raw")
    assert (lora.rank, lora.alpha, lora.base_model) == (expected.rank, expected.alpha, expected.base_model)
    for name, value in expected.weights.items():
        torch.testing.assert_close(lora.weights[name], value, rtol=0.0, atol=1e-5, msg=name)
    part = load_weights(split, mp_rank=1)[f"{PREFIX}transformer.layers.0.attention.dense.matrix_A.0"]
    assert part.shape == (4, 16) and lora.weights["transformer.layers.0.attention.dense.matrix_A.0"].shape == (4, 32)
    again = load_lora(as_sats_own(split, tmp_path / "old"))
    assert all(torch.equal(value, lora.weights[name]) for name, value in again.weights.items())


def test_a_run_without_adapters_has_no_such_file(tmp_path: Path) -> None:
    run_ranks(train_on_rank, 1, ("args.train_iters=1", "args.global_batch_size=4", f"args.save={tmp_path}"))
    plain = only_run(tmp_path)
    assert not (plain / "1" / "lora.safetensors").exists()
    with pytest.raises(CheckpointError, match=r"holds no adapters: none of its \d+ tensors is a matrix_A or matrix_B"):
        load_lora(plain)
    with pytest.raises(CheckpointError, match="there is no checkpoint"):
        load_lora(tmp_path / "nowhere")


def test_the_file_opens_without_this_project(run: Path) -> None:
    with safe_open(run / "2" / "lora.safetensors", framework="np") as reader:
        assert reader.metadata()["format"] == "pt" and len(list(reader.keys())) == MODULES
