"""The datasets of a run: from the `data:` section and the paths of the `args:` section to batches."""

import inspect
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch.utils.data import ConcatDataset, Dataset

from sat.cogvideox.presets import TIME_FACTOR
from sat.config import ConfigNode, instantiate_from_config, target_of, warn_once
from sat.data.dataset import SFTDataset
from sat.data.loader import build_loader
from sat.data.manifest import check_source
from sat.data.mixture import MixedOrder, Mixture, Numbers
from sat.data.sampler import GlobalBatchSampler, SampleOrder, ShuffledEpochs
from sat.errors import ConfigError
from sat.training.args import TrainArgs
from sat.training.plan import (
    VALID_SETS,
    RowPlan,
    TokenCount,
    check_rows,
    latent_sizes,
    nodes_of,
    take_plan,
    without_params,
)
from sat.training.preview import params_of

log = logging.getLogger(__name__)


def build_dataset(
    data: ConfigNode,
    paths: Sequence[str] | str | None,
    key: str = "args.train_data",
    weights: Sequence[float] | None = None,
) -> Dataset:
    """The dataset of the `data:` section over all paths, or without a path where its target needs none.

    key: what gives the paths, for messages. weights: how often the clips of each path come, as in SAT.
    """
    if "target" not in data:
        raise ConfigError("the data section has no target; give one, e.g. data_video.SFTDataset")
    paths = [paths] if isinstance(paths, str) else paths
    if weights is not None:
        _check_weights(key, paths, weights)
    if is_mixture(data) and paths is not None:
        sets = "valid_sets" if key == "args.valid_data" else "sets"
        raise ConfigError(
            f"{key} is {paths}, and {data.where('target')} is a mixture, whose folders stand in data.params.{sets}; "
            "leave one out"
        )
    place = inspect.signature(target_of(data)).parameters.get("data_dir")
    given = "data_dir" in (data.get("params") or {})
    if paths is None:
        if place is not None and place.default is place.empty and not given:
            raise ConfigError(
                f"{key} is not set, and {data['target']} reads files; give a list of folders or manifests"
            )
        return instantiate_from_config(data)
    if place is None:
        raise ConfigError(
            f"{key} is {paths}, and {data.where('target')} is {data['target']}, which reads no files; "
            "leave one out, or give the target data_video.SFTDataset"
        )
    parts = [instantiate_from_config(data, data_dir=path) for path in paths]
    if not parts:
        raise ConfigError(f"{key} is an empty list; give folders or manifests")
    if weights is not None:
        return Mixture(dict(zip(paths, parts)), repeats=dict(zip(paths, weights)))
    return parts[0] if len(parts) == 1 else ConcatDataset(parts)


def _check_weights(key: str, paths: Sequence[str] | None, weights: Sequence[float]) -> None:
    name = f"{key}_weights"
    if paths is None or len(paths) != len(weights) or len(set(paths)) < len(paths):
        raise ConfigError(f"{name} is {weights}, and {key} is {paths}; give one weight for each path, each path once")
    if min(weights) < 0 or not sum(weights) > 0:
        raise ConfigError(f"{name} is {weights}; give numbers of 0 or more that do not sum to 0")


def is_mixture(data: ConfigNode) -> bool:
    """Whether a data section describes several sets."""
    return target_of(data) is Mixture


def check_sources(config: ConfigNode, args: TrainArgs) -> None:
    """Raise DataError where there is nothing at a place that our own datasets are to read; no file is opened."""
    for node in nodes_of(config["data"]):
        if target_of(node).__module__ != SFTDataset.__module__:
            continue
        given = (node.get("params") or {}).get("data_dir")
        paths = [args.train_data, args.valid_data] if node is config["data"] else []
        for source in (given, *paths):
            for path in [source] if isinstance(source, str) else source or ():
                check_source(path)


def check_plan(config: ConfigNode, args: TrainArgs, seed: int, global_batch_size: int, micro_batch_size: int) -> None:
    """Raise what would stop the rows of a run that plans them; no clip is opened.

    Where sizes are read from the clips themselves (read_headers), only that a row holds more than a text is looked at.
    """
    section, kind, plan_args = take_plan(without_params(config["data"], [VALID_SETS]))
    if kind is None or plan_args is None:
        return
    check_rows(kind, plan_args, micro_batch_size)
    if not any((node.get("params") or {}).get("read_headers") for node in nodes_of(section)):
        TrainingData(config, args, seed, global_batch_size, micro_batch_size, dp_rank=0, dp_size=1)
    elif (text := TokenCount.of_config(config).text_length) >= plan_args.max_tokens:
        raise ConfigError(
            f"data.params.{kind}.max_tokens is {plan_args.max_tokens:,}, and the text of a clip takes {text:,} tokens; "
            "raise it"
        )


