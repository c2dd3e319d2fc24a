"""Whether data keeps up with training: decoding on one core, and the share of steps that is spent waiting for clips.

The first table: CPU seconds of a worker for a clip, from H.264 file to collated batch, of 49x480x720 (moving texture
with grain, written here by the project's own writer) and of the demo's clips; how many cores make a data wait below 2 %
of a step. The second table: `data_wait` over `step_time`, as metrics.jsonl has them, from the fourth step on.

The demo is trained in truth (its clips, network and batch, a VAE of random weights): with its caches, as it comes, and
without, so that every step decodes. At the 5B's rate the real loader feeds a process that sleeps for the seconds that
--plan predicts for a step of one clip; it stands for a GPU, whose work takes no core. Nothing is recomputed in that
step and the encoders' time is left out, so that no run takes clips faster. With more cores, give more --workers.

    python benchmarks/data_wait.py --workers 1 2 --device h200 --json data_wait.json
"""

import argparse
import json
import math
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from sat.config import instantiate_from_config, load_config
from sat.data.dataset import SFTDataset
from sat.data.loader import build_loader
from sat.data.sampler import GlobalBatchSampler, ShuffledEpochs
from sat.data.video import read_frames, write_mp4
from sat.training.devices import named_device
from sat.training.planning.layouts import estimate_all
from sat.training.planning.passes import pretend_ranks
from sat.training.planning.run import describe_job
from sat.vae import save_vae_state
from tools.make_demo_data import make as make_demo_data
from tools.make_tiny_t5 import make as make_tiny_t5
from tools.make_tiny_t5 import read_captions

ROOT = Path(__file__).resolve().parent.parent
LIMIT = 0.02
"""Share of a step that may be spent waiting."""
WARMUP_STEPS = 3
"""Not counted: workers start, and nothing has been read ahead."""
FPS = 8
DEMO_SIZE = (9, 32, 32)
CONFIG = ("configs/cogvideox_5b.yaml", "configs/sft.yaml")


