"""Check the clips of a run, or of a folder, a manifest or tar shards, before training meets them.

    python tools/data.py check clips/                               a folder
    python tools/data.py check 'shards/{000..099}.tar' --report problems.jsonl
    python tools/data.py check configs/sft.yaml 'args.train_data=[clips]'
    python tools/data.py check clips/ data.params.fps=16 data.params.max_num_frames=81 --sheet sheet.png

Every clip is read once, as training reads it. Told are clips that cannot be read, that have no caption or an empty one,
that are too short or there twice, wrong rows of a manifest, shards that end early, and how long and large clips are.

A YAML file (several are merged) names its own sets: args.train_data and args.valid_data, or those of a mixture, in each
stage. A path is read with the settings of data_video.SFTDataset in released configurations: 480 x 720, 49 frames at 8 a
second, 3 skipped at each end; words like `data.params.fps=16` change them.

Exit code 0: all can be used. 1: something is broken. 2: it could not be checked. Clips that are there twice or give few
frames are told and are not broken.
"""

import argparse
import inspect
import json
import logging
import os
import re
import sys
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from tqdm import tqdm

from sat.config import SECTIONS, STAGES, ConfigNode, instantiate_from_config, load_config, target_of
from sat.data.check import SetReport, check_set
from sat.data.manifest import Dropped
from sat.data.sheet import FRAMES, THUMB, contact_rows
from sat.data.video import write_png
from sat.errors import ConfigError, DataError, DownloadError, SatError
from sat.logs import setup_logging
from sat.training.args import TrainArgs
from sat.training.data import is_mixture
from sat.training.plan import VALID_SETS, take_plan, without_params
from sat.training.stages import plan_stages

log = logging.getLogger("sat.data")

CLIPS = (
    "data={target: data_video.SFTDataset, "
    "params: {video_size: [480, 720], fps: 8, max_num_frames: 49, skip_frms_num: 3., short_clips: keep}}"
)
"""How clips are read where only a path is given: as in released configurations, without repeating last frames."""
MOST_WORKERS = 8
"""Unless told otherwise: each holds a clip of some 200 MB."""

Rows = tuple[np.ndarray, list[str]]
"""Pictures, and what each row of them shows."""
NO_ROWS: Rows = (np.zeros((0, FRAMES * THUMB[1], 3), dtype=np.uint8), [])

Set = tuple[str, ConfigNode, str | None]
"""A name, the `{target, params}` of a dataset, and the path to hand to it."""


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    check = parser.add_subparsers(dest="command", required=True).add_parser(
        "check",
        help="read every clip once and tell what is wrong",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    check.add_argument("source", nargs="+", metavar="PATH|YAML|key=value", help="see above")
    check.add_argument("--report", type=Path, metavar="FILE", help="also write a JSON line for each clip told of")
    check.add_argument("--sheet", type=Path, metavar="PNG", help="also draw some clips as the model sees them")
    workers = min(os.cpu_count() or 1, MOST_WORKERS)
    check.add_argument("--workers", type=int, default=workers, help=f"clips read at a time (here {workers})")
    return parser


def find_sets(sources: Sequence[str]) -> Iterator[Set]:
    """The sets that paths, YAML files and words name."""
    files = [word for word in sources if word.endswith((".yaml", ".yml"))]
    words = [word for word in sources if re.match(rf"({'|'.join((*SECTIONS, STAGES))})[^=]*=", word)]
    paths = [word for word in sources if word not in files and word not in words]
    if files and paths:
        raise ConfigError(
            f"{paths[0]} beside {files[0]}; give paths or YAML files, and 'args.train_data=[...]' for both"
        )
    if files:
        for stage in plan_stages(load_config(files, words), seed=0):
            before = "" if stage.name is None else f"stage {stage.name}: "
            yield from ((before + name, part, path) for name, part, path in _sets_of_run(stage.config, stage.args))
        return
    section = load_config([], [CLIPS, *words])["data"]
    if not paths:
        raise ConfigError("give a folder, a manifest, tar shards or a YAML file")
    yield from ((path, section, path) for path in paths)


def _sets_of_run(config: ConfigNode, args: TrainArgs) -> Iterator[Set]:
    section, *_ = take_plan(config["data"])
    if "target" not in section:
        raise ConfigError("the data section has no target; give one, e.g. data_video.SFTDataset")
    if is_mixture(section):
        for key in ("sets", VALID_SETS):
            for name, part in (section["params"].get(key) or {}).items():
                yield f"data.params.{key}.{name}", part, None
        return
    section = without_params(section, [VALID_SETS])
    given = [("args.train_data", args.train_data), ("args.valid_data", args.valid_data)]
    paths = [(key, path) for key, value in given for path in ([value] if isinstance(value, str) else value or [])]
    yield from ((f"{key} {path}", section, path) for key, path in paths)
    if not paths:
        yield section["target"], section, None


def open_set(section: ConfigNode, path: str | None) -> Any:
    """The dataset, which tells of all that is wrong instead of stopping at the first."""
    known = inspect.signature(target_of(section)).parameters
    wanted = {"data_dir": path, "strict": False, "read_headers": True}
    return instantiate_from_config(
        section, **{key: value for key, value in wanted.items() if key in known and value is not None}
    )


def check(name: str, section: ConfigNode, path: str | None, num_workers: int) -> tuple[SetReport, Rows]:
    """The report of one set and some rows of its pictures; of one that cannot be opened, why."""
    try:
        dataset = open_set(section, path)
    except (DataError, DownloadError) as error:
        return SetReport(name, problems=[Dropped(path or name, "cannot be opened", str(error))]), NO_ROWS
    report = check_set(name, dataset, num_workers, lambda items, total: tqdm(items, name, total, unit="clip"))
    return report, contact_rows(dataset, [clip.number for clip in report.found])


def write_sheet(path: Path, parts: Sequence[Rows]) -> None:
    """Draw the rows of all sets, and print what they show."""
    rows = np.concatenate([rows for rows, _ in parts])
    if not len(rows):
        raise DataError(f"no clip to draw in {path}: none of them can be read, or all come as latents")
    write_png(path, rows)
    print(f"rows of {path}")
    for number, text in enumerate(chain(*(texts for _, texts in parts)), start=1):
        print(f"  {number}: {text}")


def main(words: Sequence[str] | None = None) -> int:
    """Parse, check and print; returns the exit code."""
    options = build_parser().parse_args(words)
    reports, pictures = [], []
    try:
        if options.workers < 1:
            raise ConfigError(f"--workers is {options.workers}; give 1 or more")
        for name, section, path in list(find_sets(options.source)):
            report, rows = check(name, section, path, options.workers)
            print("\n".join(report.lines()))
            reports.append(report)
            pictures.append(rows)
        if options.report is not None:
            lines = (json.dumps(row, ensure_ascii=False) + "\n" for report in reports for row in report.rows())
            options.report.write_text("".join(lines), encoding="utf-8")
        if options.sheet is not None:
            write_sheet(options.sheet, pictures)
    except (SatError, OSError) as error:
        log.error("error: %s", error)
        return 2
    return 1 if any(report.is_broken for report in reports) else 0


if __name__ == "__main__":
    setup_logging()
    torch.set_num_threads(1)  # the clips are what is spread over processors
    sys.exit(main())
