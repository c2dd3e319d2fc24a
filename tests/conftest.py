"""What every test relies on: one torch thread, so that numbers and times do not depend on the machine's load."""

import logging
from collections.abc import Iterator

import pytest
import torch

torch.set_num_threads(1)


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
