"""Where recorded numbers are: the full set beside the project where there is one, else those of `tests/golden`."""

from pathlib import Path

CARRIED = Path(__file__).with_name("golden")


def golden_root() -> Path:
    """The folder that holds the sets `core`, `dit` and `vae`."""
    beside = Path(__file__).resolve().parents[2] / "shared" / "golden"
    return beside if beside.is_dir() else CARRIED


def released_configs() -> list[Path]:
    """The YAML files of the released models: all of them beside the project, else the two of `tests/golden`."""
    beside = golden_root().parent / "released_configs"
    return sorted((beside if beside.is_dir() else CARRIED / "released_configs").rglob("*.yaml"))
