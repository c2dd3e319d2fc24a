"""The training recipe shown on the demo: packed rows beside padded batches, and stages beside training from scratch.

    python tools/recipe_demo.py --demo runs/demo --out runs/recipe

Needs the results of tools/demo.py. Two comparisons, each of two runs of the demo's transformer:

packs    Images, clips of 9 and clips of 17 frames, half of them images. One run packs them into rows; the other pads
         each to 17 frames by repeating its last one, as released loaders do. Both train on the same number of samples;
         then held-out captions are sampled and graded.
stages   One run trains on 32 x 32 pixels. The other trains on 16 x 16 first, for as many steps at a quarter of the
         tokens, then on 32 x 32: after how many steps is its validation loss that of the first run's end?

Every step is one command that is printed before it runs; what is there already is passed over.
"""

import argparse
import json
import os
import statistics
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # so that it runs from a checkout that is not installed

import yaml

from sat.config import load_yaml
from sat.training.run_dir import TRAINING_CONFIG
from tools.demo import SEED, python, trained
from tools.demo_report import curve

FRAMES = {"images": 1, "short": 9, "long": 17}
WEIGHTS = {"images": 0.5, "short": 0.25, "long": 0.25}
LONG_CLIPS = 1000
SAMPLES_PER_STEP = 48
TOKENS_PER_LATENT, TEXT = 16, 16
ROW_TOKENS = 24 * 64
"""About as many tokens as a micro-batch of the demo has: 24 clips of 9 frames with their text."""
TRAINING = (
    "args.lr_decay_style=constant",
    "deepspeed.zero_optimization.stage=1",
    "deepspeed.optimizer={type: AdamW, params: {lr: 1e-3, betas: [0.9, 0.95], weight_decay: 1e-4}}",
)
"""At a constant rate, so that runs of other lengths can be compared; and by AdamW, as most are trained."""
SEEN_EVERY = 20
"""Steps between two validations where stages are compared."""


