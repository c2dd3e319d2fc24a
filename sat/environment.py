"""What the process sets in its environment before torch is loaded, and what it reads there."""

import os
from pathlib import Path


def prepare_environment() -> None:
    """Let idle OpenMP threads sleep instead of spinning, unless the user says otherwise.

    Spinning threads are a little faster on an idle machine; where another program takes a core they make every small
    operation wait for a thread that is not running, and steps become up to a hundred times slower.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def cache_folder() -> Path:
    """Where is kept what can be made again: $XDG_CACHE_HOME/sat-video, by default ~/.cache/sat-video."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()) / "sat-video"
