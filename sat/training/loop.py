"""The training loop: stage after stage, step after step, validate, report, save."""

import gc
import logging
import math
import sys
import time
import zlib
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from sat.config import ConfigNode
from sat.errors import DataError, TrainingError
from sat.logs import setup_logging
from sat.mpu.launch import Launch, joined, read_launch
from sat.mpu.random import stream_seed
from sat.mpu.recorder import recorded
from sat.mpu.state import Axis
from sat.training.args import train_args
from sat.training.data import bad_clips
from sat.training.devices import matrix_tflops, peak_tflops
from sat.training.health import MicroBatch, check_replicas
from sat.training.metrics import Rates, peak_memory_gb, speed_figures
from sat.training.profiling import Profiling, StepProfiler
from sat.training.run import Job, Run
from sat.training.signals import StopRequest, process_age
from sat.training.timestep_bins import TimestepBins

log = logging.getLogger(__name__)

SHARING_AXES: tuple[Axis, ...] = ("cp", "tp")
"""Those along which ranks work on the same clips."""

_NOTHING = Profiling()


def train(config: ConfigNode, seed: int, profiling: Profiling = _NOTHING) -> bool:
    """Run the training that a configuration describes, as one process of the job.

    Returns whether it came to its end; False if it was asked to stop before, and has saved.
    """
    setup_logging(read_launch().rank)
    with joined(train_args(config).timeout_minutes) as launch:
        return train_joined(config, seed, launch, profiling)


def train_joined(config: ConfigNode, seed: int, launch: Launch | None = None, profiling: Profiling = _NOTHING) -> bool:
    """The same within a process group that is there already."""
    args, launch = train_args(config), launch or read_launch()
    profiling.check(args.save)
    with recorded(launch, args.timeout_minutes) as recorder, ExitStack() as resources:
        job = Job(config, seed, launch, recorder, resources)
        start, stages = job.begin()
        for stage in stages:
            with ExitStack() as of_stage:
                run = Run(job, stage, start, of_stage)
                if not TrainingLoop(run, profiling).run_to_end():
                    return False
            if stage is not stages[-1]:
                start = run.end()
                del run  # the next stage needs the memory
                gc.collect()
        return True


@dataclass
class _Work:
    """What this rank has done in a step so far."""

    waited: float = 0.0
    """Seconds, for data."""
    bad: list[tuple[str, str]] = field(default_factory=list)
    values: dict[str, Tensor] = field(default_factory=dict)
    """Shares of the step's means."""
    sums: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    micro_batches: list[MicroBatch] = field(default_factory=list)