def num_tokens(num_frames: int) -> int:
    """Of a clip with its text, one for each latent."""
    return ((num_frames - 1) // 4 + 1) * TOKENS_PER_LATENT + TEXT


def records(run: Path, kind: str) -> list[dict[str, Any]]:
    """Lines of a run's metrics."""
    lines = map(json.loads, (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    return [line for line in lines if line["kind"] == kind]


class RecipeDemo:
    """Both comparisons; each step leaves its result under `out`."""

    def __init__(self, demo: Path, out: Path, steps: int, num_processes: int) -> None:
        self.demo, self.out, self.steps, self.num_processes = demo, out, steps, num_processes
        trained = sorted((demo / "transformer").glob(f"*/{TRAINING_CONFIG}"))
        if not trained:
            sys.exit(f"{demo} has no trained transformer; make one with tools/demo.py --out {demo}")
        self.parts = (
            f"model.scale_factor={load_yaml(trained[-1])['model']['scale_factor']}",
            f"model.first_stage_config.params.ckpt_path={demo / 'vae' / '3d-vae.pt'}",
            f"model.conditioner_config.params.emb_models.0.params.model_dir={demo / 't5-tiny'}",
            f"args.cache_dir={out / 'cache'}",
        )

    def _train(self, name: str, steps: int, overlay: dict[str, Any]) -> Path:
        """A run of the demo's transformer with an overlay; returns its run directory."""
        folder = self.out / name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "overlay.yaml").write_text(yaml.safe_dump(overlay, sort_keys=False), encoding="utf-8")
        base = ("--base", "configs/demo.yaml", folder / "overlay.yaml")
        return trained(folder, steps, self.num_processes, *base, *self.parts, *TRAINING)

    # --- packs -------------------------------------------------------------------------------------------------------

    def compare_packs(self) -> dict[str, dict[str, float]]:
        """Rows of the table: packed and padded."""
        python(
            "tools/make_demo_data.py", "--out", self.out / "long", "--clips", LONG_CLIPS, "--frames", 17, "--seed", 2
        )
        mean_tokens = sum(weight * num_tokens(FRAMES[name]) for name, weight in WEIGHTS.items())
        rows_per_step = round(SAMPLES_PER_STEP * mean_tokens / ROW_TOKENS / self.num_processes) * self.num_processes
        samples_of_step = rows_per_step * ROW_TOKENS / mean_tokens
        packed_steps = round(self.steps * SAMPLES_PER_STEP / samples_of_step)
        packed = {
            "args": {"train_iters": packed_steps, "global_batch_size": rows_per_step},
            "data": self._data(is_packed=True),
            "deepspeed": {"train_micro_batch_size_per_gpu": 1},
        }
        padded = {
            "args": {"train_iters": self.steps, "global_batch_size": SAMPLES_PER_STEP},
            "data": self._data(is_packed=False),
        }
        runs = {
            "packed": self._train("packed", packed_steps, packed),
            "padded": self._train("padded", self.steps, padded),
        }
        return {name: {**self._speed(name, run), **self._grades(name, run)} for name, run in runs.items()}

    def _data(self, is_packed: bool) -> dict[str, Any]:
        """The data section: clips as long as they are, or all as long as the longest."""
        folders = {"images": self.demo / "shapes", "short": self.demo / "shapes", "long": self.out / "long"}
        common = {"video_size": [32, 32], "fps": 8, "skip_frms_num": 0, "read_headers": True}
        sets: dict[str, Any] = {}
        for name, folder in folders.items():
            params = {"data_dir": str(folder), **common, "max_num_frames": FRAMES[name], "short_clips": "keep"}
            if not is_packed:
                params.update(max_num_frames=FRAMES["long"], short_clips="pad")
            sets[name] = {"target": "data_video.SFTDataset", "params": params}
        plan = {"pack": {"max_tokens": ROW_TOKENS}} if is_packed else {}
        return {"target": "sat.data.mixture.Mixture", "params": {"weights": WEIGHTS, "sets": sets, **plan}}

    def _speed(self, name: str, run: Path) -> dict[str, float]:
        """Tokens of clips, without padding, by the second; and the share of padding in what was computed."""
        lines = records(run, "train")[10:]  # the first ones warm up
        computed = sum(line["tokens"] for line in lines)
        mean_tokens = sum(weight * num_tokens(FRAMES[kind]) for kind, weight in WEIGHTS.items())
        useful = sum(line["samples"] for line in lines) * mean_tokens if name == "padded" else computed
        room = len(lines) * ROW_TOKENS * self._rows_per_step(run) if name == "packed" else computed
        return {
            "samples": sum(line["samples"] for line in records(run, "train")),
            "padding": 1 - useful / room,
            "tokens_per_second": useful / len(lines) / statistics.median(line["step_time"] for line in lines),
        }

    @staticmethod
    def _rows_per_step(run: Path) -> int:
        return load_yaml(run / TRAINING_CONFIG)["args"]["global_batch_size"]

    def _grades(self, name: str, run: Path) -> dict[str, float]:
        """Shares of samples of held-out captions that show what the caption says."""
        folder = self.out / "samples" / name
        prompts = self.demo / "prompts-heldout.txt"
        if len(list(folder.glob("*.mp4"))) < len(prompts.read_text(encoding="utf-8").splitlines()):
            size = ("args.num_frames=9", "args.sampling_image_size=[32,32]")
            where = (f"args.input_file={prompts}", f"args.output_dir={folder}")
            python("sample_video.py", "--load", run, "--seed", SEED, *where, *size)
        python("tools/grade_demo.py", "--out", folder / "grades", "--row", f"{name}={folder}")
        row = json.loads((folder / "grades" / "metrics.json").read_text(encoding="utf-8"))[name]
        return {key: row[key] for key in ("colour", "shape", "motion")}

    # --- stages ------------------------------------------------------------------------------------------------------

    def compare_stages(self) -> dict[str, Any]:
        """Steps on large clips until the loss from scratch is reached, and both curves as a picture."""
        whole = {"train_iters": self.steps, "global_batch_size": SAMPLES_PER_STEP}
        seen = {
            "eval_interval": SEEN_EVERY,
            "valid_data": [str(self.demo / "shapes-validation")],
            "eval_batch_size": 90,
        }
        data = {"train_data": [str(self.demo / "shapes")]}
        scratch = self._train("scratch", self.steps, {"args": {**whole, **seen, **data}})
        small = {"name": "small", "args": whole, "data": {"params": {"video_size": [16, 16]}}}
        large = {"name": "large", "args": {**whole, **seen, "train_iters": self.steps // 2}}
        overlay = {"args": {"train_iters": None, **data}, "stages": [small, large]}
        staged = self._train("staged", self.steps + self.steps // 2, overlay)
        curves = {
            "from scratch": [(line["step"], line["loss"]) for line in records(scratch, "valid")],
            "after 16 x 16": [(line["step"] - self.steps, line["loss"]) for line in records(staged, "valid")],
        }
        curve(curves, "validation loss at 32 x 32", (720, 360)).save(self.out / "stages.png")
        target = statistics.mean(loss for _, loss in curves["from scratch"][-3:])
        reached = {name: next((step for step, loss in line if loss <= target), None) for name, line in curves.items()}
        return {"target": target, "steps": reached}


TABLE = "{name:<8}{samples:>9.0f}{padding:>10.1%}{tokens_per_second:>12,.0f}{colour:>9.0%}{shape:>8.0%}{motion:>9.0%}"


def main() -> None:
    """Parse, run, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", type=Path, default=Path("runs/demo"), help="what tools/demo.py made")
    parser.add_argument("--out", type=Path, default=Path("runs/recipe"), help="folder for everything")
    parser.add_argument("--steps", type=int, default=600, help="of 48 samples, in each comparison (default 600)")
    parser.add_argument("--processes", type=int, default=2 if (os.cpu_count() or 1) > 1 else 1, help="for training")
    options = parser.parse_args()
    recipe = RecipeDemo(options.demo, options.out, options.steps, options.processes)
    packs = recipe.compare_packs()
    stages = recipe.compare_stages()
    print(f"{'':<8}{'samples':>9}{'padding':>10}{'tokens/s':>12}{'colour':>9}{'shape':>8}{'motion':>9}")
    for name, row in packs.items():
        print(TABLE.format(name=name, **row))
    print(f"packed / padded: {packs['packed']['tokens_per_second'] / packs['padded']['tokens_per_second']:.2f}")
    for name, step in stages["steps"].items():
        print(f"validation loss {stages['target']:.4f} at 32 x 32 {name}: {step or 'not reached'} steps")
    text = json.dumps({"packs": packs, "stages": stages}, indent=1)
    (options.out / "recipe.json").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
