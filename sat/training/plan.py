"""Rows of clips for a training run: what `data.params.pack` and `data.params.bucket` ask for."""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from torch.utils.data import ConcatDataset

from sat.config import ConfigNode, build_dataclass, target_of
from sat.data.dataset import SFTDataset
from sat.data.loader import PlannedPlace
from sat.data.mixture import Numbers
from sat.data.packing import BucketPlanner, CostModel, PackingPlanner, PlannedStep, Planner, Row
from sat.data.sampler import SampleOrder
from sat.errors import ConfigError, DataError
from sat.training.preview import PLANS, params_of, text_length

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class PlanArgs:
    """How clips are put into rows."""

    max_tokens: int
    """Most tokens of a row, text counted."""
    too_long: Literal["cut", "drop"] = "cut"
    """A clip longer than a row loses frames at its end, or is left out, as one whose first frame does not fit is."""
    loss: Literal["sample", "token"] = "sample"
    """Average the loss over samples, or over tokens."""

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise ConfigError(f"data.params: max_tokens is {self.max_tokens}; give 1 or more")


VALID_SETS = "valid_sets"
"""The parameter of a mixture that names the sets of validation."""


def take_plan(data: ConfigNode) -> tuple[ConfigNode, str | None, PlanArgs | None]:
    """The data section without `pack` and `bucket`, which of the two was there, and what it says.

    With either, a dataset of ours keeps short clips as they are, images as one frame, unless the section says what
    becomes of them: rows have room for any length.
    """
    params = data.get("params") or {}
    wanted = [name for name in PLANS if params.get(name) is not None]
    if len(wanted) > 1:
        raise ConfigError("data.params has both pack and bucket; choose one")
    if not wanted:
        return without_params(data, PLANS), None, None
    section = without_params(data, PLANS)
    return _with_short_clips_kept(section), wanted[0], build_dataclass(PlanArgs, params[wanted[0]])


def nodes_of(data: ConfigNode) -> list[ConfigNode]:
    """The data section and, of a mixture, the sections of its sets: those that name a target."""
    params = data.get("params") or {}
    groups = [group for name in ("sets", VALID_SETS) if isinstance(group := params.get(name), Mapping)]
    found = [data, *(node for group in groups for node in group.values())]
    return [node for node in found if isinstance(node, ConfigNode) and "target" in node]


def _with_short_clips_kept(data: ConfigNode) -> ConfigNode:
    """The section with `short_clips: keep` for each SFTDataset in it that says nothing of them."""
    params = data.get("params")
    if not isinstance(params, ConfigNode) or "target" not in data:
        return data
    own: dict[str, Any] = {}
    if target_of(data) is SFTDataset and "short_clips" not in params:
        own["short_clips"] = "keep"
    for name in ("sets", VALID_SETS):
        if isinstance(sets := params.get(name), ConfigNode):
            nodes = {key: node for key, node in sets.items() if isinstance(node, ConfigNode)}
            own[name] = _with(sets, {key: _with_short_clips_kept(node) for key, node in nodes.items()})
    return _with(data, {"params": _with(params, own)})


def _with(node: ConfigNode, values: Mapping[str, Any]) -> ConfigNode:
    """A copy with other values."""
    result = ConfigNode(node.path)
    result.update({**node, **values})
    result.origins.update(node.origins)
    return result


def without_params(data: ConfigNode, names: Sequence[str]) -> ConfigNode:
    """The data section, some of its params left out."""
    params = data.get("params") or {}
    if not set(names) & set(params):
        return data
    rest = ConfigNode(f"{data.path}.params")
    rest.update({key: value for key, value in params.items() if key not in names})
    rest.origins.update(getattr(params, "origins", {}))
    return _with(data, {"params": rest})


def latent_sizes(dataset: Any) -> np.ndarray:
    """Latent frames, rows and columns of every clip, int64 (clips, 3), without reading any."""
    if isinstance(dataset, ConcatDataset):
        return np.concatenate([latent_sizes(part) for part in dataset.datasets])
    sizes = getattr(dataset, "latent_sizes", None)
    if sizes is None:
        raise ConfigError(
            f"{type(dataset).__name__} does not say how large its clips are, so rows cannot be planned: it needs a "
            "method latent_sizes() -> [(frames, rows, columns)], or leave data.params.pack out"
        )
    return np.asarray(sizes(), dtype=np.int64).reshape(-1, 3)


