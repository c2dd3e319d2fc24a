"""The loss of a saved batch, computed again after loading."""

import json
import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sat.errors import CheckpointError
from sat.mpu.state import ParallelState
from sat.training.resume_check import Circumstances, LossRecord, check_losses, gather_losses
from sat.weights.finding import model_file
from tests.ranks import run_ranks
from tests.tiny import only_run, records, train_on_rank

HERE = Circumstances({"dp": 2, "cp": 1, "tp": 1}, 2, "fp32", "cpu", "2.0")
SAVED = LossRecord([8, 9, 10, 11], [0.1, 0.2, 0.3, 0.4], HERE)
ELSEWHERE = replace(HERE, layout={"dp": 1, "cp": 1, "tp": 1})


def test_a_record_goes_through_json_unchanged() -> None:
    assert LossRecord.read(json.loads(json.dumps(SAVED.as_json()))) == SAVED


def check(rank: int, world: int, now: Circumstances, difference: float) -> str:
    """What a check says whose losses differ by so much on the last rank."""
    parallel = ParallelState.build()
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("sat.training.resume_check")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)

    def compute(only_last: bool) -> tuple[list[int], list[float]]:
        share = len(SAVED.counters) // world
        own = slice(rank * share, (rank + 1) * share)
        more = [] if only_last else [5 + rank]  # of an earlier micro batch
        losses = [loss + (difference if rank == world - 1 else 0.0) for loss in SAVED.losses[own]]
        return [*more, *SAVED.counters[own]], [0.7 for _ in more] + losses

    try:
        check_losses(SAVED, compute, parallel, now)
    except CheckpointError as error:
        return str(error)
    return lines[-1]


@pytest.mark.parametrize("world", [1, 2, 4])
def test_equal_losses_pass_on_any_number_of_ranks(world: int) -> None:
    assert run_ranks(check, world, world, HERE, 0.0) == ["resume check: 0.250000 = 0.250000"] * world


def test_a_single_bit_is_told_on_all_ranks_in_the_same_place() -> None:
    for message in run_ranks(check, 2, 2, HERE, 1e-16):
        assert message.startswith("resume check: 0.25 was saved and 0.25 comes out now (")
        assert "samples differ, not a bit may): the weights, the data or the code are not those that were" in message
        assert "args.resume=RUN/ITERATION, or, if you know what has changed, set args.resume_check=false" in message


def test_another_layout_may_round_but_no_more() -> None:
    (message,) = run_ranks(check, 1, 1, ELSEWHERE, 1e-6)
    assert message == (
        "resume check: 0.250000 = 0.250001 to rounding (saved with layout dp 2 x cp 1 x tp 1, now dp 1 x cp 1 x tp 1)"
    )
    (message,) = run_ranks(check, 1, 1, ELSEWHERE, 1e-2)
    assert message.startswith("resume check: 0.25 was saved and 0.26 comes out now (4 of 4 samples differ, 0.0001 is")


def gather(rank: int) -> LossRecord:
    return gather_losses([2 * rank, 2 * rank + 1], [0.5 + rank, 0.6 + rank], ParallelState.build(), HERE)


def test_the_record_holds_the_samples_of_all_ranks() -> None:
    assert run_ranks(gather, 2) == [LossRecord([0, 1, 2, 3], [0.5, 0.6, 1.5, 1.6], HERE)] * 2


def miss(rank: int) -> str:
    with pytest.raises(CheckpointError) as caught:
        check_losses(SAVED, lambda only_last: ([8, 9, 10], [0.1, 0.2, 0.3]), ParallelState.build(), HERE)
    return str(caught.value)


def test_other_data_are_told_as_such() -> None:
    assert run_ranks(miss, 1)[0].startswith(
        "resume check: sample 11 was in the step that was saved, and is not in it now"
    )


# --- in a run --------------------------------------------------------------------------------------------------------

COMMON = ("args.train_iters=4", "args.save_interval=2", "args.global_batch_size=4")


@pytest.mark.parametrize("stage", [0, 3])
def test_the_check_does_not_disturb_training(tmp_path: Path, stage: int) -> None:
    """The same run with its two saves and checks, and with none."""
    options = (*COMMON, f"deepspeed.zero_optimization.stage={stage}")
    run_ranks(train_on_rank, 2, (*options, f"args.save={tmp_path / 'a'}"))
    run_ranks(train_on_rank, 2, (*options, f"args.save={tmp_path / 'b'}", "args.save_interval=9"))
    for one, other in zip(records(only_run(tmp_path / "a")), records(only_run(tmp_path / "b"))):
        assert (one["loss"], one["grad_norm"]) == (other["loss"], other["grad_norm"])


def test_weights_that_are_not_those_that_were_saved_stop_the_run(tmp_path: Path) -> None:
    """A run that goes on from changed weights, with a manifest that agrees with them."""
    run_ranks(train_on_rank, 1, (*COMMON, f"args.save={tmp_path}"))
    run = only_run(tmp_path)
    content = torch.load(run / "2" / model_file(0), weights_only=True)
    content["module"]["model.diffusion_model.mixins.final_layer.linear.bias"][0] += 1e-3
    torch.save(content, run / "2" / model_file(0))
    (run / "2" / "manifest.json").write_text(json.dumps({"files": {}}))
    again = (*COMMON, f"args.load={run / '2'}")
    with pytest.raises(
        AssertionError, match=r"resume check: 2\.\d+ was saved and 2\.\d+ comes out now \(2 of 2 samples"
    ):
        run_ranks(train_on_rank, 1, again)
    assert (run / "latest").read_text() == "4"  # nothing was set back
    run_ranks(train_on_rank, 1, (*again, "args.resume_check=false"))
