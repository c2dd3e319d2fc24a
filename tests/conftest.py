"""What every test relies on: one torch thread, so that numbers and times do not depend on the machine's load."""

import logging
import signal
from collections.abc import Iterator

import pytest
import torch

torch.set_num_threads(1)

# A shell starts background commands with SIGINT ignored, and what a test starts would inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def fresh_log(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The package's log as at the start of a process: nothing set up, nothing warned of yet; put back afterwards."""
    logger = logging.getLogger("sat")
    before = logger.handlers[:], logger.level, logger.propagate
    logger.handlers[:], logger.propagate = [], True
    logger.setLevel(logging.NOTSET)
    monkeypatch.setattr("sat.config._warned", set())
    yield
    logger.handlers[:], level, logger.propagate = before
    logger.setLevel(level)
