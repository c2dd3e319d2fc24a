"""Pictures for a report: a contact sheet of clips, and curves of a metrics file. Needs pillow.

python tools/demo_report.py sheet --out sheet.png --scale 4 runs/demo/heldout
python tools/demo_report.py curve --out loss.png --key loss stratified=runs/a/metrics.jsonl plain=runs/b/metrics.jsonl
"""

import argparse
import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it runs from a checkout that is not installed

import numpy as np
from PIL import Image, ImageDraw

from sat.data.video import probe, read_frames, read_metadata
from sat.errors import DataError

PAPER, INK, FAINT = (255, 255, 255), (30, 30, 30), (225, 225, 225)
LINES = ((31, 119, 180), (214, 39, 40), (44, 160, 44), (148, 103, 189), (255, 127, 14), (23, 190, 207))
LINE_HEIGHT = 14
"""Pixels: the built-in font is 11 high."""
GAP = 3
"""Pixels between frames."""


def contact_sheet(clips: Sequence[Path], num_frames: int, scale: int) -> Image.Image:
    """One line of frames for each clip, evenly spaced from the first to the last, under the clip's prompt."""
    rows = []
    for clip in clips:
        total = probe(clip, count=True).num_frames
        indices = np.linspace(0, total - 1, min(num_frames, total)).round().astype(int)
        frames = read_frames(clip, indices).repeat(scale, axis=1).repeat(scale, axis=2)
        gaps = ((0, 0), (0, 0), (0, GAP), (0, 0))
        strip = np.concatenate(list(np.pad(frames, gaps, constant_values=PAPER[0])), axis=1)
        rows.append((read_metadata(clip).get("prompt", clip.stem), strip))
    height = sum(strip.shape[0] + LINE_HEIGHT + 6 for _, strip in rows)
    sheet = Image.new("RGB", (max(strip.shape[1] for _, strip in rows), height), PAPER)
    pen, top = ImageDraw.Draw(sheet), 0
    for prompt, strip in rows:
        pen.text((2, top + 1), prompt, fill=INK)
        sheet.paste(Image.fromarray(strip), (0, top + LINE_HEIGHT))
        top += strip.shape[0] + LINE_HEIGHT + 6
    return sheet


def read_curve(path: Path, key: str) -> list[tuple[float, float]]:
    """(step, value) of the training lines of a metrics.jsonl that have the key. Raises DataError where none has."""
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    points = [(line["step"], line[key]) for line in lines if line.get("kind") == "train" and key in line]
    if not points:
        known = sorted({name for line in lines for name in line})
        raise DataError(f"{path} has no training line with '{key}'; its keys are {', '.join(known) or 'none'}")
    return points


def curve(
    series: Mapping[str, Sequence[tuple[float, float]]], label: str, size: tuple[int, int], over: str = "steps"
) -> Image.Image:
    """Lines over the step: name -> (step, value) points. The value axis is logarithmic where all values allow it."""
    chart = Image.new("RGB", size, PAPER)
    pen = ImageDraw.Draw(chart)
    left, top, right, bottom = 64, 24, size[0] - 16, size[1] - 32
    steps = [step for points in series.values() for step, _ in points]
    values = [value for points in series.values() for _, value in points if math.isfinite(value)]
    is_log = min(values) > 0
    low, high = _span([math.log10(value) for value in values] if is_log else values)
    first, last = _span(steps)

    def place(step: float, value: float) -> tuple[float, float]:
        level = math.log10(value) if is_log else value
        return (
            left + (step - first) / (last - first) * (right - left),
            bottom - (level - low) / (high - low) * (bottom - top),
        )

    for part in range(5):
        level = low + (high - low) * part / 4
        step = first + (last - first) * part / 4
        across, up = left + (right - left) * part / 4, bottom - (bottom - top) * part / 4
        pen.line([(left, up), (right, up)], fill=FAINT)
        pen.text((left - 6, up), f"{10**level if is_log else level:.3g}", fill=INK, anchor="rm")
        pen.text((across, bottom + 6), f"{step:.0f}", fill=INK, anchor="mt")
    pen.text((left, top - 6), f"{label} over {over}{' (logarithmic)' if is_log else ''}", fill=INK, anchor="lb")
    for number, (name, points) in enumerate(series.items()):
        colour = LINES[number % len(LINES)]
        path = [place(step, value) for step, value in points if math.isfinite(value)]
        pen.line(path, fill=colour, width=2)
        pen.text((right - 4, top + 4 + number * LINE_HEIGHT), name, fill=colour, anchor="rt")
    return chart


def _span(values: Sequence[float]) -> tuple[float, float]:
    """Least and greatest, set apart where they are one."""
    low, high = min(values), max(values)
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = parser.add_subparsers(dest="kind", required=True)
    sheet = kinds.add_parser("sheet", help="frames of clips")
    sheet.add_argument("--out", type=Path, required=True, help="PNG file to write")
    sheet.add_argument("--frames", type=int, default=9, help="of each clip (default 9)")
    sheet.add_argument("--scale", type=int, default=4, help="pixels for each pixel (default 4)")
    sheet.add_argument("clips", type=Path, nargs="+", help="mp4 files, or folders of them")
    lines = kinds.add_parser("curve", help="a value of metrics.jsonl over the step")
    lines.add_argument("--out", type=Path, required=True, help="PNG file to write")
    lines.add_argument("--key", default="loss", help="the value (default loss)")
    lines.add_argument("series", nargs="+", metavar="NAME=FILE", help="metrics.jsonl files and their names")
    options = parser.parse_args(arguments)
    try:
        if options.kind == "sheet":
            found = [sorted(path.rglob("*.mp4")) if path.is_dir() else [path] for path in options.clips]
            clips = [clip for group in found for clip in group]
            if not clips:
                raise DataError(f"no mp4 files below {', '.join(map(str, options.clips))}")
            picture = contact_sheet(clips, options.frames, options.scale)
        else:
            named = (word.rpartition("=") for word in options.series)
            series = {name or path: read_curve(Path(path), options.key) for name, _, path in named}
            picture = curve(series, options.key, (720, 360))
    except DataError as error:
        sys.exit(str(error))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    picture.save(options.out)


if __name__ == "__main__":
    main()
