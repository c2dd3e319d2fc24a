"""What saving costs a training run: the pause against the step, the rate of writing against the disk's own; and EMA.

A run of train_video.py with several saves, timed step by step. Pause: by how much the step that ends in a save is
longer than one with no save under way (the median of those). Slowed: what all steps until publication lose besides, to
the threads that write. Rate: bytes of a checkpoint over the seconds that its threads work (checksums, averages and
fsync among it), beside that of one plain file of the same size with an fsync. EMA: a step of sat.ops.FusedEmaAdam
beside one of AdamW, in turns.

    python benchmarks/checkpoint.py --threads 1 --json checkpoint.json
    torchrun --nproc_per_node 8 benchmarks/checkpoint.py deepspeed.bf16.enabled=true args.save_safetensors=true

Words key=value change the run. The first save also takes the memory that all later ones use again; it is told apart.
"""

import argparse
import json
import os
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.side_by_side import median_seconds
from sat.config import ConfigNode, load_config
from sat.logs import setup_logging
from sat.mpu.launch import Launch, joined
from sat.mpu.recorder import recorded
from sat.ops import FusedEmaAdam
from sat.training.files import PIECE_BYTES
from sat.training.loop import TrainingLoop
from sat.training.run import Job, Run

TINY = Path(__file__).resolve().parent.parent / "configs" / "tiny.yaml"
SEED = 42
WARM_UP = 2
"""Steps at the start that do not count."""
OPTIMIZER_REPEATS = 15


def run_words(args: argparse.Namespace) -> list[str]:
    """The run: configs/tiny.yaml, larger, with averages."""
    network, data = "model.network_config.params", "data.params"
    return [
        f"{network}.hidden_size={args.hidden_size}",
        f"{network}.num_attention_heads={args.hidden_size // 64}",
        f"{network}.modules.pos_embed_config.params.hidden_size_head=64",
        f"{network}.num_layers={args.layers}",
        f"{network}.time_embed_dim=512",
        f"{network}.latent_height={args.side}",
        f"{network}.latent_width={args.side}",
        f"{data}.height={args.side}",
        f"{data}.width={args.side}",
        "deepspeed.optimizer.type=sat.ops.FusedEmaAdam",
        "args.eval_interval=null",
        "args.keep_last=2",
        f"args.save={args.save}",
        "args.resume=never",
        f"args.save_interval={args.interval}",
        f"args.train_iters={args.interval * (args.saves + 1)}",
        *args.words,
    ]


class TimedLoop(TrainingLoop):
    """Training that notes when each step begins, and whether a save is then under way."""

    def __init__(self, run: Run) -> None:
        super().__init__(run)
        self.begins: list[float] = []
        self.under_way: list[bool] = []
        self.writing: list[float] = []
        """Seconds of each piece of work in the background: of this rank's files, and on rank 0 of publication."""
        assert run.saver is not None
        for name in ("_write", "_publish"):
            setattr(run.saver, name, self._timed(getattr(run.saver, name)))

    def _timed(self, work: Callable[..., None]) -> Callable[..., None]:
        def timed(*args: Any) -> None:
            start = time.perf_counter()
            work(*args)
            self.writing.append(time.perf_counter() - start)

        return timed

    def _step(self, step: int, batches: Iterator[Mapping[str, Any]]) -> tuple[dict[str, Any], list[tuple[str, str]]]:
        saver = self.run.saver
        assert saver is not None
        last_saved = (step - 1) // self.args.save_interval * self.args.save_interval
        self.under_way.append(last_saved > 0 and saver.published != last_saved)
        self.begins.append(time.perf_counter())
        return super()._step(step, batches)


def summary(begins: Sequence[float], under_way: Sequence[bool], interval: int) -> dict[str, Any]:
    """What saves after steps interval, 2 * interval, .. cost, of when steps 1, 2, .. began; seconds, and steps.

    under_way: whether a save was, when the step began. The last step has no end and does not count.
    """
    seconds = {step: begins[step] - begins[step - 1] for step in range(1, len(begins))}
    plain = statistics.median(
        value for step, value in seconds.items() if step > WARM_UP and step % interval and not under_way[step - 1]
    )
    saves = range(interval, len(seconds) + 1, interval)
    pauses = [seconds[step] - plain for step in saves]
    slowed = [
        sum(seconds[later] - plain for later in range(step + 1, min(step + interval, len(seconds) + 1))
            if under_way[later - 1])
        for step in saves
    ]  # fmt: skip
    return {
        "step_seconds": plain,
        "first_pause_steps": pauses[0] / plain,
        "pause_seconds": statistics.median(pauses[1:]),
        "pause_steps": statistics.median(pauses[1:]) / plain,
        "slowed_steps": statistics.median(slowed[1:]) / plain,
    }


def size_of(run_dir: Path, step: int) -> int:
    """Bytes of a checkpoint with its averages."""
    folders = [run_dir / str(step), run_dir / f"{step}-ema"]
    return sum(file.stat().st_size for folder in folders if folder.is_dir() for file in folder.iterdir())


