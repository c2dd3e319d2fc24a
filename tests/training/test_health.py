"""Numbers that are no longer numbers, losses that stand out, ranks that have come apart."""

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from sat.data.sampler import epoch_permutation
from sat.data.synthetic import SyntheticLatents
from sat.errors import ConfigError, TrainingError
from sat.mpu.launch import Launch, read_launch
from sat.mpu.state import ParallelState
from sat.training.args import deepspeed_config, train_args
from sat.training.checkpoint import load_weights
from sat.training.health import GradientWatch, Health, HealthOptions, MicroBatch, bit_sums, check_replicas
from sat.training.step import Stepper
from tests.ranks import run_ranks
from tests.tiny import only_run, records, tiny_config, train_on_rank

COMMON = ("args.train_iters=6", "args.global_batch_size=4", "args.save_interval=2")


class Poisoned(SyntheticLatents):
    """Latents of which some are not finite: by their sample number."""

    def __init__(self, bad: list[int], value: str = "nan") -> None:
        super().__init__(1000, 3, 16, 4, 4)
        self.bad, self.value = bad, float(value)

    def __getitem__(self, index: int) -> dict[str, Any]:
        item = super().__getitem__(index)
        if index in self.bad:
            item["latents"][0, 0, 0, 0] = self.value
        return item


def indices_of_step(step: int) -> list[int]:
    """The samples of a step of a run of COMMON."""
    order = epoch_permutation(1000, 7, 0)
    return [order[counter] for counter in range(4 * (step - 1), 4 * step)]


def poisoned(bad: list[int], value: str = "nan") -> str:
    return f"data={{target: tests.training.test_health.Poisoned, params: {{bad: {bad}, value: {value}}}}}"


# --- a loss that is no number ----------------------------------------------------------------------------------------


def poison(folder: Path, world: int, stage: int, *more: str, value: str = "nan") -> Path:
    """A run whose third step has one bad sample, the third of its four."""
    bad = poisoned([indices_of_step(3)[2]], value)
    words = (bad, f"deepspeed.zero_optimization.stage={stage}", f"args.save={folder}", *more)
    run_ranks(train_on_rank, world, (*COMMON, *words))
    return only_run(folder)


@pytest.mark.parametrize(
    ("world", "stage"),
    [
        (1, 0),
        pytest.param(1, 1, marks=pytest.mark.slow),
        pytest.param(2, 0, marks=pytest.mark.slow),
        (2, 1),
        pytest.param(2, 2, marks=pytest.mark.slow),
        (2, 3),
    ],
)
@pytest.mark.parametrize("value", ["nan", pytest.param("inf", marks=pytest.mark.slow)])
def test_a_bad_sample_costs_one_step_and_reaches_no_weight(tmp_path: Path, world: int, stage: int, value: str) -> None:
    run = poison(tmp_path, world, stage, "args.keep_last=9", value=value)
    found = records(run)
    assert [record["step"] for record in found] == [1, 2, 3, 4, 5, 6]
    assert [record["step"] for record in found if record.get("skipped")] == [3]
    assert found[2]["loss"] is None and all(math.isfinite(found[place]["loss"]) for place in (0, 1, 3, 4, 5))
    for step in (2, 4, 6):
        assert all(value.isfinite().all() for value in load_weights(run / str(step)).values())
    (report,) = (run / "health").iterdir()
    assert report.name == "step_00000003_skipped.json"
    content = json.loads(report.read_text())
    assert (content["step"], content["seed"], content["kind"]) == (3, 7, "skipped")
    told = [(own["rank"], sample) for own in content["ranks"] for batch in own["samples"] for sample in batch]
    assert [sample["counter"] for _, sample in told] == [8, 9, 10, 11]
    ((guilty, sample),) = [(rank, sample) for rank, sample in told if not math.isfinite(float(sample["loss"]))]
    assert (guilty, sample["counter"]) == (0 if world == 1 else 1, 10)
    assert sample["key"] == f"synthetic/{indices_of_step(3)[2]}"
    rank = content["ranks"][guilty]
    assert rank["gradients"] and set(rank["gradients"].values()) == {0, 1}  # of all groups


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_the_steps_around_a_skipped_one_are_those_without_it(tmp_path: Path, stage: int) -> None:
    """The weights after step 3 are those after step 2; Adam's count of steps is one behind."""
    run = poison(tmp_path, 2, stage, "args.save_interval=1", "args.train_iters=3")
    before, after = (load_weights(run / name) for name in ("2", "3"))
    assert all(torch.equal(after[name], value) for name, value in before.items())


