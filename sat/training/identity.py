"""What makes two starts the same run: the values of a configuration that decide its numbers."""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from sat.config import STAGES, ConfigNode
from sat.training.args import TrainArgs
from sat.training.files import write_json
from sat.training.plan import VALID_SETS, without_params
from sat.training.stages import plan_stages

RUN_FILE = "run.json"

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


def digest(values: Mapping[str, Any]) -> str:
    """A short name for deciding values: the configuration's hash."""
    return hashlib.blake2b(json.dumps(values, sort_keys=True).encode(), digest_size=8).hexdigest()


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """`args.train_iters 10, now 20` for each key that differs."""
    keys = sorted(key for key in {*before, *now} if before.get(key) != now.get(key))
    return [f"{key} {before.get(key, 'not set')}, now {now.get(key, 'not set')}" for key in keys]


def read_run(run_dir: Path) -> dict[str, Any] | None:
    """What `describe_run` wrote; None where there is nothing of the kind."""
    try:
        content = json.loads((run_dir / RUN_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    has_all = isinstance(content, dict) and isinstance(content.get("decides"), dict)
    return content if has_all and isinstance(content.get("number"), int) else None


def runs_called(save: Path, experiment_name: str) -> dict[Path, dict[str, Any]]:
    """The runs of that name in a folder, the last one first: by number, for clocks go back."""
    pattern = re.compile(re.escape(experiment_name) + r"-\d\d-\d\d-\d\d-\d\d(-\d+)?")
    found = {}
    if save.is_dir():
        for folder in save.iterdir():
            if pattern.fullmatch(folder.name) and (run := read_run(folder)) is not None:
                found[folder] = run
    return dict(sorted(found.items(), key=lambda item: item[1]["number"], reverse=True))


def describe_run(run_dir: Path, experiment_name: str, decides: Mapping[str, Any]) -> None:
    """Note in a run directory by what it is found again."""
    own = read_run(run_dir)
    others = runs_called(run_dir.parent, experiment_name).values()
    number = own["number"] if own is not None else 1 + max((run["number"] for run in others), default=0)
    content = {"number": number, "configuration": digest(decides), "decides": dict(decides)}
    if content != own:
        write_json(run_dir / RUN_FILE, content)
