"""Computing what a cache lacks: the processes of a job share the clips, and each writes shards of its own."""

import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence, Sized
from contextlib import suppress
from dataclasses import dataclass, field
from functools import reduce
from json import dumps
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from sat.data.cache import BAD, ENTRIES, Entries, checksum, latents_key, text_key
from sat.data.content import FILES, KEY_TYPE, KnownFiles, as_lines
from sat.data.loader import cut_to, read_in_workers
from sat.data.quarantine import BadClip
from sat.errors import DataError
from sat.mpu.launch import Launch
from sat.training.files import LazyTensor, sync_folder, write_safetensors, write_text

SHARD_BYTES = 1 << 28
SHARD_SECONDS = 300.0
"""A shard is published when it holds so many bytes or so long after the one before: a kill loses no more."""
UNFINISHED = ".unfinished"
ABANDONED_SECONDS = 86400.0
ROWS = 1000
"""Hashes in a file."""
CHUNK = 4
"""Clips that a process takes at a time."""

Computed = tuple[Mapping[str, Tensor], Mapping[str, Any]]
"""Tensors of an entry, and what else is known of it."""


@dataclass
class Work:
    """A number of a dataset, looked at."""

    number: int
    name: str
    """Of the clip, for messages."""
    key: str = ""
    """Empty where the file cannot be read."""
    item: Any = None
    """What the encoder is given, where the cache lacks the entry."""
    problem: list[str] | None = None
    """Or message and reason of what is wrong with the bytes of the file: kept, so that it is not tried again."""
    file_row: dict[str, Any] | None = None
    """A hash to keep."""
    unusable: str = ""
    """What is wrong that may be mended before the next start."""

    @property
    def is_missing(self) -> bool:
        """Whether the cache lacks its entry."""
        return self.item is not None or self.problem is not None


class ClipWork(Dataset):
    """The clips of a dataset, to be encoded by the VAE. limits: latent frames of those that a plan cuts, 0
    of those that it leaves out."""

    def __init__(self, dataset: Any, entries: Entries, known: KnownFiles, limits: Mapping[int, int]) -> None:
        self.dataset, self.entries, self.known, self.limits = dataset, entries, known, limits

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, number: int) -> Work:
        source, work = self.dataset.source(number), Work(number, self.dataset.name(number))
        limit = self.limits.get(number)
        if limit == 0:
            return work
        try:
            digest, work.file_row = self.known.look_up(source)
        except BadClip as bad:
            work.unusable = str(bad)
            return work
        work.key = latents_key(source, digest, limit)
        if work.key not in self.entries:
            self._read(work, limit)
        return work

    def _read(self, work: Work, limit: int | None) -> None:
        try:
            self.dataset.caption(work.number)
        except BadClip as bad:
            work.unusable = str(bad)
            return
        try:
            item = self.dataset[work.number]
        except BadClip as bad:
            work.problem = [str(bad), bad.reason]
            return
        work.item = item if limit is None else cut_to(item, limit)


class TextWork(Dataset):
    """The captions of a dataset, to be encoded."""

    def __init__(self, dataset: Any, entries: Entries) -> None:
        self.dataset, self.entries = dataset, entries

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, number: int) -> Work:
        try:
            caption = self._caption(number)
        except DataError as error:
            return Work(number, str(number), unusable=str(error))
        key = text_key(caption)
        return Work(number, f"'{caption[:60]}'", key, item=None if key in self.entries else caption)

    def _caption(self, number: int) -> str:
        if hasattr(self.dataset, "caption"):
            return self.dataset.caption(number)
        return self.dataset[number]["caption"]  # a dataset that has no shorter way to it


class SharedNumbers:
    """The numbers 0 .. count - 1, each given to one process of the job: who is done sooner takes more.

    team: the processes that are given the same, by rank, those that share the work on a clip. The first of them leads.
    """

    def __init__(self, count: int, name: str, team: Sequence[int]) -> None:
        self.count, self.name, self.team = count, name, team
        self.store = dist.distributed_c10d._get_default_store()
        self.leads = dist.get_rank() == team[0]
        self._num_asked = 0

    def __iter__(self) -> Iterator[int]:
        chunk = 0
        while (start := self._agree(f"chunk {chunk}", self._take_chunk)) < self.count:
            yield from range(start, min(start + CHUNK, self.count))
            chunk += 1

    def _take_chunk(self) -> int:
        return self.store.add(self.name, CHUNK) - CHUNK

    def _agree(self, question: str, decide: Callable[[], int]) -> int:
        """What the leader of the team decides."""
        if len(self.team) == 1:
            return decide()
        key = f"{self.name}/team {self.team[0]}/{question}"
        if self.leads:
            self.store.set(key, str(decide()))
        return int(self.store.get(key))

    @property
    def num_taken(self) -> int:
        """Of all processes."""
        return min(self.store.add(self.name, 0), self.count)

    def claims(self, key: str) -> bool:
        """Whether this team is the first to ask for an entry: two clips may have the same."""
        self._num_asked += 1
        return self._agree(f"claim {self._num_asked}", lambda: self.store.add(f"{self.name}/{key}", 1)) == 1


