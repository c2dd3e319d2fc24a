"""Training speed of packed rows beside rows of one size and padded batches, on clips of very different sizes.

The clips: 1 to 145 frames (log-normal), three resolutions. All three ways take the same clips once, through forward and
backward of the same network, in turns; tokens that carry a clip or its text are counted, padding is not. A padded batch
holds clips in random order, as many as a packed row does on average, each padded to the batch's largest sides. The last
table holds the attention of packed rows beside that of its clips in calls of their own. fp32 on the CPU, medians.

    python benchmarks/packing.py --clips 96 --repeats 5 --threads 1 --json packing.json
"""

import argparse
import json
import math
import os
import sys
from collections.abc import Iterable, Sequence
from itertools import accumulate, islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.dit import CHANNELS, TEXT_WIDTH, build_ours
from benchmarks.side_by_side import CLOCKS, Call, median_seconds
from sat.data.packing import BucketPlanner, CostModel, PackingPlanner, Planner
from sat.data.sampler import ShuffledEpochs
from sat.ops.packed_attention import packed_attention

Size = tuple[int, int, int]
"""Latent frames, rows, columns."""

RESOLUTIONS = ((4, 4), (6, 8), (8, 12))
"""Rows and columns of latents: a third of the clips each."""
RANKS, ROWS_PER_RANK = 8, 4


