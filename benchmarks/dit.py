"""Time and memory of the transformer beside diffusers' CogVideoXTransformer3DModel with the same weights.

Times: both in one process, alternating, medians. Memory: each case in a process of its own, what a call adds at its
peak to the process that holds the model and has run it once on a tiny clip. fp32 on the CPU, 5B form (3D RoPE).

    python benchmarks/dit.py --repeats 7 --threads 2 --json dit.json
"""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import CogVideoXTransformer3DModel
from diffusers.models.embeddings import get_3d_rotary_pos_embed
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.side_by_side import CLOCKS, Call, added_memory, in_fresh_process, median_seconds
from sat.cogvideox.mixins import FINAL_NORM_EPSILON
from sat.compat.diffusers_names import dit_from_diffusers
from sat.config import instantiate_from_config

NAMES = ("ours", "diffusers")
CASES = ("forward", "forward + backward")
SAMPLING = "sampling step"
"""Both halves of guidance in one batch; not in the table of this script."""
CHANNELS, TEXT_WIDTH, TIME_EMBED_DIM = 16, 256, 512
TINY_GRID = (1, 2, 2)


def build_diffusers(args: argparse.Namespace) -> CogVideoXTransformer3DModel:
    """diffusers' transformer with random weights."""
    torch.manual_seed(0)
    model = CogVideoXTransformer3DModel(
        num_attention_heads=args.heads,
        attention_head_dim=args.hidden_size // args.heads,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        time_embed_dim=TIME_EMBED_DIM,
        text_embed_dim=TEXT_WIDTH,
        num_layers=args.layers,
        sample_width=2 * args.columns,
        sample_height=2 * args.rows,
        max_text_seq_length=args.text,
        use_rotary_positional_embeddings=True,
    )
    model.norm_out.norm.eps = FINAL_NORM_EPSILON
    return model


def build_ours(args: argparse.Namespace) -> nn.Module:
    """Our transformer with the same weights."""
    head_dim = args.hidden_size // args.heads
    positions = {"hidden_size_head": head_dim, "text_length": args.text}
    modules = {
        "pos_embed_config": {"target": "dit_video_concat.Rotary3DPositionEmbeddingMixin", "params": positions},
        "patch_embed_config": {
            "target": "dit_video_concat.ImagePatchEmbeddingMixin",
            "params": {"text_hidden_size": TEXT_WIDTH},
        },
        "adaln_layer_config": {"target": "dit_video_concat.AdaLNMixin"},
        "final_layer_config": {"target": "dit_video_concat.FinalLayerMixin"},
    }
    params = {
        "hidden_size": args.hidden_size,
        "num_layers": args.layers,
        "num_attention_heads": args.heads,
        "num_frames": 4 * args.frames - 3,
        "latent_height": 2 * args.rows,
        "latent_width": 2 * args.columns,
        "time_embed_dim": TIME_EMBED_DIM,
        "patch_size": [1, 2, 2],
        "in_channels": CHANNELS,
        "out_channels": CHANNELS,
        "modules": modules,
    }
    model = instantiate_from_config({"target": "dit_video_concat.DiffusionTransformer", "params": params})
    left_out = model.load_state_dict(dit_from_diffusers(build_diffusers(args).state_dict()), strict=False)
    assert left_out.missing_keys == ["transformer.position_embeddings.weight"] and not left_out.unexpected_keys
    return model


