"""Grade clips of the demo set: does each show what its caption says? The grader is `tools/demo_shapes.py: see`.

    python tools/grade_demo.py --out runs/demo/grades --row "real clips=data/shapes/manifest.jsonl" \\
        --row "samples, held out=runs/demo/heldout" --shuffled "shuffled captions=runs/demo/heldout"

Each row is NAME=PATH: a folder of mp4 files that carry their caption as `prompt` in their metadata (as sample_video.py
writes them), or a JSONL file of {"video": path, "caption": text}. Rows appear in the order given. A --shuffled row
grades the same clips against one another's captions: what a model reaches that does not read them. Prints a table and
writes DIR/metrics.json; exit code 1 where a clip cannot be graded.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it runs from a checkout that is not installed

import numpy as np

from sat.data.manifest import scan
from sat.data.video import probe, read_frames, read_metadata
from sat.errors import DataError
from tools.demo_shapes import ATTRIBUTES, Scene, agreement, parse_caption, see

COLUMNS = (*ATTRIBUTES, "all")


def captions_of(source: Path) -> list[tuple[Path, str]]:
    """(clip, caption) of a folder or a JSONL file. Raises DataError where there is none, or a clip has no caption."""
    if source.suffix == ".jsonl":
        index = scan(source, read_headers=False)
        return [(index[number].path, index[number].caption()) for number in range(len(index))]
    clips = sorted(source.rglob("*.mp4"))
    if not clips:
        raise DataError(f"no mp4 files below {source}")
    captions = [read_metadata(clip).get("prompt") for clip in clips]
    for clip, caption in zip(clips, captions):
        if caption is None:
            raise DataError(f"{clip} has no 'prompt' in its metadata; list the clips and captions in a JSONL file")
    return [(clip, str(caption)) for clip, caption in zip(clips, captions)]


def look_at(clip: Path) -> Scene:
    """What a whole clip shows."""
    return see(read_frames(clip, range(probe(clip, count=True).num_frames)))


def shuffled(wanted: Sequence[Scene]) -> list[Scene]:
    """The captions in another order, the same at every call."""
    return [wanted[place] for place in np.random.default_rng(0).permutation(len(wanted))]


def grade(wanted: Sequence[Scene], seen: Sequence[Scene]) -> dict[str, float]:
    """Number of clips, and the share of them that agree: attribute by attribute and in all."""
    verdicts = [agreement(want, saw) for want, saw in zip(wanted, seen)]
    shares = {column: sum(verdict[column] for verdict in verdicts) / len(verdicts) for column in COLUMNS}
    return {"clips": len(verdicts), **shares}


def grade_row(source: Path, is_shuffled: bool) -> dict[str, float]:
    """One row of the table. Raises DataError with the clip that cannot be graded."""
    pairs = captions_of(source)
    wanted = [parse_caption(caption) for _, caption in pairs]
    return grade(shuffled(wanted) if is_shuffled else wanted, [look_at(clip) for clip, _ in pairs])


def table(rows: Mapping[str, Mapping[str, float]]) -> str:
    """Rows as text, shares in percent."""
    width = max(len(name) for name in (*rows, "clips of"))
    head = "".join(f"{column:>12}" for column in COLUMNS)
    lines = [f"{'clips of':<{width}} {'clips':>7}{head}"]
    for name, row in rows.items():
        shares = "".join(f"{100 * row[column]:>10.1f} %" for column in COLUMNS)
        lines.append(f"{name:<{width}} {row['clips']:>7}{shares}")
    return "\n".join(lines)


class _AddRow(argparse.Action):
    """Collects --row and --shuffled in the order given, as (name, source, is_shuffled)."""

    def __call__(self, parser, namespace, value, option=None):
        name, equals, path = value.rpartition("=")
        if not equals or not name or not path:
            parser.error(f"{option} '{value}': write NAME=PATH")
        namespace.rows = [*(namespace.rows or []), (name, Path(path), option == "--shuffled")]


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse, grade, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for metrics.json")
    parser.add_argument("--row", action=_AddRow, dest="rows", metavar="NAME=PATH", help="clips to grade")
    parser.add_argument("--shuffled", action=_AddRow, dest="rows", metavar="NAME=PATH", help="the control")
    options = parser.parse_args(arguments)
    if not options.rows:
        parser.error("give at least one --row NAME=PATH")
    try:
        rows = {name: grade_row(source, is_shuffled) for name, source, is_shuffled in options.rows}
    except DataError as error:
        sys.exit(str(error))
    print(table(rows))
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "metrics.json").write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
