"""Low-rank adapters on the projections of layers (Hu et al. 2021, arXiv:2106.09685, eq. 3), under SAT's names.

y = W x + b + concat_i(B_i A_i x) · alpha / r, one pair A_i (r, inputs), B_i (block, r) for each block of a projection:
q, k, v for `query_key_value`, key and value for `key_value`, one for the others. SAT's default alpha is 1.

Letters: r rank, of all adapters of a projection together.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sat.config import did_you_mean
from sat.errors import ConfigError
from sat.model.base_model import BaseMixin, BaseModel
from sat.model.hooks import Context
from sat.mpu.layers import ColumnParallelLinear, RowParallelLinear
from sat.mpu.shards import ShardRule, make_rule, mark_sharded

TARGETS: Mapping[str, tuple[str, ...]] = {
    "qkv": ("attention.query_key_value",),
    "dense": ("attention.dense",),
    "mlp": ("mlp.dense_h_to_4h", "mlp.dense_4h_to_h"),
    "cross_attention": ("cross_attention.query", "cross_attention.key_value", "cross_attention.dense"),
}
"""What may get adapters -> its projections, by their names within a layer."""

RELEASED_TARGETS = ("qkv", "dense")
"""What SAT's lora2 adapts, besides the cross attention of decoder layers."""


@dataclass(frozen=True)
class Adapter:
    """One adapter's share of a projection."""

    number: int
    """Which of the model's adapters it belongs to: the place of its scale among those of a call."""
    rank: int
    scaling: float
    """alpha / rank."""


class LoraLinear(nn.Module):
    """A linear layer (`original`) and its adapters. Loads plain weights into `original` as well as its own names.

    Several adapters lie side by side along the rank. A call's context may scale each: `lora_scale`, one number for all
    or one for each. Over tensor-parallel ranks the adapters are split as the layer is: B by its outputs, or A by its
    inputs.
    """

    reads_context = True

    def __init__(self, original: nn.Module, adapters: Sequence[Adapter], lora_dropout: float = 0.0) -> None:
        super().__init__()
        self.original: Any = original
        self.adapters = tuple(adapters)
        self.lora_dropout = nn.Dropout(lora_dropout)
        weight: Tensor = original.weight  # type: ignore[assignment]
        factory: dict[str, Any] = {"device": weight.device, "dtype": weight.dtype}
        splits, rank = output_rules(original), self.rank
        whole = [torch.empty(rank, num_inputs(original), **factory) for _ in splits]
        for matrix in whole:
            nn.init.kaiming_uniform_(matrix, a=math.sqrt(5))
        self.matrix_A = nn.ParameterList(_own_part(matrix, _input_rule(original), original) for matrix in whole)
        self.matrix_B = nn.ParameterList(
            _own_part(torch.zeros(sum(rule.chunks), rank, **factory), rule, original) for rule in splits
        )
        self.register_load_state_dict_pre_hook(_accept_plain_weights)

    @property
    def rank(self) -> int:
        """Rank of all adapters together."""
        return sum(adapter.rank for adapter in self.adapters)

    def forward(self, hidden: Tensor, ctx: Context | None = None) -> Tensor:
        called = 1.0 if ctx is None else ctx.get("lora_scale")
        return self.original(hidden) + self._update(self.lora_dropout(hidden), 1.0 if called is None else called)

    def _update(self, hidden: Tensor, called: float | Sequence[float]) -> Tensor:
        reduced = F.linear(hidden, torch.cat(list(self.matrix_A)))
        if isinstance(self.original, RowParallelLinear):
            reduced = self.original.leave(reduced)
        elif isinstance(self.original, ColumnParallelLinear):
            reduced = self.original.enter(reduced)
        scale = self._scales(called, reduced)
        parts = reduced.chunk(len(self.matrix_A), dim=-1)
        update = torch.cat([(part * scale) @ b.T for part, b in zip(parts, self.matrix_B)], dim=-1)
        return self.original.finish(update) if isinstance(self.original, ColumnParallelLinear) else update

    def _scales(self, called: float | Sequence[float], like: Tensor) -> float | Tensor:
        """The factor of each row of A: one number where there is one adapter, else (r,)."""
        called = [called] * (1 + self.adapters[-1].number) if isinstance(called, int | float) else called
        factors = [adapter.scaling * called[adapter.number] for adapter in self.adapters]
        if len(factors) == 1:
            return factors[0]
        return torch.cat([like.new_full((one.rank,), factor) for one, factor in zip(self.adapters, factors)])

    def fill(self, matrices: Mapping[str, Tensor]) -> None:
        """Take whole matrices, `matrix_A.0` .. `matrix_B.2`, or this rank's part of them."""
        with torch.no_grad():
            for rule, name, own in self._matrices():
                own.copy_(_part(matrices[name], rule, self.original))

    def _matrices(self) -> Iterator[tuple[ShardRule, str, Tensor]]:
        for number, rule in enumerate(output_rules(self.original)):
            yield _input_rule(self.original), f"matrix_A.{number}", self.matrix_A[number]
            yield rule, f"matrix_B.{number}", self.matrix_B[number]

    def weight_change(self) -> Tensor:
        """What the adapters add to the weight, at a scale of 1 for each."""
        scale = self._scales(1.0, self.matrix_A[0])
        rows = [scale.unsqueeze(1) * a if isinstance(scale, Tensor) else scale * a for a in self.matrix_A]
        return torch.cat([b @ a for a, b in zip(rows, self.matrix_B)], dim=0)

    def merged(self) -> nn.Module:
        """The original layer with the adapters folded into its weight."""
        with torch.no_grad():
            self.original.weight += self.weight_change()
        return self.original