def write_clips(folder: Path, count: int, frames: int, height: int, width: int) -> None:
    """Clips of a smooth texture that moves, with grain on each frame: neither easy nor noise for a video codec."""
    folder.mkdir()
    rows = []
    for number in range(count):
        generator = np.random.default_rng(number)
        coarse = torch.from_numpy(generator.uniform(0.0, 255.0, (1, 3, height // 8 + 16, width // 8 + 16)))
        size = (height + 2 * frames, width + 2 * frames)
        texture = torch.nn.functional.interpolate(coarse, size, mode="bicubic")[0].permute(1, 2, 0).numpy()
        windows = (texture[2 * t : 2 * t + height, t : t + width] for t in range(frames))
        noisy = (window + generator.normal(0.0, 3.0, (height, width, 1)) for window in windows)
        write_mp4(folder / f"{number}.mp4", (frame.clip(0, 255).astype(np.uint8)[None] for frame in noisy), FPS)
        rows.append({"video": f"{number}.mp4", "caption": f"texture {number}"})
    (folder / "manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def dataset_of(folder: Path, frames: int, height: int, width: int) -> SFTDataset:
    """The clips as training reads them."""
    return SFTDataset(folder / "manifest.jsonl", [height, width], FPS, frames, skip_frms_num=0)


def loader_of(dataset: SFTDataset, num_clips: int, micro_batch: int, workers: int) -> Any:
    """The real loader over so many clips."""
    order = ShuffledEpochs(len(dataset), seed=0)
    num_steps = num_clips // micro_batch
    sampler = GlobalBatchSampler(
        order, global_batch_size=micro_batch, micro_batch_size=micro_batch, dp_rank=0, dp_size=1, end_step=num_steps
    )
    return build_loader(dataset, sampler, workers)


def seconds_of_a_clip(dataset: SFTDataset, num_clips: int, micro_batch: int) -> dict[str, float]:
    """CPU seconds for a clip: of the decoder, of a dataset's item, and of all that a worker does."""
    indices = [number % len(dataset) for number in range(num_clips)]
    files = [dataset.index[index].path for index in indices]
    parts = {
        "decode": lambda: [read_frames(file, range(dataset.max_num_frames)) for file in files],
        "item": lambda: [dataset[index]["num_frames"] for index in indices],
    }
    seconds = {}
    for name, call in parts.items():
        before = time.process_time()
        call()
        seconds[name] = (time.process_time() - before) / num_clips
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    for _ in loader_of(dataset, num_clips, micro_batch, workers=1):
        pass
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds["worker"] = (after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime) / num_clips
    return seconds


def cores_needed(seconds: float, clips_of_a_step: int, step_time: float) -> int:
    """The fewest workers, each with a core of its own, that make a step wait for less than LIMIT of its time."""
    return math.floor((1.0 - LIMIT) * seconds * clips_of_a_step / step_time) + 1


def planned_step_time(device: str) -> float:
    """Predicted seconds for a step of one clip of the 5B on one GPU of a job."""
    config = load_config([ROOT / file for file in CONFIG])
    world = config["args"]["global_batch_size"]
    job, configured = describe_job(config, named_device(device), world)
    with pretend_ranks(world):
        (found,) = estimate_all(job, [replace(configured, activations="keep")])
    return found.step_seconds - found.seconds["encoding"]


def wait_share(records: Sequence[tuple[float, float]]) -> float:
    """Of (data_wait, step_time) of steps."""
    counted = records[WARMUP_STEPS:]
    return sum(waited for waited, _ in counted) / sum(step_time for _, step_time in counted)


def feed(dataset: SFTDataset, workers: int, num_steps: int, step_time: float) -> float:
    """The wait share of steps that take a clip and sleep."""
    records = []
    batches = iter(loader_of(dataset, num_steps, 1, workers))
    for _ in range(num_steps):
        started = time.perf_counter()
        batch = next(batches)
        waited = time.perf_counter() - started
        del batch  # 50 ms for its 200 MB, which in training is no wait; on a GPU the loader's pinning thread does it
        time.sleep(step_time)
        records.append((waited, time.perf_counter() - started))
    return wait_share(records)


def prepare_demo(folder: Path, num_clips: int) -> list[str]:
    """What the demo's training reads, and the words that say so: clips, a T5, and a VAE of random weights."""
    make_demo_data(folder / "shapes", num_clips, seed=0, num_frames=DEMO_SIZE[0], workers=1)
    make_tiny_t5(read_captions(folder / "shapes" / "manifest.jsonl"), folder / "t5")
    vae = load_config([ROOT / "configs/demo.yaml"])["model"]["first_stage_config"]
    del vae["params"]["ckpt_path"]
    save_vae_state(instantiate_from_config(vae).state_dict(), folder / "3d-vae.pt")
    return [
        f"args.train_data=[{folder / 'shapes'}]",
        f"model.first_stage_config.params.ckpt_path={folder / '3d-vae.pt'}",
        f"model.conditioner_config.params.emb_models.0.params.model_dir={folder / 't5'}",
        f"args.cache_dir={folder / 'cache'}",
    ]


def train_demo(folder: Path, words: Sequence[str], cache: str, workers: int, num_steps: int) -> dict[str, Any]:
    """Steps of the demo's own training, and what its metrics say of them."""
    save = folder / f"runs-{cache}-{workers}"
    options = [f"args.save={save}", f"args.train_iters={num_steps}", f"args.num_workers={workers}"]
    command = [sys.executable, "train_video.py", "--base", "configs/demo.yaml", *words, *options, f"args.cache={cache}"]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (metrics,) = save.glob("*/metrics.jsonl")
    lines = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    records = [(line["data_wait"], line["step_time"]) for line in lines if line["kind"] == "train"]
    times = sorted(step_time for _, step_time in records[WARMUP_STEPS:])
    return {
        "consumer": f"demo, cache: {cache}",
        "step_time": times[len(times) // 2],
        "clips": lines[0]["samples"],
        "workers": workers,
        "wait_share": wait_share(records),
    }


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, default=4, help="large clips that are written (default 4)")
    parser.add_argument("--repeats", type=int, default=2, help="times each is decoded on one core (default 2)")
    parser.add_argument("--frames", type=int, default=49, help="of a large clip (default 49)")
    parser.add_argument("--height", type=int, default=480, help="of a large clip (default 480)")
    parser.add_argument("--width", type=int, default=720, help="of a large clip (default 720)")
    parser.add_argument(
        "--workers", type=int, nargs="+", default=[1, 2], help="of the loader, each tried (default 1 2)"
    )
    parser.add_argument("--steps", type=int, default=20, help="at the 5B's rate (default 20)")
    parser.add_argument("--device", default="h200", help="GPU that the 5B's step is predicted for (default h200)")
    parser.add_argument("--step-time", type=float, help="seconds of a step, instead of the predicted ones")
    parser.add_argument("--demo-clips", type=int, default=480, help="of the demo's set (default 480)")
    parser.add_argument("--demo-steps", type=int, default=30, help="of its training; 0 leaves it out (default 30)")
    parser.add_argument("--json", type=Path, help="also write the tables to this file")
    args = parser.parse_args()
    if args.steps <= WARMUP_STEPS or 0 < args.demo_steps <= WARMUP_STEPS:
        parser.error(f"the first {WARMUP_STEPS} steps are not counted; give more --steps and --demo-steps")
    return args


def measure(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Both tables."""
    size = (args.frames, args.height, args.width)
    write_clips(folder / "large", args.clips, *size)
    large = dataset_of(folder / "large", *size)
    step_time = args.step_time or planned_step_time(args.device)
    consumer = "given step" if args.step_time else f"5B on {args.device}, predicted"
    waits = [
        {
            "consumer": consumer,
            "step_time": step_time,
            "clips": 1,
            "workers": workers,
            "wait_share": feed(large, workers, args.steps, step_time),
        }
        for workers in args.workers
    ]
    words = prepare_demo(folder / "demo", args.demo_clips)
    demo = dataset_of(folder / "demo" / "shapes", *DEMO_SIZE)
    if args.demo_steps:
        waits += [
            train_demo(folder / "demo", words, cache, workers, args.demo_steps)
            for cache in ("none", "all")
            for workers in args.workers
        ]
    rates = []
    for dataset, own, count, batch in (
        (large, size, args.repeats * args.clips, 1),
        (demo, DEMO_SIZE, args.demo_clips, 24),
    ):
        seconds = seconds_of_a_clip(dataset, count, batch)
        steps = [wait for wait in waits if ("demo" in str(wait["consumer"])) == (dataset is demo)]
        rates.append(
            {
                "size": "x".join(map(str, own)),
                **seconds,
                "clips_per_second": 1 / seconds["worker"],
                "frames_per_second": own[0] / seconds["worker"],
                "cores_needed": {
                    f"{step['consumer']}": cores_needed(seconds["worker"], step["clips"], step["step_time"])
                    for step in steps
                },
            }
        )
    return {"rates": rates, "waits": waits}


def main() -> None:
    """Measure, print, write."""
    args = parse_arguments()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "demo").mkdir()
        found = measure(args, Path(folder))
    print(f"{'clip':<14}{'decode s':>10}{'item s':>10}{'worker s':>10}{'clips/s':>10}{'frames/s':>10}  cores for < 2 %")
    for row in found["rates"]:
        needed = ", ".join(f"{cores} ({name})" for name, cores in row["cores_needed"].items())
        print(
            "{size:<14}{decode:>10.4f}{item:>10.4f}{worker:>10.4f}{clips_per_second:>10.1f}"
            "{frames_per_second:>10.0f}  ".format(**row)
            + needed
        )
    print(f"{'consumer':<28}{'step s':>9}{'clips':>7}{'workers':>9}{'data wait':>11}")
    for row in found["waits"]:
        print("{consumer:<28}{step_time:>9.3f}{clips:>7}{workers:>9}{wait_share:>11.2%}".format(**row))
    if args.json:
        facts = {"torch": torch.__version__, "cores": os.cpu_count(), "clips": args.clips, "steps": args.steps}
        args.json.write_text(json.dumps({**facts, **found}, indent=1))


if __name__ == "__main__":
    main()
