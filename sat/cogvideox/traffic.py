"""What a rank sends for one layer of the video transformer, by formula.

Bytes are counted as the ring algorithms count them (`sat.mpu.collectives`) and hold exactly: tests compare them with
what the collectives of a forward and a backward carry. Where activations are recomputed, backward also sends what
forward sends. Letters: b samples of a micro batch, s tokens, d hidden size, k heads, e head size, p bytes of a number.
"""

from dataclasses import dataclass
from fractions import Fraction

from sat.mpu.collectives import all_gather_bytes, all_reduce_bytes
from sat.mpu.shards import split_evenly

MODULATIONS = 12
"""Vectors of the hidden size that a layer makes of the time embedding."""

ACCUMULATED_BYTES = 4
"""Bytes of an element in which the ring adds up gradients, at least."""


@dataclass(frozen=True)
class Sent:
    """Bytes that a rank sends."""

    forward: Fraction = Fraction(0)
    backward: Fraction = Fraction(0)

    def __add__(self, other: "Sent") -> "Sent":
        return Sent(self.forward + other.forward, self.backward + other.backward)

    @property
    def total(self) -> Fraction:
        """Forward and backward, without recomputation."""
        return self.forward + self.backward


def tensor_parallel(b: int, s: int, d: int, tp: int, p: int) -> Sent:
    """Attention and MLP each sum their outputs over the ranks, and in backward the gradients of their inputs.

    s: tokens that the rank has in attention.
    """
    both = 2 * all_reduce_bytes(b * s * d * p, tp)
    return Sent(both, both)


def sequence_parallel(b: int, s: int, d: int, tp: int, p: int) -> Sent:
    """The same with tokens split between the products: each sum becomes a gather and a reduce-scatter."""
    both = 4 * all_gather_bytes(Fraction(b * s * d * p, tp), tp)
    return Sent(both, both)


def modulation(b: int, d: int, time_embed_dim: int, tp: int, p: int, has_sequence_parallel: bool = False) -> Sent:
    """Each rank projects the time embedding to its share of shifts, scales and gates; they are gathered.

    Backward sums gradients: of the time embedding, or of all modulations where each rank used them for its own tokens.
    """
    share = -(-MODULATIONS * d // tp)
    summed = MODULATIONS * d if has_sequence_parallel else time_embed_dim
    return Sent(all_gather_bytes(b * share * p, tp), all_reduce_bytes(b * summed * p, tp))


def replicated_gradients(d: int, e: int, tp: int, p: int, has_sequence_parallel: bool = False) -> Sent:
    """Gradients of parameters of which every tensor-parallel rank has a copy and computes a share.

    The norms of q and k, and under sequence parallelism also the layer's two norms and two biases.
    """
    elements = 4 * e + (6 * d if has_sequence_parallel else 0)
    return Sent(backward=all_reduce_bytes(elements * p, tp))


def ulysses(b: int, s: int, e: int, k: int, size: int, rank: int, p: int) -> Sent:
    """q, k and v go to where their heads are, the attended values come back; backward the other way round.

    s: tokens of the rank before the exchange. k: heads before it, dealt to the ranks as evenly as they go.
    """
    own = split_evenly(k, size)[rank]
    to_heads, to_tokens = (b * s * e * count * p for count in (k - own, own * (size - 1)))
    return Sent(Fraction(3 * to_heads + to_tokens), Fraction(to_heads + 3 * to_tokens))


def ring(b: int, s: int, e: int, k: int, size: int, p: int) -> Sent:
    """Keys and values pass all other ranks; in backward again, and their gradients behind them until they are home.

    s, k: tokens and heads of the rank within the ring.
    """
    block = 2 * b * s * e * k
    passes = Fraction((size - 1) * block * p)
    return Sent(passes, passes + size * block * max(p, ACCUMULATED_BYTES) if size > 1 else passes)


@dataclass(frozen=True, kw_only=True)
class LayerSizes:
    """What a layer's traffic depends on. Ranks are this rank's place, where heads do not divide evenly."""

    batch: int
    tokens: int
    """Text and video of one sample."""
    hidden_size: int
    num_heads: int
    time_embed_dim: int
    element_bytes: int = 2
    tp: int = 1
    sequence_parallel: bool = False
    ulysses: int = 1
    ring: int = 1
    tp_rank: int = 0
    ulysses_rank: int = 0

    @property
    def attention_tokens(self) -> int:
        """Tokens of a rank's share in attention, padding included."""
        tp_parts = self.tp if self.sequence_parallel else 1
        return -(-self.tokens // (self.ulysses * self.ring * tp_parts)) * tp_parts


def layer_traffic(sizes: LayerSizes) -> dict[str, Sent]:
    """What a rank sends for one layer, by the part of the layout that makes it."""
    b, d, p, tp = sizes.batch, sizes.hidden_size, sizes.element_bytes, sizes.tp
    s, e = sizes.attention_tokens, d // sizes.num_heads
    own_heads = split_evenly(sizes.num_heads, tp)[sizes.tp_rank]
    ring_heads = split_evenly(own_heads, sizes.ulysses)[sizes.ulysses_rank]
    product = sequence_parallel if sizes.sequence_parallel else tensor_parallel
    return {
        "activations over tp": product(b, s, d, tp, p),
        "modulation over tp": modulation(b, d, sizes.time_embed_dim, tp, p, sizes.sequence_parallel),
        "copies' gradients over tp": replicated_gradients(d, e, tp, p, sizes.sequence_parallel),
        "ulysses": ulysses(b, s, e, own_heads, sizes.ulysses, sizes.ulysses_rank, p),
        "ring": ring(b, s * sizes.ulysses, e, ring_heads, sizes.ring, p),
    }
