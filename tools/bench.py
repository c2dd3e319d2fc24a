"""Measure this machine, then this project on it: against diffusers on the same weights, and against the ideal.

The ideal is the formula's operations at the rates that products and attention reach here. What is compared runs in one
process in turns, and its figures are medians; rates of the machine, and growth with tokens, are the best of some
repeats.
Other work on the machine spoils them all: there is a warning where it is busy at the start.

    python tools/bench.py --quick                                  about five minutes on two cores
    python tools/bench.py --preset cogvideox_5b                    a released model's size; needs a GPU's memory
    python tools/bench.py --quick --threads 1 --clock cpu          on a machine that others use, too
    python tools/bench.py --quick --against benchmarks/results/cpu-1-thread-quick.json
"""

import argparse
import datetime
import json
import math
import os
import platform
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that it runs from a checkout that is not installed

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks import dit, vae
from benchmarks.side_by_side import CLOCKS
from sat.cogvideox.flops import Clip, TransformerFlops
from sat.config import load_config
from sat.mpu.collectives import all_reduce_bytes
from sat.training.args import deepspeed_config, train_args
from sat.training.devices import Clock, matrix_tflops, seconds_of
from sat.training.preview import clip_sizes
from tests.ranks import run_ranks
from tools.demo_report import curve

ROOT = Path(__file__).resolve().parents[1]
Figures = dict[str, float]
"""Name -> seconds, a rate or a ratio; the name ends in its unit."""

BACKENDS = {
    "cpu": (SDPBackend.FLASH_ATTENTION, SDPBackend.MATH),
    "cuda": (
        SDPBackend.FLASH_ATTENTION,
        SDPBackend.CUDNN_ATTENTION,
        SDPBackend.EFFICIENT_ATTENTION,
        SDPBackend.MATH,
    ),
}
HEADS, HEAD_DIM = 8, 64
LENGTHS = (500, 1000, 2000, 4000, 8000)
COPIED_BYTES = 1 << 28
SUMMED_NUMBERS = 1 << 21
MOST_SCORES = 1 << 28
"""Numbers of a matrix of scores up to which attention is also measured by explicit ones."""

DIT = ("--hidden-size=512", "--layers=6", "--heads=8")
"""About 2,000 tokens, 25 M parameters."""
NARROW = ("--hidden-size=64", "--layers=6", "--heads=2")
VAE = ("--ch=64", "--frames=17", "--size=128")
VAE_CASES = ("encode whole", "decode whole")
DEMO = (
    *(
        f"model.network_config.params.{key}"
        for key in (
            *("hidden_size=128", "num_layers=6", "num_attention_heads=4", "time_embed_dim=128", "patch_size=[1,1,1]"),
            *("latent_height=4", "latent_width=4"),
        )
    ),
    *("data.params.height=4", "data.params.width=4", "data.params.num_samples=1000"),
    *("deepspeed.train_micro_batch_size_per_gpu=24", "args.global_batch_size=48", "args.eval_interval=null"),
    *("deepspeed.zero_optimization.stage=0", "deepspeed.optimizer={type: sat.ops.Muon, params: {lr: 0.02}}"),
)
"""The demo's transformer (configs/demo.yaml) on latents that are drawn."""


# --- this machine ----------------------------------------------------------------------------------------------------


