"""Small models for the tests of the core."""

from typing import Any

import torch
from torch import Tensor

from sat.model import BaseModel

ARGS = {"num_layers": 2, "vocab_size": 19, "hidden_size": 16, "num_attention_heads": 2, "max_sequence_length": 8}


def make_model(**changes: Any) -> BaseModel:
    """A model with random weights, the same in every call."""
    torch.manual_seed(0)
    model = BaseModel({**ARGS, **changes})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def make_inputs(batch: int = 2, length: int = 6) -> tuple[Tensor, Tensor]:
    """Token ids (b s) and positions (s,)."""
    ids = torch.randint(0, 19, (batch, length), generator=torch.Generator().manual_seed(3))
    return ids, torch.arange(length)


def gradients(model: torch.nn.Module) -> dict[str, Tensor]:
    """A copy of the gradient of every parameter that has one."""
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