@pytest.mark.parametrize("precision", ["bf16"])
def test_bf16_skips_too(tmp_path: Path, precision: str) -> None:
    run = poison(tmp_path, 2, 2, f"deepspeed.{precision}.enabled=true")
    assert [record["step"] for record in records(run) if record.get("skipped")] == [3]
    assert all(value.isfinite().all() for value in load_weights(run).values())


def test_a_micro_batch_of_several_poisons_its_step(tmp_path: Path) -> None:
    run = poison(tmp_path, 1, 2, "deepspeed.train_micro_batch_size_per_gpu=1")  # the bad one is the third of four
    assert [record["step"] for record in records(run) if record.get("skipped")] == [3]


@pytest.mark.parametrize("world", [1, 2])
def test_too_many_in_a_row_stop_the_run_with_the_last_good_checkpoint(tmp_path: Path, world: int) -> None:
    bad = [index for step in (4, 5, 6) for index in indices_of_step(step)]
    words = (poisoned(bad), f"args.save={tmp_path}", "args.train_iters=20", "args.max_skipped_steps=3")
    with pytest.raises(AssertionError) as caught:
        run_ranks(train_on_rank, world, (*COMMON, *words))
    run = only_run(tmp_path)
    message = (
        "3 steps in a row, from 4 on, had a loss or gradients that are not finite (args.max_skipped_steps); at step 6: "
        "the loss of sample 20 (synthetic/"
    )
    assert str(caught.value).count(message) == world
    assert str(caught.value).count(f"The last good checkpoint is {run}/2: lower the learning rate or mend") == world


def train_with_bad_gradients(rank: int, options: tuple[str, ...], first: int) -> None:
    """From a step on, one parameter's gradients are infinite; losses stay finite."""
    make, passes = Stepper.__init__, 0

    def making(self: Stepper, model: nn.Module, *rest: Any) -> None:
        def spoil(gradient: torch.Tensor) -> torch.Tensor:
            nonlocal passes
            passes += 1
            return gradient * math.inf if passes >= first else gradient

        next(one for one in model.parameters() if one.requires_grad).register_hook(spoil)
        make(self, model, *rest)

    Stepper.__init__ = making  # type: ignore[method-assign]
    train_on_rank(rank, options)


@pytest.mark.parametrize("is_gradient", [False, True])
def test_the_checkpoint_that_is_named_is_there_and_good(tmp_path: Path, is_gradient: bool) -> None:
    """Saves in a row of bad steps must not push the last good one out, whether the loss is bad or gradients alone."""
    words = ("args.save_interval=1", "args.keep_last=1", "args.max_skipped_steps=3", f"args.save={tmp_path}")
    words = (*COMMON, *words, "deepspeed.train_micro_batch_size_per_gpu=4", "args.train_iters=9")
    with pytest.raises(AssertionError) as caught:
        if is_gradient:
            run_ranks(train_with_bad_gradients, 1, words, 4)
        else:
            bad = [index for step in (4, 5, 6) for index in indices_of_step(step)]
            run_ranks(train_on_rank, 1, (*words, poisoned(bad)))
    run = only_run(tmp_path)
    assert "3 steps in a row, from 4 on" in str(caught.value)
    assert f"The last good checkpoint is {run}/3: lower the learning rate" in str(caught.value)
    assert {path.name for path in run.iterdir() if path.name.isdecimal()} == {"3", "5"}
    assert all(torch.equal(value, load_weights(run / "5")[name]) for name, value in load_weights(run / "3").items())


def test_weights_that_were_saved_only_in_the_row_are_named_for_what_they_are(tmp_path: Path) -> None:
    bad = [index for step in (2, 3, 4) for index in indices_of_step(step)]
    words = (*COMMON, poisoned(bad), f"args.save={tmp_path}", "args.max_skipped_steps=3")
    with pytest.raises(AssertionError) as caught:
        run_ranks(train_on_rank, 1, words)
    run = only_run(tmp_path)
    message = f"No checkpoint was saved before; {run}/2 holds the weights from before step 2, as skipped steps"
    assert message in str(caught.value) and f"args.mode=finetune args.load={run}/2" in str(caught.value)


