"""Write the demo set: thousands of small clips of one moving shape, each with its caption.

    python tools/make_demo_data.py --out data/shapes --clips 3000 --seed 0

The folder then has videos/00000.mp4 ... and labels/00000.txt ... as a fine-tuning set is laid out, the same as one
manifest.jsonl, and heldout.jsonl: the captions whose colour, shape and motion no clip has together. Clips take the
other captions in turn. seen.txt and heldout.txt have both kinds one a line, as sample_video.py reads prompts. A second
run with the same arguments does nothing. A data section for the set is

    target: sat.data.dataset.SFTDataset
    params: {video_size: [32, 32], fps: 8, max_num_frames: 9, skip_frms_num: 0}
"""

import argparse
import json
import os
import sys
from collections.abc import Iterable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it runs from a checkout that is not installed

import numpy as np

from sat.data.video import write_mp4
from sat.errors import DataError
from tools.demo_shapes import FPS, SIZE, Scene, all_scenes, draw, is_held_out, training_scenes

VERSION = 1
"""Of the drawing: a set made by another version is not the same set."""

CRF = 8
"""H.264 quality: at 18 the checker already reads shapes a little worse."""

RECEIPT = "demo_set.json"


def scene_of_clip(number: int) -> Scene:
    """Clips take the training captions in turn."""
    return training_scenes()[number % len(training_scenes())]


def write_clip(number: int, out: Path, num_frames: int, seed: int) -> None:
    """One clip and its caption, a function of (seed, number) alone."""
    scene = scene_of_clip(number)
    frames = draw(scene, num_frames, np.random.default_rng([seed, number]))
    write_mp4(out / f"videos/{number:05d}.mp4", frames, FPS, {"prompt": scene.caption}, crf=CRF)
    (out / f"labels/{number:05d}.txt").write_text(f"{scene.caption}\n", encoding="utf-8")


def write_rows(path: Path, rows: Iterable[Mapping]) -> None:
    """A JSONL file, whole or not at all."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    temporary.replace(path)


def make(out: Path, num_clips: int, seed: int, num_frames: int, workers: int) -> bool:
    """Write the set; False where it is there already. Raises DataError where another set is in the way."""
    arguments = {"clips": num_clips, "seed": seed, "frames": num_frames, "version": VERSION}
    receipt = out / RECEIPT
    found = json.loads(receipt.read_text(encoding="utf-8")) if receipt.is_file() else None
    if found == {**arguments, "complete": True}:
        return False
    if found is not None and found != {**arguments, "complete": False}:
        raise DataError(f"{out} holds a set made with {found}; delete it, or give another --out")
    for name in ("videos", "labels"):
        (out / name).mkdir(parents=True, exist_ok=True)
    write_rows(receipt, [{**arguments, "complete": False}])
    with ProcessPoolExecutor(workers) as pool:
        job = partial(write_clip, out=out, num_frames=num_frames, seed=seed)
        for _ in pool.map(job, range(num_clips), chunksize=50):
            pass
    header = {"num_frames": num_frames, "fps": FPS, "height": SIZE, "width": SIZE, "duration": num_frames / FPS}
    scenes = map(scene_of_clip, range(num_clips))
    rows = ({"video": f"videos/{number:05d}.mp4", **_row(scene), **header} for number, scene in enumerate(scenes))
    held_out = [scene for scene in all_scenes() if is_held_out(scene)]
    write_rows(out / "manifest.jsonl", rows)
    write_rows(out / "heldout.jsonl", map(_row, held_out))
    for name, group in (("seen.txt", training_scenes()), ("heldout.txt", held_out)):
        (out / name).write_text("".join(f"{scene.caption}\n" for scene in group), encoding="utf-8")
    write_rows(receipt, [{**arguments, "complete": True}])
    return True


def _row(scene: Scene) -> dict[str, str]:
    return {"caption": scene.caption, **asdict(scene)}


def main() -> None:
    """Parse and make."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--clips", type=int, default=3000, help="how many (default 3000)")
    parser.add_argument("--seed", type=int, default=0, help="of size, place and speed (default 0)")
    parser.add_argument("--frames", type=int, choices=(9, 17), default=9, help="of each clip (default 9)")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes (default: one for each core)")
    options = parser.parse_args()
    try:
        is_new = make(options.out, options.clips, options.seed, options.frames, options.workers)
    except DataError as error:
        sys.exit(str(error))
    print(f"wrote {options.out}" if is_new else f"{options.out} is there already", file=sys.stderr)


if __name__ == "__main__":
    main()
