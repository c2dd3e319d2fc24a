"""Time and memory of the VAE beside diffusers' AutoencoderKLCogVideoX with the same weights.

Times: both in one process, alternating, medians. Memory: each case in a process of its own, what a call adds at its
peak to the process that holds the model and has run it once on a tiny clip. fp32 on the CPU. `whole` takes a clip in
one go, `in chunks` as both are used by default; `backward` computes the gradient of every weight, too.

    python benchmarks/vae.py --repeats 5 --threads 2 --json vae.json
    python benchmarks/vae.py --threads 1 --clock cpu            on a machine that others use, too
"""

import argparse
import json
import math
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLCogVideoX
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.side_by_side import CLOCKS, Call, added_memory, in_fresh_process, median_seconds
from sat.compat.diffusers_names import vae_from_diffusers
from sat.vae import Decoder3D, DiagonalGaussianRegularizer, Encoder3D, VideoAutoencoder

CASES = (
    *("encode whole", "encode in chunks", "decode whole", "decode in chunks"),
    *("encode whole + backward", "decode whole + backward"),
)
NAMES = ("ours", "diffusers")
CH_MULT = (1, 2, 2, 4)
FRAMES_PER_CHUNK, LATENTS_PER_CHUNK = 8, 2
WHOLE = 1 << 30
"""Frames per chunk that no clip reaches."""
TINY = (9, 32)
"""Frames and size of the clip that loads what torch loads late."""


def build_diffusers(args: argparse.Namespace) -> AutoencoderKLCogVideoX:
    """diffusers' VAE with random weights."""
    torch.manual_seed(0)
    return AutoencoderKLCogVideoX(
        block_out_channels=tuple(args.ch * factor for factor in CH_MULT),
        layers_per_block=args.num_res_blocks,
        latent_channels=args.z_channels,
    )


def build_ours(args: argparse.Namespace) -> VideoAutoencoder:
    """Our VAE with the same weights."""
    size = {"ch": args.ch, "ch_mult": CH_MULT, "num_res_blocks": args.num_res_blocks, "z_channels": args.z_channels}
    vae = VideoAutoencoder(Encoder3D(**size), Decoder3D(**size), DiagonalGaussianRegularizer())
    vae.load_state_dict(vae_from_diffusers(build_diffusers(args).state_dict(), len(CH_MULT)))
    return vae


