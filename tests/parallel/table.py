"""Print how far every layout at every ZeRO stage is from one process, as docs/parallelism.md shows it.

python -m tests.parallel.table

Gradients: of one step of the tiny 5B-form network in float64 (3 heads, 4 for TP4, 55 tokens, batch 2), the worst entry
of any parameter, relative to that parameter's largest. ZeRO: of a run of five steps in float32 the worst loss,
relative, and the worst entry of the final weights, where a step is up to 1e-3.
"""

import tempfile
from pathlib import Path

import torch

from tests.cogvideox.tiny import HEAD_DIM
from tests.parallel.layouts import LAYOUTS, WIDE, Layout
from tests.parallel.test_network import run
from tests.parallel.test_training import train, whole_weights
from tests.tiny import records

STAGES = (0, 1, 2, 3)
NOT_COMPARED = "query_key_value.bias"
"""The key's bias cannot change the loss: Adam amplifies the rounding of its gradient."""


def worst_gradient(layout: Layout) -> float:
    """Relative, in float64."""
    widths = {"hidden_size": HEAD_DIM * layout.heads, "num_attention_heads": layout.heads}
    return max(run(layout, "5B", "kind", torch.float64, **widths).values())


def worst_of_run(own: Path, reference: Path, heads: int) -> tuple[float, float]:
    """(Loss, relative, weights, absolute)."""
    losses = [(a["loss"], b["loss"]) for a, b in zip(records(own), records(reference), strict=True)]
    found, expected = whole_weights(own, heads), whole_weights(reference, heads)
    weights = [float((found[name] - value).abs().max()) for name, value in expected.items() if NOT_COMPARED not in name]
    return max(abs(a - b) / b for a, b in losses), max(weights)


def main() -> None:
    """Compute and print, a row as soon as it is there."""
    print("| layout | ranks | gradients, float64 | " + " | ".join(f"ZeRO {stage}" for stage in STAGES) + " |")
    print("|---|---|---|" + "---|" * len(STAGES))
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        references: dict[int, Path] = {}
        for name, layout in {**LAYOUTS, **WIDE}.items():
            if layout.heads not in references:
                references[layout.heads] = train(folder / f"one process {layout.heads}", Layout(), 0, layout.heads)
            reference = references[layout.heads]
            cells = [name, str(layout.world), f"{worst_gradient(layout):.0e}"]
            for stage in STAGES:
                loss, weights = worst_of_run(train(folder / f"{name} {stage}", layout, stage), reference, layout.heads)
                cells.append(f"{loss:.0e}, {weights:.0e}")
            print("| " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
