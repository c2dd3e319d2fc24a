"""Several processes that share one clip along time, each with a run of its frames.

Letters: `b` batch, `c` channels, `t` frames, `h w` rows and columns, `k` frames that a convolution's kernel spans.
The forward is that of one process. Its layers ask their `FrameShard` in two places: a causal convolution for the k-1
frames that stand before its own, a norm for statistics over the frames of all.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class FrameShard:
    """A process' place in the row of those that share a clip.

    length: how many of the group's processes, its first ones, have frames. one_clip: norms see the frames of all; else
    each share is a chunk that norms see alone. goes_on: the row's last frames stay behind for a clip's next chunks.
    """

    group: dist.ProcessGroup
    length: int
    one_clip: bool = True
    goes_on: bool = False

    @property
    def index(self) -> int:
        """This process' place."""
        return self.group.rank()

    @property
    def has_frames(self) -> bool:
        """Whether this process has a share. One that has none runs on zeros, because collectives need it."""
        return self.index < self.length

    @property
    def neighbours(self) -> tuple[int | None, int | None]:
        """The places of the frames before and after this process' own, None where there are none."""
        previous = self.index - 1 if 0 < self.index < self.length else None
        return previous, self.index + 1 if self.index + 1 < self.length else None

    def frames_before(self, tail: Tensor, lookback: int, before: Tensor | None) -> Tensor:
        """The k-1 = `lookback` frames (b c k-1 h w) before this process' own, of the processes that have them.

        tail: this process' last frames, `lookback` of them or all that it has. before: the result on the row's first
        process, which must bring it along. Gradients go to the frames' owners.
        """
        return _PassOn.apply(tail, before, lookback, self)

    @torch.no_grad()
    def carry_over(self, tail: Tensor, before: Tensor) -> Tensor | None:
        """What stands before the clip's next chunk, from the row's last process; on its first one, None on others."""
        place_of_last = self.length - 1
        if self.index == place_of_last:
            last = _last_frames(before, tail)
            if self.index == 0:
                return last.clone()  # a view would keep more alive
            self.exchange(last, 0, None, None)
        return self.exchange(None, None, before, place_of_last) if self.index == 0 else None

    def gather(self, values: Tensor) -> Tensor:
        """(n ...) of the `values` (...) of all n processes of the group."""
        parts = [torch.empty_like(values) for _ in range(self.group.size())]
        dist.all_gather(parts, values.contiguous(), group=self.group)
        return torch.stack(parts)

    def sum(self, values: Tensor) -> Tensor:
        """The sum of `values` over the group."""
        total = values.contiguous().clone()
        dist.all_reduce(total, group=self.group)
        return total

    def exchange(self, sent: Tensor | None, target: int | None, like: Tensor | None, source: int | None) -> Any:
        """Send to one place while receiving a tensor shaped `like` another from a second; None without a source."""
        operations, received = [], None
        if sent is not None and target is not None:
            sent = sent.contiguous()
            operations.append(dist.P2POp(dist.isend, sent, self._rank_at(target), self.group))
        if like is not None and source is not None:
            received = torch.empty_like(like, memory_format=torch.contiguous_format)
            operations.append(dist.P2POp(dist.irecv, received, self._rank_at(source), self.group))
        for work in dist.batch_isend_irecv(operations) if operations else []:
            work.wait()
        return received

    def _rank_at(self, place: int) -> int:
        return dist.get_global_rank(self.group, place)


def _last_frames(before: Tensor, tail: Tensor) -> Tensor:
    """As many frames as `before` has, from the end of both."""
    return torch.cat([before, tail], dim=2)[:, :, tail.shape[2] :]


class _PassOn(torch.autograd.Function):
    """Forward, hand the last frames of a share on to the next process; backward, hand their gradient back.

    A share of fewer frames than a kernel looks back passes on some that it was handed, so it waits for them first.
    """

    @staticmethod
    def forward(ctx, tail: Tensor, before: Tensor | None, lookback: int, shard: FrameShard) -> Tensor:
        ctx.shard, ctx.num_own = shard, tail.shape[2]
        previous, following = shard.neighbours
        like = tail.new_empty((*tail.shape[:2], lookback, *tail.shape[3:]))
        if before is None and ctx.num_own == lookback:
            return shard.exchange(tail, following, like, previous)
        before = shard.exchange(None, None, like, previous) if before is None else before
        shard.exchange(_last_frames(before, tail), following, None, None)
        return before

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        previous, following = ctx.shard.neighbours
        passed_through = grad.shape[2] - ctx.num_own
        if passed_through == 0:
            returned = ctx.shard.exchange(grad, previous, grad, following)
        else:
            returned = ctx.shard.exchange(None, None, grad, following)
            if returned is not None:
                grad = grad.clone()
                grad[:, :, ctx.num_own :] += returned[:, :, :passed_through]
            ctx.shard.exchange(grad, previous, None, None)
        own = torch.zeros_like(grad) if returned is None else returned
        return own[:, :, passed_through:], grad if previous is None else None, None, None
