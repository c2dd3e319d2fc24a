"""Dealing the frames of a clip to the processes of a group, and putting together what they make of them.

Shares are dealt in latents, so that no frames that are pooled or doubled together lie on two processes. Every process
has the whole clip before and after; between, its share. Video is (b t c h w): `b` clips, `t` frames.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate, pairwise

import torch
import torch.distributed as dist
from torch import Tensor

from sat.errors import LayoutError
from sat.mpu.mappings import _all_gather_sizes
from sat.mpu.shards import split_evenly
from sat.vae.causal_conv import ConvCache, FirstFrame, is_first_apart
from sat.vae.decoder import count_pixel_frames
from sat.vae.encoder import frames_per_level
from sat.vae.shard import FrameShard


def deal_frames(
    num_frames: int, num_halvings: int, first_frame: FirstFrame, num_shares: int
) -> tuple[list[int], list[int]]:
    """(pixel frames, latents) of each share of a clip of `num_frames` pixel frames. Earlier shares get more."""
    counts = frames_per_level(num_frames, num_halvings, first_frame)
    latents = split_evenly(counts[-1], num_shares)
    ends = list(accumulate(latents))
    for count, pooled in reversed(list(pairwise(counts))):
        apart = is_first_apart(first_frame, count)
        # An odd frame at the end, which pooling leaves out, goes to the share before it.
        ends = [count if end == pooled else 2 * end - apart for end in ends]
    return [end - start for start, end in pairwise([0, *ends])], latents


def take_share(whole: Tensor, sizes: Sequence[int], stand_in: int, group: dist.ProcessGroup) -> Tensor:
    """This process' frames of (b t c h w), `sizes` of which the processes get; `stand_in` frames of zeros for none.

    Gradients of the whole are complete and the same on every process; in a share they are larger by a factor, see
    `gather_shares`.
    """
    return _TakeShare.apply(whole, sizes, stand_in, group)


def gather_shares(part: Tensor, sizes: Sequence[int], group: dist.ProcessGroup) -> Tensor:
    """The whole (b t c h w) of all shares, on every process; `sizes` as in `take_share`.

    What follows must be the same on every process. Gradients in shares are multiplied by the size of the group: the
    mean over replicas that data parallelism takes of parameters' gradients then is their sum over shares.
    """
    return _GatherShares.apply(part, sizes, group)


class _TakeShare(torch.autograd.Function):
    """This process' frames forward; backward, those of all processes, over the factor that shares have."""

    @staticmethod
    def forward(ctx, whole: Tensor, sizes: Sequence[int], stand_in: int, group: dist.ProcessGroup) -> Tensor:
        ctx.sizes, ctx.group = sizes, group
        rank = group.rank()
        if sizes[rank] == 0:
            return whole.new_zeros((len(whole), stand_in, *whole.shape[2:]))
        return whole.narrow(1, sum(sizes[:rank]), sizes[rank]).clone()

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        own = grad.narrow(1, 0, ctx.sizes[ctx.group.rank()])
        return _all_gather_sizes(own, ctx.group, 1, ctx.sizes) / ctx.group.size(), None, None, None


class _GatherShares(torch.autograd.Function):
    """The frames of all processes forward; backward, this one's, times the factor that shares have."""

    @staticmethod
    def forward(ctx, part: Tensor, sizes: Sequence[int], group: dist.ProcessGroup) -> Tensor:
        ctx.sizes, ctx.group, ctx.shape = sizes, group, part.shape
        return _all_gather_sizes(part.narrow(1, 0, sizes[group.rank()]), group, 1, sizes)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        rank = ctx.group.rank()
        own = grad.narrow(1, sum(ctx.sizes[:rank]), ctx.sizes[rank]) * ctx.group.size()
        return own if own.shape == ctx.shape else own.new_zeros(ctx.shape), None, None


Run = Callable[[Tensor, ConvCache | None, FirstFrame, FrameShard | None], Tensor]
"""Encoder or decoder: (video, cache, first-frame rule, shard) -> video."""

RunShared = Callable[[Run, Tensor, int, FirstFrame, dist.ProcessGroup], Tensor]
"""`encode_shared` or `decode_shared`."""


def encode_shared(run: Run, pixels: Tensor, num_halvings: int, rule: FirstFrame, group: dist.ProcessGroup) -> Tensor:
    """Moments (b t 2z h w) of pixels (b T 3 H W), each process computing its share of the latents."""
    frames, latents = deal_frames(pixels.shape[1], num_halvings, rule, group.size())
    shard = FrameShard(group, length=min(sum(latents), group.size()))
    own = take_share(pixels, frames, 1 << num_halvings, group)
    return gather_shares(run(own, None, rule if shard.index == 0 else "later", shard), latents, group)


def decode_shared(run: Run, latents: Tensor, num_halvings: int, rule: FirstFrame, group: dist.ProcessGroup) -> Tensor:
    """Pixels (b T 3 H W) of latents (b t z h w), each process computing those of its share of the latents."""
    num_latents = latents.shape[1]
    frames, shares = deal_frames(count_pixel_frames(num_latents, num_halvings, rule), num_halvings, rule, group.size())
    shard = FrameShard(group, length=min(num_latents, group.size()))
    starts_apart = shard.index == 0 and (num_latents == 1 or is_first_apart(rule, num_latents))
    own = take_share(latents, shares, 1, group)
    return gather_shares(run(own, None, "split" if starts_apart else "later", shard), frames, group)


@torch.no_grad()
def run_chunks_shared(
    run: Run,
    chunks: Sequence[Tensor],
    rules: Sequence[FirstFrame],
    shapes: Sequence[Sequence[int]],
    weight: Tensor,
    group: dist.ProcessGroup,
) -> Iterator[Tensor]:
    """What `run` makes of chunks of a clip, in order, on every process.

    Process i of n computes chunks i, n + i, ... A chunk sees of the one before it only the frames that convolutions
    look back to, and those are there as soon as both have come to the same layer: n chunks are under way at once.
    shapes: of the results, which are like `weight` in precision and device.
    """
    cache, size = ConvCache(), group.size()
    for begin in range(0, len(chunks), size):
        end = min(begin + size, len(chunks))
        shard = FrameShard(group, length=end - begin, one_clip=False, goes_on=end < len(chunks))
        own = begin + shard.index
        results = {own: run(chunks[own], cache, rules[own], shard).contiguous()} if shard.has_frames else {}
        for index in range(begin, end):
            chunk = results.pop(index) if index in results else weight.new_empty(shapes[index])
            dist.broadcast(chunk, dist.get_global_rank(group, index - begin), group)
            yield chunk


def check_agreement(shape: Sequence[int], name: str, device: torch.device, group: dist.ProcessGroup) -> None:
    """Raise LayoutError on every process of a group unless all have clips of the same shape (5 numbers)."""
    own = torch.tensor(shape, device=device)
    shapes = [torch.empty_like(own) for _ in range(group.size())]
    dist.all_gather(shapes, own, group=group)
    found = [tuple(shape.tolist()) for shape in shapes]
    if len(set(found)) > 1:
        places = ", ".join(f"{shape} at place {place}" for place, shape in enumerate(found))
        raise LayoutError(
            f"{name} differ among the {len(found)} processes that share a clip: {places}; give all of them the same"
        )
