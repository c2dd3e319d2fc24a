"""n steps, a kill -9, and the same command again: to the last bit the run that was never broken off.

Compared are all files of the last checkpoint by checksum (weights, master weights, Adam's moments, averages, state) and
of every step the loss, gradient norm and learning rate, and what it was drawn from: sample numbers, timesteps, noise.
"""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from sat.training.checkpoint import load_weights
from sat.weights.whole import read_manifest
from tests.ranks import run_ranks
from tests.tiny import only_run, records, train_on_rank
from tests.training.crashes import numbers_of

BEFORE, AFTER = 4, 20
OPTIONS = (
    f"args.train_iters={BEFORE + AFTER}",
    f"args.save_interval={BEFORE}",
    "args.global_batch_size=4",
    "deepspeed.train_micro_batch_size_per_gpu=1",
    "deepspeed.optimizer.type=sat.ops.FusedEmaAdam",
    "model.network_config.params.hidden_size=48",
    "model.network_config.params.num_attention_heads=3",
)
BF16 = ("deepspeed.bf16.enabled=true",)
TP, CP = ("args.model_parallel_size=2",), ("args.context_parallel_size=2",)
LORA = (
    "model.network_config.params.modules.lora_config={target: sat.model.finetune.lora2.LoraMixin, "
    "params: {r: 2, lora_dropout: 0.3}}",
    "model.not_trainable_prefixes=[all]",
)
MUON = ("deepspeed.optimizer={type: sat.ops.Muon, params: {lr: 0.01}}",)
OFFLOAD = ("deepspeed.zero_optimization.offload_optimizer={device: cpu}",)


def stage(number: int) -> tuple[str, ...]:
    return (f"deepspeed.zero_optimization.stage={number}",)


def train_and_note(rank: int, words: tuple[str, ...], notes: str) -> None:
    """Train, noting what each micro batch was drawn as. Steps that are made again after a break replace their notes."""
    from sat.training.step import Stepper

    accumulate = Stepper.accumulate
    found: list[str] = []

    def noting(self: Any, inputs: Any, weights: Any = None) -> dict[str, torch.Tensor]:
        digest = hashlib.blake2b(digest_size=8)
        for value in (inputs.latents, inputs.timesteps, inputs.noise, inputs.cond["crossattn"]):
            digest.update(value.contiguous().numpy().tobytes())
        found.append(digest.hexdigest())
        return accumulate(self, inputs, weights)

    Stepper.accumulate = noting  # type: ignore[method-assign]
    train_on_rank(rank, words)
    Path(f"{notes}{rank}").write_text(json.dumps(found))


def run(folder: Path, world: int, words: tuple[str, ...], notes: Path) -> Path:
    run_ranks(train_and_note, world, (*OPTIONS, *words, f"args.save={folder}"), str(notes))
    return only_run(folder)


def as_after_a_kill(whole: Path, folder: Path, step: int = BEFORE) -> Path:
    """The run as a kill -9 leaves it a step and a half after it has saved `step`."""
    copy = folder / whole.name
    shutil.copytree(whole, copy)
    for path in copy.iterdir():
        if path.name.removesuffix("-ema").isdecimal() and int(path.name.removesuffix("-ema")) > step:
            shutil.rmtree(path)
    (copy / "latest").write_text(str(step))
    lines = (copy / "metrics.jsonl").read_text().splitlines()
    (copy / "metrics.jsonl").write_text("\n".join(lines[: step + 1]) + "\n" + lines[step + 1][:30])
    return copy


CASES: dict[str, tuple[int, tuple[str, ...]]] = {
    "Muon": (1, (*stage(0), *MUON)),
    "stage 2 on 2": (2, stage(2)),
    "bf16, LoRA with dropout": (1, (*stage(2), *LORA, *BF16)),
}
MORE_CASES: dict[str, tuple[int, tuple[str, ...]]] = {
    "stage 0": (1, stage(0)),
    "stage 1": (1, stage(1)),
    "bf16, tp 2": (2, (*stage(1), *TP, *BF16)),
    "stage 3, cp 2": (2, (*stage(3), *CP)),
    "stage 0 on 2": (2, stage(0)),
    "bf16, stage 2 on 2": (2, (*stage(2), *BF16)),
    "bf16, stage 3 on 2": (2, (*stage(3), *BF16)),
    "stage 3, tp 2 on 4": (4, (*stage(3), *TP)),
    "bf16, tp 2 and cp 2": (4, (*stage(2), *TP, *CP, *BF16)),
    "ring": (2, (*stage(1), *CP, "args.context_parallel_mode=ring")),
    "sequence parallel": (2, (*stage(2), *TP, "args.sequence_parallel=true")),
    "LoRA at stage 3": (2, (*stage(3), *LORA)),
    "offloaded": (2, (*stage(2), *OFFLOAD)),
    "offloaded at stage 3": (2, (*stage(3), *OFFLOAD)),
    "bf16 gradients added up in fp32": (2, (*stage(1), *BF16, "deepspeed.data_types={grad_accum_dtype: fp32}")),
    "SGD": (1, (*stage(1), "deepspeed.optimizer={type: SGD, params: {lr: 0.01, momentum: 0.9}}")),
    "recomputed activations": (1, (*stage(2), "args.checkpoint_activations=true")),
}


