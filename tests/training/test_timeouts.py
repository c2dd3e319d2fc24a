"""A training run in which one rank stands still ends on the others with a message, in the time that was set."""

import time

from sat.errors import CommunicationError
from sat.mpu.recorder import REPORT_SECONDS
from sat.training.step import Stepper
from tests.ranks import launched, run_processes
from tests.tiny import tiny_config

SECONDS = 6.0
STILL_AT = 3


def train_beside_a_still_rank() -> str:
    """Train; rank 1 stands still in the third step. Returns how it ended."""
    import deepspeed

    from sat.training.loop import train

    deepspeed.utils.logger.setLevel("ERROR")
    update = Stepper.update

    def stand_still(self: Stepper, lr: float) -> float:
        if self.parallel.rank("tp") == 1 and self.micro_step == STILL_AT:
            time.sleep(SECONDS + REPORT_SECONDS + 1.0)
        return update(self, lr)

    Stepper.update = stand_still  # type: ignore[method-assign]
    config = tiny_config(
        "args.train_iters=5",
        "args.global_batch_size=2",
        f"args.timeout_minutes={SECONDS / 60.0}",
        "deepspeed.train_micro_batch_size_per_gpu=2",
        "args.model_parallel_size=2",
    )
    try:
        train(config, seed=7)
    except CommunicationError as error:
        return str(error)
    return "trained to the end"


def test_a_rank_that_stands_still_is_named_with_step_operation_and_shapes() -> None:
    message, _ = run_processes(train_beside_a_still_rank, launched(2))
    assert "a collective failed at rank 0 on " in message
    assert f"step {STILL_AT}, in all_reduce of float32 (" in message
    assert "over ranks 0, 1" in message
    assert "Timed out waiting 6000ms" in message
    assert "rank 1 on " in message
    assert "did not fail with the others: look there first" in message
