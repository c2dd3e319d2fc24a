"""SAT's table of default hooks, for users' mixins that call a default by name.

`HOOKS_DEFAULT[name](self, *tensors, **values)` runs the default with a mixin or model as `self`; `attention_fn` alone
takes no `self`, as in SAT.
"""

from collections.abc import Callable
from typing import Any

from sat.model.base_model import ARGS_DEFAULT
from sat.model.defaults import DEFAULTS, attention_fn_default, standard_attention
from sat.model.hooks import HOOKS, Context
from sat.mpu.utils import split_tensor_along_last_dim

__all__ = [
    "ARGS_DEFAULT",
    "HOOKS_DEFAULT",
    "attention_fn_default",
    "split_tensor_along_last_dim",
    "standard_attention",
]


def _by_name(hook: str) -> Callable[..., Any]:
    """A default in SAT's manner: the owner of a transformer first, context values by name."""

    def run(self: Any, *tensors: Any, **values: Any) -> Any:
        named = [values.pop(name, None) for name in HOOKS[hook].tensors[len(tensors) :]]
        return DEFAULTS[hook](self.transformer, Context(values), *tensors, *named)

    run.__name__ = f"{hook}_default"
    return run


HOOKS_DEFAULT: dict[str, Callable[..., Any]] = {hook: _by_name(hook) for hook in DEFAULTS}
HOOKS_DEFAULT["attention_fn"] = attention_fn_default
