"""The generic core on every kind of layout: a language model with a split vocabulary, masks and grouped heads."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sat.model import BaseModel
from sat.mpu import sum_partial_gradients, vocab_parallel_cross_entropy
from sat.mpu.shards import cut_state, shard_rules
from tests.marks import rest_is_slow
from tests.parallel.layouts import (
    LAYOUTS,
    Layout,
    gradients,
    load_own_part,
    mean_over_replicas,
    parallel_state,
    worst_difference,
)
from tests.ranks import run_ranks

VOCABULARY, LENGTH = 1003, 11
ARGS: dict[str, Any] = {
    "num_layers": 2,
    "vocab_size": VOCABULARY,
    "hidden_size": 24,
    "num_attention_heads": 6,
    "max_sequence_length": 16,
}
MODELS: dict[str, dict[str, Any]] = {
    "plain": {},
    "grouped heads, rotary, gated": {"num_multi_query_heads": 3, "is_rotary_emb": True, "is_gated_mlp": True},
    "one key head": {"num_multi_query_heads": 1, "is_rotary_emb": False},
    "fewer key heads than ranks": {"num_attention_heads": 8, "num_multi_query_heads": 2},
    "cross attention": {"is_decoder": True, "cross_attn_hidden_size": 10},
    "cross attention, one key head": {"is_decoder": [False, True], "cross_num_multi_query_heads": 1},
    "post order": {"layernorm_order": "post"},
}
NAMES = ("TP2", "TP3", "TP2+SP", "Ulysses2", "Ring2", "Ring3", "TP2xRing2", "TP2+SPxUlysses2", "Ulysses2xRing2")


def make_model(changes: dict[str, Any], seed: int = 0) -> BaseModel:
    torch.manual_seed(seed)
    model = BaseModel({**ARGS, **changes}).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def encoder_values(model: BaseModel, has_rows: bool) -> dict[str, Tensor]:
    """An encoder's states for layers with cross attention, and a mask of them, with a row for each token or for all."""
    if not model.transformer.is_decoder:
        return {}
    layer = model.transformer.layers[-1].cross_attention.key_value
    noise = torch.Generator().manual_seed(4)
    states = torch.randn(2, 5, layer.input_size, generator=noise, dtype=torch.float64)
    mask = torch.rand(2, 1, LENGTH if has_rows else 1, 5, generator=noise).double()
    return {"encoder_outputs": states, "cross_attention_mask": mask}


def loss_of(model: BaseModel, causal: bool, parallel_output: bool) -> tuple[Tensor, Tensor]:
    ids = torch.randint(0, VOCABULARY, (2, LENGTH), generator=torch.Generator().manual_seed(3))
    model.transformer.parallel_output = parallel_output
    logits = model(ids, torch.arange(LENGTH), -1 if causal else None, **encoder_values(model, causal))[0]
    if parallel_output:
        loss = vocab_parallel_cross_entropy(logits[:, :-1], ids[:, 1:]).mean()
    else:
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    return logits, loss


def compare(rank: int, layout: Layout, changes: dict[str, Any], causal: bool) -> dict[str, float]:
    whole = make_model(changes)
    expected_logits, expected_loss = loss_of(whole, causal, parallel_output=False)
    expected_loss.backward()
    with parallel_state(layout.build(6)) as parallel:
        model = make_model(changes, seed=9)
        load_own_part(model, whole.state_dict(), parallel)
        sum_partial_gradients(model, parallel)
        with torch.no_grad():
            logits, _ = loss_of(model, causal, parallel_output=False)
        _, loss = loss_of(model, causal, parallel_output=True)
        loss.backward()
    found = {"logits": worst_difference(logits, expected_logits), "loss": worst_difference(loss, expected_loss)}
    expected = cut_state(gradients(whole), shard_rules(model), parallel.rank("tp"), parallel.size("tp"))
    for name, own in gradients(model).items():
        found[name] = worst_difference(mean_over_replicas(own, parallel), expected[name])
    return found


CASES = [(model, name, causal) for model in MODELS for name in NAMES for causal in (False, True)]
DEFAULT = [
    (model, name, causal)
    for model, name, causal in CASES
    if (name in ("TP3", "TP2+SPxUlysses2") and causal) or (model, name) == ("plain", "Ulysses2xRing2")
]


@pytest.mark.parametrize("case", rest_is_slow(CASES, DEFAULT), ids=lambda case: "-".join(map(str, case)))
def test_logits_loss_and_gradients(case: tuple[str, str, bool]) -> None:
    model, name, causal = case
    results = run_ranks(compare, LAYOUTS[name].world, LAYOUTS[name], MODELS[model], causal)
    for found in results:
        worst = max(found, key=found.__getitem__)
        assert found[worst] < 1e-10, f"{worst}: {found[worst]:.1e}"