def draw_sizes(num_clips: int, seed: int = 0) -> list[Size]:
    """Sizes of clips: images, many short ones, a few of up to 145 frames."""
    generator = np.random.default_rng(seed)
    frames = np.clip(generator.lognormal(math.log(24), 1.0, num_clips), 1, 145).astype(int)
    sides = generator.integers(len(RESOLUTIONS), size=num_clips)
    return [(1 + (int(f) - 1) // 4, *RESOLUTIONS[s]) for f, s in zip(frames, sides)]


def num_tokens(size: Size, text: int) -> int:
    """Of a clip with its text, patches of 1 x 2 x 2."""
    t, h, w = size
    return t * h * w // 4 + text


def one_epoch(planner: Planner) -> list[tuple[int, ...]]:
    """The clips of each row."""
    return [row.indices for row in planner.epoch_rows(0)]


def make_rows(sizes: Sequence[Size], args: argparse.Namespace) -> dict[str, list[tuple[int, ...]]]:
    """Each way to put the clips together: the numbers of those that share a pass."""
    lengths = [num_tokens(size, args.text) for size in sizes]
    options = (args.max_tokens, 1, ShuffledEpochs(len(sizes), 0), CostModel(args.hidden_size))
    packed = one_epoch(PackingPlanner(lengths, *options))
    per_batch = max(1, round(len(sizes) / len(packed)))
    order = np.random.default_rng(1).permutation(len(sizes)).tolist()
    return {
        "packed": packed,
        "bucketed": one_epoch(BucketPlanner(lengths, sizes, *options)),
        "padded": [tuple(order[first : first + per_batch]) for first in range(0, len(order), per_batch)],
    }


def computed_tokens(way: str, row: Sequence[int], sizes: Sequence[Size], text: int) -> int:
    """Tokens that go through the network, padding included."""
    if way == "padded":
        return len(row) * num_tokens(largest(sizes[index] for index in row), text)
    return sum(num_tokens(sizes[index], text) for index in row)


def largest(sizes: Iterable[Size]) -> Size:
    """The size that holds all of these."""
    t, h, w = (max(sides) for sides in zip(*sizes))
    return t, h, w


def train_on(way: str, rows: Sequence[Sequence[int]], sizes: Sequence[Size], text: int, network: nn.Module) -> Call:
    """Forward and backward over all rows, as a function of nothing."""
    generator = torch.Generator().manual_seed(3)
    clips = [torch.randn(t, CHANNELS, h, w, generator=generator) for t, h, w in sizes]
    texts = torch.randn(len(sizes), text, TEXT_WIDTH, generator=generator)
    timesteps = torch.randint(1000, (len(sizes),), generator=generator)

    def inputs(row: Sequence[int]) -> Any:
        if way == "packed":
            return [clips[index] for index in row]
        t, h, w = largest(sizes[index] for index in row)
        parts = [clips[index] for index in row]
        padding = ((0, w - c.shape[3], 0, h - c.shape[2], 0, 0, 0, t - c.shape[0]) for c in parts)
        return torch.stack([F.pad(clip, own) for clip, own in zip(parts, padding)])

    def train() -> None:
        network.zero_grad(set_to_none=True)
        for row in rows:
            numbers = list(row)
            predictions = network(inputs(row), timesteps[numbers], texts[numbers])
            losses = [
                prediction[: size[0], :, : size[1], : size[2]].square().mean()
                for prediction, size in zip(predictions, (sizes[index] for index in row))
            ]
            torch.stack(losses).mean().backward()

    return train


def compare_ways(sizes: Sequence[Size], args: argparse.Namespace) -> list[dict[str, Any]]:
    """A row of the table for each way."""
    network = build_ours(args)
    ways = make_rows(sizes, args)
    calls = {way: train_on(way, rows, sizes, args.text, network) for way, rows in ways.items()}
    for call in calls.values():
        call()  # warms up
    seconds = median_seconds(calls, args.repeats, args.clock)
    useful = sum(num_tokens(size, args.text) for size in sizes)
    rates = {way: useful / seconds[way] for way in ways}
    results = []
    for way, rows in ways.items():
        computed = sum(computed_tokens(way, row, sizes, args.text) for row in rows)
        results.append(
            {
                "way": way,
                "passes": len(rows),
                "padding": 1 - useful / computed,
                "tokens_per_second": rates[way],
                "speedup": rates[way] / rates["padded"],
            }
        )
    return results


def attention_calls(lengths: Sequence[int], args: argparse.Namespace) -> dict[str, Call]:
    """Forward and backward of the attention of one row: in the row, and of each clip alone."""
    generator = torch.Generator().manual_seed(4)
    shape = (3, 1, args.heads, sum(lengths), args.hidden_size // args.heads)
    row = torch.randn(shape, generator=generator).requires_grad_()
    bounds = [0, *accumulate(lengths)]
    marks, scale = torch.tensor(bounds, dtype=torch.int32), shape[-1] ** -0.5
    alone = [row.detach()[:, :, :, a:b].contiguous().requires_grad_() for a, b in pairwise(bounds)]

    def packed() -> Tensor:
        query, key, value = row.unbind(0)
        attended, _ = packed_attention(query, key, value, marks, scale)
        attended.sum().backward()
        return attended

    def separate() -> list[Tensor]:
        results = [F.scaled_dot_product_attention(*clip.unbind(0)) for clip in alone]
        for result in results:
            result.sum().backward()
        return results

    assert torch.allclose(packed(), torch.cat(separate(), dim=2), atol=1e-5)
    return {"packed": packed, "separate": separate}


def compare_attention(sizes: Sequence[Size], args: argparse.Namespace) -> list[dict[str, Any]]:
    """A row of the table for each of the first packed rows."""
    results = []
    for row in islice(make_rows(sizes, args)["packed"], args.attention_rows):
        lengths = [num_tokens(sizes[index], args.text) for index in row]
        seconds = median_seconds(attention_calls(lengths, args), 5 * args.repeats, args.clock)
        ratio = seconds["packed"] / seconds["separate"]
        results.append({"clips": len(lengths), "tokens": sum(lengths), "ratio": ratio})
    return results


def describe_plan(args: argparse.Namespace) -> dict[str, Any]:
    """Padding of rows and spread of the ranks' costs over an epoch of the same mix, with many clips."""
    sizes = draw_sizes(args.planned_clips, seed=2)
    lengths = [num_tokens(size, args.text) for size in sizes]
    order, cost = ShuffledEpochs(len(sizes), 0), CostModel(args.hidden_size)
    planner = PackingPlanner(lengths, args.max_tokens, RANKS * ROWS_PER_RANK, order, cost)
    steps = list(islice(planner.steps(), len(one_epoch(planner)) // (RANKS * ROWS_PER_RANK)))
    tokens = sum(row.tokens for step in steps for row in step.rows)
    costs = [[sum(row.cost for row in share) for share in step.shares(RANKS)] for step in steps]
    spread = [max(own) / (sum(own) / RANKS) - 1 for own in costs]
    return {
        "clips": len(sizes),
        "ranks": RANKS,
        "padding": 1 - tokens / (len(steps) * RANKS * ROWS_PER_RANK * args.max_tokens),
        "cost_spread": sum(spread) / len(spread),
    }


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, default=96, help="clips that are trained on (default 96)")
    parser.add_argument("--max-tokens", type=int, default=2048, help="of a row (default 2048)")
    parser.add_argument("--hidden-size", type=int, default=128, help="width (default 128)")
    parser.add_argument("--heads", type=int, default=4, help="attention heads (default 4)")
    parser.add_argument("--layers", type=int, default=2, help="layers (default 2)")
    parser.add_argument("--text", type=int, default=16, help="text tokens of a clip (default 16)")
    parser.add_argument("--planned-clips", type=int, default=20_000, help="clips planned only (default 20000)")
    parser.add_argument("--attention-rows", type=int, default=3, help="rows whose attention is timed (default 3)")
    parser.add_argument("--repeats", type=int, default=5, help="timed calls of each way (default 5)")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default 2)")
    parser.add_argument("--clock", choices=tuple(CLOCKS), default="wall", help="wall, or cpu on a machine in use")
    parser.add_argument("--json", type=Path, help="also write the tables to this file")
    args = parser.parse_args()
    args.frames, (args.rows, args.columns) = 37, RESOLUTIONS[-1]
    return args


def main() -> None:
    """Measure, print, write."""
    args = parse_arguments()
    torch.set_num_threads(args.threads)
    sizes = draw_sizes(args.clips)
    plan = describe_plan(args)
    print(
        f"plan: {plan['clips']:,} clips, {plan['padding']:.1%} padding, the slowest of {RANKS} ranks has "
        f"{plan['cost_spread']:.1%} more work than their mean"
    )
    print(f"{'way':<10}{'passes':>8}{'padding':>10}{'tokens/s':>12}{'speedup':>10}")
    ways = compare_ways(sizes, args)
    for row in ways:
        print("{way:<10}{passes:>8}{padding:>10.1%}{tokens_per_second:>12,.0f}{speedup:>10.2f}".format(**row))
    print(f"{'attention of clips':>20}{'tokens':>8}{'packed / separate':>20}")
    attention = compare_attention(sizes, args)
    for row in attention:
        print("{clips:>20}{tokens:>8}{ratio:>20.2f}".format(**row))
    if args.json:
        facts = {"torch": torch.__version__, "cores": os.cpu_count(), "clips": args.clips, "threads": args.threads}
        args.json.write_text(json.dumps({**facts, "plan": plan, "ways": ways, "attention": attention}, indent=1))


if __name__ == "__main__":
    main()
