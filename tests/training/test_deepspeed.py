"""Where DeepSpeed would be wrong without a word: its traps, shown, and the guards that keep runs out of them."""

from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest
import torch
import torch.distributed as dist
from torch import nn

from sat.errors import ConfigError, LayoutError
from sat.mpu.gradients import check_copies
from sat.mpu.launch import read_launch
from sat.mpu.layers import ColumnParallelLinear, RowParallelLinear
from sat.mpu.shards import make_rule
from sat.mpu.state import ParallelState
from sat.mpu.traffic import count_traffic, zero_bytes
from sat.training import step
from sat.training.args import DeepSpeedConfig, deepspeed_config, train_args
from sat.training.step import DeepSpeedGroups, Stepper
from tests.ranks import run_ranks
from tests.tiny import only_run, records, tiny_config, train_on_rank

COMMON = ("args.train_iters=3", "args.global_batch_size=4", "args.save_interval=3", "deepspeed.gradient_clipping=0.1")


def train(folder: Path, world: int, *options: str) -> list[float]:
    """Gradient norms of a short run."""
    run_ranks(train_on_rank, world, (*COMMON, f"args.save={folder}", *options))
    return [record["grad_norm"] for record in records(only_run(folder))]


@pytest.fixture(scope="module")
def norms(tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """Those of one process."""
    return train(tmp_path_factory.mktemp("one"), 1, "deepspeed.zero_optimization.stage=0")


def worst_error(found: list[float], expected: list[float]) -> float:
    return max(abs(a - b) / b for a, b in zip(found, expected, strict=True))


def plain_config(stage: int, precision: Literal["fp32", "bf16"]) -> DeepSpeedConfig:
    return DeepSpeedConfig(
        micro_batch_size=1,
        grad_accum_steps=1,
        zero_stage=stage,
        precision=precision,
        gradient_clipping=0.0,
        optimizer={"type": "Adam", "params": {"betas": [0.9, 0.95]}},
        rest={precision: {"enabled": True}} if precision == "bf16" else {},
    )


# --- sequence groups -------------------------------------------------------------------------------------------------


class SequenceGroups(DeepSpeedGroups):
    """The groups as DeepSpeed's sequence parallelism wants them: dp by itself, and dp x cp under a name of its own."""

    def get_data_parallel_rank(self) -> int:
        return self.parallel.rank("dp")

    def get_data_parallel_world_size(self) -> int:
        return self.parallel.size("dp")

    def get_data_parallel_group(self) -> dist.ProcessGroup | None:
        return self.parallel.true_group("dp")

    def get_sequence_data_parallel_rank(self) -> int:
        return self.parallel.rank("replicas")

    def get_sequence_data_parallel_world_size(self) -> int:
        return self.parallel.size("replicas")

    def get_sequence_data_parallel_group(self) -> dist.ProcessGroup | None:
        return self.parallel.true_group("replicas")


def train_with_sequence_groups(rank: int, options: tuple[str, ...]) -> None:
    step.DeepSpeedGroups = SequenceGroups  # type: ignore[misc]
    train_on_rank(rank, options)


CP = ("args.context_parallel_size=2", "deepspeed.zero_optimization.stage=3")


@pytest.mark.slow
def test_zero_3_is_wrong_with_sequence_groups(norms: list[float], tmp_path: Path) -> None:
    """The reason why context-parallel ranks are among the data-parallel ones for DeepSpeed."""
    assert worst_error(train(tmp_path / "ours", 4, *CP), norms) < 1e-5
    run_ranks(train_with_sequence_groups, 4, (*COMMON, f"args.save={tmp_path / 'theirs'}", *CP))
    theirs = [record["grad_norm"] for record in records(only_run(tmp_path / "theirs"))]
    assert worst_error(theirs, norms) > 0.1


def test_deepspeed_finds_no_sequence_groups() -> None:
    assert not [name for name in dir(DeepSpeedGroups) if "sequence" in name]


# --- parts of parameters ---------------------------------------------------------------------------------------------


class Product(nn.Module):
    """Two products whose weights tensor-parallel ranks share."""

    def __init__(self, parallel: ParallelState) -> None:
        super().__init__()
        torch.manual_seed(0)
        group = parallel.group("tp")
        self.up = ColumnParallelLinear(8, 16, bias=False, gather_output=False, group=group)
        self.down = RowParallelLinear(16, 8, bias=False, input_is_parallel=True, group=group)

    def forward(self, inputs: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"loss": self.down(self.up(inputs)).square().mean(-1)}


def norm_of_a_step(rank: int, tp: int, has_marks: bool) -> float:
    """The gradient norm that DeepSpeed finds, with the attributes that it looks at on parts of weights or without."""
    parallel = ParallelState.build(tp)
    module = Product(parallel)
    if not has_marks:
        for parameter in module.parameters():
            parameter.tensor_model_parallel = parameter.model_parallel = False  # type: ignore[attr-defined]
    stepper = Stepper(module, plain_config(1, "fp32"), read_launch(), parallel)
    stepper.accumulate(torch.linspace(-1.0, 1.0, 8).unsqueeze(0))
    return stepper.update(1e-3)


@pytest.mark.slow
def test_the_norm_is_wrong_without_marks() -> None:
    """Parts that are taken for copies are counted once. Clipping would be wrong with it, and no word said."""
    (expected,) = run_ranks(norm_of_a_step, 1, 1, True)
    assert run_ranks(norm_of_a_step, 2, 2, True) == pytest.approx([expected] * 2, rel=1e-6)
    assert all(abs(norm - expected) / expected > 0.1 for norm in run_ranks(norm_of_a_step, 2, 2, False))


def check_parts_and_copies(rank: int) -> list[str]:
    """What is said of a marked part, an unmarked part, equal copies and copies that differ."""
    parallel = ParallelState.build(tp=2)
    torch.manual_seed(0)
    part = ColumnParallelLinear(4, 6, group=parallel.group("tp"))
    unmarked = nn.Linear(4, 3)
    with torch.no_grad():
        unmarked.weight.copy_(part.weight)
        unmarked.bias.copy_(part.bias)
    copy = nn.Linear(4, 3)
    torch.manual_seed(rank)
    own = nn.Linear(4, 3)
    said = []
    for module in (part, unmarked, copy, own):
        try:
            check_copies(module, parallel)
            said.append("")
        except LayoutError as error:
            said.append(str(error))
    return said


def test_parts_must_be_marked_and_copies_equal() -> None:
    for part, unmarked, copy, own in run_ranks(check_parts_and_copies, 2):
        assert part == copy == ""
        assert unmarked.startswith("parameter weight differs between tensor-parallel ranks; if each holds a part of it")
        assert own.startswith("parameter weight differs") and "make it from the run's seed" in own


def test_marks_are_those_of_deepspeed() -> None:
    parameter = ColumnParallelLinear(4, 6).weight
    assert parameter.tensor_model_parallel and parameter.model_parallel
    assert parameter.shard_rule == make_rule(0, 6)


# --- bf16 at stage 0 -------------------------------------------------------------------------------------------------


class Square(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(64))

    def forward(self, inputs: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"loss": (self.weight * inputs).square().sum(-1).float()}


def first_update(rank: int, stage: int) -> float:
    """Size of Adam's first update in bf16, over the learning rate: 1 (Kingma & Ba 2014, arXiv:1412.6980, sec. 2.1)."""
    lr = 2.0**-4
    stepper = Stepper(Square(), plain_config(stage, "bf16"), read_launch(), ParallelState.build())
    stepper.accumulate(torch.ones(1, 64, dtype=torch.bfloat16))
    stepper.update(lr)
    return float((1.0 - stepper.module.weight).mean()) / lr


@pytest.mark.slow
def test_bf16_at_stage_0_is_a_step_off() -> None:
    assert run_ranks(first_update, 1, 1)[0] == pytest.approx(1.0, abs=0.05)
    assert run_ranks(first_update, 1, 0)[0] == pytest.approx(0.74, abs=0.05)


def checked(*words: str) -> DeepSpeedConfig:
    config = tiny_config(*words)
    return deepspeed_config(config, train_args(config), 1, "cpu")


def test_bf16_runs_at_stage_1_or_above(caplog: pytest.LogCaptureFixture) -> None:
    assert checked("deepspeed.bf16.enabled=true", "deepspeed.zero_optimization.stage=0").zero_stage == 1
    assert checked("deepspeed.bf16.enabled=true", "deepspeed.zero_optimization.stage=3").zero_stage == 3
    assert checked("deepspeed.zero_optimization.stage=0").zero_stage == 0


# --- keys that make numbers depend on the layout ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("prescale_gradients=true", "deepspeed.prescale_gradients .* is True, which is not available here: ZeRO 2 and"),
        ("gradient_predivide_factor=4", "deepspeed.gradient_predivide_factor .* is 4, .*: ZeRO 2 and 3 refuse it"),
        ("zero_optimization.cpu_offload=true", r"its name is offload_optimizer: \{device: cpu\} now"),
        ("zero_optimization.zero_quantized_gradients=true", "rounded gradients make results depend on the ranks"),
        ("zero_optimization.zero_quantized_weights=true", "rounded weights make results depend on the ranks"),
        ("zero_optimization.zenflow.topk_ratio=0.1", "late updates make results depend on timing"),
        ("elasticity.enabled=true", "it changes the global batch with the number of processes"),
        ("data_efficiency.enabled=true", "the data's order is a function of the seed alone"),
        ("compression_training.layer_reduction.enabled=true", "it changes the weights that are trained"),
        ("sparse_gradients=true", "DeepSpeed has dropped it"),
        ("amp.enabled=true", r"enable deepspeed\.bf16 or deepspeed\.fp16"),
        ("communication_data_type=bf16", "communication_data_type .* is 'bf16' in training with fp32: gradients would"),
        ("data_types.grad_accum_dtype=bf16", "data_types.grad_accum_dtype .* is 'bf16' in training with fp32"),
    ],
)
def test_keys_that_break_equality_are_refused(word: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        checked(f"deepspeed.{word}")


@pytest.mark.parametrize(
    "words",
    [
        ("prescale_gradients=false", "gradient_predivide_factor=1.0", "zero_optimization.cpu_offload=false"),
        ("communication_data_type=fp32", "data_types.grad_accum_dtype=fp32"),
        ("bf16.enabled=true", "communication_data_type=fp32"),
        ("bf16.enabled=true", "communication_data_type=bf16", "elasticity.enabled=false"),
    ],
)
def test_their_harmless_values_are_not(words: tuple[str, ...]) -> None:
    checked(*(f"deepspeed.{word}" for word in words))


# --- what ZeRO sends -------------------------------------------------------------------------------------------------


class Chain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(96, 96, bias=False) for _ in range(4))

    def forward(self, inputs: torch.Tensor) -> dict[str, torch.Tensor]:
        for layer in self.layers:
            inputs = layer(inputs).tanh()
        return {"loss": inputs.square().mean(-1)}


