"""A row of clips on split ranks against each clip alone on one process: outputs and the gradient of every parameter."""

import pytest
import torch

from sat.mpu.gradients import sum_partial_gradients
from sat.mpu.shards import cut_state, shard_rules
from tests.cogvideox.test_packing import MIXED, alone, is_nothing, loss_of, make_clips
from tests.cogvideox.tiny import HEADS, build
from tests.parallel.layouts import (
    LAYOUTS,
    Layout,
    gradients,
    load_own_part,
    mean_over_replicas,
    parallel_state,
    worst_difference,
)
from tests.parallel.test_network import NOT_COMPARED
from tests.ranks import run_ranks

FORMS = ("2B", "5B-I2V")
"""Fixed positions, and learned ones beside rotary ones; clips of the stored grid and of others."""
BARS = {torch.float64: 1e-10, torch.float32: 1e-5}
"""Measured: 2e-15 and 1e-6."""


def compare(rank: int, layout: Layout) -> dict[str, float]:
    """Worst difference of one rank for each form and precision, over its bar."""
    found = {}
    for form in FORMS:
        for dtype, bar in BARS.items():
            worst = max(differences(form, dtype, layout).values())
            found[f"{form} {dtype}"] = worst / bar
    return found


def differences(form: str, dtype: torch.dtype, layout: Layout) -> dict[str, float]:
    """Relative to the largest entry of what one process gives, by name."""
    inputs = make_clips(form, MIXED, dtype)
    whole = build(form).to(dtype)
    expected_outputs = alone(whole, inputs)
    loss_of(expected_outputs).backward()
    with parallel_state(layout.build(HEADS)) as parallel:
        network = build(form, seed=9).to(dtype)
        load_own_part(network, whole.state_dict(), parallel)
        sum_partial_gradients(network, parallel)
        outputs = network(**inputs)
        loss_of(outputs).backward()
    found = {f"clip {n}": worst_difference(own, want) for n, (own, want) in enumerate(zip(outputs, expected_outputs))}
    expected = cut_state(gradients(whole), shard_rules(network), parallel.rank("tp"), parallel.size("tp"))
    for name, gradient in gradients(network).items():
        if name != NOT_COMPARED and not is_nothing(form, name):
            found[name] = worst_difference(mean_over_replicas(gradient, parallel), expected[name])
    return found


@pytest.mark.parametrize("name", ["TP2", "Ulysses2", "Ring2"])
def test_a_row_on_split_ranks_is_its_clips_alone_on_one(name: str) -> None:
    for found in run_ranks(compare, 2, LAYOUTS[name]):
        assert len(found) == 4 and max(found.values()) < 1.0, found
