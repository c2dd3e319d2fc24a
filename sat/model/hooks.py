"""Hooks: the places where a mixin may change the transformer, and how a call finds its way there.

A hook is called with its tensors by position. What all layers share travels beside them in one frozen `Context`; the
adapter of each hook function hands over, by name, only the values that the function's signature declares (as pytest
hands out fixtures). A function with `**kwargs` gets them all, one that declares `ctx` gets the object. Signatures are
read once, when the mixins of a model change.
"""

import inspect
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from sat.errors import HookError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class HookSpec:
    """One hook: its name, the tensors it is called with by position, and what it returns."""

    name: str
    tensors: tuple[str, ...]
    returns: str


HOOKS: dict[str, HookSpec] = {
    spec.name: spec
    for spec in (
        HookSpec("word_embedding_forward", ("input_ids",), "hidden states (b s d)"),
        HookSpec("position_embedding_forward", ("position_ids",), "what to add to them (b s d or 1 s d), or None"),
        HookSpec("layer_forward", ("hidden_states", "mask"), "hidden states (b s d)"),
        HookSpec("attention_forward", ("hidden_states", "mask"), "attention output (b s d)"),
        HookSpec(
            "cross_attention_forward",
            ("hidden_states", "cross_attention_mask", "encoder_outputs"),
            "cross-attention output (b s d)",
        ),
        HookSpec(
            "attention_fn",
            ("query_layer", "key_layer", "value_layer", "attention_mask", "attention_dropout"),
            "attended values (b k s e)",
        ),
        HookSpec("mlp_forward", ("hidden_states",), "MLP output (b s d)"),
        HookSpec("routing_forward", ("hidden_states",), "weights and expert numbers, each (b·s, chosen)"),
        HookSpec("final_forward", ("logits",), "the model's output"),
    )
}
"""Every hook, in the order in which a forward pass reaches them."""

_MISSING: Any = object()


@dataclass(frozen=True)
class Context:
    """What the hooks of one forward pass share. Subclasses declare fields; any further names live in `extra`.

    Values are read as attributes (`ctx.layer_id`), whether they are fields or extras.
    """

    extra: Mapping[str, Any] = field(default_factory=dict)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # copy and pickle ask for such names before `extra` is set
            raise AttributeError(name)
        try:
            return self.extra[name]
        except KeyError:
            known = ", ".join(self.named()) or "nothing"
            raise AttributeError(f"the context has no '{name}'; it holds {known}") from None

    def get(self, name: str, default: Any = None) -> Any:
        """The value of that name, or `default`."""
        if name in self.__dataclass_fields__:
            return getattr(self, name)
        return self.extra.get(name, default)

    def named(self) -> dict[str, Any]:
        """All values by name."""
        values = {name: getattr(self, name) for name in self.__dataclass_fields__ if name != "extra"}
        values.update(self.extra)
        return values

    def updated(self, values: Mapping[str, Any]) -> "Context":
        """A copy in which these values are added or replaced."""
        if not values:
            return self
        fields = {name: value for name, value in values.items() if name in self.__dataclass_fields__}
        others = {name: value for name, value in values.items() if name not in fields}
        return self._copy({**fields, "extra": {**self.extra, **others}})

    def without(self, *names: str) -> "Context":
        """A copy that lacks these extra values."""
        return self._copy({"extra": {key: value for key, value in self.extra.items() if key not in names}})

    def _copy(self, changed: Mapping[str, Any]) -> "Context":
        # dataclasses.replace reads every field, and a compiled graph would be one for the values that it found there.
        copy = object.__new__(type(self))
        vars(copy).update(vars(self))
        vars(copy).update(changed)
        return copy


def non_conflict(method: Callable) -> Callable:
    """Mark a hook method as going around whatever holds the hook; it receives that as `old_impl`."""
    method.non_conflict = True  # type: ignore[attr-defined]
    return method


def replacable(method: Callable) -> Callable:
    """Mark a hook method as one that a later mixin may replace (SAT's spelling)."""
    method.replacable = True  # type: ignore[attr-defined]
    return method


class _Default:
    """The end of a chain: the library's own implementation, bound to the transformer that it serves."""

    origin = "default"
    may_be_replaced = True

    def __init__(self, function: Callable, transformer: nn.Module) -> None:
        self.function = function
        self.transformer = transformer

    def __call__(self, ctx: Context, *tensors: Any) -> Any:
        return self.function(self.transformer, ctx, *tensors)


class _OldImpl:
    """What a wrapping hook calls: the rest of the chain, with the context of this call.

    It may be called with the tensors alone; values given by name override the context's for the rest of the chain.
    """

    def __init__(self, link: "Link", ctx: Context, spec: HookSpec) -> None:
        self.link, self.ctx, self.spec = link, ctx, spec

    def declares(self, name: str) -> bool:
        """Whether what this calls asks for a context value of that name: a wrap may then leave it part of its work."""
        return isinstance(self.link, _Method) and name in self.link.names

    def __call__(self, *tensors: Any, **values: Any) -> Any:
        named = [values.pop(name, None) for name in self.spec.tensors[len(tensors) :]]
        values.pop("old_impl", None)
        return self.link(self.ctx.updated(values), *tensors, *named)


