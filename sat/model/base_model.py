"""`BaseModel`: a transformer whose every step can be replaced or wrapped by mixins."""

import logging
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sat.config import did_you_mean
from sat.model.defaults import DEFAULTS, standard_attention
from sat.model.hooks import Context, Hooks, non_conflict, replacable
from sat.model.transformer import BaseTransformer

__all__ = [
    "ARGS_DEFAULT",
    "BaseMixin",
    "BaseModel",
    "get_model",
    "non_conflict",
    "replacable",
    "standard_attention",
]

log = logging.getLogger(__name__)

REQUIRED_ARGS = ("num_layers", "vocab_size", "hidden_size", "num_attention_heads", "max_sequence_length")

ARGS_DEFAULT: dict[str, tuple[str, Any]] = {
    "embedding_dropout_prob": ("hidden_dropout", 0),
    "attention_dropout_prob": ("attention_dropout", 0),
    "output_dropout_prob": ("hidden_dropout", 0),
    "inner_hidden_size": ("inner_hidden_size", None),
    "hidden_size_per_attention_head": ("hidden_size_per_attention_head", None),
    "cross_hidden_size_per_attention_head": ("cross_hidden_size_per_attention_head", None),
    "checkpoint_activations": ("checkpoint_activations", False),
    "checkpoint_num_layers": ("checkpoint_num_layers", 1),
    "checkpoint_skip_layers": ("checkpoint_skip_layers", 0),
    "is_decoder": ("is_decoder", False),
    "cross_attn_hidden_size": ("cross_attn_hidden_size", None),
    "use_final_layernorm": ("use_final_layernorm", True),
    "layernorm_epsilon": ("layernorm_epsilon", 1e-5),
    "use_bias": ("use_bias", True),
    "use_qkv_bias": ("use_qkv_bias", False),
    "num_multi_query_heads": ("num_multi_query_heads", 0),
    "cross_num_multi_query_heads": ("cross_num_multi_query_heads", 0),
    "drop_path": ("drop_path", 0.0),
    "row_parallel_linear_final_bias": ("row_parallel_linear_final_bias", True),
    "is_gated_mlp": ("is_gated_mlp", False),
    "is_rotary_emb": ("is_rotary_emb", False),
    "parallel_output": ("parallel_output", False),
    "num_experts": ("num_experts", 1),
}
"""Optional arguments of a model: transformer keyword -> (attribute of the arguments, value where it is missing)."""


class BaseMixin(nn.Module):
    """A part of a model: parameters, and methods named like hooks (see `sat.model.hooks.HOOKS`).

    `self.transformer` is the model's transformer, set when the mixin is added. A mixin may also have
    `extend_context(ctx) -> dict`: values that are computed once per forward and shared by all hooks.
    """

    non_conflict = staticmethod(non_conflict)
    replacable = staticmethod(replacable)

    transformer: Any

    def reinit(self, parent_model: "BaseModel | None" = None) -> None:
        """Initialise this mixin's parameters, or edit the model it was added to (`add_mixin(..., reinit=True)`)."""


