"""What a run says about itself: metrics.jsonl, console lines, TensorBoard and wandb where they are wanted."""

import json
import logging
import math
import os
import resource
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch

from sat.training.files import write_text

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Rates:
    """What a run's speed is compared with (TFLOP/s of one device), None where it is not known."""

    peak: float | None = None
    """The vendor's dense peak in the run's precision."""
    measured: float | None = None
    """What large products reach here."""


def speed_figures(
    seconds: float, tokens: float, model_flops: float, hardware_flops: float, devices: int, rates: Rates
) -> dict[str, Any]:
    """The speed of a step that all devices take together, by the names of metrics.jsonl."""
    model, hardware = (flops / seconds / devices / 1e12 for flops in (model_flops, hardware_flops))
    figures: dict[str, Any] = {
        "tokens_per_s": tokens / seconds,
        "tflops": model,
        "mfu": model / rates.peak if rates.peak else None,
        "hfu": hardware / rates.peak if rates.peak else None,
    }
    if rates.measured is not None:
        figures["mfu_measured"] = model / rates.measured
    return figures


def peak_memory_gb(device: torch.device) -> float:
    """Peak memory of this process: on its GPU, else resident in RAM (GB = 1e9 bytes)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


class MetricsWriter:
    """Rank 0's record of a run. Opening it for a step forgets what a longer earlier run wrote after that step."""

    def __init__(
        self,
        run_dir: Path | None,
        start_step: int = 0,
        tensorboard_dir: str = "",
        wandb: Mapping[str, Any] | None = None,
    ):
        self._stream: IO[bytes] | None = None
        self._pending = b""
        self._tensorboard = None
        self._wandb = None
        if run_dir is not None:
            file = run_dir / "metrics.jsonl"
            _keep_up_to(file, start_step)
            self._stream = file.open("ab", buffering=0)
            self._tensorboard = _open_tensorboard(tensorboard_dir or str(run_dir / "tensorboard"), start_step)
        if wandb is not None:
            import wandb as wandb_module

            self._wandb = wandb_module.init(**wandb)

    def write(self, record: Mapping[str, Any]) -> None:
        """One JSON line, and the same numbers to the other recorders; `record` has `kind` and `step`.

        JSON has no word for infinity, which a gradient norm is where fp16 overflows: it is written as null.
        """
        if self._stream is not None:
            finite = {key: None if _is_infinite(value) else value for key, value in record.items()}
            self._pending += json.dumps(finite, allow_nan=False).encode() + b"\n"
            self._write_pending()
        kind, step = record["kind"], record["step"]
        numbers = {
            f"{kind}/{key}": value for key, value in record.items() if isinstance(value, int | float) and key != "step"
        }
        if self._tensorboard is not None:
            try:
                for key, value in numbers.items():
                    self._tensorboard.add_scalar(key, value, step)
            except OSError as error:
                log.warning("TensorBoard is left: %s; metrics.jsonl has the same numbers", error)
                self._tensorboard = None
        if self._wandb is not None:
            self._wandb.log(numbers, step=step)

    def _write_pending(self) -> None:
        """A full disk does not end a run: lines wait until they can be written, each once and whole."""
        assert self._stream is not None
        try:
            while self._pending:
                self._pending = self._pending[self._stream.write(self._pending) :]
        except OSError as error:
            log.warning("metrics.jsonl cannot be written (%s); its lines wait", error.strerror)

    def sync(self) -> None:
        """Make what is written durable, before a checkpoint relies on it."""
        if self._stream is not None:
            self._write_pending()
            os.fsync(self._stream.fileno())

    def close(self) -> None:
        """Finish all recorders."""
        if self._stream is not None:
            self._write_pending()
            self._stream.close()
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish()


def _is_infinite(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


def _keep_up_to(file: Path, step: int) -> None:
    """Drop lines of later steps, so that each step stands once in the record of a continued run.

    What is no record is left out too, with a warning that names its line; but for the end of a line that a killed run
    was writing.
    """
    if not file.exists():
        return
    kept = []
    lines = file.read_bytes().decode("utf-8", errors="replace").split("\n")
    for number, line in enumerate(lines, 1):
        of_step = _step_of(line)
        if of_step is None:
            if number < len(lines):
                log.warning("%s: line %d is damaged and is left out: %.80s", file, number, line)
        elif of_step <= step:
            kept.append(line)
    write_text(file, "".join(line + "\n" for line in kept))


def _step_of(line: str) -> int | None:
    """The step of a record; None where a line is none."""
    try:
        step = json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return None
    return step if isinstance(step, int) else None


def _open_tensorboard(folder: str, start_step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        log.info("TensorBoard is not installed; metrics.jsonl has the same numbers")
        return None
    return SummaryWriter(folder, purge_step=start_step + 1 if start_step else None)