def test_a_resumed_run_counts_on(tmp_path: Path) -> None:
    """The same command again after a save within a row of bad steps: it stops where it would have stopped."""
    bad = [index for step in (2, 3, 4) for index in indices_of_step(step)]
    words = (*COMMON, poisoned(bad), f"args.save={tmp_path}", "args.max_skipped_steps=3")
    with pytest.raises(AssertionError, match="3 steps in a row, from 2 on"):
        run_ranks(train_on_rank, 1, words)
    assert json.loads((only_run(tmp_path) / "2" / "training_state.json").read_text())["health"] == {
        "skipped_in_a_row": 1,
        "first_skipped": 2,
        "losses": [records(only_run(tmp_path))[0]["loss"]],
    }
    with pytest.raises(AssertionError, match="3 steps in a row, from 2 on"):
        run_ranks(train_on_rank, 1, words)
    assert [record["step"] for record in records(only_run(tmp_path))] == [1, 2, 3]


def run_again(rank: int, report: str, folder: str) -> None:
    """The recipe of docs/checkpoints.md, from what a report says alone."""
    import shutil

    import torch.distributed as dist

    from sat.config import load_config
    from sat.training.loop import train_joined

    content = json.loads(Path(report).read_text())
    checkpoint = Path(content["checkpoint"])
    again = Path(folder) / checkpoint.name
    if rank == 0:
        shutil.copytree(checkpoint, again)
    dist.barrier()
    words = [f"args.resume={again}", "args.max_skipped_steps=1"]
    train_joined(load_config([content["configuration"]], words), content["seed"])


def test_a_report_makes_the_step_again(tmp_path: Path) -> None:
    """From the checkpoint of step 2 over the good step 3 to the bad one, to the last bit; the run is not touched."""
    bad = poisoned([indices_of_step(4)[2]], "inf")
    run_ranks(train_on_rank, 2, (*COMMON, bad, f"args.save={tmp_path / 'runs'}"))
    run, again = only_run(tmp_path / "runs"), tmp_path / "again"
    report = run / "health" / "step_00000004_skipped.json"
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    content = json.loads(report.read_text())
    assert (content["checkpoint"], content["configuration"]) == (str(run / "2"), str(run / "training_config.yaml"))
    with pytest.raises(AssertionError, match="1 steps in a row, from 4 on"):
        run_ranks(run_again, 2, str(report), str(again))
    assert json.loads((again / "health" / report.name).read_text())["ranks"] == content["ranks"]
    assert [(one["step"], one["loss"]) for one in records(again)] == [(3, records(run)[2]["loss"])]
    assert {path: path.read_bytes() for path in before} == before


# --- gradients that are no numbers -----------------------------------------------------------------------------------


def bad_gradient(rank: int, stage: int, guilty: int) -> tuple[bool, dict[str, int], bool, float]:
    """One step whose loss is finite and one of whose gradients is not, on one rank; then a good one."""
    from sat.mpu.launch import read_launch

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, inputs: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"loss": self.second(self.first(inputs)).square().mean(1)}

    torch.manual_seed(0)
    config = tiny_config(f"deepspeed.zero_optimization.stage={stage}", "deepspeed.train_micro_batch_size_per_gpu=2")
    launch, parallel = read_launch(), ParallelState.build()
    ds = deepspeed_config(config, train_args(config), launch.world_size, "cpu")
    model = Model()
    hook = None
    if rank == guilty:  # as of a device that miscounts
        hook = model.first.weight.register_hook(lambda gradient: gradient * math.inf)
    stepper = Stepper(model, ds, launch, parallel)
    before = (
        {name: value.clone() for name, value in stepper.weights(lambda _, value: value.clone()).items()}
        if rank == 0
        else {}
    )  # type: ignore[union-attr]
    if rank != 0:
        stepper.weights(lambda _, value: value)
    loss = stepper.accumulate(torch.ones(2, 4))["loss"]
    assert loss.isfinite().all()
    norm = stepper.update(0.1)
    was_updated, bad = stepper.was_updated, stepper.watch.take()
    after = stepper.weights(lambda _, value: value.clone())
    is_same = all(torch.equal(before[name], after[name]) for name in before) if after is not None else True
    if hook is not None:
        hook.remove()
    stepper.accumulate(torch.ones(2, 4))
    assert math.isfinite(stepper.update(0.1)) and stepper.was_updated and stepper.watch.take() == {}
    return was_updated, bad, is_same, norm


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_bad_gradient_is_left_out_and_its_rank_and_group_known(stage: int) -> None:
    for rank, (was_updated, bad, is_same, norm) in enumerate(run_ranks(bad_gradient, 2, stage, 1)):
        assert not was_updated and is_same and not math.isfinite(norm)
        assert bad == ({"first.weight": 0} if rank == 1 else {})


