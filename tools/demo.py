"""The main job in small: from nothing to videos that a model trained here made from sentences, and their grades.

    python tools/demo.py --out runs/demo

Makes a set of clips of moving shapes and a tiny T5, trains the VAE and the transformer, samples captions that training
has seen and captions that it has not, and grades the videos with a checker that has no learned part. Every step is one
command that is printed before it runs; a step whose result is there already is passed over, videos only if the same
weights made them. Exit code 1 if the grades are below the bars.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from sat.weights.whole import LATEST, MANIFEST, checksum

ROOT = Path(__file__).resolve().parent.parent
SEED = 42
BARS = {"VAE PSNR (dB)": 28.0, "colour and motion": 0.90, "shuffled control": 0.35}
VALIDATION_CLIPS = 90
SAMPLES_PER_CAPTION = 2
SHEET_ROWS = 9


def run(*words: object, is_read: bool = False) -> str:
    """Run a command from the project's root, and read what it prints; stop with its exit code if it fails."""
    text = [str(word) for word in words]
    print("\n$ " + " ".join(text), file=sys.stderr, flush=True)
    done = subprocess.run(text, cwd=ROOT, stdout=subprocess.PIPE if is_read else None, text=True)
    if done.returncode:
        sys.exit(done.returncode)
    return done.stdout or ""


def python(script: str, *words: object) -> None:
    """Run one of the project's scripts."""
    run(sys.executable, script, *words)


