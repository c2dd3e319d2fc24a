"""Recordings of training and of weights: `training/`, `parallel/`, `checkpoint/`; and what has no counterpart here."""

import argparse
import re
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sat import arguments
from sat.config import instantiate_from_config
from sat.model.base_model import ARGS_DEFAULT
from sat.mpu.shards import ShardRule, cut_state, make_rule, shard_rules
from sat.ops import FusedEmaAdam
from sat.training.checkpoint import load_pickle, load_weights
from sat.training.lr import LearningRate
from sat.training.optim import parameter_groups
from tools.golden.common import (
    CannotReplay,
    Case,
    Checks,
    Folder,
    Recording,
    RecordingError,
    with_tensors,
)
from tools.golden.core_forward import build_model

EMA_TOLERANCE = 1e-6
RATE_TOLERANCE = 1e-12
AUTO_WARMUP_STEPS = 100
"""SAT starts low for so many steps when it loads weights."""


# --- learning rate ---------------------------------------------------------------------------------------------------


def recorded_schedule(case: Mapping[str, Any]) -> LearningRate:
    """SAT's arguments of one run as a schedule."""
    total = case["lr_decay_iters"] or case["train_iters"]
    loads = case["mode"] == "finetune" or case["start_iteration"] > 0
    start = max(case["start_iteration"] - (AUTO_WARMUP_STEPS if loads else 0), 0)
    return LearningRate(
        peak=case["lr"],
        total_steps=total,
        warmup_steps=case["warmup"] * total,
        style=case["style"],
        decay_ratio=case["decay_ratio"],
        auto_warmup_until=start + AUTO_WARMUP_STEPS if loads else 0,
    )


def replay_schedules(content: Mapping[str, Any], checks: Checks) -> None:
    for case in content["cases"]:
        rate = recorded_schedule(case)
        label = f"{case['style']} {case['mode']} from {case['start_iteration']}"
        for step, *recorded in case["points_step_lr0_lr1"]:
            own = [rate.at(step) * scale for scale in case["group_scales"]]
            checks.close(f"{label}, step {step}", own, recorded, atol=1e-18, rtol=RATE_TOLERANCE)
        state = case["state_dict"]
        checks.close(f"{label}: warmup_iter", rate.warmup_steps, state["warmup_iter"], rtol=RATE_TOLERANCE)
        last_step = case["points_step_lr0_lr1"][-1][0]
        checks.equal(f"{label}: num_iters", last_step, state["num_iters"])
        checks.equal(f"{label}: end_iter", rate.total_steps, state["end_iter"])
        checks.equal(f"{label}: start_lr", rate.peak, state["start_lr"])
        checks.equal(f"{label}: decay_style", rate.style, state["decay_style"])
        checks.close(f"{label}: decay_ratio", 1.0 / rate.decay_ratio, state["decay_ratio"], rtol=RATE_TOLERANCE)


# --- parameter groups ------------------------------------------------------------------------------------------------

ADDED_PART = re.compile(r"(?P<name>\w+)=(?P<kind>\w+)\((?P<sizes>[\d,]+)\)(?P<rest>.*)")


def add_recorded_part(model: nn.Module, words: str) -> None:
    """Add one module or parameter described as `name=Kind(sizes) with lr_scale 0.1 on both parameters`."""
    match = ADDED_PART.fullmatch(words.strip())
    if match is None:
        raise CannotReplay(f"the added part '{words}' is not known here")
    sizes = [int(size) for size in match["sizes"].split(",")]
    parameters: list[Any]
    if match["kind"] == "Parameter":
        parameters = [nn.Parameter(torch.zeros(*sizes))]
        model.register_parameter(match["name"], parameters[0])
    else:
        part = getattr(nn, match["kind"])(*sizes)
        parameters = list(part.parameters())
        model.add_module(match["name"], part)
    for parameter in parameters:
        if scale := re.search(r"lr_scale ([\d.]+)", match["rest"]):
            parameter.lr_scale = float(scale[1])
        if "no_weight_decay" in match["rest"]:
            parameter.no_weight_decay = True
        if "without grad" in match["rest"]:
            parameter.requires_grad_(False)


def replay_groups(content: Mapping[str, Any], checks: Checks) -> None:
    model = build_model(content["args"])
    for words in content["added"].split(";"):
        add_recorded_part(model, words)
    groups, recorded = parameter_groups(model), content["groups"]
    checks.equal("number of groups", len(groups), len(recorded))
    for index, (group, expected) in enumerate(zip(groups, recorded, strict=False)):
        flags = [bool(getattr(parameter, "model_parallel", False)) for parameter in group["params"]]
        checks.equal(f"group {index}: parameters", group["names"], expected["params"])
        checks.equal(f"group {index}: model_parallel", flags, expected["model_parallel"])
        checks.equal(f"group {index}: lr", group["lr"], expected["lr"])
        decay = group.get("weight_decay", "optimizer default")
        checks.equal(f"group {index}: weight_decay", decay, expected["weight_decay"])


