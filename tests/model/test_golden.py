"""Recorded cases of the core: models with gradients, hook rules, schedules, groups, shards, files on disk."""

import pytest

from tests.golden_files import golden_root
from tools.golden.common import Case, Folder
from tools.golden.runner import discover, replay

CASES = [case for case in discover(Folder(golden_root() / "core")) if case.replay is not None]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_recorded_case(case: Case) -> None:
    result = replay(case)
    assert not result.error
    assert result.checks.off == []
    assert result.reason == ""


def test_the_set_covers_every_kind() -> None:
    folders = {case.name.split("/")[0] for case in CASES}
    assert {"forward", "hooks", "training"} <= folders