def make_forward(
    name: str, model: nn.Module, args: argparse.Namespace, grid: tuple[int, int, int], batch: int = 1
) -> Call:
    """One forward pass over a (frames, rows, columns) grid of tokens, giving the prediction (b t c h w)."""
    t, h, w = grid
    generator = torch.Generator().manual_seed(1)
    noisy = torch.randn(batch, t, CHANNELS, 2 * h, 2 * w, generator=generator)
    text = torch.randn(batch, args.text, TEXT_WIDTH, generator=generator)
    timesteps = torch.tensor([500] * batch)
    if name == "ours":
        return lambda: model(noisy, timesteps, text)
    rotary = get_3d_rotary_pos_embed(args.hidden_size // args.heads, ((0, 0), (h, w)), (h, w), t)
    return lambda: model(noisy, text, timesteps, image_rotary_emb=rotary, return_dict=False)[0]


def make_call(name: str, case: str, args: argparse.Namespace, model: nn.Module, grid: tuple[int, int, int]) -> Call:
    """One case as a function of nothing."""
    forward = make_forward(name, model, args, grid, batch=2 if case == SAMPLING else 1)

    def infer() -> Tensor:
        with torch.no_grad():
            return forward()

    def train() -> Tensor:
        model.zero_grad(set_to_none=True)
        prediction = forward()
        prediction.square().mean().backward()
        return prediction.detach()

    return train if case.endswith("backward") else infer


def build_call(name: str, case: str, args: argparse.Namespace) -> Call:
    """The call of one case, its model built and run once on a tiny clip."""
    model: Any = build_ours(args) if name == "ours" else build_diffusers(args)
    if name == "ours" and args.compile:
        model.transformer.compile_layers()
    make_call(name, case, args, model, TINY_GRID)()
    return make_call(name, case, args, model, (args.frames, args.rows, args.columns))


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
    options = [f"--{key}={value}" for key, value in settings(args).items()] + ["--compile"] * args.compile
    mib = {name: in_fresh_process(__file__, [*options, "--memory-of", name, case]) for name in NAMES}
    return {
        **{f"{name}_mib": value for name, value in mib.items()},
        "memory_ratio": mib["ours"] / mib["diffusers"],
    }


def measure(args: argparse.Namespace, case: str) -> dict[str, Any]:
    """One row of the table."""
    return {**measure_time(args, case), **measure_memory(args, case)}


HEADER = "case                  ours s  diffusers s  ratio  ours MiB  diffusers MiB  ratio   differ"
ROW = (
    "{case:<18} {ours_seconds:9.3f} {diffusers_seconds:12.3f} {time_ratio:6.2f} {ours_mib:9.0f} {diffusers_mib:14.0f} "
    "{memory_ratio:6.2f} {relative_difference:8.1e}"
)


def settings(args: argparse.Namespace) -> dict[str, int]:
    """The numbers of the command line, under their option names."""
    return {key.replace("_", "-"): value for key, value in vars(args).items() if type(value) is int}


def add_options(parser: argparse.ArgumentParser) -> None:
    """Sizes of the model and the clip, and how they are measured."""
    parser.add_argument("--hidden-size", type=int, default=512, help="width (default 512)")
    parser.add_argument("--layers", type=int, default=6, help="layers (default 6)")
    parser.add_argument("--heads", type=int, default=8, help="attention heads (default 8)")
    parser.add_argument("--frames", type=int, default=5, help="frames of the token grid (default 5)")
    parser.add_argument("--rows", type=int, default=20, help="rows of the token grid (default 20)")
    parser.add_argument("--columns", type=int, default=20, help="columns of the token grid (default 20)")
    parser.add_argument("--text", type=int, default=64, help="text tokens (default 64)")
    parser.add_argument("--repeats", type=int, default=7, help="timed calls per case and implementation (default 7)")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default 2)")
    parser.add_argument("--clock", choices=tuple(CLOCKS), default="wall", help="wall, or cpu on a machine in use")
    parser.add_argument("--json", type=Path, help="also write the rows to this file")


def parse_arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    parser.add_argument("--compile", action="store_true", help="ours with compiled layers, as args.compile makes them")
    parser.add_argument("--memory-of", nargs=2, metavar=("NAME", "CASE"), help="print the MiB of one case and stop")
    return parser.parse_args(words)


def main() -> None:
    """Measure and print."""
    args = parse_arguments()
    torch.set_num_threads(args.threads)
    if args.memory_of:
        print(added_memory(build_call(*args.memory_of, args)))
        return
    tokens = args.frames * args.rows * args.columns + args.text
    facts = {
        **settings(args),
        "compile": args.compile,
        "clock": args.clock,
        "tokens": tokens,
        "torch": torch.__version__,
        "cores": os.cpu_count(),
    }
    print(", ".join(f"{key} {value}" for key, value in facts.items()))
    print(HEADER)
    rows = []
    for case in CASES:
        rows.append(measure(args, case))
        print(ROW.format(**rows[-1]), flush=True)
    if args.json:
        args.json.write_text(json.dumps({"settings": facts, "rows": rows}, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