# --- optimizer -------------------------------------------------------------------------------------------------------


def replay_ema_adam(path: Path, content: Mapping[str, Any], checks: Checks) -> None:
    recording = checks.open(path.with_suffix(".safetensors"))
    gradients = recording.group("in/grad_")
    for run, decoupled in content["adam_w_mode"].items():
        parameter = nn.Parameter(recording["in/param"].clone())
        params = {**content["config"], "params": [parameter], "adam_w_mode": decoupled}
        optimizer = instantiate_from_config({"target": "sat.ops.FusedEmaAdam", "params": params})
        assert isinstance(optimizer, FusedEmaAdam)
        for step in range(len(gradients)):
            parameter.grad = gradients[str(step)].clone()
            optimizer.step()
            for kind, value in (("param", parameter), ("shadow", optimizer.state[parameter]["shadow"])):
                name = f"out/{run}/{kind}_{step + 1}"
                checks.close(name, value, recording[name], atol=EMA_TOLERANCE)
        for kind in ("exp_avg", "exp_avg_sq"):
            name = f"out/{run}/{kind}"
            checks.close(name, optimizer.state[parameter][kind], recording[name], atol=EMA_TOLERANCE)


# --- command line ----------------------------------------------------------------------------------------------------


def describe_flag(action: argparse.Action) -> dict[str, Any]:
    """One flag as recorded."""
    name = type(action).__name__.strip("_")
    return {
        "flags": list(action.option_strings),
        "dest": action.dest,
        "default": action.default,
        "type": getattr(action.type, "__name__", None),
        "nargs": action.nargs,
        "const": action.const,
        "choices": None if action.choices is None else list(action.choices),
        "action": name,
    }


def replay_flags(content: Mapping[str, Any], checks: Checks) -> None:
    for function, recorded in content.items():
        if function == "args_to_transformer":
            own = {keyword: list(source) for keyword, source in ARGS_DEFAULT.items()}
            checks.equal("args_to_transformer", own, recorded)
            continue
        if not hasattr(arguments, function):
            raise CannotReplay(f"sat.arguments has no {function}")
        parser = argparse.ArgumentParser(add_help=False)
        getattr(arguments, function)(parser)
        flags = {action.dest: describe_flag(action) for action in parser._actions}
        checks.equal(f"{function}: names in order", list(flags), [flag["dest"] for flag in recorded])
        for flag in recorded:
            for key, value in flag.items():
                checks.equal(f"{function}: {key} of {flag['dest']}", flags.get(flag["dest"], {}).get(key), value)


# --- shards ----------------------------------------------------------------------------------------------------------


def split_rules(case: Mapping[str, Any], whole: Mapping[str, Tensor]) -> dict[str, ShardRule]:
    """Parameter -> how it is split; parameters that are not named are whole on each rank."""
    if "model_args" in case:
        return shard_rules(build_model(case["model_args"]))
    weight = whole["weight"]
    if case["cls"] == "RowParallelLinear":
        return {"weight": make_rule(1, weight.shape[1])}
    if case["cls"] not in ("ColumnParallelLinear", "VocabParallelEmbedding"):
        raise CannotReplay(f"there is no layer {case['cls']} here")
    rule = make_rule(0, weight.shape[0], case["stride"] or 1)
    return {"weight": rule, "bias": rule}


def replay_shards(path: Path, name: str, case: Mapping[str, Any], checks: Checks) -> None:
    recording = Recording(path.with_suffix(".safetensors"))
    whole = recording.group(f"{name}/full/")
    if not whole:
        raise RecordingError(f"{recording.path.name} has no tensors {name}/full/")
    rules = split_rules(case, whole)
    for rank in range(case["ranks"]):
        recorded = recording.group(f"{name}/rank{rank}/")
        checks.equal(f"rank {rank}: split parameters are recorded", sorted(set(rules) & set(whole) - set(recorded)), [])
        own = cut_state(whole, rules, rank, case["ranks"])
        for key, expected in recorded.items():
            checks.close(f"rank {rank}: {key}", own[key], expected)
    checks.equal("tensors without a rule", [key for key in recording.unused() if key.startswith(f"{name}/")], [])


# --- checkpoints -----------------------------------------------------------------------------------------------------


def replay_checkpoint(folder: Path, expected_file: Path, checks: Checks) -> None:
    """A folder as SAT writes it: reading by `latest` gives exactly the recorded weights."""
    recording = checks.open(expected_file)
    weights = load_weights(folder)
    checks.equal("names", sorted(weights), sorted(recording.tensors))
    for name in recording.tensors:
        if name in weights:
            checks.equal(f"dtype of {name}", weights[name].dtype, recording[name].dtype)
            checks.close(name, weights[name], recording[name])
    listing = expected_file.with_suffix(".json")
    if listing.is_file():
        _compare_listing(folder, Folder(listing.parent).documents[listing], checks)


