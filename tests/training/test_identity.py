"""What makes two starts the same run."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from sat.errors import CheckpointError
from sat.training.args import train_args
from sat.training.identity import deciding_values, describe_run, differences, digest, read_run, runs_called
from sat.weights.run_file import RunRecord, run_file_problem
from tests.tiny import tiny_config

BASE = ("args.train_iters=8", "args.global_batch_size=4")


def values(*words: str, seed: int = 7) -> dict[str, object]:
    config = tiny_config(*BASE, *words)
    return deciding_values(config, train_args(config), seed)


@pytest.mark.parametrize(
    "words",
    [
        ("args.model_parallel_size=2", "args.sequence_parallel=true"),
        ("args.context_parallel_size=2", "args.context_parallel_mode=ring"),
        ("deepspeed.zero_optimization.stage=3", "deepspeed.zero_optimization.offload_optimizer={device: cpu}"),
        ("deepspeed.train_micro_batch_size_per_gpu=1", "deepspeed.gradient_accumulation_steps=3"),
        ("args.save_interval=1", "args.log_interval=5", "args.eval_interval=3", "args.keep_last=2"),
        ("args.num_workers=3", "args.timeout_minutes=1", "args.resume=never", "args.save=elsewhere"),
        ("args.load=runs/of-before",),
        ("args.checkpoint_activations=true",),
        ("data.params.valid_sets={a: {target: b}}",),
    ],
)
def test_how_a_run_is_spread_and_recorded_does_not_decide_it(words: tuple[str, ...]) -> None:
    assert values(*words) == values()


@pytest.mark.parametrize(
    ("words", "key"),
    [
        (("args.train_iters=9",), "args.train_iters"),
        (("args.global_batch_size=8",), "args.global_batch_size"),
        (("args.lr_decay_style=linear",), "args.lr_decay_style"),
        (("args.mode=finetune",), "args.mode"),
        (("args.mode=finetune", "args.load=a"), "args.load"),
        (("args.train_data=[a]",), "args.train_data"),
        (("args.train_data_weights=[2]",), "args.train_data_weights"),
        (("data.params.num_samples=7",), "data.params.num_samples"),
        (("model.network_config.params.num_layers=3",), "model.network_config.params.num_layers"),
        (("deepspeed.optimizer.params.lr=1",), "deepspeed.optimizer.params.lr"),
        (("deepspeed.gradient_clipping=2",), "deepspeed.gradient_clipping"),
        (("deepspeed.bf16.enabled=true",), "deepspeed.bf16.enabled"),
    ],
)
def test_what_decides_a_runs_numbers_does(words: tuple[str, ...], key: str) -> None:
    assert any(line.startswith(f"{key} ") for line in differences(values(), values(*words)))
    assert digest(values()) != digest(values(*words))


def test_the_weights_of_a_mixture_decide_and_their_order_does_not() -> None:
    def mixture(weights: str, sets: str = "{a: {target: x}, b: {target: x}}") -> dict[str, object]:
        return values(f"data={{target: sat.data.mixture.Mixture, params: {{sets: {sets}, weights: {weights}}}}}")

    assert differences(mixture("{a: 1, b: 2}"), mixture("{a: 1, b: 3}")) == ["data.params.weights.b 2, now 3"]
    assert digest(mixture("{a: 1, b: 2}")) == digest(mixture("{b: 2, a: 1}", "{b: {target: x}, a: {target: x}}"))


def test_the_seed_decides_too() -> None:
    assert differences(values(), values(seed=8)) == ["seed 7, now 8"]


def test_without_a_global_batch_the_samples_of_a_process_decide() -> None:
    none = "args.global_batch_size=null"
    two = values(none, "deepspeed.train_micro_batch_size_per_gpu=2")
    assert two == values(none, "deepspeed.train_micro_batch_size_per_gpu=1", "deepspeed.gradient_accumulation_steps=2")
    assert two != values(none, "deepspeed.train_micro_batch_size_per_gpu=1")


def test_runs_are_numbered_in_the_order_of_their_start(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Whatever the clock says: the second run here starts an hour before the first."""
    for name in ("tiny-11-24-10-00", "tiny-11-24-09-00", "tiny-11-24-09-00-2", "tiny-2-11-24-09-00", "tiny-x"):
        (tmp_path / name).mkdir()
    for name in ("tiny-11-24-10-00", "tiny-11-24-09-00", "tiny-11-24-09-00-2"):
        describe_run(tmp_path / name, "tiny", {"a": 1})
        describe_run(tmp_path / name, "tiny", {"a": 2})  # a later start keeps the number
    (tmp_path / "tiny-x" / "run.json").write_text('{"number": 9, "decides": {}}')
    (tmp_path / "tiny-11-24-11-00").mkdir()
    (tmp_path / "tiny-11-24-11-00" / "run.json").write_text('{"numb')
    found, unknown = runs_called(tmp_path, "tiny")
    assert [path.name for path in found] == ["tiny-11-24-09-00-2", "tiny-11-24-09-00", "tiny-11-24-10-00"]
    assert [run.number for run in found.values()] == [3, 2, 1] and unknown == {}
    assert found[tmp_path / "tiny-11-24-10-00"].decides == {"a": 2}
    damaged = tmp_path / "tiny-11-24-11-00"
    assert f"{damaged / 'run.json'} is damaged, and {damaged} holds no checkpoint to continue from" in caplog.text
    assert runs_called(tmp_path / "nowhere", "tiny") == ({}, {}) and read_run(tmp_path / "tiny-11-24-11-00") is None


