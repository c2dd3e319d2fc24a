"""What the collectives of a layer carry equals the formulas, to the byte, on every layout."""

import itertools
import re
from fractions import Fraction
from typing import Any

import pytest
import torch

from sat.cogvideox.traffic import LayerSizes, Sent, layer_traffic
from sat.config import load_config
from sat.mpu.gradients import sum_partial_gradients
from sat.mpu.state import ParallelState
from sat.mpu.traffic import Traffic, count_traffic
from tests.cogvideox.tiny import HEADS, TEXT_LENGTH, build, make_inputs
from tests.marks import rest_is_slow
from tests.parallel.layouts import LAYOUTS, parallel_state
from tests.ranks import run_ranks
from tests.tiny import ROOT

BATCH, FRAMES, ROWS, COLUMNS = 2, 3, 6, 10
TOKENS = TEXT_LENGTH + FRAMES * ROWS // 2 * COLUMNS // 2  # 52: not a multiple of 3 or 6 ranks
HIDDEN, TIME_EMBED = 48, 20
WIDTHS = {torch.float32: 4, torch.bfloat16: 2}


def count_passes(parallel: ParallelState, num_layers: int, dtype: torch.dtype) -> tuple[Traffic, Traffic]:
    """The traffic of one forward and one backward of a network of that depth."""
    network = build("5B", num_layers=num_layers).to(dtype)
    sum_partial_gradients(network, parallel)
    inputs = {
        name: value.to(dtype) if value.is_floating_point() else value
        for name, value in make_inputs("5B", BATCH, FRAMES, ROWS, COLUMNS).items()
    }
    with count_traffic() as forward:
        loss = network(**inputs).square().mean()
    with count_traffic() as backward:
        loss.backward()
    return forward, backward


def layer_sizes(parallel: ParallelState, dtype: torch.dtype) -> LayerSizes:
    return LayerSizes(
        batch=BATCH,
        tokens=TOKENS,
        hidden_size=HIDDEN,
        num_heads=HEADS,
        time_embed_dim=TIME_EMBED,
        element_bytes=WIDTHS[dtype],
        tp=parallel.size("tp"),
        sequence_parallel=parallel.sequence_parallel,
        ulysses=parallel.size("ulysses"),
        ring=parallel.size("ring"),
        tp_rank=parallel.rank("tp"),
        ulysses_rank=parallel.rank("ulysses"),
    )


def compare_layers(rank: int, world: int) -> dict[str, tuple[Sent, Sent]]:
    """(Counted, by formula) of one layer, the difference between networks of three and of two, on each layout."""
    found = {}
    for name, dtype in itertools.product(LAYOUTS, WIDTHS):
        if LAYOUTS[name].world == world:
            with parallel_state(LAYOUTS[name].build(HEADS)) as parallel:
                deeper, shallower = count_passes(parallel, 3, dtype), count_passes(parallel, 2, dtype)
                counted = Sent(*(a.sent_bytes - b.sent_bytes for a, b in zip(deeper, shallower)))
                expected = sum(layer_traffic(layer_sizes(parallel, dtype)).values(), Sent())
            found[f"{name} {dtype}"] = (counted, expected)
    return found


@pytest.mark.parametrize("world", rest_is_slow(sorted({layout.world for layout in LAYOUTS.values()}), (2, 3)))
def test_counted_bytes_are_those_of_the_formulas(world: int) -> None:
    """Every rank, to the byte."""
    for found in run_ranks(compare_layers, world, world):
        assert found
        for name, (counted, expected) in found.items():
            layout = LAYOUTS[name.split()[0]]
            assert counted == expected, name
            assert (counted.total > 0) == (layout.tp * layout.cp > 1)  # data parallelism sends nothing within a layer


def test_the_formulas_agree_with_plain_ones_where_all_divides() -> None:
    """The products that docs/parallelism.md prints."""
    sizes = {"batch": 1, "tokens": 64, "hidden_size": 32, "num_heads": 8, "time_embed_dim": 16, "element_bytes": 2}
    whole = 64 * 32 * 2
    plain = {
        "tp": (LayerSizes(**sizes, tp=4), "activations over tp", 4 * Fraction(3, 4) * whole),
        "sp": (LayerSizes(**sizes, tp=4, sequence_parallel=True), "activations over tp", 4 * Fraction(3, 4) * whole),
        "ulysses": (LayerSizes(**sizes, ulysses=4), "ulysses", 4 * Fraction(3, 4) * whole / 4),
        "ring": (LayerSizes(**sizes, ring=4), "ring", 2 * 3 * Fraction(whole, 4)),
    }
    for layout, part, forward in plain.values():
        assert layer_traffic(layout)[part].forward == forward


@pytest.mark.parametrize(
    ("layout", "megabytes"), [({"tp": 8, "sequence_parallel": True}, 382), ({"ring": 8}, 191), ({"ulysses": 8}, 48)]
)
def test_released_sizes(layout: dict[str, Any], megabytes: int) -> None:
    """One layer's forward of CogVideoX-5B on 8 ranks: (p - 1) / p of 4, 2 or 4 / p times 17,776 · 3072 · 2 bytes."""
    sizes = {"batch": 1, "tokens": 17776, "hidden_size": 3072, "num_heads": 48, "time_embed_dim": 512}
    sent = sum(layer_traffic(LayerSizes(**sizes, **layout)).values(), Sent())  # type: ignore[arg-type]
    assert round(sent.forward / 10**6) == megabytes


def test_the_document_has_these_numbers() -> None:
    """The table of docs/parallelism.md for the released models, as benchmarks/comm.py computes it."""
    from benchmarks.comm import RELEASED, layer_sizes, layouts  # which itself prints what is counted here

    text = (ROOT / "docs" / "parallelism.md").read_text(encoding="utf-8")
    cell = r" (\d+ \+ \d+) \|"
    rows = {name: cells for name, *cells in re.findall(rf"^\| ([^|]+) \|{cell}{cell}{cell}$", text, re.MULTILINE)}
    assert len(rows) == 6
    for name, layout in layouts(8).items():
        row = rows["tp 8, or tp 8 + sp" if name.startswith("tp 8") else name]
        for model, printed in zip(RELEASED, row, strict=True):
            config = load_config([ROOT / "configs" / f"{model}.yaml"])
            sent = sum(layer_traffic(layer_sizes(config, **layout)).values(), Sent())
            assert printed == f"{float(sent.forward) / 1e6:.0f} + {float(sent.backward) / 1e6:.0f}"
