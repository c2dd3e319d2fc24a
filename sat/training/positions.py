"""Position tables of weights that were trained at another grid or number of text tokens, brought to a network's own."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from sat.cogvideox.context import Grid
from sat.cogvideox.mixins import PositionTable
from sat.config import ConfigNode, load_config
from sat.errors import CheckpointError, ConfigError
from sat.training.preset import model_file
from sat.training.run_dir import STAGES_CONFIG
from sat.training.stages import plan_stages
from sat.weights.finding import CheckpointPath
from sat.weights.whole import AVERAGES, TRAINING_STATE


@dataclass(frozen=True)
class TableChange:
    """Makes a network's table of one that was stored for another grid."""

    own: PositionTable
    grid: Grid
    """The stored one."""
    text_length: int
    """The stored one."""

    @property
    def stored_rows(self) -> int:
        """Of the stored table: text, then video."""
        t, h, w = self.grid
        return self.text_length + t * h * w

    def __call__(self, table: Tensor) -> Tensor:
        """(1 m d) -> (1 s d), of the table or of what an optimizer keeps for each of its numbers."""
        if table.is_meta:
            return table.new_empty(self.own.pos_embedding.shape)
        return self.own.adapt(table, self.grid, self.text_length)


def table_changes(network: Any, former: Any) -> dict[str, TableChange]:
    """What changes between two networks that store positions: name in the state dict -> how.

    former: the network that the weights are of; it may be without memory.
    """
    changes = {}
    before = dict(getattr(former, "mixins", {}).items())
    for name, own in getattr(network, "mixins", {}).items():
        old: Any = before.get(name)
        if not all(isinstance(one, PositionTable) and hasattr(one, "pos_embedding") for one in (own, old)):
            continue
        if (own.grid, own.text_length) != (old.grid, old.text_length):
            changes[f"mixins.{name}.pos_embedding"] = TableChange(own, old.grid, old.text_length)
    return changes


def changed(state: Mapping[str, Tensor], changes: Mapping[str, TableChange], source: str) -> dict[str, Tensor]:
    """A state dict with its position tables brought to the network's grid; all others are the same tensors.

    Raises CheckpointError where a table has not the rows of the grid that it was trained at.
    """
    result = dict(state)
    for name, table in state.items():
        change = next((change for end, change in changes.items() if name.endswith(end)), None)
        if change is None:
            continue
        if table.shape[1] != change.stored_rows:
            raise CheckpointError(
                f"{source}: {name} has {table.shape[1]} rows, and the configuration that it was trained with says "
                f"{change.stored_rows} ({change.text_length} text tokens and a grid of {change.grid}); give them "
                "beside the training_config.yaml of their own run"
            )
        result[name] = change(table)
    return result


def trained_network(checkpoint: CheckpointPath) -> ConfigNode | None:
    """The network_config with which weights were trained: their run's, or the released one that their shapes fit.

    None where neither is there.
    """
    try:
        file = model_file(checkpoint.weights())
    except ConfigError:
        return None
    folder = checkpoint.path.parent if checkpoint.is_file else checkpoint.path
    state = folder.with_name(folder.name.removesuffix(AVERAGES)) / TRAINING_STATE
    job = file.with_name(STAGES_CONFIG)
    if job.is_file() and state.is_file():  # the run's file is that of its last stage
        name = json.loads(state.read_text(encoding="utf-8"))["stage"]
        for stage in plan_stages(load_config([job]), seed=0):
            if stage.name == name:
                return stage.config["model"].get("network_config")
    return load_config([file])["model"].get("network_config")
