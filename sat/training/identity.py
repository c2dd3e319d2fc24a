"""What makes two starts the same run: the values of a configuration that decide its numbers."""

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from sat.config import STAGES, ConfigNode
from sat.errors import CheckpointError
from sat.training.args import TrainArgs
from sat.training.files import write_json
from sat.training.plan import VALID_SETS, without_params
from sat.training.stages import plan_stages
from sat.weights.run_file import RUN_FILE, RunRecord, digest, read_run

DECIDING_ARGS = (
    "mode",
    "train_iters",
    "epochs",
    "global_batch_size",
    "train_data",
    "train_data_weights",
    "lr_decay_style",
    "lr_decay_iters",
    "lr_decay_ratio",
    "warmup",
    "auto_warmup_steps",
)
FINETUNE_ARGS = ("load", "weights", "force_train")
"""They decide where a finetuning run starts from; otherwise they say what is continued."""
DECIDING_DEEPSPEED = ("optimizer", "gradient_clipping", "bf16", "fp16", "torch_autocast", "data_types")


def deciding_values(config: ConfigNode, args: TrainArgs, seed: int) -> dict[str, Any]:
    """Dotted key -> value, of what decides a run's numbers, stage by stage. How it is spread over processes is not
    among it.

    Where no global batch is given, the samples that one process takes in a step are.
    """
    names = (*DECIDING_ARGS, *(FINETUNE_ARGS if args.mode == "finetune" else ()))
    own = {name: getattr(args, name) for name in names}
    deepspeed = config["deepspeed"]
    if args.global_batch_size is None:
        own["micro_batch_size x grad_accum_steps"] = deepspeed.get("train_micro_batch_size_per_gpu", 1) * deepspeed.get(
            "gradient_accumulation_steps", 1
        )
    tree = {
        "seed": seed,
        "args": own,
        "model": config["model"].plain(),
        "data": without_params(config["data"], [VALID_SETS]).plain(),
        "deepspeed": {key: deepspeed.plain()[key] for key in DECIDING_DEEPSPEED if key in deepspeed},
    }
    if STAGES in config:
        tree[STAGES] = [deciding_values(stage.config, stage.args, stage.seed) for stage in plan_stages(config, seed)]
    return json.loads(json.dumps(dict(_flat(tree, "")), default=str))


def _flat(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping) and value:
        for key, item in value.items():
            yield from _flat(item, f"{path}.{key}" if path else str(key))
    elif path == STAGES:
        for number, stage in enumerate(value):
            yield from _flat(stage, f"{path}.{number}")
    else:
        yield path, value


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """`args.train_iters 10, now 20` for each key that differs."""
    keys = sorted(key for key in {*before, *now} if before.get(key) != now.get(key))
    return [f"{key} {before.get(key, 'not set')}, now {now.get(key, 'not set')}" for key in keys]


def runs_called(save: Path, experiment_name: str) -> tuple[dict[Path, RunRecord], dict[Path, str]]:
    """The runs of that name in a folder, the last one first: by number, for clocks go back; and those not known.

    The latter hold checkpoints that can be continued, and nothing says to which run they belong: folder -> why.
    """
    pattern = re.compile(re.escape(experiment_name) + r"-\d\d-\d\d-\d\d-\d\d(-\d+)?")
    found: dict[Path, RunRecord] = {}
    unknown: dict[Path, str] = {}
    for folder in save.iterdir() if save.is_dir() else ():
        if pattern.fullmatch(folder.name) and folder.is_dir():
            try:
                run = read_run(folder)
            except CheckpointError as error:
                unknown[folder] = str(error)
                continue
            if run is not None:
                found[folder] = run
    return dict(sorted(found.items(), key=lambda item: item[1].number, reverse=True)), unknown


def describe_run(run_dir: Path, experiment_name: str, decides: Mapping[str, Any]) -> int:
    """Note in a run directory by what it is found again; returns its number."""
    runs, _ = runs_called(run_dir.parent, experiment_name)
    try:
        own = read_run(run_dir)  # whatever its name is now
    except CheckpointError:
        own = None
    number = own.number if own is not None else 1 + max((run.number for run in runs.values()), default=0)
    record = RunRecord(number, digest(decides), dict(decides))
    if record != own:
        write_json(run_dir / RUN_FILE, {key: getattr(record, key) for key in ("number", "configuration", "decides")})
    return number
