"""One stage of a training run: what it is built from, where it begins, and how it is saved."""

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from sat.cogvideox.engine import NETWORK_PREFIX
from sat.cogvideox.start import start_from_text_to_video
from sat.config import ConfigNode
from sat.data.quarantine import Quarantine
from sat.errors import CheckpointError, ConfigError
from sat.mpu.launch import Launch
from sat.mpu.recorder import Recorder
from sat.mpu.shards import shard_rules
from sat.mpu.state import AXES, set_parallel_state
from sat.ops.apex import find_norm
from sat.ops.attention_kernels import attention_kernel
from sat.training.adapters import lora_alpha
from sat.training.args import deepspeed_config, train_args
from sat.training.caches import Caches, check_cache
from sat.training.checkpoint import fit_weights, load_parts
from sat.training.data import TrainingData, ValidationData, check_plan, check_sources
from sat.training.fit import changes_from, check_model
from sat.training.health import Health, HealthOptions
from sat.training.identity import deciding_values, describe_run, digest
from sat.training.layout import build_parallel_state, check_layout
from sat.training.lock import RunLock
from sat.training.lr import LearningRate
from sat.training.metrics import MetricsWriter
from sat.training.mix import RealisedMix
from sat.training.optim import check_optimizer
from sat.training.optimizer_state import StoredState
from sat.training.positions import TableChange, changed, trained_network
from sat.training.preview import check_numbers, clip_sizes
from sat.training.resume import Start, find_start, lock_run, open_weights, read_training_state, set_back
from sat.training.resume_check import Circumstances, LossRecord, check_losses, gather_losses
from sat.training.retention import Retention, is_good, read_state
from sat.training.run_dir import check_writable, configuration_file, make_run_dir, on_main, write_description
from sat.training.samples import ValidationSamples
from sat.training.saving import HostMemory, SaveOptions, Saver, Snapshot
from sat.training.stages import Stage, plan_stages, stage_lines, stages_left
from sat.training.step import Stepper, check_with_deepspeed
from sat.training.systems import DiffusionSystem, attention_work, build_system, check_files
from sat.weights.finding import CheckpointPath, find_checkpoint
from sat.weights.whole import iteration_names, problem_of, read_latest

log = logging.getLogger(__name__)


class Job:
    """What all stages of a run have in common."""

    def __init__(self, config: ConfigNode, seed: int, launch: Launch, recorder: Recorder, resources: ExitStack) -> None:
        """resources: takes what is to be given back when the run ends, in whatever way."""
        self.config, self.seed, self.launch, self.recorder, self.resources = config, seed, launch, recorder, resources
        self.stages = plan_stages(config, seed)
        for stage in self.stages:
            check_numbers(stage.config)
        self.decides = deciding_values(config, train_args(config), seed)

    @property
    def stage_ends(self) -> frozenset[int]:
        """Steps at whose checkpoints another stage begins."""
        return frozenset(stage.first_step for stage in self.stages[1:])

    def begin(self) -> tuple[Start, Sequence[Stage]]:
        """Where the run starts, and the stages that it has still to do; every rank must call it."""
        start = find_start(train_args(self.config), self.decides, self.launch, self.resources)
        left = stages_left(self.stages, start.step)
        for stage in left[1:]:  # they may be days away
            check_ahead(stage, self.launch)
        return start, left


def check_ahead(stage: Stage, launch: Launch) -> None:
    """Raise what would stop a stage when its turn comes: files that are not there, its layout, its batch, its rows."""
    config, args = stage.config, stage.args
    check_files(config)
    check_cache(config, args)
    check_sources(config, args)
    dp_size = check_layout(config, args, launch.world_size)
    sizes = deepspeed_config(config, args, dp_size, launch.device.type)
    check_optimizer(sizes, args.model_parallel_size)
    check_with_deepspeed(config["deepspeed"], sizes, launch)
    rows = sizes.micro_batch_size * sizes.grad_accum_steps * dp_size
    check_plan(config, args, stage.seed, rows, sizes.micro_batch_size)


