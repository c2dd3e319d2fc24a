"""Checking a set: every clip is read once, the report holds each once, and few are under way."""

import threading
from collections.abc import Iterable
from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st

from sat.data.check import BINS, WINDOW, _bars, _histogram_of_numbers, _most_common, check_set
from sat.data.quarantine import BadClip


class Counted:
    """A dataset that counts how many clips are read at a time; every tenth is broken."""

    def __init__(self, size: int) -> None:
        self.size, self.reads, self.under_way, self.most = size, [0] * size, 0, 0
        self.lock = threading.Lock()

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict[str, Any]:
        with self.lock:
            self.reads[index] += 1
            self.under_way += 1
            self.most = max(self.most, self.under_way)
        with self.lock:
            self.under_way -= 1
        if index % 10 == 0:
            raise BadClip("broken", reason="unreadable", key=f"clip {index}")
        return {"pixels": torch.zeros(1, 3, 2, 2), "key": f"clip {index}", "num_frames": 1}


def test_every_clip_is_read_once_in_order() -> None:
    dataset, shown = Counted(2 * WINDOW + 5), []

    def progress(items: Iterable[Any], total: int) -> Iterable[Any]:
        shown.append(total)
        return items

    report = check_set("set", dataset, 3, progress)
    assert dataset.reads == [1] * len(dataset) and dataset.most <= 3 and shown == [len(dataset)]
    assert [clip.number for clip in report.found] == [n for n in range(len(dataset)) if n % 10]
    assert [clip.key for clip in report.problems] == [f"clip {n}" for n in range(0, len(dataset), 10)]
    assert report.is_broken
    assert "    and 201 more" in report.lines()


@given(numbers=st.lists(st.integers(1, 2000), min_size=1, max_size=60))
def test_a_histogram_holds_every_clip_once(numbers: list[int]) -> None:
    bars = _histogram_of_numbers(numbers)
    assert len(bars) <= BINS
    assert sum(int(line.rstrip("# ").split()[-1].replace(",", "")) for line in bars) == len(numbers)


def test_many_kinds_are_told_together() -> None:
    counts = _most_common(str(n % 20) for n in range(100))
    assert len(counts) == BINS and sum(count for _, count in counts) == 100 and counts[-1][0] == "others"
    assert _bars([("a", 1), ("bb", 80)]) == ["     a         1 #", f"    bb        80 {'#' * 40}"]
