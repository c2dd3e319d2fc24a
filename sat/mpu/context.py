"""Which tokens of a sequence a rank holds, under context parallelism (cp) and Megatron's sequence parallelism (tp).

The sequence is padded at its end to equal shares. In attention a rank holds the share of its cp rank; between the
sharded products, under sequence parallelism, only its tp rank's part of that. Letters: b batch, s tokens, d channels.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.distributed as dist
from torch import Tensor

from sat.mpu.mappings import Group, _all_gather
from sat.mpu.state import ParallelState


@dataclass(frozen=True)
class SequenceShard:
    """A rank's share of a sequence of `length` tokens."""

    length: int
    parallel: ParallelState
    bounds: tuple[int, ...]
    """Tokens attend to each other between neighbouring bounds: (0, length) where all see all."""
    marks: Tensor | None = None
    """bounds as int32 where attention runs, if there are any within the sequence: a compiled graph reads these."""
    longest: int = 0
    """Tokens between the bounds that are furthest apart."""

    @classmethod
    def of(
        cls,
        length: int,
        parallel: ParallelState,
        bounds: Sequence[int] | None = None,
        device: torch.device | None = None,
    ) -> "SequenceShard | None":
        """The share of this rank; None where nothing is shared out and every token sees every other."""
        if bounds is not None:
            longest = max(high - low for low, high in pairwise(bounds))
            return cls(length, parallel, tuple(bounds), numbers_on(device, bounds), longest)
        if parallel.size("cp") == 1 and not parallel.sequence_parallel:
            return None
        return cls(length, parallel, (0, length))

    @property
    def num_parts(self) -> int:
        """Shares between the sharded products."""
        return self.parallel.size("cp") * self._tp_parts

    @property
    def _tp_parts(self) -> int:
        return self.parallel.size("tp") if self.parallel.sequence_parallel else 1

    @property
    def part_length(self) -> int:
        """Tokens of a share between the sharded products, padding included."""
        return -(-self.length // self.num_parts)

    @property
    def start(self) -> int:
        """First token of this rank's share between the sharded products."""
        tp_rank = self.parallel.rank("tp") if self.parallel.sequence_parallel else 0
        return (self.parallel.rank("cp") * self._tp_parts + tp_rank) * self.part_length

    @property
    def attention_length(self) -> int:
        """Tokens of a share in attention."""
        return self.part_length * self._tp_parts

    @property
    def attention_start(self) -> int:
        """First token of this rank's share in attention."""
        return self.parallel.rank("cp") * self.attention_length

    def count_before(self, position: int) -> int:
        """How many tokens of this rank's share lie before a place of the whole sequence."""
        return min(max(position - self.start, 0), self.part_length)

    def take(self, whole: Tensor, dim: int = 1) -> Tensor:
        """This rank's share of a tensor that lies whole on every rank, zeros where it is padding."""
        return _take(whole, dim, self.start, self.part_length)

    def take_for_attention(self, whole: Tensor, dim: int = 0) -> Tensor:
        """The same for tensors that attention reads, such as position tables."""
        return _take(whole, dim, self.attention_start, self.attention_length)

    def gather(self, part: Tensor) -> Tensor:
        """The whole (b s d) of all ranks' shares (b s/n d), on every rank.

        What follows must be the same on all ranks. Gradients are cut to the share and multiplied by the size of cp:
        the mean over replicas that data parallelism takes of them then is their sum over cp.
        """
        groups = [self.parallel.group("tp") if self.parallel.sequence_parallel else None, self.parallel.group("cp")]
        return _GatherWhole.apply(part, groups, float(self.parallel.size("cp"))).narrow(1, 0, self.length)


def numbers_on(device: torch.device | None, numbers: Sequence[int]) -> Tensor:
    """Whole numbers as int32 on a GPU without waiting for it, else on the CPU."""
    if device is None or device.type != "cuda":
        return torch.tensor(numbers, dtype=torch.int32, device="cpu")
    return torch.tensor(numbers, dtype=torch.int32, device="cpu", pin_memory=True).to(device, non_blocking=True)


def _take(whole: Tensor, dim: int, start: int, length: int) -> Tensor:
    """Entries start .. start + length along `dim`, zeros past the end. Its storage is its own."""
    available = min(max(whole.shape[dim] - start, 0), length)
    own = whole.narrow(dim, min(start, whole.shape[dim]), available)
    if available == length:
        return own.clone()
    shape = list(whole.shape)
    shape[dim] = length - available
    return torch.cat([own, whole.new_zeros(shape)], dim)


class _GatherWhole(torch.autograd.Function):
    """Concatenate tokens over groups, the innermost first; backward, this rank's slice times a factor."""

    @staticmethod
    def forward(ctx, part: Tensor, groups: Sequence[Group], factor: float) -> Tensor:
        ctx.groups, ctx.factor, ctx.length = groups, factor, part.shape[1]
        for group in groups:
            if group is not None:
                part = _all_gather(part, group, 1)
        return part

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        for group in reversed(ctx.groups):
            if group is not None:
                grad = grad.chunk(group.size(), 1)[group.rank()]
        assert grad.shape[1] == ctx.length
        return grad * ctx.factor, None, None


class _ExchangeHeads(torch.autograd.Function):
    """(m b k s/n e), all heads of a share -> (m b k/n s e), a share of the heads of the whole; and back in backward."""

    @staticmethod
    def forward(ctx, tensor: Tensor, group: dist.ProcessGroup, heads: Sequence[int], to_heads: bool) -> Tensor:
        ctx.group, ctx.heads, ctx.to_heads = group, heads, to_heads
        return _to_heads(tensor, group, heads) if to_heads else _to_tokens(tensor, group, heads)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None, None]:
        back = _to_tokens if ctx.to_heads else _to_heads
        return back(grad, ctx.group, ctx.heads), None, None, None


