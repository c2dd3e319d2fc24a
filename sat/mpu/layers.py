"""Linear layers and embeddings whose weights are split over a tensor-parallel group (Shoeybi et al. 2019, sec. 3).

A layer holds its own slice, cut from the whole initial weight, so that the weights of a seed are the same at any group
size. `rule` says how the whole weight splits; saving, loading and resharding read it.
"""

import math
import mmap
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from sat.mpu.mappings import (
    copy_to_model_parallel_region,
    gather_from_model_parallel_region,
    gather_sequence,
    reduce_from_model_parallel_region,
    reduce_scatter_sequence,
    scatter_to_model_parallel_region,
)
from sat.mpu.shards import ShardRule, make_rule, mark_sharded
from sat.mpu.state import get_parallel_state

InitMethod = Callable[..., object]


def unscaled_init_method(std: float) -> InitMethod:
    """Initialise weights from N(0, std²)."""

    def init(weight: Tensor, **_: object) -> Tensor:
        return nn.init.normal_(weight, std=std)

    return init


def scaled_init_method(std: float, num_layers: int) -> InitMethod:
    """Initialise weights of residual outputs from N(0, std² / (2 num_layers)) (Radford et al. 2019, sec. 2.3)."""
    return unscaled_init_method(std / (2.0 * num_layers) ** 0.5)


def _pages_of(shape: Sequence[int], like: Tensor) -> Tensor:
    """An uninitialised tensor of that shape; on a CPU in pages of its own, which go back to the system with it."""
    if like.device.type != "cpu":
        return like.new_empty(list(shape))
    pages = mmap.mmap(-1, max(math.prod(shape) * like.element_size(), 1))
    return torch.frombuffer(pages, dtype=like.dtype, count=math.prod(shape)).view(*shape)


class _Sharded(nn.Module):
    """What the sharded layers share: a group, a rule, and making a slice of a whole parameter."""

    rule: ShardRule

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        super().__init__()
        self.group = group if group is not None else get_parallel_state().group("tp")
        self.world_size = 1 if self.group is None else self.group.size()
        self.rank = 0 if self.group is None else self.group.rank()

    def _own_part(self, shape: Sequence[int], fill: Callable[[Tensor], object] | None, **factory: Any) -> nn.Parameter:
        """This rank's part of a parameter of that shape, of which `fill` makes the whole.

        The whole does not come from the heap, in which it would leave gaps between the parts of all parameters.
        """
        own_shape = list(shape)
        own_shape[self.rule.dim] = self.rule.size(self.rank, self.world_size)
        own = torch.empty(own_shape, **factory)
        if fill is not None and self.world_size == 1:
            fill(own)
        elif fill is not None:
            whole = _pages_of(shape, own)
            fill(whole)
            self.rule.cut(whole, self.rank, self.world_size, out=own)
        parameter = nn.Parameter(own)
        mark_sharded(parameter, self.rule)
        return parameter

    def _own_weight(
        self,
        shape: Sequence[int],
        init: InitMethod | None,
        skip: bool,
        module: nn.Module,
        name: str | None,
        **factory: Any,
    ) -> nn.Parameter:
        """The part of a weight, drawn as a whole, so that it is the same at any group size; undefined where skipped."""

        def fill(weight: Tensor) -> object:
            return (init or unscaled_init_method(0.02))(weight, module=module, name=name)

        return self._own_part(shape, None if skip else fill, **factory)

    @property
    def own_sizes(self) -> list[int]:
        """Length of this rank's part of each chunk of the split dimension."""
        return [parts[self.rank] for parts in self.rule.sizes(self.world_size)]

    @property
    def rank_sizes(self) -> list[int]:
        """Length of every rank's part of the split dimension."""
        return [self.rule.size(rank, self.world_size) for rank in range(self.world_size)]


class ColumnParallelLinear(_Sharded):
    """y = x Wᵀ + b with the rows of W (the outputs) split over the group.

    stride: how many equal blocks the outputs are made of (3 for fused q, k, v), or the blocks' proportions; each block
    is split on its own, in runs of `unit` outputs, by `fine_units` where there are more ranks than runs.
    gather_output: return the whole y rather than this rank's outputs.
    sequence_parallel: x holds this rank's tokens (b s/n d) and is gathered first; with gather_output, x is the same on
    all ranks and y is used for tokens of the rank's own, so gradients of x are this rank's share, to be summed later.
    """

    def __init__(
        self,
        input_size: int,
        output_size: int,
        bias: bool = True,
        gather_output: bool = True,
        init_method: InitMethod | None = None,
        stride: int | Sequence[int] = 1,
        params_dtype: torch.dtype | None = None,
        module: nn.Module | None = None,
        name: str | None = None,
        skip_init: bool = False,
        device: torch.device | str | None = None,
        group: dist.ProcessGroup | None = None,
        unit: int = 1,
        fine_units: Sequence[int] | None = None,
        sequence_parallel: bool = False,
        bias_init_method: InitMethod = nn.init.zeros_,
    ) -> None:
        super().__init__(group)
        self.input_size, self.output_size = input_size, output_size
        self.gather_output = gather_output
        self.stride = stride
        self.sequence_parallel = sequence_parallel and self.group is not None
        self.rule = make_rule(0, output_size, stride, unit, fine_units)
        factory: dict[str, Any] = {"device": device, "dtype": params_dtype}
        shape = (output_size, input_size)
        self.weight = self._own_weight(shape, init_method, skip_init, module or self, name, **factory)
        self.bias = None
        if bias:
            self.bias = self._own_part((output_size,), nn.init.zeros_ if skip_init else bias_init_method, **factory)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.finish(F.linear(self.enter(hidden), self.weight, self.bias))

    def enter(self, hidden: Tensor) -> Tensor:
        """What the product is taken of: the input, as all ranks of the group see it."""
        if not self.sequence_parallel:
            return copy_to_model_parallel_region(hidden, self.group)
        return hidden if self.gather_output else gather_sequence(hidden, self.group)

    def finish(self, output: Tensor) -> Tensor:
        """What is returned of this rank's outputs."""
        if not self.gather_output:
            return output
        return gather_from_model_parallel_region(output, self.group, self.rank_sizes, self.sequence_parallel)

    def extra_repr(self) -> str:
        return f"{self.input_size}, {self.output_size}, bias={self.bias is not None}, ranks={self.world_size}"


