"""Memory and time of one forward and backward pass by what layers keep for backward (`args.activations`).

Memory: the bytes of tensors that are alive at the peak, beyond weights and gradients. Times take turns; medians.
`offload` on a CPU copies to the same memory, so there it shows its cost alone.

    python benchmarks/activation_memory.py --clock cpu --threads 1
    python benchmarks/activation_memory.py --device cuda --hidden-size 3072 --heads 48 --layers 42 --frames 13 \\
        --rows 30 --columns 45 --text 226
"""

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.dit import CHANNELS, TEXT_WIDTH, TINY_GRID, add_options, build_ours, settings
from benchmarks.side_by_side import Call, median_seconds
from sat.model.activations import CHOICES, Activations
from sat.training.planning.dry import Watch

NAMES = tuple(choice.replace("_N", "_2") for choice in CHOICES)


def build_call(name: str, args: argparse.Namespace, grid: tuple[int, int, int], network: Any) -> Call:
    """A forward and backward pass that keeps what that choice says."""
    t, h, w = grid
    generator = torch.Generator().manual_seed(1)
    noisy = torch.randn(1, t, CHANNELS, 2 * h, 2 * w, generator=generator).to(args.device, args.dtype)
    text = torch.randn(1, args.text, TEXT_WIDTH, generator=generator).to(args.device, args.dtype)
    timesteps = torch.tensor([500], device=args.device)

    def train() -> None:
        network.transformer.activations = Activations.parse(name)
        network.zero_grad(set_to_none=False)  # gradients stay allocated: they are not activations
        network(noisy, timesteps, text).square().mean().backward()
        if args.device == "cuda":
            torch.cuda.synchronize()

    return train


def build_network(args: argparse.Namespace) -> Any:
    """The network, with gradients in place."""
    network = build_ours(args).to(args.device, args.dtype).train()
    build_call("keep", args, TINY_GRID, network)()
    return network


def peak_mib(call: Call, device: str) -> float:
    """MiB of tensors that a call has alive at most, beyond those before it."""
    if device == "cpu":
        with Watch("cpu") as watch:
            call()
        return watch.peak / 2**20
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    """A row of the table for each choice."""
    network = build_network(args)
    grid = (args.frames, args.rows, args.columns)
    calls = {name: build_call(name, args, grid, network) for name in NAMES}
    mib = {name: peak_mib(call, args.device) for name, call in calls.items()}  # warms up, too
    seconds = median_seconds(calls, args.repeats, args.clock)
    return [
        {
            "activations": name,
            "mib": mib[name],
            "memory_ratio": mib[name] / mib["keep"],
            "seconds": seconds[name],
            "time_ratio": seconds[name] / seconds["keep"],
        }
        for name in NAMES
    ]


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="cpu in fp32, or cuda in bf16")
    args = parser.parse_args()
    args.dtype = torch.float32 if args.device == "cpu" else torch.bfloat16
    return args


def main() -> None:
    """Measure and print."""
    args = parse_arguments()
    torch.set_num_threads(args.threads)
    tokens = args.frames * args.rows * args.columns + args.text
    facts = {**settings(args), "tokens": tokens, "torch": torch.__version__, "cores": os.cpu_count()}
    print(", ".join(f"{key} {value}" for key, value in facts.items()))
    print(f"{'activations':<18}{'MiB':>8}{'ratio':>8}{'seconds':>10}{'ratio':>8}")
    rows = measure(args)
    for row in rows:
        print("{activations:<18}{mib:>8.0f}{memory_ratio:>8.2f}{seconds:>10.3f}{time_ratio:>8.2f}".format(**row))
    if args.json:
        args.json.write_text(json.dumps({"settings": facts, "rows": rows}, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
