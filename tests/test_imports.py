"""Imports point one way, and importing the package does nothing but import."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LAYERS = (
    {"compat", "errors", "logs", "environment"},
    {"weights.headers", "weights.whole", "weights.finding"},
    {"config"},
    {"mpu", "diffusion"},
    {"ops"},
    {"model"},
    {"cogvideox", "cogview3", "vae", "conditioning", "data"},
    {"weights"},
    {"training"},
    {"sampling", "convert"},
)
"""Parts of the package, and modules that lie below their part, lowest first. Each may import itself, its own layer and
those below."""
OUTSIDE = {"arguments", "helpers", "transformer_defaults"}
"""SAT's import paths for users' code: nothing of ours may import them."""
HEIGHTS = {part: height for height, layer in enumerate(LAYERS) for part in layer}


def imports_of(file: Path) -> set[str]:
    """The modules that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            found.add(node.module or "")
    return found


def part_of(module: str) -> str | None:
    """`vae` for `sat.vae.encoder`, `weights.whole` for that module; None for other packages and for `sat` itself."""
    words = module.split(".")
    if words[0] != "sat" or len(words) < 2:
        return None
    own = ".".join(words[1:3])
    return own if own in HEIGHTS else words[1]


def upward_imports(folder: Path) -> list[str]:
    """`file imports module` for every import that points up."""
    found = []
    for file in sorted((folder / "sat").rglob("*.py")):
        own = part_of(".".join(file.relative_to(folder).with_suffix("").parts))
        if own is None or own in OUTSIDE or own == "__init__":
            continue
        for module in sorted(imports_of(file)):
            part = part_of(module)
            if part is not None and (part in OUTSIDE or HEIGHTS[part] > HEIGHTS[own]):
                found.append(f"{file.relative_to(folder)} imports {module}")
    return found


def test_imports_point_one_way() -> None:
    assert upward_imports(ROOT) == []


def test_an_import_that_points_up_is_found(tmp_path: Path) -> None:
    (tmp_path / "sat" / "model").mkdir(parents=True)
    (tmp_path / "sat" / "model" / "x.py").write_text("def f():\n    from sat.training.loop import train\n")
    assert upward_imports(tmp_path) == ["sat/model/x.py imports sat.training.loop"]


def test_no_part_is_forgotten() -> None:
    parts = {path.stem for path in (ROOT / "sat").iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert parts - OUTSIDE - {"__init__"} == {part for part in HEIGHTS if "." not in part}


PROBE = """
import os, sys
os.environ.pop('TORCHINDUCTOR_CACHE_DIR', None)  # torch's compiler sets it, and this process inherits it
before = dict(os.environ)
import {module}
import torch.distributed as dist
assert not dist.is_initialized(), "a process group was started"
assert "deepspeed" not in sys.modules, "DeepSpeed was imported"
assert "torch._dynamo" not in sys.modules, "torch's compiler was imported"
assert dict(os.environ) == before, "the environment was changed"
import torch
assert not torch.cuda.is_initialized(), "the GPU was touched"
"""


@pytest.mark.parametrize(
    "module", ["sat", "sat.model", "sat.mpu", "sat.cogvideox.engine", "sat.vae", "sat.training.cli"]
)
def test_importing_does_nothing_else(module: str) -> None:
    done = subprocess.run([sys.executable, "-c", PROBE.format(module=module)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "" and done.stderr == ""
