"""A tiny T5 in the folder layout of the released one."""

from pathlib import Path

import pytest

from tools.make_tiny_t5 import make

CAPTIONS = ["a red square moving right", "a blue circle moving left", "a green triangle moving up"]


@pytest.fixture(scope="session")
def t5_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("t5") / "t5-tiny"
    make(CAPTIONS, folder)
    return folder
