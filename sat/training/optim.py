"""Which parameters are trained, with which weight decay and learning rate, by which optimizer."""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from sat.config import ConfigNode, did_you_mean, resolve_target
from sat.errors import ConfigError
from sat.ops.apex import find_adam
from sat.ops.layernorm import RMSNorm
from sat.training.args import DeepSpeedConfig

NO_WD_MODULES: list[type[nn.Module]] = [nn.LayerNorm, RMSNorm]
"""Modules whose parameters have no weight decay; users' own norms may be appended."""

ADAPTER_NAMES = ("matrix_A", "matrix_B")
"""Parameters with such a part in their name are trained whatever is frozen."""


def freeze(module: nn.Module, not_trainable_prefixes: Sequence[str]) -> None:
    """Stop training parameters whose name starts with a prefix; `all` stops every one. Adapters stay trained."""
    for name, parameter in module.named_parameters():
        is_frozen = "all" in not_trainable_prefixes or name.startswith(tuple(not_trainable_prefixes))
        if is_frozen and not any(part in name for part in ADAPTER_NAMES):
            parameter.requires_grad_(False)


def parameter_groups(module: nn.Module, lr: float = 1.0) -> list[dict[str, Any]]:
    """Groups for an optimizer: decayed and not, each split by the parameters' `lr_scale`, in this order.

    No decay for norms (NO_WD_MODULES), for everything called bias, and where `no_weight_decay` is set. A group has
    `params`, `names`, `lr` (lr times its scale), `lr_scale`, and `weight_decay: 0` where there is none.
    """
    found: dict[tuple[bool, float], dict[str, Any]] = {}
    seen: set[int] = set()
    for prefix, owner in module.named_modules():
        for name, parameter in owner.named_parameters(recurse=False):
            if not parameter.requires_grad or id(parameter) in seen:
                continue
            seen.add(id(parameter))
            no_decay = (
                isinstance(owner, tuple(NO_WD_MODULES))
                or name == "bias"
                or getattr(parameter, "no_weight_decay", False)
            )
            scale = float(getattr(parameter, "lr_scale", 1.0))
            group = found.setdefault(
                (no_decay, scale), {"params": [], "names": [], "lr": lr * scale, "lr_scale": scale}
            )
            group["params"].append(parameter)
            group["names"].append(f"{prefix}.{name}" if prefix else name)
            if no_decay:
                group["weight_decay"] = 0.0
    # Decayed groups first; within each, the groups in the order in which their first parameter was met.
    return [found[key] for key in sorted(found, key=lambda key: key[0])]


_TORCH_OPTIMIZERS = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}


def optimizer_class(config: Mapping[str, Any]) -> type[torch.optim.Optimizer]:
    """The class that `deepspeed.optimizer` names with `type`: a dotted path (a user's own too), Adam, AdamW or SGD.

    Raises ConfigError for an unknown type and for params that the class does not take.
    """
    kind = config.get("type", "AdamW")
    if "." in kind:
        found: Any = resolve_target(kind)
    elif kind.lower() in _TORCH_OPTIMIZERS:
        found = _TORCH_OPTIMIZERS[kind.lower()]
    else:
        near = did_you_mean(kind, ["Adam", "AdamW", "SGD", "sat.ops.FusedEmaAdam"])
        raise ConfigError(f"deepspeed.optimizer.type is '{kind}'{near}; give Adam, AdamW, SGD or a dotted path")
    params = config.get("params") or {}
    accepted = inspect.signature(found).parameters
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in accepted.values())
    for key in params:
        if key not in accepted and key not in _NOT_HANDED_ON and not takes_any:
            where = params.where(key) if isinstance(params, ConfigNode) else f"deepspeed.optimizer.params.{key}"
            raise ConfigError(f"unknown key {where}{did_you_mean(key, accepted)}; {kind} takes {', '.join(accepted)}")
    return found


def needs_whole_parameters(kind: type[torch.optim.Optimizer]) -> bool:
    """Whether an optimizer says, with an attribute of this name, that it takes no parts of parameters."""
    return bool(getattr(kind, "needs_whole_parameters", False))


def check_optimizer(config: DeepSpeedConfig, tp_size: int) -> None:
    """Raise ConfigError where the optimizer is unknown or would get parts of the parameters that it needs whole."""
    kind = optimizer_class(config.optimizer)
    if needs_whole_parameters(kind) and (config.zero_stage > 0 or tp_size > 1):
        raise ConfigError(
            f"deepspeed.optimizer.type is {config.optimizer['type']}, which needs each matrix whole, and ZeRO stage "
            f"{config.zero_stage} with args.model_parallel_size {tp_size} hands it parts of them: set "
            "deepspeed.zero_optimization.stage=0 (in fp32) and args.model_parallel_size=1, or take AdamW"
        )


_NOT_HANDED_ON = ("lr", "torch_adam")
"""The parameter groups carry the rate; torch_adam is DeepSpeed's word for torch's Adam, not Apex's."""
_TAKEN_BY_APEX = {"betas", "eps", "weight_decay"}


def build_optimizer(
    groups: list[dict[str, Any]], config: Mapping[str, Any], is_on_gpu: bool = False
) -> torch.optim.Optimizer:
    """The optimizer that `deepspeed.optimizer` describes: `{type, params}`.

    It is handed to DeepSpeed as an object, so nothing is compiled at start. Adam and AdamW that update on a GPU are
    NVIDIA Apex's where it is installed.
    """
    given = config.get("params") or {}
    params = {key: value for key, value in given.items() if key not in _NOT_HANDED_ON}
    if "betas" in params:
        params["betas"] = tuple(params["betas"])
    groups = [{key: value for key, value in group.items() if key != "names"} for group in groups]
    kind: Any = optimizer_class(config)
    if is_on_gpu and kind in (torch.optim.Adam, torch.optim.AdamW) and not given.get("torch_adam"):
        fused: Any = find_adam() if params.keys() <= _TAKEN_BY_APEX else None
        if fused is not None:
            decay = inspect.signature(kind).parameters["weight_decay"].default  # torch's own, Apex has another
            return fused(groups, **{"weight_decay": decay, **params}, adam_w_mode=kind is torch.optim.AdamW)
    return kind(groups, **params)