@pytest.mark.parametrize("name", [*CASES, *(pytest.param(name, marks=pytest.mark.slow) for name in MORE_CASES)])
def test_a_broken_run_ends_as_the_whole_one(tmp_path: Path, name: str) -> None:
    world, words = {**CASES, **MORE_CASES}[name]
    whole = run(tmp_path / "whole", world, words, tmp_path / "notes")
    broken = as_after_a_kill(whole, tmp_path / "broken")
    assert run(broken.parent, world, words, tmp_path / "notes-after") == broken
    assert numbers_of(broken) == numbers_of(whole)
    for folder in (str(BEFORE + AFTER), *([f"{BEFORE + AFTER}-ema"] if name not in ("SGD", "Muon") else [])):
        assert read_manifest(broken / folder) == read_manifest(whole / folder)
    for rank in range(world):
        drawn, drawn_after = (json.loads((tmp_path / f"{kind}{rank}").read_text()) for kind in ("notes", "notes-after"))
        assert len(drawn_after) == len(drawn) * AFTER // (BEFORE + AFTER)
        assert drawn[-len(drawn_after) :] == drawn_after and len(set(drawn)) == len(drawn)


def test_the_comparison_has_teeth(tmp_path: Path) -> None:
    """One element of Adam's state is another: the next losses are, too."""
    words = stage(0)
    whole = run(tmp_path / "whole", 1, words, tmp_path / "notes")
    broken = as_after_a_kill(whole, tmp_path / "broken")
    edit_state(broken / str(BEFORE))
    run_ranks(train_and_note, 1, (*OPTIONS, *words, f"args.save={broken.parent}"), str(tmp_path / "notes"))
    losses = [[record["loss"] for record in records(one)] for one in (whole, broken)]
    assert losses[0][: BEFORE + 1] == losses[1][: BEFORE + 1]  # weights and data are those that were saved
    assert losses[0][BEFORE + 2] != losses[1][BEFORE + 2]


def edit_state(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    file = folder / "optimizer_rank_00000.safetensors"
    tensors = load_file(file)
    name = next(name for name in sorted(tensors) if name.startswith("exp_avg|") and "final_layer.linear.weight" in name)
    tensors[name][0] += 1.0
    save_file(tensors, file, {"tp_rank": "0", "tp_size": "1"})
    (folder / "manifest.json").write_text(json.dumps({"files": {}}))


# --- on another layout -----------------------------------------------------------------------------------------------

LOSS_RTOL = 1e-5  # measured 3e-7 in fp32
Layout = tuple[int, tuple[str, ...]]
JOURNEYS: dict[str, list[Layout]] = {
    "2 -> 1 -> tp 2": [(2, stage(1)), (1, stage(1)), (2, (*stage(1), *TP))],
}
MORE_JOURNEYS: dict[str, list[Layout]] = {
    "2 -> 1 -> 2": [(2, stage(2)), (1, stage(1)), (2, stage(3))],
    "tp 2 -> cp 2 -> dp 2": [(2, (*stage(3), *TP)), (2, (*stage(1), *CP)), (2, stage(2))],
    "offload on and off": [(2, (*stage(2), *OFFLOAD)), (1, stage(0)), (2, (*stage(3), *OFFLOAD))],
    "LoRA, dp 2 -> tp 2 -> 1": [
        (2, (*stage(2), *LORA, "model.network_config.params.modules.lora_config.params.lora_dropout=0")),
        (2, (*stage(3), *LORA, *TP, "model.network_config.params.modules.lora_config.params.lora_dropout=0")),
        (1, (*stage(1), *LORA, "model.network_config.params.modules.lora_config.params.lora_dropout=0")),
    ],
}


@pytest.mark.parametrize("name", [*JOURNEYS, *(pytest.param(name, marks=pytest.mark.slow) for name in MORE_JOURNEYS)])
def test_a_run_that_moves_keeps_its_curve(tmp_path: Path, name: str) -> None:
    """Broken off after 8 and 16 of 24 steps, each time continued elsewhere; the averages move along."""
    layouts = {**JOURNEYS, **MORE_JOURNEYS}[name]
    world, words = layouts[0]
    model = tuple(word for word in words if word.startswith("model."))
    whole = run(tmp_path / "whole", 1, (*stage(0), *model), tmp_path / "notes")
    present = tmp_path / "0"
    for number, (world, words) in enumerate(layouts):
        run(present, world, words, tmp_path / "notes")
        if number < 2:
            present = as_after_a_kill(only_run(present), tmp_path / str(number + 1), 8 * (number + 1)).parent
    expected, got = (torch.tensor([record["loss"] for record in records(one)]) for one in (whole, only_run(present)))
    torch.testing.assert_close(got, expected, rtol=LOSS_RTOL, atol=0.0)
    assert [record["lr"] for record in records(only_run(present))] == [record["lr"] for record in records(whole)]
    if "model_parallel_size" not in str(layouts[-1]):  # its files hold a rank's part each
        check_weights(
            lambda folder: load_weights(only_run(present) / folder), lambda folder: load_weights(whole / folder)
        )


def check_weights(
    got: Callable[[str], dict[str, torch.Tensor]], expected: Callable[[str], dict[str, torch.Tensor]]
) -> None:
    for folder in (f"{BEFORE + AFTER}", f"{BEFORE + AFTER}-ema"):
        weights = got(folder)
        for name, value in expected(folder).items():
            if "query_key_value.bias" not in name:  # the key's bias has no gradient but rounding
                torch.testing.assert_close(weights[name], value, rtol=0.0, atol=1e-4)