def _compare_listing(folder: Path, listing: Mapping[str, Any], checks: Checks) -> None:
    content = load_pickle(next(folder.glob("*/mp_rank_00_model_states.pt")))
    for key in ("iteration", "client_lr_scheduler"):
        checks.equal(key, content.get(key), listing[key])
    checks.equal("top_level_keys", sorted(content), sorted(listing["top_level_keys"]))


def replay_rank_files(folder: Path, whole_file: Path, ranks: int, checks: Checks) -> None:
    """A folder with one file for each rank, against slices of the recorded whole weights."""
    recording = checks.open(whole_file)
    args = Folder(folder).documents[folder / "model_config.json"]
    rules = shard_rules(build_model({**args, "model_parallel_size": 1}))
    for rank in range(ranks):
        weights = load_weights(folder, rank)
        checks.equal(f"rank {rank}: names", sorted(weights), sorted(recording.tensors))
        own = cut_state({name: recording[name] for name in recording.tensors}, rules, rank, ranks)
        for name in set(weights) & set(own):
            checks.close(f"rank {rank}: {name}", weights[name], own[name])


def find_checkpoints(folder: Folder) -> Iterator[Case]:
    """Folders with `latest` in them.

    Beside them are the weights that they must give, NAME.safetensors or NAME_full.safetensors; a `release` folder holds
    those of another folder.
    """
    for latest in (path for path in folder.files if path.name == "latest"):
        root = latest.parent
        files = tuple(path for path in folder.files if root in path.parents)
        single, whole = (root.with_name(f"{root.name}{end}.safetensors") for end in ("", "_full"))
        ranks = len(list(root.glob("*/mp_rank_*_model_states.pt")))
        listing = single.with_suffix(".json")
        if single.is_file():
            yield Case(folder.name(root), (*files, single, listing), partial(replay_checkpoint, root, single))
        elif whole.is_file():
            yield Case(folder.name(root), (*files, whole), partial(replay_rank_files, root, whole, ranks))
        elif latest.read_text(encoding="utf-8").strip() == "release":
            yield Case(folder.name(root), files, partial(replay_release, root))


def replay_release(folder: Path, checks: Checks) -> None:
    """A folder whose `latest` says `release`: it holds the weights of one of the recordings beside it."""
    weights = load_weights(folder)
    shapes = {name: value.shape for name, value in weights.items()}
    for file in sorted(folder.parent.glob("*.safetensors")):
        recorded = Recording(file)
        if {name: value.shape for name, value in recorded.tensors.items()} == shapes:
            for name, value in recorded.tensors.items():
                checks.close(name, weights[name], value)
            return
    raise CannotReplay("no recording beside it has weights of these names and shapes")


# --- all -------------------------------------------------------------------------------------------------------------

NO_COUNTERPART = {
    "generation": "text generation (key/value cache, sampling strategies) is not part of this project",
    "data": "SAT's index arithmetic has no counterpart: data order is one permutation for each epoch",
    "checkpoint": "SAT's model_config.json of language models has no counterpart: runs carry their YAML",
}
"""Folders of recordings whose subject this project does not have."""


def find(folder: Folder) -> Iterator[Case]:
    """The cases of `training/`, `parallel/` and `checkpoint/`, and reasons for those without a counterpart."""
    for path, content in folder.with_keys("cases"):
        cases = content["cases"]
        if isinstance(cases, list) and all("points_step_lr0_lr1" in case for case in cases):
            yield Case(folder.name(path), (path,), partial(replay_schedules, content))
    for path, content in folder.with_keys("groups", "added"):
        yield Case(folder.name(path), (path,), partial(replay_groups, content))
    for path, content in folder.with_keys("config", "adam_w_mode"):
        yield Case(folder.name(path), with_tensors(path), partial(replay_ema_adam, path, content))
    for path, content in folder.with_keys("args_to_transformer"):
        yield Case(folder.name(path), (path,), partial(replay_flags, content))
    for path, content in folder.documents.items():
        for name, case in content.items() if isinstance(content, dict) else ():
            if isinstance(case, dict) and "ranks" in case and ("cls" in case or "model_args" in case):
                title = f"{folder.name(path)}:{name}"
                yield Case(title, with_tensors(path), partial(replay_shards, path, name, case))
    yield from find_checkpoints(folder)
    yield from _find_without_counterpart(folder)


def _find_without_counterpart(folder: Folder) -> Iterator[Case]:
    for path in folder.with_suffix(".json"):
        reason = NO_COUNTERPART.get(path.parent.name)
        is_listing = path.with_suffix("").is_dir()
        if reason and not is_listing:
            partner = path.with_suffix(".safetensors")
            yield Case(folder.name(path), (path, partner), reason=reason)
