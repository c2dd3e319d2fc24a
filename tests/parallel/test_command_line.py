"""The same YAML and seed under torchrun with 1, 2 and 4 processes: one curve of losses, the same exported weights."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.launch import BIN, ENVIRONMENT, ROOT
from tests.tiny import only_run, records
from tests.training.test_oracle import as_after_a_kill

STEPS = 20
LOSS_RTOL = 1e-5  # measured: 1e-6
WEIGHT_ATOL = 1e-4
NOT_COMPARED = "query_key_value.bias"
"""The key's bias cannot change the loss: Adam amplifies the rounding of its gradient."""

THIRTY_HEADS = (
    "model.network_config.params.num_attention_heads=30",
    "model.network_config.params.hidden_size=480",
    "model.network_config.params.modules.pos_embed_config.params.hidden_size_head=16",
    "model.network_config.params.modules.pos_embed_config.params.text_length=226",
    "model.conditioner_config.params.emb_models.0.params.max_length=226",
    "data.params.num_frames=5",
    "data.params.height=14",
    "data.params.width=6",
)
"""5 x 7 x 3 patches with 226 text tokens: 331, a prime number."""


def torchrun(processes: int, *words: object) -> str:
    command = [str(BIN / "torchrun"), "--standalone", "--nproc_per_node", str(processes), *map(str, words)]
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def train(folder: Path, processes: int, *words: str, steps: int = STEPS) -> Path:
    options = (f"args.train_iters={steps}", "args.global_batch_size=4", "args.eval_interval=null")
    base = ("train_video.py", "--base", "configs/tiny.yaml", "--seed", 7)
    torchrun(processes, *base, *options, f"args.save={folder}", *words)
    return only_run(folder)


def losses(run: Path) -> list[float]:
    return [record["loss"] for record in records(run)]


def exported(run: Path, file: Path) -> dict[str, torch.Tensor]:
    """The weights as one released file."""
    command = [sys.executable, "tools/reshard.py", str(run), str(file)]
    subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, check=True)
    return torch.load(file, weights_only=True)["module"]


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tmp_path_factory.mktemp("one"), 1, "deepspeed.zero_optimization.stage=0")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("processes", "words"),
    [
        (2, ("args.model_parallel_size=2", "deepspeed.zero_optimization.stage=0")),
        (2, ("args.context_parallel_size=2", "deepspeed.zero_optimization.stage=3")),
        (2, ("deepspeed.zero_optimization.stage=2",)),
        (4, ("args.model_parallel_size=2", "args.sequence_parallel=true", "deepspeed.zero_optimization.stage=1")),
        (4, ("args.model_parallel_size=2", "args.context_parallel_size=2", "deepspeed.zero_optimization.stage=3")),
        (4, ("args.context_parallel_size=4", "args.context_parallel_mode=ring", "deepspeed.zero_optimization.stage=2")),
    ],
    ids=["tp 2", "cp 2, ZeRO 3", "dp 2, ZeRO 2", "dp 2 x tp 2 + sp, ZeRO 1", "tp 2 x cp 2, ZeRO 3", "ring 4, ZeRO 2"],
)
def test_losses_and_exported_weights(one: Path, tmp_path: Path, processes: int, words: tuple[str, ...]) -> None:
    run = train(tmp_path / "runs", processes, *words)
    assert len(losses(run)) == STEPS
    assert losses(run) == pytest.approx(losses(one), rel=LOSS_RTOL)
    expected = exported(one, tmp_path / "one.pt")
    found = exported(run, tmp_path / "own.pt")
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if NOT_COMPARED not in name:
            torch.testing.assert_close(
                found[name], value, rtol=0.0, atol=WEIGHT_ATOL, msg=lambda m, n=name: f"{n}: {m}"
            )


@pytest.mark.slow
def test_thirty_heads_on_four_ranks_at_sizes_that_nothing_divides(tmp_path: Path) -> None:
    one = train(tmp_path / "one", 1, *THIRTY_HEADS, steps=3)
    for mode in ("auto", "ulysses", "ring"):
        options = ("args.context_parallel_size=4", f"args.context_parallel_mode={mode}")
        run = train(tmp_path / mode, 4, *THIRTY_HEADS, *options, steps=3)
        assert losses(run) == pytest.approx(losses(one), rel=LOSS_RTOL)


@pytest.mark.slow
def test_a_run_moves_from_tp_and_dp_to_cp(one: Path, tmp_path: Path) -> None:
    split = ("args.model_parallel_size=2", "deepspeed.zero_optimization.stage=1")
    whole = train(tmp_path / "whole", 4, *split, "args.save_interval=10")
    run = as_after_a_kill(whole, tmp_path / "moved", step=10)
    again = train(tmp_path / "moved", 2, "args.context_parallel_size=2", "deepspeed.zero_optimization.stage=2")
    assert again == run and len(losses(run)) == STEPS
    assert losses(run) == pytest.approx(losses(one), rel=LOSS_RTOL)
