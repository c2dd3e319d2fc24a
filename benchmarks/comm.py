"""Bytes that a rank sends for one layer, under each way to share it out: by formula, and as counted.

By formula for released models at their clip size in bf16, for rank 0, which has the most heads; counted for a tiny
network whose collectives run on gloo in as many processes as the layout has, beside the formulas at its sizes.

    python benchmarks/comm.py --ranks 8
    python benchmarks/comm.py --base my_model.yaml --ranks 16 --no-count
"""

import argparse
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from sat.cogvideox.traffic import LayerSizes, Sent, layer_traffic
from sat.config import ConfigNode, load_config
from sat.mpu.traffic import zero_bytes
from sat.training.preview import clip_sizes
from tests.parallel.layouts import LAYOUTS
from tests.parallel.test_traffic import compare_layers
from tests.ranks import run_ranks

ROOT = Path(__file__).resolve().parent.parent
RELEASED = ("cogvideox_2b", "cogvideox_5b", "cogvideox1.5_5b")
MB = 1e6
BF16_BYTES = 2

HEADER = "  MB a layer and clip               forward backward     both  over tp  all layers"
ROW = "  {:32} {:8.1f} {:8.1f} {:8.1f} {:8.1f} {:11.0f}"
COUNTED = """
tiny network, 52 tokens, 48 wide, 3 heads: bytes a layer of rank 0, counted and by formula
                                     forward  backward     forward  backward"""
COUNTED_ROW = "  {:32} {:9.1f} {:9.1f}   {:9.1f} {:9.1f}"


def layouts(ranks: int) -> dict[str, dict[str, Any]]:
    """Ways to share a layer out over that many ranks."""
    half = ranks // 2
    found: dict[str, dict[str, Any]] = {
        f"tp {ranks}": {"tp": ranks},
        f"tp {ranks} + sp": {"tp": ranks, "sequence_parallel": True},
        f"ulysses {ranks}": {"ulysses": ranks},
        f"ring {ranks}": {"ring": ranks},
    }
    if ranks % 2 == 0 and half > 1:
        found[f"ulysses {half} x ring 2"] = {"ulysses": half, "ring": 2}
        found[f"tp 2 + sp x ulysses {half}"] = {"tp": 2, "sequence_parallel": True, "ulysses": half}
        found[f"tp 2 + sp x ring {half}"] = {"tp": 2, "sequence_parallel": True, "ring": half}
    return found


def layer_sizes(config: ConfigNode, **layout: Any) -> LayerSizes:
    """The layer of a model at its clip size, one clip in bf16, on a layout."""
    network, clip = config["model"]["network_config"]["params"], clip_sizes(config)
    assert clip is not None
    return LayerSizes(
        batch=1,
        tokens=clip.video_tokens + clip.text_length,
        hidden_size=network["hidden_size"],
        num_heads=network["num_attention_heads"],
        time_embed_dim=network.get("time_embed_dim") or network["hidden_size"],
        element_bytes=BF16_BYTES,
        **layout,
    )


def print_model(base: str, ranks: int) -> None:
    """The table of one model's layer."""
    config = load_config([base])
    whole, num_layers = layer_sizes(config), config["model"]["network_config"]["params"]["num_layers"]
    width = whole.hidden_size
    print(
        f"\n{Path(base).stem}: {clip_sizes(config)}; {width} wide, {whole.num_heads} heads, {num_layers} layers, bf16"
    )
    print(HEADER)
    for name, layout in layouts(ranks).items():
        parts = layer_traffic(layer_sizes(config, **layout))
        sent = sum(parts.values(), Sent())
        over_tp = sum((part for where, part in parts.items() if where.endswith("over tp")), Sent())
        columns = (sent.forward, sent.backward, sent.total, over_tp.total, num_layers * sent.total)
        print(ROW.format(name, *(float(value) / MB for value in columns)))
    weights = 12 * num_layers * width * (width + whole.time_embed_dim) * BF16_BYTES
    steps = [f"ZeRO {stage}: {float(zero_bytes(weights, ranks, stage)) / MB:.0f}" for stage in range(4)]
    print(f"  for the weights, a step over {ranks} replicas: {', '.join(steps)}")


def print_counted() -> bool:
    """The tiny network's table; returns whether all counts are those of the formulas."""
    print(COUNTED)
    all_equal = True
    for world in sorted({layout.world for layout in LAYOUTS.values()}):
        results = run_ranks(compare_layers, world, world)
        all_equal &= all(counted == expected for found in results for counted, expected in found.values())
        for name, (counted, expected) in results[0].items():
            columns = [float(value) for sent in (counted, expected) for value in (sent.forward, sent.backward)]
            print(COUNTED_ROW.format(name.replace("torch.", ""), *columns))
    print("counts and formulas are equal on every rank" if all_equal else "COUNTS AND FORMULAS DIFFER")
    return all_equal


def main() -> None:
    """Print and compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    released = [str(ROOT / "configs" / f"{name}.yaml") for name in RELEASED]
    parser.add_argument(
        "--base", nargs="+", default=released, metavar="YAML", help="models (default: the released ones)"
    )
    parser.add_argument("--ranks", type=int, default=8, help="ranks that share a clip (default 8)")
    parser.add_argument("--no-count", action="store_true", help="formulas only")
    options = parser.parse_args()
    for base in options.base:
        print_model(base, options.ranks)
    if not options.no_count and not print_counted():
        sys.exit(1)


if __name__ == "__main__":
    main()
