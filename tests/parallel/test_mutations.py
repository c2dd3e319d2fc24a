"""The comparisons have teeth: each leaves out one reduction, factor or slice, and must be noticed."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from sat.model.finetune.lora2 import LoraLinear
from sat.mpu import context, gradients, layers, mappings
from sat.ops import ring_attention
from tests.parallel.layouts import LAYOUTS, Layout
from tests.parallel.test_network import LORA, SIZES, compare
from tests.ranks import run_ranks


def skip_backward(function: Any) -> None:
    """A collective's gradient passes as it is."""
    function.backward = staticmethod(lambda ctx, grad: (grad, *[None] * 4)[: BACKWARD_OUTPUTS[function]])


BACKWARD_OUTPUTS: dict[Any, int] = {mappings._CopyTo: 2, mappings._ReduceFrom: 3}


def no_gradient_sum_in_copy() -> None:
    skip_backward(mappings._CopyTo)


def no_sum_in_row_layers() -> None:
    layers.reduce_from_model_parallel_region = lambda tensor, group, sum_gradients=False: tensor


def no_sum_of_partial_gradients() -> None:
    from tests.parallel import test_network

    test_network.sum_partial_gradients = lambda module, parallel: None


def all_replicated_gradients_are_summed() -> None:
    """As if every copy's gradient were a share: what sequence parallelism needs and tensor parallelism must not do."""
    original = gradients.mark_partial

    from tests.parallel import test_network

    def sum_all(module: torch.nn.Module, parallel: Any) -> None:
        for parameter in module.parameters():
            original(parameter)
        gradients.sum_partial_gradients(module, parallel)

    test_network.sum_partial_gradients = sum_all


def gathered_modulations_keep_their_share_of_gradients() -> None:
    original = mappings.gather_from_model_parallel_region
    layers.gather_from_model_parallel_region = lambda tensor, group, sizes, sum_gradients: original(
        tensor, group, sizes, False
    )


def no_factor_for_context_parallel_gradients() -> None:
    original = context._GatherWhole.backward
    context._GatherWhole.backward = staticmethod(
        lambda ctx, grad: (original(ctx, grad)[0] / ctx.factor, None, None)  # type: ignore[attr-defined]
    )


def shares_are_one_token_off() -> None:
    context.SequenceShard.count_before = lambda self, position: min(max(position - self.start + 1, 0), self.part_length)


def positions_are_not_shared_out() -> None:
    context.SequenceShard.take_for_attention = lambda self, whole, dim=0: whole[: self.attention_length]  # type: ignore[method-assign]


def padding_is_attended_to() -> None:
    original = context.SequenceShard.of.__func__  # type: ignore[attr-defined]

    def padded(cls: Any, length: int, *others: Any) -> Any:
        shard = original(cls, length, *others)
        return shard and replace(shard, bounds=(0, shard.part_length * shard.num_parts))

    context.SequenceShard.of = classmethod(padded)  # type: ignore[assignment, method-assign]


def ring_blocks_are_not_reweighted() -> None:
    def add(output: Any, lse: Any, block: Any, block_lse: Any) -> None:
        output.add_(block)
        lse.copy_(torch.logaddexp(lse, block_lse))

    ring_attention.merge_block = add


def ring_gradients_stay_away_from_home() -> None:
    original = context.RingPass.start

    def start(self: Any, tensors: Any) -> Any:
        return (
            _Arrived(tensors)
            if tensors[0].dtype == torch.float64 and len(tensors) == 2 and _in_backward()
            else original(self, tensors)
        )

    context.RingPass.start = start  # type: ignore[method-assign]


class _Arrived:
    def __init__(self, tensors: Any) -> None:
        self.tensors = tensors

    def wait(self) -> Any:
        return self.tensors


def _in_backward() -> bool:
    import inspect

    return any(frame.function == "backward" for frame in inspect.stack())


def heads_come_back_in_the_wrong_order() -> None:
    original = context._to_tokens
    context._to_tokens = lambda tensor, group, heads: original(tensor, group, heads).flip(2)


def adapters_are_not_summed() -> None:
    LoraLinear._update = lambda self, hidden, called: torch.cat(  # type: ignore[method-assign]
        [hidden @ a.T @ b.T * self.adapters[0].scaling for a, b in zip(self.matrix_A, self.matrix_B)], dim=-1
    )


CASES: list[tuple[Callable[[], None], str, dict[str, Any]]] = [
    (no_gradient_sum_in_copy, "TP2", {}),
    (no_sum_in_row_layers, "TP2", {}),
    (no_sum_of_partial_gradients, "TP2", {}),
    (no_sum_of_partial_gradients, "TP2+SP", {}),
    (all_replicated_gradients_are_summed, "TP2", {}),
    (gathered_modulations_keep_their_share_of_gradients, "TP2+SP", {}),
    (no_factor_for_context_parallel_gradients, "Ring2", {}),
    (shares_are_one_token_off, "Ulysses2", {}),
    (positions_are_not_shared_out, "Ring2", {}),
    (padding_is_attended_to, "Ulysses4", {}),
    (ring_blocks_are_not_reweighted, "Ring2", {}),
    (ring_gradients_stay_away_from_home, "Ring2", {}),
    (heads_come_back_in_the_wrong_order, "Ulysses2", {}),
    (adapters_are_not_summed, "TP2", {"extra_modules": LORA}),
]


def compare_mutated(rank: int, mutate: Callable[[], None], layout: Layout, options: dict[str, Any]) -> float:
    """Worst difference of a comparison in a process whose code was changed; infinite where it failed."""
    assert dist.is_initialized()
    mutate()
    return max(compare(rank, layout, "5B", SIZES["kind"], torch.float64, options).values())


@pytest.mark.parametrize(("mutate", "layout", "options"), CASES, ids=lambda value: getattr(value, "__name__", None))
def test_a_mutation_is_noticed(mutate: Callable[[], None], layout: str, options: dict[str, Any]) -> None:
    found = run_ranks(compare_mutated, LAYOUTS[layout].world, mutate, LAYOUTS[layout], options)
    assert max(found) > 1e-3
