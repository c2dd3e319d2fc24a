"""What is run by default, and what only with `-m slow`."""

from collections.abc import Iterable
from typing import Any

import pytest


def rest_is_slow(values: Iterable[Any], default: Iterable[Any]) -> list[Any]:
    """All values to parametrize with; those that are not among the default ones are marked slow."""
    chosen = list(default)
    return [value if value in chosen else pytest.param(value, marks=pytest.mark.slow) for value in values]
