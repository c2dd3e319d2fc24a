"""What layers keep of their forward pass until their backward pass: memory against time."""

import re
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from sat.errors import ConfigError

Kept = Literal["all", "inputs", "attention", "host"]
"""all activations; a layer's inputs alone; these and what attention gave; or all, in the memory of the host."""

CHOICES = ("keep", "recompute", "keep_attention", "recompute_every_N", "offload")

_PLAIN: dict[str, Kept] = {"keep": "all", "recompute": "inputs", "keep_attention": "attention", "offload": "host"}
_MIN_OFFLOADED = 1 << 14  # elements; what is smaller stays: the copies' overhead is more than their size


@dataclass(frozen=True)
class Activations:
    """What layers keep."""

    kept: Kept = "all"
    every: int = 1
    """Layers between those that recompute; the others keep all."""

    @classmethod
    def parse(cls, choice: str) -> "Activations":
        """Read one of CHOICES."""
        if choice in _PLAIN:
            return cls(_PLAIN[choice])
        found = re.fullmatch(r"recompute_every_([1-9]\d*)", choice)
        if found is None:
            raise ConfigError(f"activations is '{choice}'; give one of {', '.join(CHOICES)} (N: 2, 3, ..)")
        return cls("inputs", int(found[1]))

    def groups(self, num_layers: int, group_size: int = 1, skipped: int = 0) -> list[tuple[tuple[int, ...], Kept]]:
        """The layers in groups, and what each group keeps; the last `skipped` layers keep all."""
        layers = range(num_layers)
        if self.kept == "all":
            return [((index,), "all") for index in layers]
        last = num_layers - skipped
        starts = range(0, last, group_size)
        groups = [tuple(layers[low : min(low + group_size, last)]) for low in starts]
        kept: list[tuple[tuple[int, ...], Kept]] = [
            (group, self.kept if number % self.every == 0 else "all") for number, group in enumerate(groups)
        ]
        return [*kept, *(((index,), "all") for index in layers[last:])]


def run_keeping(kept: Kept, function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function so that only so much of it is kept for backward; where that is kept, `held` decides."""
    if kept in ("all", "host") or not torch.is_grad_enabled():
        return function(*arguments)
    options: dict[str, Any] = {"context_fn": _keep_attention} if kept == "attention" else {}
    return checkpoint(function, *arguments, use_reentrant=False, **options)


def held(kept: Kept) -> AbstractContextManager:
    """Where this block's activations are held until backward: the host's memory, from which weights stay away."""
    if kept == "host" and torch.is_grad_enabled():
        return torch.autograd.graph.saved_tensors_hooks(_to_host, _from_host)
    return nullcontext()


def attention_operations() -> list[Any]:
    """The operations whose outputs `keep_attention` keeps, as far as this torch and this machine have them."""
    names = {
        "aten": (
            "_scaled_dot_product_flash_attention",
            "_scaled_dot_product_efficient_attention",
            "_scaled_dot_product_cudnn_attention",
            "_scaled_dot_product_flash_attention_for_cpu",
        ),
        "sat": ("packed_attention",),
        "torch_attn": ("_varlen_attn",),
        "flash_attn": ("_flash_attn_forward",),
        "flash_attn_3": ("fwd", "_flash_attn_forward"),
    }
    found = (getattr(getattr(torch.ops, library), name, None) for library, own in names.items() for name in own)
    return [packet.default for packet in found if packet is not None and hasattr(packet, "default")]


def _keep_attention() -> tuple[AbstractContextManager, AbstractContextManager]:
    kept = set(attention_operations())

    def policy(_: Any, operation: Any, *arguments: Any, **options: Any) -> CheckpointPolicy:
        return CheckpointPolicy.MUST_SAVE if operation in kept else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)


def goes_to_host(tensor: Tensor) -> bool:
    """Whether `offload` moves it: neither weights nor what is small."""
    is_weight = isinstance(tensor, nn.Parameter) or isinstance(tensor._base, nn.Parameter)
    return not is_weight and tensor.numel() >= _MIN_OFFLOADED


def _to_host(tensor: Tensor) -> Any:
    if not goes_to_host(tensor):
        return tensor
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
    return tensor.device, host.copy_(tensor, non_blocking=True)


def _from_host(kept: Any) -> Tensor:
    if isinstance(kept, Tensor):
        return kept
    device, host = kept
    return host.to(device, non_blocking=True)