def machine(device: torch.device, lengths: Sequence[int], repeats: int, clock: Clock) -> Figures:
    """Rates of products, copies, attention by back end and length, and sums over two processes."""
    figures = {
        f"matrix {precision} TFLOP/s": matrix_tflops(device, precision, repeats=repeats, clock=clock)  # type: ignore[arg-type]
        for precision in ("fp32", "bf16")
    }
    block = torch.empty(COPIED_BYTES // 4, device=device)
    other = torch.empty_like(block)
    figures["copy GB/s"] = 2 * COPIED_BYTES / seconds_of(lambda: other.copy_(block), device, repeats, clock) / 1e9
    for length in lengths:
        figures.update(attention(device, length, repeats, clock))
    if device.type == "cpu":
        figures["all-reduce over 2 processes GB/s"] = min(run_ranks(_sum_rate, 2, repeats))
    return figures


def attention(device: torch.device, length: int, repeats: int, clock: Clock) -> Figures:
    """Forward, and forward + backward, of every back end that takes the length."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    shape = (1, HEADS, length, HEAD_DIM)
    query, key, value = (torch.randn(shape, device=device, dtype=dtype, requires_grad=True) for _ in range(3))
    flops = 4 * HEADS * length**2 * HEAD_DIM / 1e12

    def forward() -> torch.Tensor:
        return F.scaled_dot_product_attention(query, key, value)

    def both() -> None:
        forward().sum().backward()

    figures = {}
    for backend in BACKENDS[device.type]:
        if backend is SDPBackend.MATH and HEADS * length**2 > MOST_SCORES:
            continue
        name = f"attention {backend.name.removesuffix('_ATTENTION').lower()} {length} tokens"
        try:
            with sdpa_kernel(backend):
                with torch.no_grad():
                    figures[f"{name}, forward TFLOP/s"] = flops / seconds_of(forward, device, repeats, clock)
                figures[f"{name}, both TFLOP/s"] = 3 * flops / seconds_of(both, device, repeats, clock)
        except RuntimeError as error:  # a back end that this device or torch does not have
            print(f"{name}: {str(error).splitlines()[0]}", file=sys.stderr)
    return figures


def _sum_rate(rank: int, repeats: int) -> float:
    """1e9 bytes a second that a rank sends while tensors are summed over all."""
    block = torch.zeros(SUMMED_NUMBERS)
    seconds = seconds_of(lambda: dist.all_reduce(block), torch.device("cpu"), repeats)
    return float(all_reduce_bytes(4 * SUMMED_NUMBERS, dist.get_world_size())) / seconds / 1e9


# --- this project ----------------------------------------------------------------------------------------------------


def networks(options: argparse.Namespace, rates: Figures) -> Figures:
    """Transformer against diffusers', and against the ideal."""
    figures: Figures = {}
    sizes = {options.preset: preset_words(options.preset)} if options.preset else {"512 wide": DIT, "64 wide": NARROW}
    for size, words in sizes.items():
        args = dit.parse_arguments([*words, *_common(options)])
        for case in (*dit.CASES, dit.SAMPLING):
            measured = dit.measure_time(args, case)
            figures.update(_against_diffusers(f"{size}, {case}", measured))
            if case != dit.SAMPLING:
                figures[f"{size}, {case}, ideal s"] = ideal(args, rates, case.endswith("backward"))
                if not options.quick:
                    figures[f"{size}, {case}, memory / diffusers"] = dit.measure_memory(args, case)["memory_ratio"]
    return figures


def autoencoders(options: argparse.Namespace) -> Figures:
    """VAE against diffusers'."""
    figures: Figures = {}
    args = vae.parse_arguments([*VAE, *_common(options)])
    for case in VAE_CASES:
        figures.update(_against_diffusers(f"VAE, {case}", vae.measure_time(args, case)))
        figures[f"VAE, {case}, memory / diffusers"] = vae.measure_memory(args, case)["memory_ratio"]
    return figures


def _against_diffusers(name: str, measured: dict[str, Any]) -> Figures:
    return {
        f"{name} s": measured["ours_seconds"],
        f"{name}, diffusers s": measured["diffusers_seconds"],
        f"{name}, time / diffusers": measured["time_ratio"],
    }


def _common(options: argparse.Namespace) -> list[str]:
    return [f"--repeats={options.repeats}", f"--threads={options.threads}", f"--clock={options.clock}"]


def preset_words(name: str) -> list[str]:
    """A released model's size as options of benchmarks/dit.py."""
    config = load_config([ROOT / "configs" / f"{name}.yaml"])
    network, clip = config["model"]["network_config"]["params"], clip_sizes(config)
    assert clip is not None
    sizes = {
        "hidden-size": network["hidden_size"],
        "layers": network["num_layers"],
        "heads": network["num_attention_heads"],
        **dict(zip(("frames", "rows", "columns"), clip.grid)),
        "text": clip.text_length,
    }
    return [f"--{key}={value}" for key, value in sizes.items()]


def ideal(args: argparse.Namespace, rates: Figures, backward: bool) -> float:
    """Seconds of the formula's operations at the rates of this machine, attention at the best back end's."""
    flops, clips = TransformerFlops(dit.build_ours(args)), [Clip(args.text, args.frames * args.rows * args.columns)]
    work = flops.training(clips) if backward else flops.forward(clips)
    attended = best_attention(rates, clips[0].length, "both" if backward else "forward")
    return work.products / rates["matrix fp32 TFLOP/s"] / 1e12 + work.attention / attended / 1e12


def best_attention(rates: Figures, length: int, passes: str) -> float:
    """TFLOP/s of the fastest back end at the measured length that is nearest."""
    found: dict[int, float] = {}
    for name, value in rates.items():
        if name.startswith("attention ") and name.endswith(f"{passes} TFLOP/s"):
            tokens = int(name.split()[2])
            found[tokens] = max(found.get(tokens, 0.0), value)
    return found[min(found, key=lambda tokens: abs(tokens - length))]


def training_step(options: argparse.Namespace) -> Figures:
    """A step of the demo's transformer under DeepSpeed, and what of it is forward and backward."""
    whole, passes = run_ranks(_time_step, 1, options.repeats, options.threads, options.clock, timeout=600.0)[0]
    return {"demo, training step s": whole, "demo, share of forward and backward": passes / whole}


def _time_step(rank: int, repeats: int, threads: int, clock: str) -> tuple[float, float]:
    from sat.mpu.launch import read_launch
    from sat.mpu.state import set_parallel_state
    from sat.training.data import TrainingData
    from sat.training.layout import build_parallel_state
    from sat.training.step import Stepper
    from sat.training.systems import build_system

    torch.set_num_threads(threads)
    config = load_config([ROOT / "configs" / "tiny.yaml"], DEMO)
    args, launch = train_args(config), read_launch()
    parallel = build_parallel_state(config, args, "cpu")
    set_parallel_state(parallel)
    section = deepspeed_config(config, args, 1, "cpu")
    system = build_system(config, args)
    stepper = Stepper(system.trained, section, launch, parallel)
    batches = TrainingData(config, args, 42, 48, section.micro_batch_size, 0, 1).batches(0)
    passes = 0.0

    def step() -> None:
        nonlocal passes
        for _ in range(section.grad_accum_steps):
            inputs = system.training_inputs(next(batches), 42, 48)
            passes += seconds_of_one(lambda inputs=inputs: stepper.accumulate(inputs), CLOCKS[clock])  # type: ignore[misc]
        stepper.update(1e-4)

    step()
    passes = 0.0
    whole = sum(seconds_of_one(step, CLOCKS[clock]) for _ in range(repeats))
    return whole / repeats, passes / repeats


def seconds_of_one(call: Callable[[], object], clock: Clock) -> float:
    """Seconds of one call of nothing, on a CPU."""
    start = clock()
    call()
    return clock() - start


# --- growth with tokens ----------------------------------------------------------------------------------------------


def growth(options: argparse.Namespace, rates: Figures, lengths: Sequence[int]) -> Figures:
    """Forward and backward of two layers of 512 over clips of more and more tokens, and what the formula says."""
    figures: Figures = {}
    calls = {}
    for length in lengths:
        rows = round(length / 20) - 1
        words = [*DIT[:1], "--layers=2", "--heads=8", "--frames=1", f"--rows={rows}", "--columns=20", "--text=20"]
        args = dit.parse_arguments([*words, *_common(options)])
        calls[f"{length} tokens s"] = dit.make_call(
            "ours", "forward + backward", args, dit.build_ours(args), (1, rows, 20)
        )
        figures[f"{length} tokens, formula s"] = ideal(args, rates, backward=True)
    for _ in range(options.repeats + 1):  # in turns: a busy spell meets all
        for name, call in calls.items():
            figures[name] = min(figures.get(name, math.inf), seconds_of_one(call, CLOCKS[options.clock]))
    return figures


def points(figures: Figures, ending: str) -> list[tuple[float, float]]:
    """(tokens, seconds) of what `growth` measured."""
    return [
        (int(name.split()[0]), value)
        for name, value in figures.items()
        if name.split()[0].isdigit() and name.endswith(ending)
    ]


def fitted(figures: Figures) -> list[tuple[float, float]]:
    """The formula's seconds times the one factor that fits the measured ones best (geometric mean)."""
    measured, formula = points(figures, "tokens s"), points(figures, "formula s")
    ratios = torch.tensor([own[1] / ideal[1] for own, ideal in zip(measured, formula)], dtype=torch.float64)
    factor = float(ratios.log().mean().exp())
    return [(tokens, factor * seconds) for tokens, seconds in formula]


# --- results ---------------------------------------------------------------------------------------------------------


def describe(options: argparse.Namespace) -> dict[str, Any]:
    """What was measured, where and when."""
    is_cuda = torch.cuda.is_available()
    import diffusers

    return {
        "device": torch.cuda.get_device_name() if is_cuda else _processor(),
        "cores": os.cpu_count(),
        "threads": options.threads,
        "clock": options.clock,
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "python": platform.python_version(),
        "date": datetime.date.today().isoformat(),
        "quick": options.quick,
        "preset": options.preset,
        "load": round(os.getloadavg()[0], 2),
    }


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def lines_of(figures: Figures, before: Figures) -> Iterator[str]:
    """The table; beside each figure that was measured before, how it has changed."""
    for name, value in figures.items():
        then = before.get(name)
        change = "" if not then else f"   before {then:.4g}, x {value / then:.2f}"
        yield f"{name:<58} {value:>10.4g}{change}"


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measure, print as it goes, and return what is written."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    before = json.loads(options.against.read_text(encoding="utf-8"))["figures"] if options.against else {}
    facts = describe(options)
    print(", ".join(f"{key} {value}" for key, value in facts.items()))
    if options.clock == "wall" and os.getloadavg()[0] > 0.25 * (os.cpu_count() or 1):
        print("the machine is busy with other work: these figures are not to be quoted", file=sys.stderr)
    lengths = LENGTHS[:-1] if options.quick else LENGTHS
    figures: Figures = {}

    def add(found: Figures) -> None:
        print("\n".join(lines_of(found, before)), flush=True)
        figures.update(found)

    add(machine(device, lengths, options.repeats, CLOCKS[options.clock]))
    add(networks(options, figures))
    add(autoencoders(options))
    add(training_step(options))
    add(growth(options, figures, lengths))
    off = max(abs(own[1] / line[1] - 1) for own, line in zip(points(figures, "tokens s"), fitted(figures)))
    add({"growth, furthest from the formula": off})
    return {"facts": facts, "figures": figures}


def parse_arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer repeats and lengths, memory of the VAE only")
    presets = sorted(path.stem for path in (ROOT / "configs").glob("cogvideox*.yaml"))
    parser.add_argument("--preset", choices=presets, help="the transformer at a released model's size")
    parser.add_argument("--against", type=Path, help="a JSON file of an earlier run, to compare with")
    parser.add_argument("--json", type=Path, help="file to write, and a plot of the same name in .png")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="CPU threads (default: all cores)")
    parser.add_argument(
        "--clock", choices=tuple(CLOCKS), default="wall", help="cpu on a machine that others use, with --threads 1"
    )
    options = parser.parse_args(words)
    options.repeats = 5 if options.quick else 9
    return options


def main() -> None:
    """Measure, print and write."""
    options = parse_arguments()
    torch.set_num_threads(options.threads)
    results = run(options)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        figures = results["figures"]
        series = {"measured": points(figures, "tokens s"), "formula, scaled": fitted(figures)}
        curve(series, "seconds, forward + backward", (720, 360), "tokens").save(options.json.with_suffix(".png"))


if __name__ == "__main__":
    main()
