"""The mixin core: a transformer whose every step is a hook. It knows no video."""

from sat.model.base_model import BaseMixin, BaseModel, get_model, non_conflict, replacable
from sat.model.encoder_decoder import EncoderDecoderModel
from sat.model.hooks import HOOKS, Context, Hooks
from sat.model.transformer import BaseTransformer

__all__ = [
    "HOOKS",
    "BaseMixin",
    "BaseModel",
    "BaseTransformer",
    "Context",
    "EncoderDecoderModel",
    "Hooks",
    "get_model",
    "non_conflict",
    "replacable",
]