class RowParallelLinear(_Sharded):
    """y = x Wᵀ + b with the columns of W (the inputs) split over the group; b is whole and added once.

    input_is_parallel: x already holds only this rank's inputs. final_bias: add b after the sum over ranks, else the
    first rank adds it before. sequence_parallel: of the sum over ranks, return this rank's tokens (b s/n d).
    """

    def __init__(
        self,
        input_size: int,
        output_size: int,
        bias: bool = True,
        input_is_parallel: bool = False,
        init_method: InitMethod | None = None,
        params_dtype: torch.dtype | None = None,
        module: nn.Module | None = None,
        name: str | None = None,
        skip_init: bool = False,
        device: torch.device | str | None = None,
        final_bias: bool = True,
        group: dist.ProcessGroup | None = None,
        unit: int = 1,
        fine_units: Sequence[int] | None = None,
        sequence_parallel: bool = False,
    ) -> None:
        super().__init__(group)
        self.input_size, self.output_size = input_size, output_size
        self.input_is_parallel = input_is_parallel
        self.final_bias = final_bias
        self.sequence_parallel = sequence_parallel and self.group is not None
        self.rule = make_rule(1, input_size, unit=unit, fine_units=fine_units)
        factory: dict[str, Any] = {"device": device, "dtype": params_dtype}
        shape = (output_size, input_size)
        self.weight = self._own_weight(shape, init_method, skip_init, module or self, name, **factory)
        self.bias = nn.Parameter(torch.zeros(output_size, **factory)) if bias else None

    def forward(self, hidden: Tensor) -> Tensor:
        if not self.input_is_parallel:
            hidden = scatter_to_model_parallel_region(hidden, self.group, self.rank_sizes)
        if self.bias is None:
            return self.leave(F.linear(hidden, self.weight))
        if self.group is None:
            return F.linear(hidden, self.weight, self.bias)
        if self.final_bias:
            return self.leave(F.linear(hidden, self.weight)) + self.bias
        bias = self.bias if self.sequence_parallel else copy_to_model_parallel_region(self.bias, self.group)
        return self.leave(F.linear(hidden, self.weight, bias if self.rank == 0 else 0.0 * bias))

    def leave(self, summand: Tensor) -> Tensor:
        """The sum over ranks of what each computed of its inputs."""
        if self.sequence_parallel:
            return reduce_scatter_sequence(summand, self.group)
        return reduce_from_model_parallel_region(summand, self.group)

    def extra_repr(self) -> str:
        return f"{self.input_size}, {self.output_size}, bias={self.bias is not None}, ranks={self.world_size}"


class VocabParallelEmbedding(_Sharded):
    """An embedding table whose rows are split over the group; each rank looks up its own and the results are summed.

    sequence_parallel: the rank goes on with tokens of its own, so the ranks' gradients are summed.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        params_dtype: torch.dtype | None = None,
        init_method: InitMethod | None = None,
        skip_init: bool = False,
        device: torch.device | str | None = None,
        group: dist.ProcessGroup | None = None,
        sequence_parallel: bool = False,
    ) -> None:
        super().__init__(group)
        self.sequence_parallel = sequence_parallel
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        self.rule = make_rule(0, num_embeddings)
        self.num_embeddings_per_partition = self.rank_sizes[self.rank]
        self.vocab_start_index = sum(self.rank_sizes[: self.rank])
        shape = (num_embeddings, embedding_dim)
        factory: dict[str, Any] = {"device": device, "dtype": params_dtype}
        self.weight = self._own_weight(shape, init_method, skip_init, self, "word_embeddings", **factory)

    def forward(self, input_ids: Tensor) -> Tensor:
        if self.group is None:
            return F.embedding(input_ids, self.weight)
        local_ids = input_ids - self.vocab_start_index
        is_elsewhere = (local_ids < 0) | (local_ids >= self.num_embeddings_per_partition)
        rows = F.embedding(local_ids.masked_fill(is_elsewhere, 0), self.weight)
        rows = rows.masked_fill(is_elsewhere.unsqueeze(-1), 0.0)
        return reduce_from_model_parallel_region(rows, self.group, sum_gradients=self.sequence_parallel)