# --- a run.json that cannot be read ----------------------------------------------------------------------------------

HARMS: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated": (lambda file: file.write_bytes(file.read_bytes()[:-3]), "FILE is damaged"),
    "flipped": (lambda file: file.write_text(file.read_text().replace('": 1', '": 9', 1)), "FILE is damaged"),
    "emptied": (lambda file: file.write_bytes(b""), "FILE is damaged"),
    "deleted": (Path.unlink, "there is no FILE"),
    "unreadable": (lambda file: (file.unlink(), file.mkdir()), "FILE cannot be read (Is a directory)"),
}


def make_checkpoint(run: Path, step: int, state: dict[str, object] | None) -> None:
    folder = run / str(step)
    folder.mkdir()
    (folder / "manifest.json").write_text('{"files": {}}')
    if state is not None:
        (folder / "training_state.json").write_text(json.dumps(state))


@pytest.mark.parametrize("harm", HARMS)
def test_a_checkpoint_tells_what_a_broken_run_file_does_not(tmp_path: Path, harm: str) -> None:
    run, (break_it, what) = tmp_path / "tiny-11-24-10-00", HARMS[harm]
    run.mkdir()
    describe_run(run, "tiny", {"a": 1})
    file = run / "run.json"
    make_checkpoint(run, 4, {"run": 1, "configuration": digest({"a": 1})})
    make_checkpoint(run, 8, None)
    (run / "8" / "training_state.json").write_text('{"ru')
    break_it(file)
    record = read_run(run)
    assert record is not None and record.is_of({"a": 1}) and not record.is_of({"a": 2})
    assert (record.number, record.problem) == (1, f"{what.replace('FILE', str(file))}; checkpoint 4 tells its run")
    assert runs_called(tmp_path, "tiny") == ({run: record}, {})
    assert run_file_problem(run) == what.replace("there is no FILE", "run.json is missing").replace("FILE", "run.json")
    if harm != "unreadable":  # a folder of that name is for its owner to look at
        assert describe_run(run, "tiny", {"a": 1}) == 1 and read_run(run) == RunRecord(1, digest({"a": 1}), {"a": 1})


@pytest.mark.parametrize("harm", HARMS)
def test_checkpoints_that_do_not_tell_their_run_are_never_passed_over(tmp_path: Path, harm: str) -> None:
    run, (break_it, what) = tmp_path / "tiny-11-24-10-00", HARMS[harm]
    run.mkdir()
    describe_run(run, "tiny", {"a": 1})
    make_checkpoint(run, 4, {"step": 4})
    break_it(run / "run.json")
    message = (
        f"{what.replace('FILE', str(run / 'run.json'))}, and its checkpoints do not tell which run they belong to; "
        f"args.resume={run} continues it, args.resume=never starts a new run"
    )
    assert runs_called(tmp_path, "tiny") == ({}, {run: message})
    with pytest.raises(CheckpointError, match=re.escape(message)):
        read_run(run)


def test_weights_of_another_trainer_are_no_run(tmp_path: Path) -> None:
    (tmp_path / "tiny-11-24-10-00").mkdir()
    make_checkpoint(tmp_path / "tiny-11-24-10-00", 4, None)
    assert runs_called(tmp_path, "tiny") == ({}, {})