def _to_heads(tensor: Tensor, group: dist.ProcessGroup, heads: Sequence[int]) -> Tensor:
    m, b, _, tokens, e = tensor.shape
    own = heads[group.rank()]
    sent = torch.cat([part.reshape(-1) for part in tensor.split(list(heads), dim=2)])
    received = tensor.new_empty(group.size() * m * b * own * tokens * e)
    unit = m * b * tokens * e
    dist.all_to_all_single(received, sent, [own * unit] * group.size(), [count * unit for count in heads], group=group)
    parts = received.view(group.size(), m, b, own, tokens, e)
    return parts.permute(1, 2, 3, 0, 4, 5).reshape(m, b, own, group.size() * tokens, e)


def _to_tokens(tensor: Tensor, group: dist.ProcessGroup, heads: Sequence[int]) -> Tensor:
    m, b, own, tokens, e = tensor.shape
    size = group.size()
    share = tokens // size
    sent = tensor.reshape(m, b, own, size, share, e).permute(3, 0, 1, 2, 4, 5).reshape(-1)
    received = tensor.new_empty(m * b * sum(heads) * share * e)
    unit = m * b * share * e
    dist.all_to_all_single(received, sent, [count * unit for count in heads], [own * unit] * size, group=group)
    parts = received.split([count * unit for count in heads])
    return torch.cat([part.view(m, b, count, share, e) for part, count in zip(parts, heads)], dim=2)


def exchange_to_heads(tensor: Tensor, group: dist.ProcessGroup, heads: Sequence[int]) -> Tensor:
    """Ulysses' first exchange: (m b k s/n e) -> (m b heads[rank] s e) (Jacobs et al. 2023, arXiv:2309.14509)."""
    return _ExchangeHeads.apply(tensor, group, heads, True)


def exchange_to_tokens(tensor: Tensor, group: dist.ProcessGroup, heads: Sequence[int]) -> Tensor:
    """Ulysses' second exchange, the first one's inverse: (m b heads[rank] s e) -> (m b k s/n e)."""
    return _ExchangeHeads.apply(tensor, group, heads, False)


class RingPass:
    """Sends tensors one place around a ring while the caller computes; every rank gets those of the one before it."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        ranks = dist.get_process_group_ranks(group)
        self.next = ranks[(group.rank() + 1) % group.size()]
        self.previous = ranks[(group.rank() - 1) % group.size()]

    def start(self, tensors: Sequence[Tensor]) -> "PendingPass":
        """Begin to pass contiguous tensors on; they must stay as they are until `wait`."""
        received = [torch.empty_like(tensor) for tensor in tensors]
        operations = [dist.P2POp(dist.isend, tensor, self.next, self.group) for tensor in tensors]
        operations += [dist.P2POp(dist.irecv, tensor, self.previous, self.group) for tensor in received]
        return PendingPass(dist.batch_isend_irecv(operations), received, tensors)


@dataclass(frozen=True)
class PendingPass:
    """A pass under way. Holds what is sent: gloo loses a message whose tensor goes away."""

    works: Sequence[dist.Work]
    received: list[Tensor]
    sent: Sequence[Tensor]

    def wait(self) -> list[Tensor]:
        """The tensors of the rank before."""
        for work in self.works:
            work.wait()
        return self.received