def test_the_watch_notes_each_parameter_once_and_forgets() -> None:
    one, two = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3, dtype=torch.float16))
    watch = GradientWatch({one: "one", two: "two"}, {one: 0, two: 1})
    assert watch.take() == {}
    (one.sum() * 1e30 + two.sum() * 60000.0).backward()  # sums past the largest fp16 number, of finite gradients
    assert watch.take() == {}
    (two * torch.tensor([1.0, math.nan, 1.0])).sum().backward()
    (one.sum()).backward()  # a later good one does not cover it
    assert watch.take() == {"two": 1} and watch.take() == {}


@pytest.mark.parametrize(
    "word",
    [
        "deepspeed.bf16={enabled: true, check_grad_overflow: false}",
        "deepspeed.zero_optimization.compute_grad_norm=false",
    ],
)
def test_the_guard_cannot_be_switched_off_in_deepspeed(word: str) -> None:
    config = tiny_config(word)
    with pytest.raises(ConfigError, match="is false: infinite gradients would go into the weights; leave it out"):
        deepspeed_config(config, train_args(config), 1, "cpu")


# --- fp16 ------------------------------------------------------------------------------------------------------------


def test_a_collapsed_loss_scale_is_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """As DeepSpeed's scaler tells it; fp16 itself runs on GPUs only."""

    class Engine:
        def step(self) -> None:
            raise Exception("Current loss scale already at minimum - cannot decrease scale anymore. Exiting run.")

        def loss_scale(self) -> float:
            return 1.0

    stepper = object.__new__(Stepper)
    config = tiny_config("deepspeed.fp16.enabled=true", "deepspeed.zero_optimization.stage=2")
    stepper.config = deepspeed_config(config, train_args(config), 1, "cuda")
    stepper.engine = Engine()
    stepper.optimizer = torch.optim.SGD([{"params": [torch.ones(1)], "lr_scale": 1.0}], lr=1.0)
    with pytest.raises(
        TrainingError, match=r"fp16: the loss scale has fallen to its minimum 1 and the gradients still"
    ):
        stepper.update(0.1)


def test_fp16_and_bf16_leave_stage_0() -> None:
    for name in ("fp16", "bf16"):
        config = tiny_config(f"deepspeed.{name}.enabled=true", "deepspeed.zero_optimization.stage=0")
        assert deepspeed_config(config, train_args(config), 1, "cuda").zero_stage == 1


# --- spikes ----------------------------------------------------------------------------------------------------------


def watch_losses(folder: Path, losses: list[float], deviations: float = 10.0) -> list[str]:
    """The reports that a row of losses makes."""
    launch = Launch(0, 0, 1, torch.device("cpu"))
    options = HealthOptions(spike_deviations=deviations)
    health = Health(options, folder, launch, ParallelState(), {"seed": 1, "global_batch_size": 4})
    for step, loss in enumerate(losses, 1):
        health.updated(step, loss, [MicroBatch([4 * step], ["a"], torch.tensor([loss]))])
    return sorted(path.name for path in (folder / "health").iterdir()) if (folder / "health").exists() else []


NOISY = [1.0 + 0.1 * math.sin(7.0 * step) for step in range(40)]


def test_a_spike_is_reported_with_what_reproduces_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert watch_losses(tmp_path, [*NOISY, 5.0, *NOISY]) == ["step_00000041_spike.json"]
    content = json.loads((tmp_path / "health" / "step_00000041_spike.json").read_text())
    assert (content["loss"], content["median"], content["seed"]) == (5.0, pytest.approx(1.0, abs=0.05), 1)
    assert content["ranks"] == [{"rank": 0, "samples": [[{"counter": 164, "key": "a", "loss": "5.0"}]]}]
    assert "step 41: the loss is 5, and was 1" in caplog.text and "step_00000041_spike.json" in caplog.text


@pytest.mark.parametrize(
    ("losses", "deviations"),
    [
        (NOISY, 10.0),
        ([*NOISY, 0.1], 10.0),
        ([*NOISY, 5.0], 0.0),
        ([1.0] * 5 + [5.0], 10.0),
        ([1.0] * 40 + [1.005], 10.0),
    ],
)
def test_what_is_no_spike(tmp_path: Path, losses: list[float], deviations: float) -> None:
    """Noise, a low loss, what is switched off, what comes before there is a measure, next to nothing."""
    assert watch_losses(tmp_path, losses, deviations) == []


def spike_on_two_ranks(rank: int, folder: str) -> None:
    health = Health(HealthOptions(), Path(folder), read_launch(), ParallelState.build(), {})
    for step, loss in enumerate([*NOISY, 5.0], 1):
        health.updated(step, loss, [MicroBatch([2 * step + rank], [f"key {rank}"], torch.tensor([loss + rank]))])