def bad_clips(batch: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(key, reason) of the clips that were drawn for a batch and had to be replaced."""
    return [(key, reason) for key, reason in zip(batch["bad_key"], batch["replaced"]) if reason]


Cached = Callable[[Dataset, Mapping[int, int]], Dataset]
"""A dataset, and latent frames of the clips that a plan cuts -> the same dataset, which reads from caches."""


class TrainingData:
    """The training set and the order in which this rank reads it."""

    def __init__(
        self,
        config: ConfigNode,
        args: TrainArgs,
        seed: int,
        global_batch_size: int,
        micro_batch_size: int,
        dp_rank: int,
        dp_size: int,
    ) -> None:
        section, kind, plan_args = take_plan(without_params(config["data"], [VALID_SETS]))
        self.dataset = build_dataset(section, args.train_data, weights=args.train_data_weights)
        self.num_samples = len(self.dataset)  # type: ignore[arg-type]
        self.args, self.seed = args, seed
        self.global_batch_size, self.micro_batch_size = global_batch_size, micro_batch_size
        self.dp_rank, self.dp_size = dp_rank, dp_size
        if args.epochs is None and args.train_iters is None:
            raise ConfigError("args says neither train_iters nor epochs; give one")
        self.plan: RowPlan | None = None
        self.lengths: Numbers | None = None
        """Tokens of each clip that is drawn, where they are asked for."""
        if kind is not None and plan_args is not None:
            check_rows(kind, plan_args, micro_batch_size)
            width = params_of(config["model"], "network_config")["hidden_size"]
            sizes, count = latent_sizes(self.dataset), TokenCount.of_config(config)
            self.plan = RowPlan(kind, plan_args, sizes, count, width, global_batch_size, self._make_order)
            self.lengths, self.order = self.plan.planner.lengths, self.plan.planner.order
            steps_of_epoch = self.plan.steps_of_epoch() if args.epochs else 0.0
        else:
            if isinstance(self.dataset, Mixture) and self.dataset.weights_by == "tokens":
                self.lengths = TokenCount.of_config(config)(latent_sizes(self.dataset))
            self.order = self._make_order(range(self.num_samples), self.lengths)
            steps_of_epoch = self.order.epoch_size / global_batch_size
        self.total_steps = args.train_iters or math.ceil((args.epochs or 0) * steps_of_epoch)

    def read_through(self, cached: Cached) -> None:
        """From now on, take what caches hold; they are completed first. Every process must call it."""
        self.dataset = cached(self.dataset, {} if self.plan is None else self.plan.limits)

    def _make_order(self, kept: Numbers, lengths: Numbers | None) -> SampleOrder:
        """Which of the clips that are kept each sample of the run reads."""
        if isinstance(self.dataset, Mixture):
            return self.dataset.order(self.seed, kept, lengths)
        return ShuffledEpochs(len(kept), self.seed)

    @property
    def set_names(self) -> list[str]:
        """The sets of a mixture."""
        return self.dataset.names if isinstance(self.dataset, Mixture) else []

    def batches(self, start_step: int) -> Iterator[Mapping[str, Any]]:
        """Micro batches of this rank from the step after `start_step` to the last."""
        return self._read(start_step, self.total_steps, self.args.num_workers)

    def step(self, number: int) -> Iterator[Mapping[str, Any]]:
        """Micro batches of this rank in one step (1 up), read by this process."""
        return self._read(number - 1, number, num_workers=0)

    def _read(self, start_step: int, end_step: int, num_workers: int) -> Iterator[Mapping[str, Any]]:
        if self.plan is not None:
            order = self.plan.order(self.dp_rank, self.dp_size, self.micro_batch_size, start_step, end_step)
            lengths, packed = self.plan.lengths_by_index, self.plan.packed
            return iter(build_loader(self.dataset, order, num_workers, packed, lengths))  # type: ignore[arg-type]
        sampler = GlobalBatchSampler(
            self.order,
            global_batch_size=self.global_batch_size,
            micro_batch_size=self.micro_batch_size,
            dp_rank=self.dp_rank,
            dp_size=self.dp_size,
            start_step=start_step,
            end_step=end_step,
        )
        return iter(build_loader(self.dataset, sampler, num_workers))

    def padding(self, batch: Mapping[str, Any]) -> float:
        """Number of samples of a batch that padding would make up: the padded share of each, summed."""
        kind = next((kind for kind in ("pixels", "moments") if kind in batch), None)
        if self.plan is not None or kind is None or "num_frames" not in batch:
            return 0.0
        count = batch[kind].shape[1]
        whole = count if kind == "pixels" else TIME_FACTOR * (count - 1) + 1
        return sum(1.0 - float(real) / whole for real in batch["num_frames"])

    def padding_share(self, of_clips: float, tokens: float) -> float:
        """Share of a step that carries nothing: padded frames of its clips, or what its rows have room for."""
        return of_clips if self.plan is None else 1.0 - tokens / (self.global_batch_size * self.plan.args.max_tokens)

    def summary(self) -> list[str]:
        """Lines on the data for the start of the log."""
        if self.plan is None:
            epochs = self.total_steps * self.global_batch_size / self.order.epoch_size
            lines = [f"{self.num_samples:,} samples, {self.total_steps:,} steps = {epochs:.2f} epochs"]
        else:
            lines = [self.plan.summary()]
        if isinstance(self.order, MixedOrder) and isinstance(self.dataset, Mixture):
            lines += self.dataset.summary(self.order, self.lengths)
        parts = self.dataset.datasets if isinstance(self.dataset, ConcatDataset) else [self.dataset]
        for part in parts:
            index = getattr(part, "index", None)  # a dataset of clips has one
            if index is not None:
                lines.extend(index.summary().splitlines())
        return lines


class _InOrder:
    """The samples of given numbers, counted 0 up; this rank's are every dp_size-th from dp_rank on.

    All ranks get the same number of batches, because a forward pass may need them all (ZeRO 3): one that has no samples
    left gets sample 0 again, to be left out of the sum.
    """

    def __init__(self, indices: Sequence[int], batch_size: int, seed: int, dp_rank: int, dp_size: int) -> None:
        self.indices = indices
        self.own = range(dp_rank, len(indices), dp_size)
        self.num_batches = -(-len(indices) // (batch_size * dp_size))
        self.batch_size = batch_size
        self.seed = seed

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for number in range(self.num_batches):
            own = self.own_of(number) or range(1)
            yield [(counter, self.indices[counter]) for counter in own]

    def own_of(self, number: int) -> range:
        """The samples of a batch that are this rank's."""
        return self.own[number * self.batch_size : (number + 1) * self.batch_size]


def _first_clips(dataset: Dataset, count: int) -> Sequence[int]:
    """Numbers of so many clips, or of as many as there are; of a mixture those of each set in turn."""
    count = min(count, len(dataset))  # type: ignore[arg-type]
    return dataset.in_turn(count) if isinstance(dataset, Mixture) else range(count)


class ValidationData:
    """A fixed selection of the validation set; every rank measures its share."""

    def __init__(self, dataset: Dataset, sampler: _InOrder, num_workers: int, packed: bool = False) -> None:
        self.dataset = dataset
        self.sampler = sampler
        self.num_workers = num_workers
        self.packed = packed
        self.reported: set[str] = set()

    @classmethod
    def build(
        cls,
        config: ConfigNode,
        args: TrainArgs,
        seed: int,
        global_batch_size: int,
        micro_batch_size: int,
        dp_rank: int,
        dp_size: int,
    ) -> "ValidationData | None":
        """The validation set of a run that looks at one. How many samples it has is the same at any layout."""
        if args.eval_interval is None:
            return None
        section, kind, _ = take_plan(config["data"])
        sets = (section.get("params") or {}).get(VALID_SETS) if is_mixture(section) else None
        lacking = f"data.params.{VALID_SETS}" if is_mixture(section) else "args.valid_data"
        if args.valid_data is None and sets is None and (is_mixture(section) or args.train_data is not None):
            warn_once(f"args.eval_interval is {args.eval_interval} without effect: {lacking} is not set")
            return None
        dataset = Mixture(sets) if sets is not None else build_dataset(section, args.valid_data, "args.valid_data")
        indices = _first_clips(dataset, args.eval_iters * (args.eval_batch_size or global_batch_size))
        order = _InOrder(indices, args.eval_batch_size or micro_batch_size, seed, dp_rank, dp_size)
        return cls(dataset, order, args.num_workers, packed=kind is not None)

    def read_through(self, cached: Cached) -> None:
        """From now on, take what caches hold; they are completed first. Every process must call it."""
        self.dataset = cached(self.dataset, {})

    def first(self, count: int) -> Iterator[tuple[int, Mapping[str, Any], bool]]:
        """This rank's share of the first samples, each (number, batch of it alone, whether it counts).

        All ranks get equally many; one that has none left gets the first again.
        """
        own = self.sampler.own
        order = _InOrder(_first_clips(self.dataset, count), 1, self.sampler.seed, own.start, own.step)
        for number, batch in enumerate(build_loader(self.dataset, order, 0, self.packed)):
            counted = order.own_of(number)
            yield (counted[0] if counted else 0), batch, bool(counted)

    def batches(self) -> Iterator[tuple[Mapping[str, Any], int]]:
        """This rank's batches and how many samples of each count, the same at every call."""
        for number, batch in enumerate(build_loader(self.dataset, self.sampler, self.num_workers, self.packed)):
            for key, reason in bad_clips(batch):
                if key not in self.reported:
                    self.reported.add(key)
                    log.warning("bad validation clip %s replaced: %s", key, reason)
            yield batch, len(self.sampler.own_of(number))