class BaseModel(nn.Module):
    """A transformer, its mixins and the hooks that they resolve to.

    args: attributes (a Namespace) or keys (a mapping) with the sizes of the model; see REQUIRED_ARGS and ARGS_DEFAULT.
    A transformer may be given, to share it between models. Keywords go to the transformer and win over args.
    """

    def __init__(
        self, args: Any, transformer: nn.Module | None = None, params_dtype: torch.dtype = torch.float32, **kwargs: Any
    ) -> None:
        super().__init__()
        self.mixins = nn.ModuleDict()
        if transformer is None:
            transformer = BaseTransformer(**{**transformer_arguments(args), "params_dtype": params_dtype, **kwargs})
        self.transformer: Any = transformer
        self.collect_hooks_()

    @property
    def hook_origins(self) -> dict[str, str]:
        """For each overridden hook, who runs, first runner first: `m2 -> m1 -> default`."""
        return self.hooks.origins

    def add_mixin(self, name: str, new_mixin: BaseMixin, reinit: bool = False) -> None:
        """Add a part under a new name.

        Raises HookError, and leaves the model as it was, if the part claims a hook that is taken.
        """
        if name in self.mixins:
            raise ValueError(f"there is a mixin '{name}' already; delete it first, or choose another name")
        if not isinstance(new_mixin, BaseMixin):
            raise TypeError(f"mixin '{name}' is a {type(new_mixin).__name__}; it must be a BaseMixin")
        self.hooks = self._resolve({**dict(self.mixins.items()), name: new_mixin})
        self.mixins[name] = new_mixin
        # Past Module.__setattr__: the transformer is the model's child, not also each mixin's.
        object.__setattr__(new_mixin, "transformer", self.transformer)
        if reinit:
            new_mixin.reinit(self)

    def del_mixin(self, name: str) -> None:
        """Remove a part."""
        self.get_mixin(name)
        del self.mixins[name]
        self.collect_hooks_()

    def get_mixin(self, name: str) -> Any:
        """The part of that name."""
        if name not in self.mixins:
            known = ", ".join(self.mixins) or "none"
            raise KeyError(f"no mixin '{name}'{did_you_mean(name, self.mixins)}; the model has {known}")
        return self.mixins[name]

    def collect_hooks_(self) -> None:
        """Resolve all hooks anew: the model's own methods first, then the mixins in the order they were added."""
        self.hooks = self._resolve(dict(self.mixins.items()))

    def _resolve(self, mixins: Mapping[str, Any]) -> Hooks:
        hooks = Hooks(self.transformer, DEFAULTS)
        hooks.add("model", self)
        for name, mixin in mixins.items():
            hooks.add(name, mixin)
        return hooks

    def reinit(self, mixin_names: Iterable[str] | None = None) -> None:
        """Call `reinit` of the named mixins, or of all."""
        for name in self.mixins if mixin_names is None else mixin_names:
            self.get_mixin(name).reinit(self)

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None = None,
        attention_mask: Tensor | int | None = None,
        *,
        output_hidden_states: bool = False,
        **context: Any,
    ) -> list[Any]:
        """Run the model. Any further names reach the hooks that declare them.

        Returns a list: the output of `final_forward`, then one dict for each layer.
        """
        return self.run(input_ids, position_ids, attention_mask, Context(context), output_hidden_states)

    def run(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None,
        attention_mask: Tensor | int | None,
        ctx: Context,
        output_hidden_states: bool = False,
    ) -> list[Any]:
        """The forward pass with a context object of the caller's making."""
        self.transformer.hooks.adopt(self.hooks)
        for mixin in self.mixins.values():
            extend_context = getattr(mixin, "extend_context", None)
            if extend_context is not None:
                ctx = ctx.updated(extend_context(ctx))
        return self.transformer(input_ids, position_ids, attention_mask, ctx, output_hidden_states)


def transformer_arguments(args: Any) -> dict[str, Any]:
    """The transformer's keywords, read off a Namespace or a mapping of arguments."""

    def read(name: str, default: Any = None) -> Any:
        return args.get(name, default) if isinstance(args, Mapping) else getattr(args, name, default)

    missing = [name for name in REQUIRED_ARGS if read(name) is None]
    if missing:
        raise ValueError(f"the model's arguments lack {', '.join(missing)}")
    values = {name: read(name) for name in REQUIRED_ARGS}
    values["layernorm_order"] = read("layernorm_order", "pre")
    values["skip_init"] = read("skip_init", False)
    values.update({keyword: read(attribute, default) for keyword, (attribute, default) in ARGS_DEFAULT.items()})
    return values


def get_model(args: Any, model_cls: type[BaseModel], **kwargs: Any) -> BaseModel:
    """Build a model in the precision and on the device that the arguments name (`fp16`, `bf16`, `device`)."""
    if getattr(args, "fp16", False):
        kwargs.setdefault("params_dtype", torch.float16)
    elif getattr(args, "bf16", False):
        kwargs.setdefault("params_dtype", torch.bfloat16)
    model = model_cls(args, **kwargs)
    log.info("model has %s parameters", f"{sum(parameter.numel() for parameter in model.parameters()):,}")
    return model.to(getattr(args, "device", "cpu"))
