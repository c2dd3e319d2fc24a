"""A tree of each form and the diffusers folder that it becomes, made once."""

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from sat.convert.run import Request, convert
from tests.convert.tiny import PROMPTS, Tree, write_tree
from tools.make_tiny_t5 import make


@pytest.fixture(scope="session")
def t5(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("t5") / "t5"
    make([prompt for prompt in PROMPTS if prompt], folder)
    return folder


@pytest.fixture(scope="session")
def tree(tmp_path_factory: pytest.TempPathFactory, t5: Path) -> Callable[[str], Tree]:
    """form -> the released tree with random numbers."""
    return cache(lambda form: write_tree(tmp_path_factory.mktemp("sat") / form, form, t5))


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory, tree: Callable[[str], Tree]) -> Callable[[str], Path]:
    """form -> the diffusers folder of that tree."""

    @cache
    def converted(form: str) -> Path:
        target = tmp_path_factory.mktemp("diffusers") / form
        convert(Request(source=tree(form).path, target=target, to="diffusers", base=[tree(form).yaml]))
        return target

    return converted