def launch(num_processes: int, *words: object, is_read: bool = False) -> str:
    """Run one of the project's scripts in some processes."""
    launcher = (
        [sys.executable]
        if num_processes == 1
        else [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", num_processes]
    )
    return run(*launcher, *words, is_read=is_read)


def finished_run(folder: Path, steps: int) -> Path | None:
    """The newest run directory under `folder` whose last checkpoint is of that step."""
    runs = sorted(folder.glob("*/latest"), key=lambda latest: latest.stat().st_mtime)
    done = [latest.parent for latest in runs if latest.read_text(encoding="utf-8").strip() == str(steps)]
    return done[-1] if done else None


def trained(folder: Path, steps: int, num_processes: int, *words: object) -> Path:
    """A training run of so many steps under `folder`, unless one is there already; returns its run directory."""
    if finished_run(folder, steps) is None:
        launch(num_processes, "train_video.py", *words, "--seed", SEED, f"args.save={folder}")
    done = finished_run(folder, steps)
    if done is None:
        sys.exit(f"{folder} has no checkpoint of step {steps}: training was stopped; start again")
    return done


MADE_OF = "made_of.json"
"""In a folder of videos: the checksums and settings that they were made with."""


def checkpoint_mark(run_dir: Path) -> dict[str, str]:
    """What tells the newest checkpoint of a run from any other."""
    step = (run_dir / LATEST).read_text(encoding="utf-8").strip()
    return {"step": step, "manifest": checksum(run_dir / step / MANIFEST)}


def is_made_of(folder: Path, made_of: Mapping[str, Any], num_videos: int) -> bool:
    """Whether a folder holds so many videos that were made of this; if not, none is left in it."""
    try:
        found = json.loads((folder / MADE_OF).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        found = None
    if found == made_of and len(list(folder.glob("*.mp4"))) == num_videos:
        return True
    for file in (*folder.glob("*.mp4"), folder / MADE_OF):
        file.unlink(missing_ok=True)
    return False


def note_made_of(folder: Path, made_of: Mapping[str, Any]) -> None:
    """Say what the videos in a folder were made of, once they are all there."""
    (folder / MADE_OF).write_text(json.dumps(made_of, indent=1), encoding="utf-8")


class Demo:
    """The steps, in order; each leaves its result under `out`."""

    def __init__(self, out: Path, steps: dict[str, int], num_clips: int, num_processes: int) -> None:
        self.out = out
        self.num_clips = num_clips
        self.steps = steps
        self.num_processes = num_processes
        self.shapes, self.validation = out / "shapes", out / "shapes-validation"
        self.t5, self.vae = out / "t5-tiny", out / "vae" / "3d-vae.pt"
        self.parts = (
            f"model.first_stage_config.params.ckpt_path={self.vae}",
            f"model.conditioner_config.params.emb_models.0.params.model_dir={self.t5}",
        )

    def make_data(self) -> None:
        python("tools/make_demo_data.py", "--out", self.shapes, "--clips", self.num_clips, "--seed", 0)
        python("tools/make_demo_data.py", "--out", self.validation, "--clips", VALIDATION_CLIPS, "--seed", 1)
        python("tools/make_tiny_t5.py", "--captions", self.shapes / "manifest.jsonl", "--out", self.t5)

    def _train(self, name: str, *words: object) -> Path:
        steps = self.steps[name]
        options = (f"args.train_iters={steps}", f"args.save_interval={steps}")
        return trained(self.out / name, steps, self.num_processes, *words, *options)

    def train_vae(self) -> None:
        data = [f"args.train_data=[{self.shapes}]", f"args.valid_data=[{self.validation}]"]
        images = self._train("vae-images", "--base", "configs/demo_vae.yaml", "configs/demo_vae_images.yaml", *data)
        clips = self._train("vae-clips", "--base", "configs/demo_vae.yaml", *data, f"args.load={images}")
        python("tools/export_vae.py", clips, self.vae)

    def train_transformer(self) -> Path:
        data = (f"args.train_data=[{self.shapes}]", f"args.cache_dir={self.out / 'cache'}")
        base = ("--base", "configs/demo.yaml", *data)
        report = launch(self.num_processes, "tools/precompute.py", *base, *self.parts, is_read=True)
        self.parts = (*self.parts, f"model.scale_factor={json.loads(report)['scale_factor']:.4f}")
        return self._train("transformer", *base, *self.parts)

    def sample(self, model: Path) -> None:
        lines = (self.shapes / "heldout.jsonl").read_text(encoding="utf-8").splitlines()
        held_out = [json.loads(line)["caption"] for line in lines]
        lines = (self.shapes / "manifest.jsonl").read_text(encoding="utf-8").splitlines()
        seen = list(dict.fromkeys(json.loads(line)["caption"] for line in lines))[: len(held_out)]
        no_guidance = "sgm.modules.diffusionmodules.guiders.VanillaCFG"
        for name, captions, more in (
            ("seen", seen, ()),
            ("heldout", held_out, ()),
            (
                "notext",
                held_out,
                (f"model.sampler_config.params.guider_config={{target: {no_guidance}, params: {{scale: 0}}}}",),
            ),
        ):
            folder, prompts = self.out / "samples" / name, self.out / f"prompts-{name}.txt"
            made_of = {
                "model": checkpoint_mark(model),
                "vae": checksum(self.vae),
                "captions": captions,
                "more": [*more],
            }
            if is_made_of(folder, made_of, SAMPLES_PER_CAPTION * len(captions)):
                continue
            prompts.write_text("\n".join(captions * SAMPLES_PER_CAPTION) + "\n", encoding="utf-8")
            launch(
                self.num_processes,
                "sample_video.py",
                "--load",
                model,
                "--seed",
                SEED,
                f"args.input_file={prompts}",
                f"args.output_dir={folder}",
                *more,
            )
            note_made_of(folder, made_of)
        self._reconstruct()

    def _reconstruct(self) -> None:
        folder, made_of = self.out / "reconstructions", {"vae": checksum(self.vae), "parts": [*self.parts]}
        if not is_made_of(folder, made_of, VALIDATION_CLIPS):
            python(
                "tools/reconstruct.py",
                "--base",
                "configs/demo.yaml",
                "--data",
                self.validation,
                "--out",
                folder,
                "--clips",
                VALIDATION_CLIPS,
                *self.parts,
            )
            note_made_of(folder, made_of)

    def report(self, model: Path) -> bool:
        """Print the table, write the pictures; whether every bar is reached."""
        samples, report = self.out / "samples", self.out / "report"
        python(
            "tools/grade_demo.py", "--out", report,
            "--row", f"real clips={self.validation / 'manifest.jsonl'}",
            "--row", f"VAE reconstructions={self.out / 'reconstructions'}",
            "--row", f"samples, seen captions={samples / 'seen'}",
            "--row", f"samples, held-out captions={samples / 'heldout'}",
            "--shuffled", f"control: shuffled captions={samples / 'heldout'}",
            "--row", f"control: no text={samples / 'notext'}",
        )  # fmt: skip
        clips = sorted((samples / "heldout").glob("*.mp4"))
        shown = clips[:: max(len(clips) // SHEET_ROWS, 1)]  # walks through all held-out combinations
        python("tools/demo_report.py", "sheet", "--out", report / "sheet.png", "--scale", 2, *shown)
        python(
            "tools/demo_report.py",
            "curve",
            "--out",
            report / "loss.png",
            "--key",
            "loss",
            f"transformer={model / 'metrics.jsonl'}",
        )
        psnr = json.loads((self.out / "reconstructions" / "summary.json").read_text(encoding="utf-8"))["psnr"]
        grades = json.loads((report / "metrics.json").read_text(encoding="utf-8"))
        print(f"\nVAE PSNR {psnr:.1f} dB on clips that it was not trained on")
        print(f"look at {report / 'sheet.png'}, {report / 'loss.png'} and the videos in {samples / 'heldout'}")
        return self._judge(psnr, grades.get("rows", grades))

    def _judge(self, psnr: float, rows: dict[str, dict[str, float]]) -> bool:
        wanted = BARS["colour and motion"]
        below = [f"VAE PSNR {psnr:.1f} dB < {BARS['VAE PSNR (dB)']}"] if psnr < BARS["VAE PSNR (dB)"] else []
        for row in ("samples, seen captions", "samples, held-out captions"):
            below += [
                f"{row}: {key} {rows[row][key]:.0%} < {wanted:.0%}"
                for key in ("colour", "motion")
                if rows[row][key] < wanted
            ]
        control = rows["control: shuffled captions"]
        below += [
            f"shuffled captions: {key} {control[key]:.0%}"
            for key in ("colour", "motion")
            if control[key] > BARS["shuffled control"]
        ]
        print("every bar is reached" if not below else "below the bar: " + "; ".join(below))
        return not below


def main() -> None:
    """Parse and run all steps."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="folder for everything (default runs/demo)")
    parser.add_argument("--clips", type=int, default=3000, help="drawn for training (default 3000)")
    parser.add_argument("--vae-image-steps", type=int, default=350, help="on single frames (default 350)")
    parser.add_argument("--vae-clip-steps", type=int, default=200, help="on clips (default 200)")
    parser.add_argument("--steps", type=int, default=450, help="of the transformer (default 450)")
    parser.add_argument("--processes", type=int, default=2 if (os.cpu_count() or 1) > 1 else 1, help="at once")
    options = parser.parse_args()
    started = time.perf_counter()
    steps = {"vae-images": options.vae_image_steps, "vae-clips": options.vae_clip_steps, "transformer": options.steps}
    demo = Demo(options.out, steps, options.clips, options.processes)
    demo.make_data()
    demo.train_vae()
    model = demo.train_transformer()
    demo.sample(model)
    is_good = demo.report(model)
    print(f"{(time.perf_counter() - started) / 60:.1f} minutes")
    sys.exit(not is_good)


if __name__ == "__main__":
    main()