def count_step(rank: int, stage: int, accumulation: int) -> tuple[float, float]:
    """Bytes that the first step sends, (counted, by formula)."""
    module = Chain()
    weight_bytes = 4 * sum(parameter.numel() for parameter in module.parameters())
    nothing_stays = {"stage3_param_persistence_threshold": 0}
    config = replace(
        plain_config(stage, "fp32"), grad_accum_steps=accumulation, rest={"zero_optimization": nothing_stays}
    )
    parallel = ParallelState.build()
    with count_traffic() as traffic:  # from the start: DeepSpeed looks some functions up once
        stepper = Stepper(module, config, read_launch(), parallel)
        before = traffic.sent_bytes
        for _ in range(accumulation):
            stepper.accumulate(torch.ones(1, 96))
        stepper.update(1e-3)
    return float(traffic.sent_bytes - before), float(
        zero_bytes(weight_bytes, parallel.size("replicas"), stage, accumulation)
    )


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("stage", [0, 1, 2])
def test_bytes_of_a_step_are_those_of_the_formula(stage: int, accumulation: int) -> None:
    for counted, expected in run_ranks(count_step, 3, stage, accumulation):
        assert counted == pytest.approx(expected, rel=1e-3)  # beside them go single numbers, such as norms


def test_zero_3_gathers_weights_twice_for_a_micro_batch_at_most() -> None:
    for counted, expected in run_ranks(count_step, 3, 3, 1):
        assert counted == pytest.approx(expected, rel=1e-2)
    for counted, expected in run_ranks(count_step, 3, 3, 2):
        assert 0.8 * expected < counted < 1.01 * expected  # so small a network's weights stay from one to the next


# --- offload ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_an_offloaded_optimizer_takes_the_same_steps(norms: list[float], tmp_path: Path, stage: int) -> None:
    offload = "deepspeed.zero_optimization.offload_optimizer.device=cpu"
    found = train(tmp_path, 2, offload, f"deepspeed.zero_optimization.stage={stage}", "args.model_parallel_size=2")
    assert worst_error(found, norms) < 1e-5