@dataclass(frozen=True)
class TokenCount:
    """Tokens of a clip, from its size in latents."""

    patch_size: tuple[int, int, int]
    text_length: int

    @classmethod
    def of_config(cls, config: Mapping[str, Any]) -> "TokenCount":
        """As the network of a configuration counts them."""
        patch = params_of(config["model"], "network_config").get("patch_size", [1, 2, 2])
        return cls((1, patch, patch) if isinstance(patch, int) else tuple(patch), text_length(config["model"]))

    def __call__(self, sizes: np.ndarray) -> np.ndarray:
        """Of each clip; sizes: (..., 3) latent frames, rows and columns."""
        return self.text_length + -(-sizes[..., 0] // self.patch_size[0]) * self._of_frame(sizes)

    def longest(self, sizes: np.ndarray, max_tokens: int) -> np.ndarray:
        """Most latent frames of clips of these heights and widths that a row holds, at most their own."""
        per_frame = self._of_frame(sizes)
        room = (max_tokens - self.text_length) // np.maximum(per_frame, 1) * self.patch_size[0]
        return np.where(per_frame > 0, np.minimum(sizes[..., 0], room), sizes[..., 0])

    def _of_frame(self, sizes: np.ndarray) -> np.ndarray:
        return (sizes[..., 1] // self.patch_size[1]) * (sizes[..., 2] // self.patch_size[2])


WHOLE = -1
"""Of a clip that is not cut."""
OrderMaker = Callable[[Numbers, Numbers | None], SampleOrder]
"""The clips that are kept (numbers, rising) and the tokens of each -> the order in which a run reads them."""


class RowPlan:
    """The rows of a run: which clips share one, on which rank, in which step."""

    def __init__(
        self,
        kind: str,
        args: PlanArgs,
        sizes: np.ndarray,
        count: TokenCount,
        hidden_size: int,
        rows_per_step: int,
        make_order: OrderMaker,
    ) -> None:
        self.packed, self.args, self.count = kind == "pack", args, count
        frames = count.longest(sizes, args.max_tokens)
        is_cut = frames < sizes[:, 0]
        is_kept = (frames >= 1) & ~is_cut if args.too_long == "drop" else frames >= 1
        self.num_cut, self.num_dropped = int((is_kept & is_cut).sum()), int((~is_kept).sum())
        if not is_kept.any():
            smallest = int((count(sizes * [0, 1, 1] + [1, 0, 0])).min())
            raise DataError(
                f"max_tokens {args.max_tokens:,} holds no clip: the smallest has {smallest:,} tokens in its first "
                f"frame; raise data.params.{kind}.max_tokens"
            )
        self.indices = np.flatnonzero(is_kept)
        self.sizes = np.column_stack([frames, sizes[:, 1:]])[is_kept]
        self._limits = np.where(is_kept, np.where(is_cut, frames, WHOLE), 0)
        lengths = count(self.sizes)
        order = make_order(self.indices, lengths)
        options = (args.max_tokens, rows_per_step, order, CostModel(hidden_size))
        self.planner: Planner
        if self.packed:
            self.planner = PackingPlanner(lengths, *options)
        else:
            self.planner = BucketPlanner(lengths, self.sizes, *options)
        self.lengths_by_index = np.full(len(sizes), np.iinfo(np.int64).max)
        self.lengths_by_index[self.indices] = lengths

    @property
    def limits(self) -> dict[int, int]:
        """Latent frames of each clip that is cut, 0 of those that are left out."""
        changed = np.flatnonzero(self._limits != WHOLE)
        return dict(zip(changed.tolist(), self._limits[changed].tolist()))

    def summary(self) -> str:
        """One line for the log."""
        lengths = self.planner.lengths
        what = "packed into rows" if self.packed else "put into rows of one size"
        changes = [f"{self.num_cut:,} cut to fit", f"{self.num_dropped:,} too long and left out"]
        return (
            f"{len(lengths):,} clips of {lengths.min():,} to {lengths.max():,} tokens {what} of at most "
            f"{self.args.max_tokens:,}; {', '.join(changes)}"
        )

    def steps_of_epoch(self) -> float:
        """Optimizer steps in which about every clip comes once."""
        return sum(1 for _ in self.planner.epoch_rows(0)) / self.planner.rows_per_step

    def order(self, dp_rank: int, dp_size: int, rows_per_pass: int, start_step: int, end_step: int) -> "PlannedOrder":
        """What a rank reads of the steps start_step .. end_step - 1."""
        return PlannedOrder(self, dp_rank, dp_size, rows_per_pass, start_step, end_step)


class PlannedOrder:
    """The passes of one data-parallel rank: lists of PlannedPlace."""

    def __init__(
        self, plan: RowPlan, dp_rank: int, dp_size: int, rows_per_pass: int, start_step: int, end_step: int
    ) -> None:
        self.plan, self.seed = plan, plan.planner.order.seed
        self.dp_rank, self.dp_size, self.rows_per_pass = dp_rank, dp_size, rows_per_pass
        self.start_step, self.end_step = start_step, end_step

    def __iter__(self) -> Iterator[list[PlannedPlace]]:
        steps = self.plan.planner.steps(self.start_step)
        for number, step in zip(range(self.start_step, self.end_step), steps):
            rows = step.shares(self.dp_size)[self.dp_rank]
            for first in range(0, len(rows), self.rows_per_pass):
                yield self._places(number, step, rows[first : first + self.rows_per_pass])

    def _places(self, number: int, step: PlannedStep, rows: Sequence[Row]) -> list[PlannedPlace]:
        """The clips of a pass. Weights are such that the mean over passes and ranks is the mean over the step."""
        places = step.places()
        by_token = self.plan.args.loss == "token"
        lengths = self.plan.planner.lengths
        whole = sum(row.tokens for row in step.rows) if by_token else step.num_samples
        num_passes = len(step.rows) / self.rows_per_pass
        return [
            PlannedPlace(
                counter=counter,
                clip=int(self.plan.indices[index]),
                step=number,
                place=places[counter],
                num_samples=step.num_samples,
                latent_frames=int(self.plan.sizes[index][0]),
                weight=float(num_passes * (lengths[index] if by_token else 1) / whole),
            )
            for row in rows
            for counter, index in zip(row.counters, row.indices)
        ]


def check_rows(kind: str, args: PlanArgs, rows_per_pass: int) -> None:
    """Rows of one size go through the network one at a time; packed rows may share a pass."""
    if kind == "bucket" and rows_per_pass > 1:
        raise ConfigError(
            f"deepspeed.train_micro_batch_size_per_gpu is {rows_per_pass}; with data.params.bucket a row is a batch of "
            f"its own: set it to 1, and max_tokens to {rows_per_pass * args.max_tokens}"
        )
