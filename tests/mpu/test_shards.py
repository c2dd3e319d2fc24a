"""How whole parameters are cut over ranks and joined again."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sat.errors import LayoutError
from sat.model.layers import LayerConfig, SelfAttention
from sat.mpu.shards import ShardRule, make_rule, split_evenly


@st.composite
def attention_rules(draw: st.DrawFn) -> tuple[ShardRule, int, int]:
    """The rule of a fused projection, its key heads and its head size."""
    kv_heads, queries, head_dim = draw(st.integers(1, 6)), draw(st.integers(1, 4)), draw(st.integers(1, 5))
    heads = kv_heads * queries
    total = (heads + 2 * kv_heads) * head_dim
    return make_rule(0, total, [heads, kv_heads, kv_heads], head_dim, (head_dim, 1, 1)), kv_heads, head_dim


@given(attention_rules(), st.integers(1, 9))
def test_parts_make_the_whole(drawn: tuple[ShardRule, int, int], world_size: int) -> None:
    rule, kv_heads, head_dim = drawn
    whole = torch.arange(sum(rule.chunks) * 2).view(-1, 2)
    parts = [rule.cut(whole, rank, world_size) for rank in range(world_size)]
    assert torch.equal(rule.join(parts), whole)
    assert [len(part) for part in parts] == [rule.size(rank, world_size) for rank in range(world_size)]
    for chunk, sizes in zip(rule.chunks, rule.sizes(world_size)):
        assert sum(sizes) == chunk
    if kv_heads >= world_size:  # a key head and its queries stay whole and together
        query_sizes, key_sizes, _ = rule.sizes(world_size)
        per_key = rule.chunks[0] // rule.chunks[1]
        assert query_sizes == [per_key * size for size in key_sizes]
        assert all(size % head_dim == 0 for size in key_sizes)


@given(attention_rules(), st.integers(1, 9))
def test_rules_of_chunks_cut_as_the_whole_rule(drawn: tuple[ShardRule, int, int], world_size: int) -> None:
    rule = drawn[0]
    assert [one.sizes(world_size) for one in rule.of_chunks()] == [[sizes] for sizes in rule.sizes(world_size)]


def test_fewer_key_heads_than_ranks_are_torn_evenly() -> None:
    rule = make_rule(0, 8 + 2 * 4, [2, 1, 1], 4, (4, 1, 1))
    assert rule.sizes(1) == [[8], [4], [4]]
    assert rule.sizes(2) == [[4, 4], [2, 2], [2, 2]]
    assert make_rule(0, 8, 1, 4).sizes(3) == [[4, 4, 0]]  # what may not be torn is not


@settings(deadline=None)  # the first layer that a process builds takes seconds
@given(st.integers(1, 5), st.integers(1, 6), st.integers(1, 8))
def test_key_heads_serve_the_queries_of_a_rank(kv_heads: int, queries: int, world_size: int) -> None:
    heads = kv_heads * queries
    config = LayerConfig(hidden_size=heads, num_attention_heads=heads, num_multi_query_heads=kv_heads, device="meta")
    attention = SelfAttention(config, 0, None)  # type: ignore[arg-type]
    first = 0
    for count in split_evenly(heads, world_size):
        own = range(first, first + count)
        needed = attention._find_kv_heads(own)
        repeats = count // max(len(needed), 1)  # as attention spreads key heads over consecutive query heads
        assert [needed[place // repeats] for place in range(count)] == [query // queries for query in own]
        first += count


def test_total_that_does_not_divide() -> None:
    with pytest.raises(LayoutError, match="output size 10 does not divide by 3"):
        make_rule(0, 10, 3)
