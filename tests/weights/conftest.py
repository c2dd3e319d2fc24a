"""A hostile server for each test, and no proxy between it and the client."""

from collections.abc import Iterator

import pytest

from tests.weights.server import HostileServer, hostile_server


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[HostileServer]:
    monkeypatch.setenv("no_proxy", "*")
    with hostile_server() as running:
        yield running
