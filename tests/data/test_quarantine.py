"""Bad clips: replaced the same way everywhere, counted once, stopped past a share."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sat.data.quarantine import MAX_ATTEMPTS, BadClip, Quarantine, ReplacingDataset
from sat.errors import DataError


class Numbers:
    """A dataset of numbers, some of which cannot be read."""

    def __init__(self, num_samples, bad):
        self.num_samples, self.bad = num_samples, bad
        self.reads = []

    def __len__(self):
        return self.num_samples

    def __getitem__(self, index):
        self.reads.append(index)
        if index in self.bad:
            raise BadClip(f"clip {index} is broken", key=f"key {index}")
        return {"value": index}


@settings(deadline=None)
@given(num_samples=st.integers(1, 60), seed=st.integers(0, 5), data=st.data())
def test_good_clips_stay_and_bad_ones_are_replaced_alike_everywhere(num_samples, seed, data):
    bad = data.draw(st.sets(st.integers(0, num_samples - 1), max_size=num_samples - 1))
    one, other = (ReplacingDataset(Numbers(num_samples, bad), seed) for _ in range(2))
    for index in range(num_samples):
        item = one[index]
        assert item == other[index] and item["value"] not in bad
        if index in bad:
            assert (item["replaced"], item["bad_key"]) == (f"clip {index} is broken", f"key {index}")
        else:
            assert (item["value"], item["replaced"], item["bad_key"]) == (index, "", "")


def test_candidates_are_distinct_and_differ_between_clips():
    dataset = ReplacingDataset(Numbers(1000, set()))
    assert len(set(dataset.candidates(3))) >= MAX_ATTEMPTS and next(dataset.candidates(3)) == 3
    assert len({list(dataset.candidates(index))[1] for index in range(50)}) > 40
    assert sorted(ReplacingDataset(Numbers(5, set())).candidates(2)) == [0, 1, 2, 3, 4]


def test_all_clips_bad_raises_with_the_reasons():
    numbers = Numbers(4, {0, 1, 2, 3})
    with pytest.raises(DataError, match=r"clip 2 cannot be read, nor any of the 3 tried .*\n  clip 2 is broken\n"):
        ReplacingDataset(numbers)[2]
    assert sorted(numbers.reads) == [0, 1, 2, 3]
    numbers = Numbers(10_000, set(range(10_000)))
    with pytest.raises(DataError, match="10000 clips in all"):
        ReplacingDataset(numbers)[2]
    assert len(numbers.reads) <= MAX_ATTEMPTS + 2


def test_other_errors_are_not_hidden():
    class Wrong(Numbers):
        def __getitem__(self, index):
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        ReplacingDataset(Wrong(3, set()))[0]


def test_a_clip_counts_once_and_stands_in_the_report(tmp_path):
    report = tmp_path / "run" / "quarantine.jsonl"
    quarantine = Quarantine(1000, report)
    for _ in range(20):
        quarantine.add("a/ü.mp4", "too short")
    quarantine.add("b.mp4", "unreadable")
    rows = [json.loads(line) for line in report.read_text().splitlines()]
    assert rows == [{"key": "a/ü.mp4", "reason": "too short"}, {"key": "b.mp4", "reason": "unreadable"}]


@pytest.mark.parametrize(
    ("num_clips", "share", "allowed"), [(1000, 0.01, 10), (20, 0.01, 3), (1000, 0.0, 0), (10, 0.5, 5)]
)
def test_the_run_stops_past_the_share(tmp_path, num_clips, share, allowed):
    quarantine = Quarantine(num_clips, tmp_path / "quarantine.jsonl", share)
    for number in range(allowed):
        quarantine.add(f"{number}.mp4", "unreadable")
    message = rf"{allowed + 1} of {num_clips} clips cannot be used, more than the {allowed} allowed.*(?s:.)*mp4: "
    with pytest.raises(DataError, match=message):
        quarantine.add("one more.mp4", "unreadable")


def test_a_resumed_run_counts_on(tmp_path):
    report = tmp_path / "quarantine.jsonl"
    quarantine = Quarantine(10, report)
    for number in range(3):
        quarantine.add(f"{number}.mp4", "unreadable")
    report.write_text(report.read_text() + '{"key": "3.m')  # a crash in mid-line
    resumed = Quarantine(10, report)
    resumed.add("2.mp4", "unreadable")
    with pytest.raises(DataError, match="4 of 10 clips"):
        resumed.add("4.mp4", "unreadable")


def test_a_full_disk_does_not_end_a_run(tmp_path, caplog):
    """Rank 0 alone reports: an error there would leave the others waiting for it."""
    quarantine = Quarantine(1000, tmp_path / "quarantine.jsonl", max_bad_share=0.002)
    quarantine.report = Path("/dev/full")
    for number in range(3):
        quarantine.add(f"key {number}", "broken")
    assert caplog.text.count("/dev/full cannot be written (No space left on device); the clip is counted") == 3
    with pytest.raises(DataError, match="4 of 1000 clips cannot be used, more than the 3 allowed"):
        quarantine.add("key 3", "broken")