def num_inputs(linear: nn.Module) -> int:
    """Inputs of a whole linear layer, of which this rank may hold a part."""
    return linear.input_size if isinstance(linear, RowParallelLinear) else linear.weight.shape[1]  # type: ignore[return-value, index]


def output_rules(linear: nn.Module) -> list[ShardRule]:
    """How the outputs of each block of a projection are split; blocks of one rank are whole."""
    if not isinstance(linear, ColumnParallelLinear):
        return [make_rule(0, len(linear.weight))]  # type: ignore[arg-type]
    return linear.rule.of_chunks()


def _input_rule(linear: nn.Module) -> ShardRule:
    """How the inputs of a projection are split."""
    return linear.rule if isinstance(linear, RowParallelLinear) else make_rule(1, num_inputs(linear))


def _is_split(rule: ShardRule, layer: nn.Module) -> bool:
    """Whether a rank holds a part of a matrix along that dimension."""
    return isinstance(layer, ColumnParallelLinear) if rule.dim == 0 else isinstance(layer, RowParallelLinear)


def _part(whole: Tensor, rule: ShardRule, layer: Any) -> Tensor:
    """This rank's part of a whole adapter matrix."""
    return rule.cut(whole, layer.rank, layer.world_size) if _is_split(rule, layer) else whole


def _own_part(whole: Tensor, rule: ShardRule, layer: nn.Module) -> nn.Parameter:
    parameter = nn.Parameter(_part(whole, rule, layer).contiguous())
    if _is_split(rule, layer):
        mark_sharded(parameter, rule)
    return parameter


def _accept_plain_weights(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    for name in ("weight", "bias"):
        if f"{prefix}{name}" in state:
            state[f"{prefix}original.{name}"] = state.pop(f"{prefix}{name}")


def lora_layers(model: nn.Module) -> dict[str, LoraLinear]:
    """Every projection with adapters, by its name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLinear)}


def wrap(model: nn.Module, name: str, adapters: Sequence[Adapter], lora_dropout: float = 0.0) -> LoraLinear:
    """Put adapters on the projection of that name, in the place of those that it may have; they change nothing yet."""
    linear = model.get_submodule(name)
    original = linear.original if isinstance(linear, LoraLinear) else linear
    wrapped = LoraLinear(original, adapters, lora_dropout)
    model.set_submodule(name, wrapped)
    return wrapped


def merge_lora(model: nn.Module) -> None:
    """Fold every adapter into its layer's weight and put the plain layers back."""
    for name, linear in lora_layers(model).items():
        model.set_submodule(name, linear.merged())


class LoraMixin(BaseMixin):
    """Puts adapters on projections of some layers when it is added; the rest of the model stays.

    targets: any of qkv, dense, mlp, cross_attention; by default the attention's, as SAT's. layer_range: numbers of the
    layers to adapt, all by default. cross_attention: adapt that of decoder layers too, where targets does not say.
    """

    def __init__(
        self,
        layer_num: int,
        r: int,
        lora_alpha: float = 1.0,
        lora_dropout: float = 0.0,
        layer_range: Iterable[int] | None = None,
        qlora: bool = False,
        cross_attention: bool = True,
        targets: Sequence[str] | None = None,
    ) -> None:
        super().__init__()
        if r < 1:
            raise ConfigError(f"lora rank r is {r}; give 1 or more")
        if qlora:
            raise ConfigError("qlora (4-bit base weights) is not supported; leave it out")
        for target in targets or ():
            if target not in TARGETS:
                raise ConfigError(
                    f"lora targets has '{target}'{did_you_mean(target, TARGETS)}; give {', '.join(TARGETS)}"
                )
        self.layer_range = list(range(layer_num)) if layer_range is None else list(layer_range)
        if not self.layer_range:
            raise ConfigError("lora layer_range is empty, so nothing would be adapted; leave it out for all layers")
        outside = [number for number in self.layer_range if not 0 <= number < layer_num]
        if outside:
            raise ConfigError(f"lora layer_range has {outside}; the model's layers are 0 to {layer_num - 1}")
        self.r = r
        self.lora_alpha = lora_alpha
        self.lora_dropout = lora_dropout
        default = (*RELEASED_TARGETS, "cross_attention") if cross_attention else RELEASED_TARGETS
        self.targets = tuple(targets or default)

    def _projections(self) -> Iterator[str]:
        """Name of every projection to adapt."""
        for index in self.layer_range:
            layer = self.transformer.layers[index]
            for projection in (name for target in self.targets for name in TARGETS[target]):
                if hasattr(layer, projection.partition(".")[0]):  # layers that are no decoders have no cross attention
                    yield f"layers.{index}.{projection}"

    def reinit(self, parent_model: BaseModel | None = None) -> None:
        adapter, names = Adapter(0, self.r, self.lora_alpha / self.r), list(self._projections())
        if not names:
            raise ConfigError(
                f"lora targets are {', '.join(self.targets)}, and no layer has them; give some of {', '.join(TARGETS)} "
                "that the model has"
            )
        for name in names:
            wrap(self.transformer, name, [adapter], self.lora_dropout)

    def merge_lora(self) -> None:
        """Fold every adapter into its layer's weight and put the plain layer back."""
        merge_lora(self.transformer)