class Run:
    """One stage of a run, the whole of most: what training needs, built in the order in which it is needed."""

    def __init__(self, job: Job, stage: Stage, start: Start, resources: ExitStack) -> None:
        """resources: takes what is to be given back when the stage ends."""
        self.job, self.stage, self.start = job, stage, start
        self.args, self.seed, self.launch = stage.args, stage.seed, job.launch
        config, launch = stage.config, job.launch
        timeout = timedelta(minutes=self.args.timeout_minutes)
        self.parallel = build_parallel_state(config, self.args, launch.device.type, timeout=timeout)
        set_parallel_state(self.parallel)
        self.start_step = start.step
        self.is_new_stage = stage.begins_at(start.step)
        leases = resources.enter_context(ExitStack())
        checkpoint = start.checkpoint or self._weights_to_start_from(leases)
        former = self._former_network(checkpoint)
        self.table_changes: dict[str, TableChange] = {}
        if start.state is not None and not self.is_new_stage and self.args.global_batch_size is None:
            self.args = replace(self.args, global_batch_size=start.state["global_batch_size"])
        dp_rank, dp_size = self.parallel.rank("dp"), self.parallel.size("dp")
        self.deepspeed = deepspeed_config(config, self.args, dp_size, launch.device.type)
        self.global_batch_size = self.deepspeed.micro_batch_size * self.deepspeed.grad_accum_steps * dp_size
        self._check_before_building(checkpoint, former)
        sizes = (self.global_batch_size, self.deepspeed.micro_batch_size, dp_rank, dp_size)
        self.data = TrainingData(config, self.args, self.seed, *sizes)
        self.last_step = stage.first_step + self.data.total_steps
        if self.start_step >= self.last_step:
            return  # finished: nothing to build
        self.validation = ValidationData.build(config, self.args, self.seed, *sizes)
        self.mix = RealisedMix(self.data.set_names)

        torch.manual_seed(self.seed)
        self.system = build_system(config, self.args)
        if checkpoint is not None:
            self._load_weights(checkpoint, former)
        leases.close()
        self.system.to(launch.device)
        self._use_caches()
        self.stepper = Stepper(self.system.trained, self.deepspeed, launch, self.parallel)
        clips = clip_sizes(config)
        if isinstance(self.system, DiffusionSystem) and clips is not None:
            work = attention_work(self.system.engine.network, clips)
            resources.enter_context(attention_kernel(self.args.attention, work))
            if work.device.type == "cuda":
                find_norm()  # which the layers would do within the first step
        self.run_dir, self.lock = self._find_run_dir()
        self.health = Health(
            HealthOptions(self.args.max_skipped_steps, self.args.spike_deviations),
            self.run_dir,
            launch,
            self.parallel,
            {
                "configuration": str(configuration_file(self.run_dir, job.config))
                if self.run_dir is not None
                else None,
                "seed": job.seed,
                "global_batch_size": self.global_batch_size,
            },
        )
        self.last_validation: dict[str, Any] | None = None
        if start.checkpoint is not None:
            self._continue_from(start.checkpoint)
        self.run_number = on_main(self._describe)
        self.lr = self._schedule()
        self.last_micro_batch: tuple[list[int], Any] = ([], None)
        self.samples = self._prepare_samples()
        self.metrics = on_main(self._open_metrics) or MetricsWriter(None)
        self.saver = self._open_saver()
        if self.saver is not None:
            resources.callback(self.saver.close)
        self.quarantine = on_main(self._open_quarantine)
        self._log_start()

    def batches(self) -> Iterator[Mapping[str, Any]]:
        """Micro batches of this rank from the first step to the last."""
        return self.data.batches(self.start_step - self.stage.first_step)

    def lr_at(self, step: int) -> float:
        """Learning rate of a step. SAT's linear decay passes below zero after its end."""
        return max(self.lr.at(step - self.stage.first_step), 0.0)

    @property
    def is_finished(self) -> bool:
        """Whether it had come to its end before it began."""
        return self.start_step >= self.last_step

    def tidy(self) -> None:
        """Delete what a finished run does not keep: it may have been killed before it did so itself."""
        run_dir, checkpoint = self.start.run_dir, self.start.checkpoint
        assert run_dir is not None and checkpoint is not None

        def delete() -> None:
            # Where `latest` names another one, that is damaged: what is whole must not give way to it.
            if read_latest(run_dir)[0] == checkpoint.path.name:
                self._retention().tidy(run_dir)

        on_main(delete)

    def end(self) -> Start:
        """Where the stage after this one starts: at the checkpoint of its last step."""
        assert self.run_dir is not None
        checkpoint = find_checkpoint(self.run_dir / str(self.last_step))
        return Start(self.run_dir, checkpoint, read_training_state(checkpoint), self.lock)

    # --- building ----------------------------------------------------------------------------------------------------

    def _weights_to_start_from(self, leases: ExitStack) -> CheckpointPath | None:
        """What a new run starts from; a run that goes on has its own, which nobody else deletes."""
        if self.args.load is None or self.args.mode == "pretrain":
            return None
        return open_weights(self.args.load, self.args.weights, leases)

    def _former_network(self, checkpoint: CheckpointPath | None) -> ConfigNode | None:
        """The network_config that the weights were trained with, where that may be another than the stage's own."""
        if self.is_new_stage:
            return self.job.stages[self.stage.number - 1].config["model"].get("network_config")
        if checkpoint is None or checkpoint is self.start.checkpoint or "target" in self.stage.config["model"]:
            return None
        return trained_network(checkpoint)

    def _may_miss(self, rule: Callable[[str], bool]) -> Callable[[str], bool]:
        """Which weights may be missing in what is loaded: in a new run those that the model's rule names."""
        if self.start.checkpoint is not None:
            return lambda name: False
        return (lambda name: True) if self.args.force_train else rule

    def _is_from_text_to_video(self) -> bool:
        """Whether the weights that are loaded are to be completed; those that a run saves are complete."""
        return self.args.from_text_to_video and self.start.checkpoint is None

    def _check_before_building(self, checkpoint: CheckpointPath | None, former: ConfigNode | None) -> None:
        """Stop on what can be known to be wrong before the minutes that a large model takes to build."""
        config = self.stage.config
        if checkpoint is not None:
            may_miss = self._may_miss(DiffusionSystem.may_miss)
            check_model(config, checkpoint, may_miss, self._is_from_text_to_video(), former)
        check_files(config)
        check_cache(config, self.args)
        check_optimizer(self.deepspeed, self.args.model_parallel_size)
        check_with_deepspeed(config["deepspeed"], self.deepspeed, self.launch)
        if self.args.activations == "keep_attention" and self.deepspeed.zero_stage == 3:
            raise ConfigError(
                "args.activations is keep_attention, and ZeRO 3 gathers weights in the part that is computed again at "
                "times of its own, which torch's selective recomputation takes for another computation; set "
                "args.activations=recompute, or deepspeed.zero_optimization.stage to 2"
            )
        now = {"seed": self.job.seed, "global_batch_size": self.global_batch_size}
        for name, current in now.items():
            saved = current if self.start.state is None or self.is_new_stage else self.start.state[name]
            if saved != current:
                raise ConfigError(
                    f"{self.start.run_dir} was trained with {name} {saved}, this run has {current}; "
                    "use the same, or start a new run from its weights with args.mode=finetune"
                )
        if self.start.run_dir is None and self.args.save is not None:
            check_writable(Path(self.args.save), "args.save")

    def _use_caches(self) -> None:
        """Complete the caches that the args section asks for, read from them, and free the encoders."""
        if self.args.cache == "none":
            return
        assert isinstance(self.system, DiffusionSystem)  # check_cache has seen to it
        engine = self.system.engine
        caches = Caches(self.args, engine.first_stage_model, engine.conditioner, self.launch, self.parallel)
        self.data.read_through(caches.complete)
        if self.validation is not None:
            self.validation.read_through(caches.complete)
        caches.free_encoders(engine, is_sampled=self.args.log_sample > 0)

    def _load_weights(self, checkpoint: CheckpointPath, former: ConfigNode | None) -> None:
        parts = [self.system.rename(part) for part in load_parts(checkpoint)]
        if self._is_from_text_to_video():
            own = self.system.trained.state_dict()
            parts = [start_from_text_to_video(part, own, str(checkpoint.path)) for part in parts]
        if isinstance(self.system, DiffusionSystem):
            self.table_changes = changes_from(former, self.system.engine.network)
            parts = [changed(part, self.table_changes, str(checkpoint.path)) for part in parts]
        may_miss = self._may_miss(self.system.may_miss)
        missing = fit_weights(
            self.system.trained, parts, str(checkpoint.path), self.system.describe, may_miss, self.parallel
        )
        kind = "averaged tensors" if checkpoint.is_average else "tensors"
        log.info("loaded %s %s from %s", f"{len(parts[0]):,}", kind, checkpoint.path)
        if missing:
            log.info(
                "%d weights are not in it and start fresh: %s%s",
                len(missing),
                ", ".join(missing[:3]),
                " ..." if len(missing) > 3 else "",
            )

    def _continue_from(self, checkpoint: CheckpointPath) -> None:
        """Restore optimizer, loss scale and counters, and prove that it is what was saved."""
        assert self.start.state is not None and self.run_dir is not None
        state = self.start.state
        if self.stage.keeps_optimizer or not self.is_new_stage:
            stored = StoredState(checkpoint.path)
            self.stepper.allocate_state(stored)
            changes = {f"{NETWORK_PREFIX}{name}": change for name, change in self.table_changes.items()}
            stored.fill(self.stepper.fragments(), shard_rules(self.stepper.module), self.parallel, changes)
            self.stepper.load_scaler_state(state["loss_scaler"])
        if not self.is_new_stage:  # whose losses are others: those before say nothing of them
            self.health.load_state(state["health"])
            self.last_validation = state["validation"]
            self.mix.load(state["mix"])
            if self.args.resume_check and state["check"] is not None:
                saved = LossRecord.read(state["check"])
                check_losses(saved, self._losses_again, self.parallel, self._circumstances())
        run_dir = self.run_dir
        on_main(lambda: set_back(run_dir, checkpoint))
        begins = f"stage {self.stage.name} begins in" if self.is_new_stage else "continuing"
        log.info("%s %s after step %d", begins, self.run_dir, self.start_step)

    def _circumstances(self) -> Circumstances:
        """What the losses of this run are computed under."""
        layout: dict[str, int] = {axis: self.parallel.size(axis) for axis in (*AXES, "ulysses")}
        is_cuda = self.launch.device.type == "cuda"
        return Circumstances(
            layout={**layout, "sequence_parallel": int(self.parallel.sequence_parallel)},
            micro_batch_size=self.deepspeed.micro_batch_size,
            precision=self.deepspeed.precision,
            device=torch.cuda.get_device_name(self.launch.device) if is_cuda else "cpu",
            torch=torch.__version__,
        )

    def _losses_again(self, only_last: bool) -> tuple[list[int], list[float]]:
        """Counters and losses of this rank's last micro batch of the step that was saved, or of all of them."""
        counters: list[int] = []
        losses: list[float] = []
        batches = list(self.data.step(self.start_step - self.stage.first_step))
        for batch in batches[-1:] if only_last else batches:
            inputs = self.system.training_inputs(batch, self.seed, self.global_batch_size)
            counters += batch["counters"].tolist()
            losses += self.stepper.evaluate(inputs)["loss"].tolist()
        return counters, losses

    def _find_run_dir(self) -> tuple[Path | None, RunLock | None]:
        """Where the run writes, and on rank 0 the lock that holds it."""
        if self.start.run_dir is not None:
            return self.start.run_dir, self.start.lock
        if self.args.save is None:
            log.warning("args.save is not set: nothing will be saved, metrics go to the console only")
            return None, None
        run_dir = make_run_dir(self.args.save, self.args.experiment_name)
        return run_dir, lock_run(run_dir, self.job.resources) if self.launch.is_main else None

    def _schedule(self) -> LearningRate:
        args = self.args
        return LearningRate(
            peak=self.deepspeed.lr,
            total_steps=args.lr_decay_iters or self.data.total_steps,
            warmup_steps=args.warmup * (args.lr_decay_iters or self.data.total_steps),
            style=args.lr_decay_style,
            decay_ratio=args.lr_decay_ratio,
            auto_warmup_until=args.auto_warmup_steps if args.mode == "finetune" and not self.stage.number else 0,
        )

    def _retention(self) -> Retention:
        return Retention(self.args.keep_last, self.args.keep_every, self.args.keep_best, self.job.stage_ends)

    def _open_saver(self) -> Saver | None:
        if self.run_dir is None:
            return None

        def before_publishing() -> None:
            if self.lock is not None:
                self.lock.check()
            self.metrics.sync()

        args = self.args
        options = SaveOptions(
            retention=self._retention(),
            max_failed=args.max_failed_saves,
            consolidate=args.save_safetensors,
            lora_alpha=lora_alpha(self.stage.config),
            rules=shard_rules(self.stepper.module),
            aliases=self.stepper.aliases(),
            before_publishing=before_publishing,
        )
        return Saver(self.run_dir, self.parallel, self.launch, options)

    def _prepare_samples(self) -> ValidationSamples | None:
        """The videos that validation samples, where the args section asks for them."""
        count = self.args.log_sample
        if not count:
            return None
        if self.validation is None or self.run_dir is None or not isinstance(self.system, DiffusionSystem):
            raise ConfigError(
                "args.log_sample samples the video model at each validation, into the run directory; set "
                "args.eval_interval, args.valid_data and args.save, or leave it out"
            )
        where = (self.validation, self.parallel, self.job.seed, self.run_dir)
        return ValidationSamples(self.stage.config, count, self.system.engine, *where)

    def _describe(self) -> int | None:
        """Write what the run is found and rebuilt by; its number among those of its name."""
        if self.run_dir is None:
            return None
        write_description(self.run_dir, self.job.config, self.stage.config, self.system.sizes())
        return describe_run(self.run_dir, self.args.experiment_name, self.job.decides)

    def _open_quarantine(self) -> Quarantine:
        report = self.run_dir / "quarantine.jsonl" if self.run_dir is not None else None
        return Quarantine(self.data.num_samples, report, self.args.max_bad_share)

    def _open_metrics(self) -> MetricsWriter:
        name = self.run_dir.name if self.run_dir is not None else self.args.experiment_name
        wandb = {"project": self.args.wandb_project_name, "name": name} if self.args.wandb else None
        return MetricsWriter(self.run_dir, self.start_step, self.args.summary_dir, wandb)

    def _log_start(self) -> None:
        trained = sum(parameter.numel() for parameter in self.stepper.names)
        whole = sum(parameter.numel() for parameter in self.system.trained.parameters())
        ds = self.deepspeed
        log.info(
            "%d processes = dp %d x cp %d x tp %d on %s",
            self.launch.world_size,
            *(self.parallel.size(axis) for axis in AXES),
            self.launch.device.type,
        )
        log.info(
            "global batch %d = micro batch %d x accumulation %d x dp %d; %s, ZeRO stage %d",
            self.global_batch_size,
            ds.micro_batch_size,
            ds.grad_accum_steps,
            self.parallel.size("dp"),
            ds.precision,
            ds.zero_stage,
        )
        log.info("%s parameters trained of %s; peak lr %g, %s", f"{trained:,}", f"{whole:,}", ds.lr, self.lr.style)
        if self.lr.auto_warmup_until:
            log.info(
                "steps 1 to %d run at 5 %% of the learning rate (args.auto_warmup_steps)", self.lr.auto_warmup_until
            )
        for line in [*stage_lines([self.stage]), *self.data.summary()]:
            log.info("%s", line)
        if self.run_dir is not None:
            log.info("run directory %s", self.run_dir)

    # --- saving ------------------------------------------------------------------------------------------------------

    def save(self, step: int) -> None:
        """Begin to save this step in the background."""
        if self.saver is None:
            return
        started = time.perf_counter()
        state = {
            "run": self.run_number,
            "step": step,
            "samples": (step - self.stage.first_step) * self.global_batch_size,
            "seed": self.job.seed,
            "global_batch_size": self.global_batch_size,
            "stage": self.stage.name,
            "configuration": digest(self.job.decides),
            "loss_scaler": self.stepper.scaler_state(),
            "precision": self.deepspeed.precision,
            "zero_stage": self.deepspeed.zero_stage,
            "layout": {axis: self.parallel.size(axis) for axis in AXES},
            "health": self.health.state(),
            "validation": self.last_validation,
            "mix": self.mix.state(),
            "check": self._check_to_save(step),
        }
        self.saver.start(step, self._copy_state, state)
        log.info("saving step %d: training waited %.2f s", step, time.perf_counter() - started)

    def _check_to_save(self, step: int) -> dict[str, Any] | None:
        """The losses of the last micro batches under the weights that are saved; None where they are no numbers."""
        counters, inputs = self.last_micro_batch
        losses = self.stepper.evaluate(inputs)["loss"].tolist()
        record = gather_losses(counters, losses, self.parallel, self._circumstances())
        if all(map(math.isfinite, record.losses)):
            return record.as_json()
        first = self.health.first_skipped
        if first is None:
            log.warning("the update of step %d has spoiled the weights: with them its batch's loss is not finite", step)
        else:
            log.warning(
                "step %d is saved with the weights from before step %d, as skipped steps change none; its batch has no "
                "finite loss to check them by",
                step,
                first,
            )
        return None

    def _copy_state(self, memory: HostMemory) -> Snapshot:
        weights = self.stepper.weights(memory.keep)
        writes_state = weights is not None or self.deepspeed.zero_stage > 0
        return Snapshot(weights, memory.keep_fragments(self.stepper.fragments()) if writes_state else None)

    def save_last(self, step: int) -> None:
        """Save the last step and wait for it; a save that fails is tried once more."""
        if self.saver is None:
            return
        for _ in range(2):
            self.saver.finish()
            if self.saver.published == step:
                return
            self.save(step)
        self.saver.finish()
        if self.saver.published != step:
            raise CheckpointError(
                f"step {step} could not be saved to {self.run_dir} (see above); what was saved before is whole: mend "
                "the cause and start the same command again"
            )

    def last_good(self) -> str:
        """The checkpoint to go back to when steps are skipped, in words."""
        first = self.health.first_skipped
        if self.run_dir is None or first is None:
            return "Nothing is saved: lower the learning rate, or look at the data"
        whole = [name for name in iteration_names(self.run_dir) if problem_of(self.run_dir / name) is None]
        before = [name for name in whole if name.isdecimal() and int(name) < first]
        good = next((name for name in before if is_good(read_state(self.run_dir / name))), None)
        if good is not None:
            return (
                f"The last good checkpoint is {self.run_dir}/{good}: lower the learning rate or mend the data, and go "
                f"on from it with args.resume={self.run_dir}/{good}"
            )
        latest, _ = read_latest(self.run_dir)
        if not before and latest in whole:
            return (
                f"No checkpoint was saved before; {self.run_dir}/{latest} holds the weights from before step {first}, "
                "as skipped steps change none: if it is the data that is bad, mend it and start a new run from them "
                f"with args.mode=finetune args.load={self.run_dir}/{latest}; else lower the learning rate"
            )
        return "No checkpoint was saved before that is good: lower the learning rate, or look at the data"