def plain_write_seconds(folder: Path, num_bytes: int) -> float:
    """Seconds to write a file of random bytes and to have it on disk."""
    piece = os.urandom(PIECE_BYTES)
    file = folder / "plain"
    start = time.perf_counter()
    with file.open("wb") as stream:
        for left in range(num_bytes, 0, -PIECE_BYTES):
            stream.write(piece[:left])
        stream.flush()
        os.fsync(stream.fileno())
    seconds = time.perf_counter() - start
    file.unlink()
    return seconds


def optimizer_seconds(run: Run) -> dict[str, float]:
    """Median seconds of a step over this run's trained parameters, in float32: without and with averages."""
    parameters = {}
    for kind in (torch.optim.AdamW, FusedEmaAdam):
        own = [torch.zeros(p.shape, device=run.launch.device, requires_grad=True) for p in run.stepper.names]
        for parameter in own:
            parameter.grad = torch.full_like(parameter, 1e-3)
        parameters[kind.__name__] = kind(own, lr=1e-6)

    def call(optimizer: torch.optim.Optimizer) -> Any:
        def step() -> None:
            optimizer.step()
            if run.launch.device.type == "cuda":
                torch.cuda.synchronize()

        step()  # makes its state
        return step

    return median_seconds({name: call(one) for name, one in parameters.items()}, OPTIMIZER_REPEATS)


def measure(config: ConfigNode, launch: Launch) -> dict[str, Any]:
    """Train, and the row of the table; every process must call it. The run's folder goes again."""
    with ExitStack() as resources:
        recorder = resources.enter_context(recorded(launch, config["args"].get("timeout_minutes", 30)))
        job = Job(config, SEED, launch, recorder, resources)
        start, (stage,) = job.begin()
        run = Run(job, stage, start, resources)
        assert run.run_dir is not None and run.saver is not None
        loop = TimedLoop(run)
        loop.run_to_end()
        row = summary(loop.begins, loop.under_way, run.args.save_interval)
        averages = optimizer_seconds(run)
        row["parameters"] = sum(parameter.numel() for parameter in run.stepper.names)
        row["ema_seconds"] = averages["FusedEmaAdam"] - averages["AdamW"]
        row["ema_share"] = row["ema_seconds"] / row["step_seconds"]
        row["optimizers"] = averages
        if launch.is_main:
            row["bytes"] = size_of(run.run_dir, run.last_step)
            row["writing_seconds"] = sum(loop.writing) / (run.last_step / run.args.save_interval)
            plain = [plain_write_seconds(run.run_dir, row["bytes"]) for _ in range(3)]
            row["write_rate"] = row["bytes"] / row["writing_seconds"] / 1e6
            row["disk_rate"] = row["bytes"] / statistics.median(plain) / 1e6
            shutil.rmtree(run.run_dir)
    return row


def lines(row: Mapping[str, Any]) -> list[str]:
    """The row for people."""
    return [
        "step {step_seconds:.3f} s; {parameters:,} parameters, {bytes:,} bytes a save".format(**row),
        "pause of a save {pause_seconds:.3f} s = {pause_steps:.2f} steps (the first {first_pause_steps:.2f}); "
        "steps until publication lose {slowed_steps:.2f} more".format(**row),
        "{writing_seconds:.2f} s of writing in the background: {write_rate:.0f} MB/s; "
        "the disk's own {disk_rate:.0f} MB/s".format(**row),
        "averages take {ema_seconds:.4f} s a step = {ema_share:.1%} of it".format(**row),
    ]


def parse_arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", metavar="key=value", help="changes to the run's configuration")
    parser.add_argument("--hidden-size", type=int, default=256, help="width, a multiple of 64 (default 256)")
    parser.add_argument("--layers", type=int, default=4, help="layers (default 4)")
    parser.add_argument("--side", type=int, default=16, help="rows and columns of the latents (default 16)")
    parser.add_argument("--saves", type=int, default=4, help="saves that are measured (default 4)")
    parser.add_argument("--interval", type=int, default=8, help="steps between two saves (default 8)")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default 2)")
    parser.add_argument("--save", type=Path, default=Path("runs"), help="a folder on the disk to measure")
    parser.add_argument("--json", type=Path, help="also write the row to this file")
    return parser.parse_args(words)


def main() -> None:
    """Measure and print."""
    args = parse_arguments()
    torch.set_num_threads(args.threads)
    os.environ.setdefault("SAT_LOGLEVEL", "WARNING")
    setup_logging()
    config = load_config([TINY], run_words(args))
    with joined() as launch:
        row = measure(config, launch)
        if launch.is_main:
            facts = {"device": launch.device.type, "processes": launch.world_size, "threads": args.threads}
            facts |= {"torch": torch.__version__, "cores": os.cpu_count()}
            print(", ".join(f"{key} {value}" for key, value in facts.items()))
            print("\n".join(lines(row)))
            if args.json:
                args.json.write_text(json.dumps({"settings": facts, "row": row}, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
