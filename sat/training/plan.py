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


LatentSize = tuple[int, int, int]
"""Latent frames, rows and columns of a clip."""


def latent_sizes(dataset: Any) -> list[LatentSize]:
    """The size of every clip, without reading any."""
    if isinstance(dataset, ConcatDataset):
        return [size for part in dataset.datasets for size in latent_sizes(part)]
    sizes = getattr(dataset, "latent_sizes", None)
    if sizes is None:
        raise ConfigError(
            f"{type(dataset).__name__} does not say how large its clips are, so rows cannot be planned: it needs a "
            "method latent_sizes() -> [(frames, rows, columns)], or leave data.params.pack out"
        )
    return sizes()


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

    def __call__(self, size: LatentSize) -> int:
        (t, h, w), (o, p, q) = size, self.patch_size
        return self.text_length + -(-t // o) * (h // p) * (w // q)

    def longest(self, size: LatentSize, max_tokens: int) -> int:
        """Most latent frames of a clip of that height and width that a row holds, at most its own."""
        o, p, q = self.patch_size
        per_frame = (size[1] // p) * (size[2] // q)
        return min(size[0], (max_tokens - self.text_length) // per_frame * o) if per_frame else size[0]


OrderMaker = Callable[[Numbers, Numbers | None], SampleOrder]
"""The clips that are kept (numbers, rising) and the tokens of each -> the order in which a run reads them."""


class RowPlan:
    """The rows of a run: which clips share one, on which rank, in which step."""

    def __init__(
        self,
        kind: str,
        args: PlanArgs,
        sizes: Sequence[LatentSize],
        count: TokenCount,
        hidden_size: int,
        rows_per_step: int,
        make_order: OrderMaker,
    ) -> None:
        self.packed, self.args, self.count = kind == "pack", args, count
        kept, cut = _fit(sizes, args, count)
        self.num_cut, self.num_dropped = sum(cut), len(sizes) - len(kept)
        if not kept:
            smallest = min(count((1, h, w)) for _, h, w in sizes)
            raise DataError(
                f"max_tokens {args.max_tokens:,} holds no clip: the smallest has {smallest:,} tokens in its first "
                f"frame; raise data.params.{kind}.max_tokens"
            )
        self.indices = np.array([index for index, _ in kept], dtype=np.int64)
        self.sizes = [size for _, size in kept]
        self.limits = dict.fromkeys({*range(len(sizes))}.difference(self.indices.tolist()), 0)
        """Latent frames of each clip that is cut, 0 of those that are left out."""
        self.limits.update({index: size[0] for (index, size), is_cut in zip(kept, cut) if is_cut})
        lengths = [count(size) for size in self.sizes]
        order = make_order(self.indices, lengths)
        options = (args.max_tokens, rows_per_step, order, CostModel(hidden_size))
        self.planner: Planner
        if self.packed:
            self.planner = PackingPlanner(lengths, *options)
        else:
            self.planner = BucketPlanner(lengths, self.sizes, *options)
        self.lengths_by_index = np.full(len(sizes), np.iinfo(np.int64).max)
        self.lengths_by_index[self.indices] = lengths

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


def _fit(
    sizes: Sequence[LatentSize], args: PlanArgs, count: TokenCount
) -> tuple[list[tuple[int, LatentSize]], list[bool]]:
    """(number, size as planned) of the clips that fit a row, and whether each of them was cut."""
    kept, cut = [], []
    for index, size in enumerate(sizes):
        frames = count.longest(size, args.max_tokens)
        is_cut = frames < size[0]
        if frames < 1 or (is_cut and args.too_long == "drop"):
            continue
        kept.append((index, (frames, *size[1:])))
        cut.append(is_cut)
    return kept, cut


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
                latent_frames=self.plan.sizes[index][0],
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