class _Method:
    """A link of a chain: a hook method of the model or of a mixin, and how to call it."""

    def __init__(self, spec: HookSpec, method: Callable, owner: str, previous: "Link | None") -> None:
        self.spec = spec
        self.method = method
        self.owner = owner
        self.previous = previous
        self.may_be_replaced = previous is None and getattr(method, "replacable", False)
        parameters = inspect.signature(method).parameters.values()
        kinds = [parameter.kind for parameter in parameters]
        by_position = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
        if inspect.Parameter.VAR_POSITIONAL in kinds:
            self.num_tensors = len(spec.tensors)
        else:
            self.num_tensors = min(len(by_position), len(spec.tensors))
        self.takes_all = inspect.Parameter.VAR_KEYWORD in kinds
        rest = by_position[self.num_tensors :] + [p for p in parameters if p.kind is p.KEYWORD_ONLY]
        self.takes_old_impl = any(p.name == "old_impl" for p in rest)
        self.takes_ctx = any(p.name == "ctx" for p in rest)
        declared = [p for p in rest if p.name not in ("old_impl", "ctx")]
        self.names = tuple(p.name for p in declared)
        self.required = tuple(p.name for p in declared if p.default is p.empty)
        if previous is not None and not self.takes_old_impl:
            raise HookError(f"'{owner}' marks {spec.name} as non_conflict, so its signature must have 'old_impl'")

    @property
    def origin(self) -> str:
        return self.owner if self.previous is None else f"{self.owner} -> {self.previous.origin}"

    def __call__(self, ctx: Context, *tensors: Any) -> Any:
        values: dict[str, Any] = {}
        if self.takes_all:
            values.update(ctx.named())
        else:
            for name in self.names:
                value = ctx.get(name, _MISSING)
                if value is not _MISSING:
                    values[name] = value
        # A tensor beyond the method's positions (often attention_dropout) goes by name, where the method asks for it.
        for name, tensor in zip(self.spec.tensors[self.num_tensors :], tensors[self.num_tensors :]):
            if self.takes_all or name in self.names:
                values[name] = tensor
        if self.takes_old_impl and self.previous is not None:
            values["old_impl"] = _OldImpl(self.previous, ctx, self.spec)
        if self.takes_ctx:
            values["ctx"] = ctx
        for name in self.required:
            if name not in values:
                raise HookError(
                    f"{self.spec.name} of '{self.owner}' declares '{name}', which the context does not have; "
                    f"it has {', '.join(ctx.named())}"
                )
        return self.method(*tensors[: self.num_tensors], **values)


Link = _Default | _Method


class Hooks(Mapping[str, Callable]):
    """The resolved chains of one model. `hooks[name]` exists only where something was put in the default's place.

    `call(name, ctx, *tensors)` runs a chain; `print(hooks)` shows them all.
    """

    def __init__(self, transformer: nn.Module, defaults: Mapping[str, Callable]) -> None:
        self._chains: dict[str, Link] = {name: _Default(defaults[name], transformer) for name in HOOKS}

    def add(self, owner: str, provider: object) -> None:
        """Put every hook method of `provider` on its chain.

        Raises HookError where the hook is taken: a plain method may follow only the default or a replacable one.
        """
        for name, spec in HOOKS.items():
            method = getattr(provider, name, None)
            if method is None:
                continue
            present = self._chains[name]
            if getattr(method, "non_conflict", False):
                self._chains[name] = _Method(spec, method, owner, previous=present)
                continue
            if not present.may_be_replaced:
                raise HookError(
                    f"'{owner}' and '{present.origin}' both replace {name}; mark one @replacable, or let the later one "
                    "go around the other with @non_conflict"
                )
            if not isinstance(present, _Default):
                log.warning("%s of '%s' is replaced by '%s'", name, present.origin, owner)
            self._chains[name] = _Method(spec, method, owner, previous=None)

    def adopt(self, other: "Hooks") -> None:
        """Take over another set's chains: layers keep the set they were built with, and models may share layers."""
        self._chains = other._chains

    def call(self, name: str, ctx: Context, *tensors: Any) -> Any:
        """Run the chain of one hook."""
        return self._chains[name](ctx, *tensors)

    def overridden(self, name: str) -> bool:
        """Whether something else than the default runs first."""
        return not isinstance(self._chains[name], _Default)

    @property
    def origins(self) -> dict[str, str]:
        """For each hook that is not the default's, the chain as text, first runner first: `m2 -> m1 -> default`."""
        return {name: self._chains[name].origin for name in self}

    def __getitem__(self, name: str) -> Callable:
        """SAT's way to call a hook: tensors by position, context values by name."""
        if name not in HOOKS or not self.overridden(name):
            raise KeyError(name)
        link, spec = self._chains[name], HOOKS[name]

        def run(*tensors: Any, ctx: Context | None = None, **values: Any) -> Any:
            named = [values.pop(tensor, None) for tensor in spec.tensors[len(tensors) :]]
            return link((ctx or Context()).updated(values), *tensors, *named)

        return run

    def __iter__(self) -> Iterator[str]:
        return (name for name in HOOKS if self.overridden(name))

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __str__(self) -> str:
        width = max(map(len, HOOKS))
        return "\n".join(f"{name:<{width}}  {link.origin}" for name, link in self._chains.items())