class TrainingLoop:
    """The steps of one stage."""

    def __init__(self, run: Run, profiling: Profiling = _NOTHING) -> None:
        self.run = run
        self.profiling = profiling
        self.args, self.launch, self.parallel = run.args, run.launch, run.parallel
        self.rates = self._rates()
        self.bins = None if run.is_finished else self._bins()

    def _rates(self) -> Rates:
        device, precision = self.launch.device, self.run.deepspeed.precision
        if not self.args.measure_matrix_rate:
            return Rates(peak_tflops(device, precision))
        rates = Rates(peak_tflops(device, precision), matrix_tflops(device, precision))
        log.info("large matrix products reach %.3g TFLOP/s here in %s", rates.measured, precision)
        return rates

    def run_to_end(self) -> bool:
        """Train to the last step, or until asked to stop; returns whether it was the last."""
        run = self.run
        if run.is_finished:
            log.info(
                "%s is finished: it is at step %d of %d; args.resume=never starts a new run",
                run.start.run_dir,
                run.start_step,
                run.last_step,
            )
            run.tidy()
            return True
        batches = run.batches()
        steps = range(run.start_step + 1, run.last_step + 1)
        shows_bar = self.launch.is_main and sys.stderr.isatty()
        longest_step = 0.0
        profiler = StepProfiler(self.profiling, run.run_dir, self.launch, run.start_step, run.last_step)
        with StopRequest() as stop, logging_redirect_tqdm([logging.getLogger("sat")]):
            for step in tqdm(steps, initial=run.start_step, total=run.last_step, disable=not shows_bar, unit="step"):
                run.job.recorder.step = step
                profiler.before(step)
                record, bad = self._step(step, batches)
                profiler.after(step)
                if step % self.args.log_interval == 0 or step == run.last_step:
                    self._report(record)
                if run.validation is not None and self.args.eval_interval and step % self.args.eval_interval == 0:
                    self._validate(step)
                    if run.samples is not None:
                        run.samples.write(step)
                if step % self.args.save_interval == 0:
                    run.save(step)
                if run.saver is not None:
                    run.saver.poll()
                if self.args.desync_interval and step % self.args.desync_interval == 0:
                    check_replicas(run.stepper.module, self.parallel, step)
                too_many_bad = self._quarantine_bad(bad) if record["replaced"] else None
                longest_step = max(longest_step, record["step_time"])
                if self._time_is_up(longest_step):
                    stop.ask(f"args.time_limit_minutes {self.args.time_limit_minutes:g}")
                if too_many_bad or stop.agreed(self.launch.device):
                    log.info("stopping after step %d", step)
                    break
            run.save_last(step)
        run.metrics.close()
        if too_many_bad:
            raise DataError(too_many_bad)
        return step == run.last_step

    def _bins(self) -> TimestepBins | None:
        sizes = self.run.system.timestep_bins
        return sizes and TimestepBins(*sizes, self.launch.device, self.parallel.true_group("dp"))

    def _time_is_up(self, longest_step: float) -> bool:
        """Whether what is left of the time limit is needed for two more steps and a save."""
        if self.args.time_limit_minutes is None:
            return False
        last = self.run.saver.last_duration if self.run.saver is not None else 0.0
        needed = 2 * longest_step + (60.0 if last is None else 1.5 * last)
        return process_age() + needed > 60 * self.args.time_limit_minutes

    def _step(self, step: int, batches: Iterator[Mapping[str, Any]]) -> tuple[dict[str, Any], list[tuple[str, str]]]:
        """One optimizer step over the global batch: its record for the metrics, and this rank's bad clips in it."""
        started, work = time.perf_counter(), _Work()
        self.run.job.recorder.take_wait()
        for _ in range(self.run.deepspeed.grad_accum_steps):
            self._pass(batches, work)
        lr = self.run.lr_at(step)
        grad_norm = self.run.stepper.update(lr)
        own = {"replaced": len(work.bad), "differing": self._differing(work.bad)}
        totals = self._sum_over_ranks({**work.values, **work.sums, **own})
        if totals["differing"]:
            raise DataError(self._differing_message(step, work.bad))
        self._watch(step, totals["loss"], work.micro_batches)
        self.run.mix.add(totals)
        record: dict[str, Any] = {"kind": "train", "step": step}
        if self.run.stage.name is not None:
            record["stage"] = self.run.stage.name
        record.update({name: totals[name] for name in work.values}, grad_norm=grad_norm, lr=lr)
        record.update(self._figures(totals, time.perf_counter() - started, work.waited))
        if not self.run.stepper.was_updated:
            record["skipped"] = True
        if self.run.stepper.loss_scale is not None:
            record["loss_scale"] = self.run.stepper.loss_scale
        return record, work.bad

    def _pass(self, batches: Iterator[Mapping[str, Any]], work: _Work) -> None:
        """Forward and backward of this rank's next micro batch."""
        run, before = self.run, time.perf_counter()
        batch = next(batches)
        work.waited += time.perf_counter() - before
        work.bad += bad_clips(batch)
        inputs = run.system.training_inputs(batch, run.seed, run.global_batch_size)
        counters = batch["counters"].tolist()
        torch.manual_seed(stream_seed(run.seed, "dropout", counters[0], self.parallel.rank("cp")))
        num_passes = run.deepspeed.grad_accum_steps * self.parallel.size("dp")
        for name, value in run.stepper.accumulate(inputs, batch.get("weights")).items():
            work.values[name] = work.values.get(name, 0) + value.double() / num_passes
        if self.bins is not None:
            self.bins.add(inputs.timesteps, run.stepper.losses)
        work.micro_batches.append(MicroBatch(counters, batch["key"], run.stepper.losses))
        run.last_micro_batch = counters, inputs
        lengths = run.system.token_counts(inputs)
        counts = {
            "samples": len(counters),
            "tokens": sum(lengths),
            "flops": run.system.train_flops(inputs),
            "recomputed": run.system.recomputed_flops(inputs),
            "padding": run.data.padding(batch),
            **run.mix.count(batch, lengths),
        }
        for name, count in counts.items():
            work.sums[name] += count

    def _figures(self, totals: Mapping[str, float], step_time: float, waited: float) -> dict[str, Any]:
        """What a step carried and how long it took, for the metrics."""
        flops, tokens = totals["flops"], totals["tokens"]
        whole = flops + totals["recomputed"]
        return {
            "samples": int(totals["samples"]),
            "tokens": int(tokens),
            "padding_share": self.run.data.padding_share(totals["padding"] / totals["samples"], tokens),
            "replaced": int(totals["replaced"]),
            "step_time": step_time,
            "data_wait": waited,
            "comm_wait": self.run.job.recorder.take_wait(),
            **speed_figures(step_time, tokens, flops, whole, self.launch.world_size, self.rates),
            "mem_gb": peak_memory_gb(self.launch.device),
        }

    def _differing(self, bad: Sequence[tuple[str, str]]) -> Tensor | float:
        """Not 0 where ranks that work on the same clips did not all read the same ones."""
        groups = [group for axis in SHARING_AXES if (group := self.parallel.group(axis)) is not None]
        if not groups:
            return 0.0
        replaced = zlib.crc32(" ".join(key for key, _ in bad).encode())
        extremes = torch.tensor([replaced, -replaced], device=self.launch.device)
        for group in groups:
            dist.all_reduce(extremes, op=dist.ReduceOp.MAX, group=group)
        return extremes.sum()

    def _differing_message(self, step: int, bad: Sequence[tuple[str, str]]) -> str:
        own = ", ".join(f"{key} ({reason})" for key, reason in bad) or "none"
        return (
            f"step {step}: ranks that share clips read different ones, because some could not read a file that others "
            f"could; replaced on rank {self.launch.rank}: {own}. Nothing of this step is saved: look at the storage of "
            "that rank and start the same command again"
        )

    def _watch(self, step: int, loss: float, micro_batches: Sequence[MicroBatch]) -> None:
        """Report a step whose update was left out, or whose loss stands out."""
        if self.run.stepper.was_updated:
            self.run.stepper.watch.forget()
            self.run.health.updated(step, loss, micro_batches)
            return
        bad = self.run.stepper.watch.take()
        if self.run.deepspeed.precision == "fp16" and math.isfinite(loss):
            return  # the loss scale was too high, which is how it is found
        try:
            self.run.health.skipped(step, micro_batches, bad)
        except TrainingError as error:
            if self.run.saver is not None:
                self.run.saver.finish()
            raise TrainingError(f"{error}. {self.run.last_good()}") from None

    def _quarantine_bad(self, bad: list[tuple[str, str]]) -> str | None:
        """Count the bad clips of all ranks; past the share that is allowed, every rank is told the same message."""
        gathered: list[Any] = [None] * self.launch.world_size
        dist.all_gather_object(gathered, bad)
        outcome: list[str | None] = [None]
        if self.run.quarantine is not None:  # on rank 0
            try:
                for key, reason in (clip for own in gathered for clip in own):
                    self.run.quarantine.add(key, reason)
            except DataError as error:
                outcome[0] = str(error)
        dist.broadcast_object_list(outcome, src=0)
        return outcome[0]

    def _sum_over_ranks(self, values: Mapping[str, Any]) -> dict[str, float]:
        """Sums over the ranks that have different samples; waits for the device once, whatever it holds."""
        packed = torch.stack(
            [torch.as_tensor(value, dtype=torch.float64, device=self.launch.device) for value in values.values()]
        )
        dist.all_reduce(packed, group=self.parallel.true_group("dp"))
        return dict(zip(values, packed.tolist()))

    def _report(self, record: Mapping[str, Any]) -> None:
        mix = self.run.mix.take()
        by_timestep = self.bins.take() if self.bins is not None else {}
        self.run.metrics.write({**record, **by_timestep, **mix.shares})
        rate = record["samples"] / record["step_time"]
        used = "".join(f"  {name.upper()} {record[name]:.1%}" for name in ("mfu", "hfu") if record[name] is not None)
        log.info(
            "step %d/%d  loss %.5f  grad norm %.3g  lr %.3g  %.2f s/step  %.3g samples/s  %.4g tokens/s  "
            "data wait %.0f %%  %.3g TFLOP/s%s  %.2f GB",
            record["step"],
            self.run.last_step,
            record["loss"],
            record["grad_norm"],
            record["lr"],
            record["step_time"],
            rate,
            record["tokens_per_s"],
            100 * record["data_wait"] / record["step_time"],
            record["tflops"],
            used,
            record["mem_gb"],
        )
        if self.run.data.set_names:
            log.info("%s", mix)

    @torch.no_grad()
    def _validate(self, step: int) -> None:
        """The loss over the fixed validation samples, at each fixed case, with noise that belongs to the sample."""
        assert self.run.validation is not None
        started = time.perf_counter()
        cases = self.run.system.validation_cases()
        sums = {f"{name}_{case}": 0.0 for name in self.run.system.value_names for case in cases}
        sums["samples"] = 0.0
        for batch, num_counted in self.run.validation.batches():
            sums["samples"] += num_counted
            for case in cases:
                values = self.run.stepper.evaluate(self.run.system.validation_inputs(batch, case, self.run.seed))
                for name, value in values.items():
                    sums[f"{name}_{case}"] += float(value[:num_counted].double().sum())
        totals = self._sum_over_ranks(sums)
        count = totals.pop("samples")
        record: dict[str, Any] = {"kind": "valid", "step": step, "samples": int(count)}
        for name in self.run.system.value_names:
            record[name] = sum(totals[f"{name}_{case}"] for case in cases) / count / len(cases)
        record.update({name: total / count for name, total in totals.items()})
        record["step_time"] = time.perf_counter() - started
        self.run.metrics.write(record)
        self.run.last_validation = {"step": step, "loss": record["loss"]}
        log.info("validation at step %d: loss %.5f over %d samples", step, record["loss"], count)
