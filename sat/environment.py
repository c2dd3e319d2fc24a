"""Settings of the process that must stand before torch is loaded."""

import os


def prepare_environment() -> None:
    """Let idle OpenMP threads sleep instead of spinning, unless the user says otherwise.

    Spinning threads are a little faster on an idle machine; where another program takes a core they make every small
    operation wait for a thread that is not running, and steps become up to a hundred times slower.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