class ShardWriter:
    """Entries of one process, published as shards that nobody else writes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.names: list[str] = []
        self._start_shard()

    def _start_shard(self) -> None:
        self._tensors: dict[str, LazyTensor] = {}
        self._entries: dict[str, dict[str, Any]] = {}
        self._bytes, self._started = 0, time.monotonic()

    def add(self, key: str, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        """Take in an entry."""
        own = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        self._tensors.update({f"{key}/{name}": LazyTensor.of(tensor) for name, tensor in own.items()})
        self._entries[key] = {**facts, "crc32": {name: checksum(tensor) for name, tensor in own.items()}}
        self._bytes += sum(tensor.nbytes for tensor in own.values())
        if self._bytes >= SHARD_BYTES or time.monotonic() - self._started >= SHARD_SECONDS:
            self.publish()

    def publish(self) -> None:
        """Put what there is on disk, whole, and then under its name."""
        if self._entries:
            name = f"{uuid.uuid4().hex}.safetensors"
            unfinished = self.folder / f".{name}{UNFINISHED}"
            write_safetensors(unfinished, self._tensors, {ENTRIES: dumps(self._entries)})
            unfinished.rename(self.folder / name)
            sync_folder(self.folder)
            self.names.append(name)
        self._start_shard()


class FileRows:
    """Hashes that this process has computed, published now and then."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.rows: list[Mapping[str, Any]] = []

    def add(self, row: Mapping[str, Any]) -> None:
        """Take in a row of KnownFiles."""
        self.rows.append(row)
        if len(self.rows) == ROWS:
            self.publish()

    def publish(self) -> None:
        """Put what there is on disk."""
        if self.rows:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_text(self.folder / f"{uuid.uuid4().hex}.jsonl", as_lines(self.rows))
            self.rows = []


@dataclass
class Outcome:
    """What came of looking through a dataset: of one process, or of all."""

    keys: np.ndarray
    """KEY of each number, empty where it has none."""
    found: int = 0
    computed: int = 0
    unusable: int = 0
    missing: int = 0
    """Not computed, for the cache is only read."""
    examples: list[str] = field(default_factory=list)
    """What is missing or unusable, the first of each process."""
    names: list[str] = field(default_factory=list)
    """New shards."""

    @classmethod
    def of_all(cls, own: "Outcome") -> "Outcome":
        """The sum over all processes; every one must call it."""
        gathered: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(gathered, own)
        return cls(
            keys=reduce(lambda keys, others: np.where(keys == b"", others, keys), (one.keys for one in gathered)),
            found=sum(one.found for one in gathered),
            computed=sum(one.computed for one in gathered),
            unusable=sum(one.unusable for one in gathered),
            missing=sum(one.missing for one in gathered),
            examples=[example for one in gathered for example in one.examples],
            names=[name for one in gathered for name in one.names],
        )


class Fill:
    """Looks through a dataset and computes what its cache lacks, together with the other processes of the job.

    encode: makes an entry; None where the cache is only read. team: the processes that make an entry together, by rank.
    """

    def __init__(
        self,
        work: Sized,
        entries: Entries,
        encode: Callable[[Any], Computed] | None,
        cache_dir: Path,
        team: Sequence[int],
    ) -> None:
        job = [uuid.uuid4().hex]
        dist.broadcast_object_list(job)
        self.work, self.encode = work, encode
        self.order = SharedNumbers(len(work), f"cache {job[0]}", team)
        self.writer, self.files = ShardWriter(entries.folder), FileRows(cache_dir / FILES)
        self.outcome = Outcome(np.zeros(len(work), KEY_TYPE))

    def run(self, launch: Launch, num_workers: int, what: str) -> Outcome:
        """Every process must call it. what: a word for the progress bar."""
        hidden = not (launch.is_main and sys.stderr.isatty())
        with tqdm(total=self.order.count, desc=what, unit="clip", disable=hidden) as bar:
            for done in read_in_workers(self.work, self.order, num_workers):  # type: ignore[arg-type]
                is_own = done.is_missing and self.order.claims(done.key)
                entry = self._entry(done) if is_own else None
                if self.order.leads:
                    self._take(done, is_own, entry)
                bar.update(self.order.num_taken - bar.n)
        if self.encode is not None:
            self.writer.publish()
            self.files.publish()
        self.outcome.names = self.writer.names
        return Outcome.of_all(self.outcome)

    def _entry(self, done: Work) -> Computed | None:
        """What the cache lacks, made; None where it is only read."""
        if self.encode is None:
            return None
        return ({}, {BAD: done.problem}) if done.problem else self.encode(done.item)

    def _take(self, done: Work, is_own: bool, entry: Computed | None) -> None:
        """Count a number and keep its entry: the leader of a team does."""
        self.outcome.keys[done.number] = done.key
        if done.file_row is not None and self.encode is not None:
            self.files.add(done.file_row)
        if done.unusable:
            self.outcome.unusable += 1
            self._note(done.unusable)
        elif entry is not None:
            self.outcome.computed += 1
            self.writer.add(done.key, *entry)
        elif is_own:
            self.outcome.missing += 1
            self._note(done.name)
        elif done.key:
            self.outcome.found += 1

    def _note(self, example: str) -> None:
        if not self.outcome.examples:
            self.outcome.examples.append(example)


def remove_abandoned(folder: Path) -> None:
    """Delete what writers that were killed have left, once it is sure that none of them is at work."""
    for path in folder.glob(f".*{UNFINISHED}"):
        with suppress(OSError):  # another job may do the same
            if time.time() - path.stat().st_mtime > ABANDONED_SECONDS:
                path.unlink()
