"""Progressive training: one run in stages, each with a configuration, a learning rate and an order of data of its own.

    stages:
      - name: images
        args: {train_iters: 400}
        data: {params: {video_size: [256, 256], max_num_frames: 1}}
      - name: clips
        args: {train_iters: 800}
        data: {params: {video_size: [480, 720], max_num_frames: 49}}

A stage is the whole configuration with what it says laid over. It begins with the weights and the optimizer's state at
the end of the one before, which is a checkpoint of the run (CogVideoX, arXiv:2408.06072, sec. 3.1).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from typing import Any

from sat.config import SECTIONS, STAGES, ConfigNode, did_you_mean, merge
from sat.errors import ConfigError
from sat.training.args import TrainArgs, train_args
from sat.training.preview import PLANS, data_sets, derived_lines, params_of

KEYS = ("name", "keep_optimizer", *SECTIONS)
OF_THE_RUN = (
    "experiment_name",
    "mode",
    "load",
    "weights",
    "save",
    "resume",
    "resume_check",
    "force_train",
    "auto_warmup_steps",
    "time_limit_minutes",
    "summary_dir",
    "wandb",
    "wandb_project_name",
)
"""What of args is said once for all stages."""


@dataclass(frozen=True)
class Stage:
    """A part of a run: steps first_step + 1 to last_step."""

    config: ConfigNode
    args: TrainArgs
    seed: int
    number: int = 0
    name: str | None = None
    """None in a run without stages."""
    first_step: int = 0
    last_step: int | None = None
    """None in a run without stages: its data say how long it is."""
    keeps_optimizer: bool = True
    """It begins with the optimizer's state of the stage before."""

    def begins_at(self, step: int) -> bool:
        """Whether a checkpoint of that step is what the stage before left."""
        return self.number > 0 and step == self.first_step


def plan_stages(config: ConfigNode, seed: int) -> list[Stage]:
    """The stages of a configuration, one where it names none. Raises ConfigError where they cannot follow each other.

    Sample counters start at 0 in every stage, so each has random streams of its own.
    """
    if STAGES not in config:
        return [Stage(config, train_args(config), seed)]
    stages: list[Stage] = []
    for number, node in enumerate(config[STAGES]):
        first_step = stages[-1].last_step if stages else 0
        assert first_step is not None
        stages.append(_stage(config, node, number, first_step, seed))
    names = [stage.name for stage in stages]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"stages: {names.count(name)} are called {name!r}; give each a name of its own")
    for before, after in pairwise(stages):
        _check_growth(before, after)
        _check_optimizer(before, after)
    if len(stages) > 1 and stages[0].args.save is None:
        raise ConfigError("args.save is not set, and a stage begins with the checkpoint that the one before saves")
    return stages


def stage_lines(stages: Sequence[Stage]) -> list[str]:
    """What each stage comes to, in lines for people."""
    lines = []
    for stage in stages:
        if stage.name is not None:
            lines.append(f"stage {stage.name}: steps {stage.first_step + 1:,} to {stage.last_step:,}")
        lines += derived_lines(stage.config)
    return lines


def _stage(config: ConfigNode, node: ConfigNode, number: int, first_step: int, seed: int) -> Stage:
    for key in node:
        if key not in KEYS:
            raise ConfigError(f"unknown key {node.where(key)}{did_you_mean(key, KEYS)}; keys: {', '.join(KEYS)}")
    from sat.mpu.random import stream_seed  # and torch, which is not needed to print a configuration without stages

    own_args = node.get("args") or ConfigNode()
    for key in own_args:
        if key in OF_THE_RUN:
            raise ConfigError(f"{own_args.where(key)} is of the whole run; give it in the args section itself")
    whole = _laid_over(config, node)
    args = train_args(whole)
    if args.train_iters is None:
        raise ConfigError(f"{node.path}.args.train_iters is not set; every stage says how many steps it has")
    keeps = node.get("keep_optimizer", True)
    if not isinstance(keeps, bool):
        raise ConfigError(f"{node.where('keep_optimizer')} is {keeps!r}; give true or false")
    return Stage(
        config=whole,
        args=args,
        seed=stream_seed(seed, "stage", number) if number else seed,
        number=number,
        name=str(node.get("name", number + 1)),
        first_step=first_step,
        last_step=first_step + args.train_iters,
        keeps_optimizer=keeps,
    )


def _laid_over(config: ConfigNode, node: ConfigNode) -> ConfigNode:
    """The configuration of a stage."""
    whole, own = ConfigNode(), ConfigNode()
    for section in SECTIONS:
        whole[section] = config[section]
        if node.get(section) is not None:
            own[section] = node[section]
            own.origins[section] = node.origins[section]
    return merge(whole, own)


def _check_optimizer(before: Stage, after: Stage) -> None:
    """What one kind of optimizer keeps is nothing to another."""
    old, new = ((stage.config["deepspeed"].get("optimizer") or {}).get("type", "AdamW") for stage in (before, after))
    if after.keeps_optimizer and old.lower() != new.lower():
        raise ConfigError(
            f"stage {after.name!r} has another optimizer ({new}) than {before.name!r} before it ({old}), and cannot go "
            "on with its state; give the stage keep_optimizer: false"
        )


def _check_growth(before: Stage, after: Stage) -> None:
    """Clips grow from stage to stage: one that asks for smaller ones has its numbers in the wrong place."""
    own = _sizes(after)
    for what, old in _sizes(before).items():
        new = own.get(what)
        if new is not None and _size(new) < _size(old):
            raise ConfigError(
                f"stage {after.name!r} shrinks: its {what} is {new}, that of {before.name!r} before it {old}; put them "
                "in the order of their size"
            )


def _sizes(stage: Stage) -> dict[str, int | Sequence[int]]:
    """What says how large a stage's clips and rows are; of several sets each the largest."""
    found: dict[str, list[Any]] = {}
    for params in data_sets(stage.config):
        for key in ("video_size", "max_num_frames"):
            if params.get(key) is not None:
                found.setdefault(f"data.params.{key}", []).append(params[key])
        for frames, *sides in params.get("sizes") or [[params.get(key) for key in ("num_frames", "height", "width")]]:
            if frames is not None:
                found.setdefault("data.params.num_frames", []).append(frames)
            if None not in sides:
                found.setdefault("data.params' height and width", []).append(sides)
    data = params_of(stage.config, "data")
    budgets = [data[name].get("max_tokens") for name in PLANS if data.get(name)]
    if budgets and budgets[0] is not None:
        found["max_tokens"] = budgets[:1]
    return {what: max(values, key=_size) for what, values in found.items()}


def _size(value: int | Sequence[int]) -> int:
    return value if isinstance(value, int) else prod(value)


def stages_left(stages: Sequence[Stage], step: int) -> Sequence[Stage]:
    """What a run that is after a step has still to do; the last stage where nothing is left."""
    return [stage for stage in stages if stage.last_step is None or stage.last_step > step] or stages[-1:]
