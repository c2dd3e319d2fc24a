"""Times of kernels that earlier runs have measured, in a small JSON file: {what was timed: {kernel: seconds}}."""

import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path

from sat.weights.headers import read_json

log = logging.getLogger(__name__)


def recall_times(file: Path, key: str) -> dict[str, float] | None:
    """Seconds of each kernel, None where the file has none or cannot be read."""
    times = read_json(file).get(key)
    if not isinstance(times, dict) or not times:
        return None
    is_sound = all(isinstance(seconds, float) and seconds > 0 for seconds in times.values())
    return times if is_sound else None


def keep_times(file: Path, key: str, times: Mapping[str, float]) -> None:
    """Keep seconds of each kernel. A file that cannot be written is a line in the log; a broken one is replaced."""
    temporary = file.with_suffix(f".{os.getpid()}.tmp")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps({**read_json(file), key: times}, indent=1), encoding="utf-8")
        temporary.replace(file)
    except OSError as error:
        log.warning("the times of kernels cannot be kept in %s (%s); they are taken at each start", file, error)
