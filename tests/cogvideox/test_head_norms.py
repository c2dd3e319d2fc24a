"""Norms of q and k are done with the turn where the rotary mixin comes next, and before any attention_fn of users."""

from typing import Any

import pytest
import torch
from torch import Tensor

from sat.cogvideox.mixins import Rotary3DPositionEmbeddingMixin
from sat.model.base_model import BaseMixin, non_conflict
from sat.ops.layernorm import HeadNorm
from tests.cogvideox.tiny import build, make_inputs

seen: list[tuple[Tensor, bool]] = []
"""What users' functions were given as q, and whether norms were left to them."""


@pytest.fixture(autouse=True)
def forget() -> None:
    seen.clear()


class UsersRotary(Rotary3DPositionEmbeddingMixin):
    """A subclass from before norms could be handed on."""

    def attention_fn(self, q: Any, k: Any, v: Any, mask: Any, dropout: Any, *, rope: Any, sequence: Any) -> Tensor:  # type: ignore[override]
        seen.append((q, False))
        return super().attention_fn(q, k, v, mask, dropout, rope=rope, sequence=sequence)


class UsersWrap(BaseMixin):
    @non_conflict
    def attention_fn(self, q: Any, k: Any, v: Any, mask: Any, dropout: Any, *, old_impl: Any, **values: Any) -> Tensor:
        seen.append((q, "qk_norms" in values))
        return old_impl(q, k, v, mask, dropout)


def plainly_normed(network: Any) -> None:
    """Weights that leave LayerNorm's output as it is: mean 0, mean square 1."""
    for norm in network.get_mixin("adaln_layer").query_layernorm_list:
        torch.nn.init.ones_(norm.weight)
        torch.nn.init.zeros_(norm.bias)


def is_normed(query: Tensor) -> bool:
    return bool(query.mean(-1).abs().max() < 1e-5 and (query.square().mean(-1) - 1).abs().max() < 1e-3)


def test_the_rotary_mixin_takes_over_the_norms(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[bool] = []
    forward = HeadNorm.forward

    def watching(norm: HeadNorm, heads: Tensor, rope: Any = None) -> Tensor:
        taken.append(rope is not None)
        return forward(norm, heads, rope)

    monkeypatch.setattr(HeadNorm, "forward", watching)
    build("5B")(**make_inputs("5B"))
    assert taken == [True] * 4  # q and k of two layers
    taken.clear()
    build("2B")(**make_inputs("2B"))
    assert taken == [False] * 4


def check_that_they_see_normed_queries(changed: dict[str, BaseMixin]) -> None:
    """The same network without and with mixins of users under the norms."""
    network = build("5B")
    plainly_normed(network)
    adaln = network.get_mixin("adaln_layer")
    with torch.no_grad():
        expected = network(**make_inputs("5B"))
        for name in {"adaln_layer", *changed} & set(network.mixins):
            network.del_mixin(name)
        for name, mixin in {**changed, "adaln_layer": adaln}.items():
            network.add_mixin(name, mixin)
        torch.testing.assert_close(network(**make_inputs("5B")), expected)
    assert [was_left for _, was_left in seen] == [False, False]  # one for each layer
    assert all(is_normed(query) for query, _ in seen)


def test_a_users_rotary_mixin_is_given_normed_queries() -> None:
    check_that_they_see_normed_queries({"pos_embed": UsersRotary((4, 3, 4), 48, 16, 7)})


def test_a_wrap_under_the_norms_is_given_normed_queries() -> None:
    check_that_they_see_normed_queries({"wrap": UsersWrap()})
