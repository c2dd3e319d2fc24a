"""Look through a set as training reads it: what is broken, what is there twice, how long and large its clips are."""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

from sat.data.loader import VIDEO_KEYS
from sat.data.manifest import Dropped
from sat.errors import DataError

TOO_SHORT = "too short"
WINDOW = 1024
"""Clips that wait for a thread at a time."""
BAR = 40
"""Characters of the longest bar of a histogram."""
BINS = 12
"""Most lines of a histogram."""
EXAMPLES = 5
"""Clips that are named of each kind of problem."""

T = TypeVar("T")
Progress = Callable[[Iterable[T], int], Iterable[T]]
"""Gives out what it is given, so many in all, and shows how far it is."""


@dataclass(frozen=True)
class Found:
    """A clip that can be read."""

    number: int
    key: str
    num_frames: int
    """That training reads, without repeated ones."""
    length: int
    """Frames of the file, where its header was read; else num_frames."""
    size: tuple[int, int]
    """Rows and columns of the file, or of its latents."""


@dataclass
class SetReport:
    """What there is to say of one set."""

    name: str
    found: list[Found] = field(default_factory=list)
    problems: list[Dropped] = field(default_factory=list)
    """Clips that cannot be used, and what stands in the place of one."""
    left_out: list[Dropped] = field(default_factory=list)
    """Clips that the set's settings leave out."""
    duplicates: list[list[str]] = field(default_factory=list)
    """Keys of clips of the same content."""
    wanted_frames: int | None = None

    @property
    def is_broken(self) -> bool:
        """Whether anything is wrong with it that training would stumble over."""
        return bool(self.problems) or not self.found

    def rows(self) -> Iterator[dict[str, Any]]:
        """One row for each clip that something is said of, for a report in JSONL."""
        for kind, clips in (("broken", self.problems), ("left out", self.left_out)):
            for clip in clips:
                yield {"set": self.name, "kind": kind, "key": clip.key, "reason": clip.reason, "detail": clip.detail}
        for keys in self.duplicates:
            yield {"set": self.name, "kind": "duplicate", "keys": keys}

    def lines(self) -> list[str]:
        """The report for readers."""
        total = len(self.found) + len(self.problems) + len(self.left_out)
        lines = [f"{self.name}: {len(self.found):,} of {total:,} clips can be used"]
        lines += _by_reason("broken", self.problems) + _by_reason("left out", self.left_out)
        if self.duplicates:
            extra = sum(len(keys) - 1 for keys in self.duplicates)
            lines.append(f"  {extra:,} there twice or more")
            lines += [f"    {_abridged(keys)}" for keys in self.duplicates[:EXAMPLES]]
        short = sum(1 for clip in self.found if self.wanted_frames and clip.num_frames < self.wanted_frames)
        if short:
            lines.append(f"  {short:,} give fewer than the {self.wanted_frames} frames of max_num_frames")
        if self.found:
            lines += ["  frames of a clip", *_histogram_of_numbers([clip.length for clip in self.found])]
            lines += ["  rows x columns", *_bars(_most_common(f"{h} x {w}" for h, w in (c.size for c in self.found)))]
        return lines


def check_set(name: str, dataset: Any, num_threads: int, progress: Progress) -> SetReport:
    """Read every clip of a dataset once, as training does, and tell what came of it.

    dataset: with `index` where it has clips of its own, as SFTDataset(strict=False); what its index has dropped is
    taken up. progress: shows how far it is.
    """
    report = SetReport(name, wanted_frames=getattr(dataset, "max_num_frames", None))
    index = getattr(dataset, "index", None)
    problems = list(index.dropped) if index is not None else []
    results = _in_threads(lambda number: _read(dataset, number), range(len(dataset)), num_threads)
    for result in progress(results, len(dataset)):
        if isinstance(result, Found):
            report.found.append(result)
        else:
            problems.append(result)
    may_be_short = getattr(dataset, "short_clips", None) == "drop"
    for problem in problems:
        (report.left_out if may_be_short and problem.reason == TOO_SHORT else report.problems).append(problem)
    if index is not None:
        report.duplicates = _duplicates(index, report.found, num_threads)
    return report


def _in_threads(action: Callable[[Any], T], items: Sequence[Any], num_threads: int) -> Iterator[T]:
    """The results in order; few of the items are under way at a time."""
    with ThreadPoolExecutor(num_threads) as pool:
        for first in range(0, len(items), WINDOW):
            yield from pool.map(action, items[first : first + WINDOW])


def _read(dataset: Any, number: int) -> Found | Dropped:
    try:
        item = dataset[number]
    except DataError as error:
        return Dropped(getattr(error, "key", "") or str(number), getattr(error, "reason", "unreadable"), str(error))
    video = item[next(name for name in VIDEO_KEYS if name in item)]
    index = getattr(dataset, "index", None)
    length = index[number].num_frames if index is not None else None
    size = item.get("original_size_as_tuple", video.shape[-2:])
    return Found(number, item["key"], item["num_frames"], length or item["num_frames"], (int(size[0]), int(size[1])))


def _duplicates(index: Any, found: Sequence[Found], num_threads: int) -> list[list[str]]:
    """Clips of equal content; only those of equal size are compared."""
    by_size: dict[int, list[Found]] = defaultdict(list)
    for clip in found:
        by_size[index[clip.number].num_bytes()].append(clip)
    candidates = [clip for clips in by_size.values() if len(clips) > 1 for clip in clips]
    by_content: dict[str, list[str]] = defaultdict(list)
    digests = _in_threads(lambda clip: index[clip.number].digest(), candidates, num_threads)
    for clip, digest in zip(candidates, digests):
        by_content[digest].append(clip.key)
    return [keys for keys in by_content.values() if len(keys) > 1]


# --- text ------------------------------------------------------------------------------------------------------------


def _by_reason(kind: str, clips: Sequence[Dropped]) -> list[str]:
    lines = []
    for reason, count in Counter(clip.reason for clip in clips).most_common():
        lines.append(f"  {count:,} {kind}, {reason}")
        lines += [f"    {clip.key}: {clip.detail}" for clip in clips if clip.reason == reason][:EXAMPLES]
        if count > EXAMPLES:
            lines.append(f"    and {count - EXAMPLES:,} more")
    return lines


def _abridged(keys: Sequence[str]) -> str:
    more = f" and {len(keys) - EXAMPLES:,} more" if len(keys) > EXAMPLES else ""
    return " = ".join(keys[:EXAMPLES]) + more


def _most_common(words: Iterable[str]) -> list[tuple[str, int]]:
    """The most frequent words, and the number of the others together."""
    counts = Counter(words).most_common()
    rest = sum(count for _, count in counts[BINS - 1 :])
    return counts if len(counts) <= BINS else [*counts[: BINS - 1], ("others", rest)]


def _histogram_of_numbers(numbers: Sequence[int]) -> list[str]:
    """A line for each number where they are few, else for ranges of equal width."""
    counts = Counter(numbers)
    if len(counts) <= BINS:
        return _bars([(str(number), counts[number]) for number in sorted(counts)])
    low, high = min(numbers), max(numbers)
    width = -(-(high - low + 1) // BINS)
    bins = Counter((number - low) // width for number in numbers)
    starts = range(low, high + 1, width)
    return _bars([(f"{start} to {start + width - 1}", bins[place]) for place, start in enumerate(starts)])


def _bars(counts: Sequence[tuple[str, int]]) -> list[str]:
    most, wide = max(count for _, count in counts), max(len(word) for word, _ in counts)
    return [f"    {word:>{wide}} {count:>9,} {'#' * -(-BAR * count // most)}" for word, count in counts]