def test_a_spikes_report_has_the_samples_of_all_ranks(tmp_path: Path) -> None:
    run_ranks(spike_on_two_ranks, 2, str(tmp_path))
    ranks = json.loads((tmp_path / "health" / "step_00000041_spike.json").read_text())["ranks"]
    assert [(own["rank"], own["samples"]) for own in ranks] == [
        (rank, [[{"counter": 82 + rank, "key": f"key {rank}", "loss": repr(5.0 + rank)}]]) for rank in (0, 1)
    ]


def test_a_resumed_run_knows_what_losses_were_like(tmp_path: Path) -> None:
    launch, parallel = Launch(0, 0, 1, torch.device("cpu")), ParallelState()
    before, after = (Health(HealthOptions(), tmp_path, launch, parallel, {}) for _ in range(2))
    for step, loss in enumerate(NOISY, 1):
        before.updated(step, loss, [])
    after.load_state({"skipped_in_a_row": 0, "first_skipped": None})  # of an older checkpoint
    after.load_state(json.loads(json.dumps(before.state())))
    after.updated(41, 5.0, [])
    assert [path.name for path in (tmp_path / "health").iterdir()] == ["step_00000041_spike.json"]


# --- replicas --------------------------------------------------------------------------------------------------------


def test_bit_sums_tell_single_bits_and_types() -> None:
    parameters = {
        "fp32": nn.Parameter(torch.randn(1000)),
        "bf16": nn.Parameter(torch.randn(1000).bfloat16()),
        "scalar": nn.Parameter(torch.tensor(1.0)),
    }
    before = bit_sums(parameters)
    assert torch.equal(
        before,
        bit_sums({name: nn.Parameter(value.flip(0) if value.dim() else value) for name, value in parameters.items()}),
    )
    with torch.no_grad():
        parameters["bf16"].view(torch.int16)[7] ^= 1
        parameters["scalar"].neg_()
    assert (before != bit_sums(parameters)).tolist() == [False, True, True]
    assert bit_sums({"nan": nn.Parameter(torch.full((4,), math.nan))}).tolist() == [4 * 0x7FC00000]


@contextmanager
def told() -> Iterator[list[str]]:
    messages: list[str] = []
    try:
        yield messages
    except TrainingError as error:
        messages.append(str(error))


def come_apart(rank: int, tp: int, odd: int | None, sharded: bool) -> list[str]:
    parallel = ParallelState.build(tp=tp)
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    if sharded:
        module[1].weight.shard_rule = "own part"  # type: ignore[assignment]
    with torch.no_grad():
        if rank == odd:
            module[1].weight[0, 0] += 1e-6
    with told() as messages:
        check_replicas(module, parallel, 8)
    return messages


@pytest.mark.parametrize(
    ("world", "tp", "odd", "sharded", "expected"),
    [
        (3, 1, None, False, None),
        (3, 1, 2, False, "1.weight of rank 2 differs from that of the other 2 ranks"),
        (2, 1, 1, False, "1.weight differs between the ranks 0, 1"),
        (2, 2, 1, False, "1.weight differs between the ranks 0, 1"),
        (2, 2, 1, True, None),
        (4, 2, 3, True, "1.weight differs between the ranks 1, 3"),
    ],
)
def test_ranks_that_have_come_apart_are_named(
    world: int, tp: int, odd: int | None, sharded: bool, expected: str | None
) -> None:
    messages = [f"ranks have come apart at step 8: {expected}"] if expected else []
    assert run_ranks(come_apart, world, tp, odd, sharded) == [messages] * world


def train_and_come_apart(rank: int, options: tuple[str, ...]) -> None:
    """A bit of one rank's weights changes after its fourth step."""
    update = Stepper.update

    def changing(self: Stepper, lr: float) -> float:
        norm = update(self, lr)
        if rank == 1 and self.micro_step == 4:
            next(iter(self.names)).data.view(-1)[0] += 1.0
        return norm

    Stepper.update = changing  # type: ignore[method-assign]
    train_on_rank(rank, options)


@pytest.mark.parametrize("stage", [0, 2])
def test_a_run_whose_ranks_come_apart_stops(tmp_path: Path, stage: int) -> None:
    words = (f"args.save={tmp_path}", "args.desync_interval=2", f"deepspeed.zero_optimization.stage={stage}")
    message = r"ranks have come apart at step 4: model\.diffusion_model\.\S+ differs between the ranks 0, 1"
    with pytest.raises(AssertionError, match=message):
        run_ranks(train_and_come_apart, 2, (*COMMON, *words))
