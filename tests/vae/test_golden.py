"""Recorded cases of the VAE: whole networks, parts, the latent distribution, one training step."""

import pytest

from tests.golden_files import golden_root
from tools.golden.common import Case, Folder
from tools.golden.runner import discover, replay

CASES = [case for case in discover(Folder(golden_root() / "vae")) if case.replay is not None]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_recorded_case(case: Case) -> None:
    result = replay(case)
    assert not result.error
    assert result.checks.off == []
    assert result.reason == ""


def test_the_set_covers_every_kind() -> None:
    kinds = {case.name.split("/")[0].split("_")[0] for case in CASES}
    assert {"configs", "encode", "decode", "first", "losses", "regularizer", "released", "units"} <= kinds
