"""Clips that cannot be used: how they are named, replaced, counted and reported."""

import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset

from sat.data.sampler import Permutation
from sat.errors import DataError
from sat.mpu.random import stream_seed

log = logging.getLogger(__name__)

MAX_ATTEMPTS = 100
"""Replacements tried for one bad clip. With half of all clips bad, this many in a row fail once in 10^30 times."""

FEW_BAD_CLIPS = 3
"""So many bad clips never stop a run: in a small set one broken file would else be past any share."""


class BadClip(DataError):
    """One clip cannot be used. `reason` is the short word for tables, `key` the clip's name once it is known."""

    def __init__(self, message: str, reason: str = "unreadable", key: str = "") -> None:
        super().__init__(message)
        self.reason = reason
        self.key = key


@contextmanager
def named(key: str) -> Iterator[None]:
    """A BadClip that comes out of the `with` block is of the clip of this name."""
    try:
        yield
    except BadClip as bad:
        bad.key = key
        raise


class ReplacingDataset(Dataset):
    """A map-style dataset whose bad clips give way to others.

    An item is the inner dataset's mapping and two more keys: `replaced`, the reason why the clip of this index could
    not be used ("" where it could), and `bad_key`, that clip's name. What replaces a clip is a function of (seed,
    index, attempt), so it is the same on every rank, in every worker and after a resume. With `lengths` it is no longer
    than what it replaces; a dataset with a method `peers(index)` says which clips it may be among, as a mixture does.
    Raises DataError when nothing can replace it.
    """

    def __init__(self, dataset: Any, seed: int = 0, lengths: Sequence[int] | None = None) -> None:
        self.dataset = dataset
        self.seed = seed
        self.lengths = lengths

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        failures: list[DataError] = []
        for candidate in self.candidates(index):
            try:
                item = self.dataset[candidate]
            except DataError as error:
                failures.append(error)
                continue
            first = failures[0] if failures else None
            bad_key = (getattr(first, "key", "") or str(index)) if first else ""
            return {**item, "replaced": str(first) if first else "", "bad_key": bad_key}
        reasons = "\n  ".join(map(str, failures[:5]))
        raise DataError(
            f"clip {index} cannot be read, nor any of the {len(failures) - 1} tried in its place "
            f"({len(self)} clips in all); mend the files or leave them out. The first reasons:\n  {reasons}"
        )

    def candidates(self, index: int) -> Iterator[int]:
        """The index itself, then what may stand in for it: distinct indices, at most MAX_ATTEMPTS of them."""
        yield index
        peers = self.dataset.peers(index) if hasattr(self.dataset, "peers") else range(len(self))
        order = Permutation(len(peers), stream_seed(self.seed, "replacement", index))
        fitting = (peers[place] for place in order if peers[place] != index and self._fits(peers[place], index))
        yield from islice(fitting, MAX_ATTEMPTS)

    def _fits(self, other: int, index: int) -> bool:
        return self.lengths is None or self.lengths[other] <= self.lengths[index]


class Quarantine:
    """Counts distinct bad clips, reports each once, and stops the run when there are too many.

    report: a JSONL file, one `{"key": ..., "reason": ...}` a line, or None. One that exists is read first, so that a
        resumed run counts on from where it stopped.
    max_bad_share: the share of num_clips that may be bad; FEW_BAD_CLIPS may be in any case, unless the share is 0.
    """

    def __init__(self, num_clips: int, report: str | Path | None = None, max_bad_share: float = 0.01) -> None:
        self.num_clips = num_clips
        self.limit = max(FEW_BAD_CLIPS, int(max_bad_share * num_clips)) if max_bad_share else 0
        self.report = Path(report) if report is not None else None
        self.bad_clips: dict[str, str] = _read_report(self.report) if self.report else {}

    def add(self, key: str, reason: str) -> None:
        """Count one bad clip; nothing happens if it was counted before. Raises DataError past the limit."""
        if key in self.bad_clips:
            return
        self.bad_clips[key] = reason
        log.warning("bad clip %s replaced: %s", key, reason)
        if self.report:
            try:
                self.report.parent.mkdir(parents=True, exist_ok=True)
                with self.report.open("a", encoding="utf-8") as file:
                    file.write(json.dumps({"key": key, "reason": reason}, ensure_ascii=False) + "\n")
            except OSError as error:  # a full disk does not end a run
                log.warning("%s cannot be written (%s); the clip is counted all the same", self.report, error.strerror)
        if len(self.bad_clips) > self.limit:
            raise DataError(self._too_many())

    def _too_many(self) -> str:
        first = "".join(f"\n  {key}: {reason}" for key, reason in list(self.bad_clips.items())[:5])
        where = f"; all of them are in {self.report}" if self.report else ""
        return (
            f"{len(self.bad_clips)} of {self.num_clips} clips cannot be used, more than the {self.limit} allowed. "
            f"Mend or remove them, or raise args.max_bad_share{where}. The first:{first}"
        )


def _read_report(path: Path) -> dict[str, str]:
    """Bad clips of an earlier run. A last line that was cut by a crash is passed over: its clip will come again."""
    if not path.exists():
        return {}
    found = {}
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
            found[row["key"]] = row["reason"]
        except (ValueError, KeyError, TypeError):
            log.warning("%s: passed over a line that is not a report: %.80s", path, line)
    return found