def inputs(args: argparse.Namespace, num_frames: int, size: int) -> tuple[Tensor, Tensor]:
    """Pixels (1 T 3 H W) and latents (1 t z h w) of a clip."""
    generator = torch.Generator().manual_seed(1)
    pixels = torch.rand(1, num_frames, 3, size, size, generator=generator) * 2 - 1
    latents = torch.randn(1, (num_frames - 1) // 4 + 1, args.z_channels, size // 8, size // 8, generator=generator)
    return pixels, latents


def our_pass(vae: VideoAutoencoder, case: str, pixels: Tensor, latents: Tensor) -> Callable[[], Tensor]:
    """One case's pass through ours, giving (b c t h w)."""
    passes: dict[str, Callable[[], Tensor]] = {
        "encode whole": lambda: vae.posterior(pixels).moments,
        "encode in chunks": lambda: vae.posterior(pixels, frames_per_chunk=FRAMES_PER_CHUNK).moments,
        "decode whole": lambda: vae.decode(latents),
        "decode in chunks": lambda: vae.decode_chunked(latents, "v1"),
    }
    return lambda: passes[case]().transpose(1, 2)


def diffusers_pass(vae: AutoencoderKLCogVideoX, case: str, pixels: Tensor, latents: Tensor) -> Callable[[], Tensor]:
    """The same through diffusers'."""
    pixels, latents = pixels.transpose(1, 2).contiguous(), latents.transpose(1, 2).contiguous()
    whole = case.endswith("whole")

    def run() -> Tensor:
        vae.num_sample_frames_batch_size = WHOLE if whole else FRAMES_PER_CHUNK
        vae.num_latent_frames_batch_size = WHOLE if whole else LATENTS_PER_CHUNK
        return vae.encode(pixels).latent_dist.parameters if case.startswith("encode") else vae.decode(latents).sample

    return run


def make_call(vae: Any, case: str, clip: tuple[Tensor, Tensor]) -> Call:
    """One case as a function of nothing."""
    make_pass = our_pass if isinstance(vae, VideoAutoencoder) else diffusers_pass
    forward = make_pass(vae, case.removesuffix(" + backward"), *clip)

    def infer() -> Tensor:
        with torch.inference_mode():
            return forward()

    def train() -> Tensor:
        vae.zero_grad(set_to_none=True)
        output = forward()
        output.square().mean().backward()
        return output.detach()

    return train if case.endswith("backward") else infer


def build_call(name: str, case: str, args: argparse.Namespace) -> Call:
    """The call of one case, its model built and run once on a tiny clip."""
    vae = build_ours(args) if name == "ours" else build_diffusers(args)
    make_call(vae, case, inputs(args, *TINY))()
    return make_call(vae, case, inputs(args, args.frames, args.size))


def measure_time(args: argparse.Namespace, case: str) -> dict[str, Any]:
    """Seconds of both, and how far their results are apart."""
    calls = {name: build_call(name, case, args) for name in NAMES}
    results = {name: call() for name, call in calls.items()}  # warms up, too
    difference = (results["ours"] - results["diffusers"]).abs().max() / results["diffusers"].abs().max()
    seconds = median_seconds(calls, args.repeats, args.clock)
    return {
        "case": case,
        **{f"{name}_seconds": value for name, value in seconds.items()},
        "time_ratio": seconds["ours"] / seconds["diffusers"],
        "relative_difference": float(difference),
    }


def measure_memory(args: argparse.Namespace, case: str) -> dict[str, float]:
    """MiB that both add at their peak."""
    options = [f"--{key}={value}" for key, value in settings(args).items()]
    mib = {name: in_fresh_process(__file__, [*options, "--memory-of", name, case]) for name in NAMES}
    return {
        **{f"{name}_mib": value for name, value in mib.items()},
        # A clip so small that the tiny one's memory holds it adds nothing.
        "memory_ratio": mib["ours"] / mib["diffusers"] if mib["diffusers"] else math.nan,
    }


def measure(args: argparse.Namespace, case: str) -> dict[str, Any]:
    """One row of the table."""
    return {**measure_time(args, case), **measure_memory(args, case)}


HEADER = "case                       ours s  diffusers s  ratio  ours MiB  diffusers MiB  ratio   differ"
ROW = (
    "{case:<24} {ours_seconds:8.2f} {diffusers_seconds:12.2f} {time_ratio:6.2f} {ours_mib:9.0f} {diffusers_mib:14.0f} "
    "{memory_ratio:6.2f} {relative_difference:8.1e}"
)


def settings(args: argparse.Namespace) -> dict[str, int]:
    """The numbers of the command line, under their option names."""
    return {key.replace("_", "-"): value for key, value in vars(args).items() if isinstance(value, int)}


def parse_arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ch", type=int, default=64, help="base width (default 64; released models 128)")
    parser.add_argument("--num-res-blocks", type=int, default=1, help="residual blocks per level (default 1)")
    parser.add_argument("--z-channels", type=int, default=16, help="latent channels (default 16)")
    parser.add_argument("--frames", type=int, default=17, help="frames of the clip, 8k + 1 (default 17)")
    parser.add_argument("--size", type=int, default=128, help="rows and columns of the clip (default 128)")
    parser.add_argument("--repeats", type=int, default=5, help="timed calls per case and implementation (default 5)")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default 2)")
    parser.add_argument("--clock", choices=tuple(CLOCKS), default="wall", help="wall, or cpu on a machine in use")
    parser.add_argument("--case", choices=CASES, action="append", help="only this one; may be given several times")
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    parser.add_argument("--memory-of", nargs=2, metavar=("NAME", "CASE"), help="print the MiB of one case and stop")
    args = parser.parse_args(words)
    if args.frames % 8 != 1:
        parser.error(f"--frames is {args.frames}; give 8k + 1: the two cut an even number of latents differently")
    return args


def main() -> None:
    """Measure and print."""
    args = parse_arguments()
    torch.set_num_threads(args.threads)
    if args.memory_of:
        print(added_memory(build_call(*args.memory_of, args)))
        return
    facts = {**settings(args), "clock": args.clock, "torch": torch.__version__, "cores": os.cpu_count()}
    print(", ".join(f"{key} {value}" for key, value in facts.items()))
    print(HEADER)
    rows = []
    for case in args.case or CASES:
        rows.append(measure(args, case))
        print(ROW.format(**rows[-1]), flush=True)
    if args.json:
        args.json.write_text(json.dumps({"settings": facts, "rows": rows}, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
