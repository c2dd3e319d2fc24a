"""Which parameters are trained and how; wrong optimizers are refused before a model is built."""

from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from sat.config import load_config
from sat.errors import ConfigError
from sat.ops import FusedEmaAdam
from sat.ops.layernorm import RMSNorm
from sat.training import optim
from sat.training.args import DeepSpeedConfig
from sat.training.optim import build_optimizer, check_optimizer, freeze, optimizer_class, parameter_groups


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 3)
        self.norm = nn.LayerNorm(3)
        self.rms = RMSNorm(3)
        self.special = nn.Parameter(torch.zeros(3))
        self.special.no_weight_decay = True  # type: ignore[attr-defined]
        self.matrix_A = nn.Parameter(torch.zeros(3))
        self.slow = nn.Linear(3, 3)
        for parameter in self.slow.parameters():
            parameter.lr_scale = 0.1  # type: ignore[attr-defined]
        self.tied = self.first


def names(groups: list[dict[str, Any]]) -> list[list[str]]:
    return [group["names"] for group in groups]


def test_groups_by_decay_and_rate() -> None:
    groups = parameter_groups(Model(), lr=2.0)
    assert names(groups) == [
        ["matrix_A", "first.weight"],
        ["slow.weight"],
        ["special", "first.bias", "norm.weight", "norm.bias", "rms.weight"],
        ["slow.bias"],
    ]
    assert [(group["lr"], group["lr_scale"], group.get("weight_decay")) for group in groups] == [
        (2.0, 1.0, None),
        (0.2, 0.1, None),
        (2.0, 1.0, 0.0),
        (0.2, 0.1, 0.0),
    ]


def test_a_users_norm_may_go_without_decay(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.GroupNorm(1, 3))
    assert names(parameter_groups(model)) == [["0.weight"], ["0.bias"]]
    monkeypatch.setattr(optim, "NO_WD_MODULES", [*optim.NO_WD_MODULES, nn.GroupNorm])
    assert names(parameter_groups(model)) == [["0.weight", "0.bias"]]


@pytest.mark.parametrize(
    ("prefixes", "frozen"),
    [
        ([], set()),
        (["norm", "slow.w"], {"norm.weight", "norm.bias", "slow.weight"}),
        (["all"], {name for name, _ in Model().named_parameters()} - {"matrix_A"}),
        (["matrix"], set()),  # adapters stay trained whatever is frozen
    ],
)
def test_frozen_parameters_are_in_no_group(prefixes: list[str], frozen: set[str]) -> None:
    model = Model()
    freeze(model, prefixes)
    assert {name for name, parameter in model.named_parameters() if not parameter.requires_grad} == frozen
    trained = {name for name, _ in model.named_parameters()} - frozen
    assert {name for group in parameter_groups(model) for name in group["names"]} == trained


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, torch.optim.AdamW),
        ({"type": "adam"}, torch.optim.Adam),
        ({"type": "SGD", "params": {"momentum": 0.9}}, torch.optim.SGD),
        ({"type": "sat.ops.FusedEmaAdam", "params": {"ema_decay": 0.5}}, FusedEmaAdam),
        ({"type": "torch.optim.RAdam"}, torch.optim.RAdam),
    ],
)
def test_optimizers_by_name_and_by_path(config: Mapping[str, Any], expected: type) -> None:
    assert type(build_optimizer(parameter_groups(Model(), 0.5), config)) is expected


def test_the_groups_carry_the_rate_and_the_rest_is_handed_on() -> None:
    params = {"lr": 9.0, "torch_adam": True, "betas": [0.8, 0.9], "weight_decay": 0.3}
    optimizer = build_optimizer(parameter_groups(Model(), 0.5), {"type": "AdamW", "params": params})
    assert [(group["lr"], group["weight_decay"]) for group in optimizer.param_groups] == [
        (0.5, 0.3),
        (0.05, 0.3),
        (0.5, 0.0),
        (0.05, 0.0),
    ]
    assert optimizer.param_groups[0]["betas"] == (0.8, 0.9)


@pytest.mark.parametrize(
    ("optimizer", "message"),
    [
        (
            "{type: AdmW}",
            r"deepspeed.optimizer.type is 'AdmW'; did you mean 'AdamW'\?; give Adam, ",
        ),
        ("{type: sat.ops.FusedEmaAdan}", "module 'sat.ops' has no 'FusedEmaAdan'; did you mean 'FusedEmaAdam'"),
        (
            "{params: {wieght_decay: 1}}",
            r"key deepspeed.optimizer.params.wieght_decay \(.*line 1\); did you mean 'w",
        ),
        (
            "{type: SGD, params: {betas: [1, 2]}}",
            r"params.betas \(.*\)(; did you.*)?; SGD takes params, lr, mo",
        ),
    ],
)
def test_wrong_optimizers_are_named(tmp_path: Path, optimizer: str, message: str) -> None:
    (tmp_path / "a.yaml").write_text(f"deepspeed: {{optimizer: {optimizer}}}")
    with pytest.raises(ConfigError, match=message):
        optimizer_class(load_config([tmp_path / "a.yaml"])["deepspeed"]["optimizer"])


@pytest.mark.parametrize(("stage", "tp_size", "is_refused"), [(1, 1, True), (0, 2, True), (0, 1, False)])
def test_muon_is_given_whole_matrices(stage: int, tp_size: int, is_refused: bool) -> None:
    config = DeepSpeedConfig(1, 1, stage, "fp32", 0.0, {"type": "sat.ops.Muon"}, {})
    refusal = pytest.raises(
        ConfigError, match=r"Muon, which needs each matrix whole, and ZeRO stage . with .* hands it"
    )
    with refusal if is_refused else nullcontext():
        check_optimizer(config, tp_size)
