"""Operations of the video transformer by formula: what speed is measured against.

A product of m x k with k x n numbers counts 2 m k n operations, as in torch's FLOP counter; norms, activations and
other work on single elements counts nothing. For L layers of width d over s tokens a forward pass comes to

    24 L s d² + 4 L s² d + what is at the ends: patches, text, time, modulation.

Backward computes the gradient of each weight that is trained, and of each input that leads back to one: two more
products of the same size for most. Attention multiplies twice forward and four times backward; kernels that compute
scores again in backward (flash attention) do more than is counted. A mixin's own products are not counted, except
for adapters and SwiGLU.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from sat.cogvideox.mixins import SwiGLUMixin
from sat.model.finetune.lora2 import LoraLinear, num_inputs, output_rules
from sat.mpu.layers import ColumnParallelLinear

Rows = Literal["text", "video", "tokens", "final", "samples", "calls"]
"""What a product is taken of: text or video tokens, both, what the final layer sees, samples, or once a call."""

ROWS: tuple[Rows, ...] = ("text", "video", "tokens", "final", "samples", "calls")


@dataclass(frozen=True)
class Clip:
    """Tokens of one sample."""

    text: int
    video: int

    @property
    def length(self) -> int:
        """Tokens that see each other."""
        return self.text + self.video


@dataclass(frozen=True)
class Flops:
    """Operations of one pass over some samples, on all ranks together."""

    products: int = 0
    """Products with weights."""
    attention: int = 0
    """Scores, and the values that they weigh."""

    def __add__(self, other: "Flops") -> "Flops":
        return Flops(self.products + other.products, self.attention + other.attention)

    @property
    def total(self) -> int:
        """All of them."""
        return self.products + self.attention


@dataclass(frozen=True)
class _Cost:
    """Operations for each row, forward and backward; and whether gradients flow through the output."""

    forward: int
    backward: int
    leads_to_trained: bool


class TransformerFlops:
    """What a network's passes cost. Made while its parameters are whole: ZeRO 3 leaves empty ones."""

    def __init__(self, network: Any) -> None:
        self.forward_of: dict[Rows, int] = dict.fromkeys(ROWS, 0)
        self.backward_of: dict[Rows, int] = dict.fromkeys(ROWS, 0)
        self._attention_width = 0
        """Width of the attended values, summed over layers;"""
        self._attention_backward_width = 0
        """and over those through which gradients flow."""
        self._layer_of: dict[Rows, int] = dict.fromkeys(ROWS, 0)
        self.num_layers = len(network.transformer.layers)
        time_trains = self._time(network)
        hidden_trains = self._embed(network)
        for index in range(self.num_layers):
            hidden_trains = self._layer(network, index, hidden_trains, time_trains)
        self._final(network, hidden_trains, time_trains)

    # --- passes over samples -----------------------------------------------------------------------------------------

    def forward(self, clips: Sequence[Clip], is_packed: bool = False) -> Flops:
        """One forward pass. is_packed: the clips are one row, each attending within itself."""
        return Flops(_sum(self.forward_of, clips, is_packed), 4 * self._attention_width * _pairs(clips))

    def backward(self, clips: Sequence[Clip], is_packed: bool = False) -> Flops:
        """The gradients of a forward pass."""
        return Flops(_sum(self.backward_of, clips, is_packed), 8 * self._attention_backward_width * _pairs(clips))

    def training(self, clips: Sequence[Clip], is_packed: bool = False) -> Flops:
        """Forward and backward, nothing computed twice: the model's FLOPs of a step."""
        return self.forward(clips, is_packed) + self.backward(clips, is_packed)

    def recomputed(self, clips: Sequence[Clip], num_layers: int) -> Flops:
        """What backward computes a second time where the activations of so many layers are not kept."""
        layers = Flops(_sum(self._layer_of, clips, False), 4 * self._attention_width * _pairs(clips))
        share = self.num_layers
        return Flops(layers.products * num_layers // share, layers.attention * num_layers // share)

    # --- what the parts cost -----------------------------------------------------------------------------------------

    def _add(self, rows: Rows, linear: Any, input_trains: bool) -> bool:
        cost = _cost(linear, input_trains)
        self.forward_of[rows] += cost.forward
        self.backward_of[rows] += cost.backward
        return cost.leads_to_trained

    def _chain(self, rows: Rows, module: nn.Module) -> bool:
        trains = False
        for linear in _linears(module):
            trains = self._add(rows, linear, trains)
        return trains

    def _time(self, network: Any) -> bool:
        """The time embedding and what is added to it."""
        trains = self._chain("samples", network.time_embed)
        if getattr(network, "label_emb", None) is not None:
            trains |= self._chain("samples", network.label_emb)
        if getattr(network, "ofs_embed_dim", None) is not None:
            trains |= self._chain("calls", network.ofs_embed)
        return trains

    def _embed(self, network: Any) -> bool:
        patches = network.get_mixin("patch_embed")
        trains = self._add("video", patches.proj, False) | self._add("text", patches.text_proj, False)
        positions = network.get_mixin("pos_embed")
        return trains or any(parameter.requires_grad for parameter in positions.parameters())

    def _layer(self, network: Any, index: int, hidden_trains: bool, time_trains: bool) -> bool:
        before = dict(self.forward_of)
        layer, width = network.transformer.layers[index], network.hidden_size
        adaln = next((mixin for mixin in network.mixins.values() if hasattr(mixin, "modulations")), None)
        modulated = False
        if adaln is not None:
            modulated = time_trains
            for linear in _linears(adaln.modulations[index]):
                modulated = self._add("samples", linear, modulated)
        attention_trains = self._add("tokens", layer.attention.query_key_value, hidden_trains or modulated)
        attention_trains |= _is_trained(adaln, f"_layernorm_list.{index}.")
        self._attention_width += width
        self._attention_backward_width += width if attention_trains else 0
        hidden_trains |= self._add("tokens", layer.attention.dense, attention_trains) or modulated

        mlp, mlp_trains = layer.mlp, hidden_trains or modulated
        inner_trains = self._add("tokens", mlp.dense_h_to_4h, mlp_trains)
        for mixin in network.mixins.values():
            if isinstance(mixin, SwiGLUMixin):
                inner_trains |= self._add("tokens", mixin.w2[index], mlp_trains)
        hidden_trains |= self._add("tokens", mlp.dense_4h_to_h, inner_trains) or modulated
        if index == 0:
            self._layer_of = {row: (self.forward_of[row] - before[row]) * self.num_layers for row in ROWS}
        return hidden_trains

    def _final(self, network: Any, hidden_trains: bool, time_trains: bool) -> None:
        final = network.get_mixin("final_layer")
        modulated = time_trains
        for linear in _linears(final.modulation):
            modulated = self._add("samples", linear, modulated)
        norms = _is_trained(network.transformer, "final_layernorm") or _is_trained(final, "norm_final")
        self._add("final", final.linear, hidden_trains or modulated or norms)


def _sum(costs: Mapping[Rows, int], clips: Sequence[Clip], is_packed: bool) -> int:
    text, video = sum(clip.text for clip in clips), sum(clip.video for clip in clips)
    counts: dict[Rows, int] = {
        "text": text,
        "video": video,
        "tokens": text + video,
        "final": text + video if is_packed else video,  # in a pack text and video are not told apart there
        "samples": len(clips),
        "calls": 1,
    }
    return sum(costs[row] * counts[row] for row in ROWS)


def _pairs(clips: Sequence[Clip]) -> int:
    return sum(clip.length**2 for clip in clips)


def _is_trained(module: nn.Module | None, part: str) -> bool:
    """Whether a module trains a parameter with such a part in its name."""
    return module is not None and any(part in name and value.requires_grad for name, value in module.named_parameters())


def _linears(module: nn.Module) -> Iterator[Any]:
    return (part for part in module.modules() if isinstance(part, nn.Linear | ColumnParallelLinear))


def _sizes(linear: Any) -> tuple[int, int]:
    """Inputs and outputs of a whole layer, of which this rank may hold a part."""
    if hasattr(linear, "input_size"):
        return linear.input_size, linear.output_size
    return linear.in_features, linear.out_features


def _cost(linear: Any, input_trains: bool) -> _Cost:
    """A linear layer with the adapters that it may have. input_trains: gradients flow through its input."""
    if not isinstance(linear, LoraLinear):
        inputs, outputs = _sizes(linear)
        forward, trains = 2 * inputs * outputs, linear.weight.requires_grad
        has_trained_bias = linear.bias is not None and linear.bias.requires_grad
        return _Cost(forward, forward * (trains + input_trains), trains or input_trains or has_trained_bias)
    own = _cost(linear.original, input_trains)
    blocks = [sum(rule.chunks) for rule in output_rules(linear.original)]
    down = 2 * num_inputs(linear.original) * linear.rank * len(blocks)
    up = 2 * linear.rank * sum(blocks)
    return _Cost(
        own.forward + down + up,
        own.backward + down * (1 + input_trains) + 2 * up,
        True,
    )
