"""The rules of hooks: which may follow which, in which order they run, what they are handed."""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sat.errors import HookError
from sat.model import HOOKS, BaseMixin, BaseModel, Context, non_conflict, replacable
from tests.model.tiny import ARGS, make_inputs, make_model

KINDS = ("plain", "replacable", "non_conflict")
MARKS: dict[str, Callable] = {"plain": lambda method: method, "replacable": replacable, "non_conflict": non_conflict}


def method_of(kind: str, name: str, calls: list[str]) -> Callable:
    """An attention_fn that writes down its name."""

    def instead(self: Any, query: Any, key: Any, value: Any, mask: Any, dropout: Any) -> Any:
        calls.append(name)
        return value

    def around(self: Any, *tensors: Any, old_impl: Callable) -> Any:
        calls.append(name)
        return old_impl(*tensors)

    return MARKS[kind](around if kind == "non_conflict" else instead)


def mixin_of(kind: str, name: str = "m", calls: list[str] | None = None, hook: str = "attention_fn") -> BaseMixin:
    return type("TestMixin", (BaseMixin,), {hook: method_of(kind, name, [] if calls is None else calls)})()


def expected_chain(kinds: Sequence[str]) -> list[str] | None:
    """The oracle: names of the links, first runner first, or None where adding must fail."""
    chain, is_open = ["default"], True
    for number, kind in enumerate(kinds):
        if kind == "non_conflict":
            chain, is_open = [f"m{number}", *chain], False
        elif is_open:
            chain, is_open = [f"m{number}"], kind == "replacable"
        else:
            return None
    return chain


@settings(deadline=None)
@given(kinds=st.lists(st.sampled_from(KINDS), max_size=5))
def test_chains_follow_the_rules(kinds: list[str]) -> None:
    calls: list[str] = []
    model = BaseModel({**ARGS, "num_layers": 1})
    for number, kind in enumerate(kinds):
        before = model.hook_origins, list(model.mixins)
        mixin = mixin_of(kind, f"m{number}", calls)
        if expected_chain(kinds[: number + 1]) is None:
            with pytest.raises(HookError):
                model.add_mixin(f"m{number}", mixin)
            assert (model.hook_origins, list(model.mixins)) == before
            assert "transformer" not in vars(mixin)
            break
        model.add_mixin(f"m{number}", mixin)
    chain = expected_chain(kinds[: len(model.mixins)])
    assert chain is not None
    assert model.hook_origins.get("attention_fn", "default") == " -> ".join(chain)
    model(*make_inputs())
    assert calls == [name for name in chain if name != "default"]


@settings(deadline=None)
@given(kinds=st.lists(st.sampled_from(KINDS), min_size=1, max_size=4))
def test_deleting_the_last_mixin_undoes_adding_it(kinds: list[str]) -> None:
    model = BaseModel({**ARGS, "num_layers": 1})
    for number, kind in enumerate(kinds):
        if expected_chain(kinds[: number + 1]) is None:
            break
        before = str(model.hooks)
        model.add_mixin("last", mixin_of(kind))
        model.del_mixin("last")
        assert str(model.hooks) == before
        model.add_mixin(f"m{number}", mixin_of(kind))


@pytest.mark.parametrize("hook", HOOKS)
def test_two_replacements_are_an_error_that_names_both(hook: str) -> None:
    model = make_model()
    model.add_mixin("first", mixin_of("plain", hook=hook))
    with pytest.raises(HookError, match=rf"'second' and 'first' both replace {hook}; mark one @replacable"):
        model.add_mixin("second", mixin_of("plain", hook=hook))
    assert list(model.mixins) == ["first"]
    assert model.hook_origins == {hook: "first"}


def test_a_replaced_mixin_is_named_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    model = make_model()
    model.add_mixin("first", mixin_of("replacable"))
    model.add_mixin("second", mixin_of("plain"))
    assert "attention_fn of 'first' is replaced by 'second'" in caplog.text


def test_a_wrap_must_take_old_impl() -> None:
    class Wrap(BaseMixin):
        @non_conflict
        def mlp_forward(self, hidden_states: Any) -> Any:
            return hidden_states

    with pytest.raises(
        HookError, match="'wrap' marks mlp_forward as non_conflict, so its signature must have 'old_impl'"
    ):
        make_model().add_mixin("wrap", Wrap())


def test_printing_the_hooks_shows_every_chain() -> None:
    model = make_model()
    model.add_mixin("scale", mixin_of("plain"))
    model.add_mixin("norm", mixin_of("non_conflict"))
    lines = str(model.hooks).splitlines()
    assert [line.split()[0] for line in lines] == list(HOOKS)
    assert "attention_fn                norm -> scale" in lines
    assert "mlp_forward                 default" in lines


def test_the_marks_are_also_on_the_base_class() -> None:
    assert BaseMixin.non_conflict is non_conflict
    assert BaseMixin.replacable is replacable


# --- what a hook is handed -------------------------------------------------------------------------------------------


def listener(declared: Sequence[str], heard: list[dict[str, Any]]) -> BaseMixin:
    """A mixin whose mlp_forward declares these names by keyword, and writes down what came."""

    def mlp_forward(self: Any, hidden_states: Any, **values: Any) -> Any:
        heard.append(values)
        return hidden_states

    kinds = inspect.Parameter
    own = [kinds("self", kinds.POSITIONAL_OR_KEYWORD), kinds("hidden_states", kinds.POSITIONAL_OR_KEYWORD)]
    asked = [kinds(name, kinds.KEYWORD_ONLY) for name in declared]
    mlp_forward.__signature__ = inspect.Signature([*own, *asked])  # type: ignore[attr-defined]
    return type("Listener", (BaseMixin,), {"mlp_forward": mlp_forward})()


STANDARD = {"layer_id", "position_ids", "output_this_layer", "output_cross_layer"}


@settings(deadline=None)
@given(
    declared=st.sets(st.sampled_from(["layer_id", "position_ids", "ctx", "strength", "other", "output_this_layer"])),
)
def test_only_declared_names_are_handed_over(declared: set[str]) -> None:
    heard: list[dict[str, Any]] = []
    model = make_model()
    model.add_mixin("listener", listener(sorted(declared), heard))
    model(*make_inputs(), strength=3, other="x")
    assert [set(values) for values in heard] == [declared, declared]
    assert [values.get("layer_id", index) for index, values in enumerate(heard)] == [0, 1]
    assert all(values.get("strength", 3) == 3 for values in heard)
    assert all(isinstance(values["ctx"], Context) for values in heard if "ctx" in declared)


@settings(deadline=None)
@given(extra=st.dictionaries(st.sampled_from(["alpha", "beta", "gamma"]), st.integers()))
def test_a_hook_with_any_keywords_is_handed_all(extra: dict[str, int]) -> None:
    heard: list[dict[str, Any]] = []

    class Listener(BaseMixin):
        def mlp_forward(self, hidden_states: Any, **values: Any) -> Any:
            heard.append(values)
            return hidden_states

    model = make_model()
    model.add_mixin("listener", Listener())
    model(*make_inputs(), **extra)
    for values in heard:
        assert set(values) == STANDARD | set(extra)
        assert {name: values[name] for name in extra} == extra


def test_a_name_that_nobody_gives_is_an_error_that_lists_what_there_is() -> None:
    model = make_model()
    model.add_mixin("listener", listener(["strength"], []))
    message = r"mlp_forward of 'listener' declares 'strength', which the context does not have; it has .*layer_id"
    with pytest.raises(HookError, match=message):
        model(*make_inputs())


def test_a_default_value_stands_in_for_a_missing_name() -> None:
    heard: list[Any] = []

    class Listener(BaseMixin):
        def mlp_forward(self, hidden_states: Any, *, strength: float = 0.5) -> Any:
            heard.append(strength)
            return hidden_states

    model = make_model()
    model.add_mixin("listener", Listener())
    model(*make_inputs())
    model(*make_inputs(), strength=2.0)
    assert heard == [0.5, 0.5, 2.0, 2.0]


def test_a_tensor_may_be_asked_for_by_name() -> None:
    heard: list[Any] = []

    class Listener(BaseMixin):
        @non_conflict
        def attention_fn(
            self, q: Any, k: Any, v: Any, *, attention_mask: Any, attention_dropout: Any, old_impl: Any
        ) -> Any:
            heard.append((attention_mask, attention_dropout))
            return old_impl(q, k, v, attention_mask, attention_dropout)

    plain, model = make_model(), make_model()
    model.add_mixin("listener", Listener())
    assert torch.equal(model(*make_inputs(), -1)[0], plain(*make_inputs(), -1)[0])
    assert [mask.shape for mask, _ in heard] == [(6, 6), (6, 6)]


def test_values_given_to_old_impl_reach_the_rest_of_the_chain() -> None:
    heard: list[Any] = []

    class Inner(BaseMixin):
        def mlp_forward(self, hidden_states: Any, *, strength: float) -> Any:
            heard.append(strength)
            return hidden_states

    class Outer(BaseMixin):
        @non_conflict
        def mlp_forward(self, hidden_states: Any, *, strength: float, old_impl: Any) -> Any:
            return old_impl(hidden_states, strength=strength + 1)

    model = make_model()
    model.add_mixin("inner", Inner())
    model.add_mixin("outer", Outer())
    model(*make_inputs(), strength=1)
    assert heard == [2, 2]


def test_signatures_are_read_when_mixins_change_and_never_in_a_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model()
    model.add_mixin("listener", listener(["layer_id", "strength"], []))
    model.add_mixin("around", mixin_of("non_conflict"))

    def fail(*_: Any, **__: Any) -> None:
        raise AssertionError("a signature was read")

    monkeypatch.setattr(inspect, "signature", fail)
    model(*make_inputs(), strength=1)


def test_the_context_tells_what_it_lacks() -> None:
    context = Context({"layer_id": 3})
    assert context.layer_id == 3
    assert context.get("strength", 1.0) == 1.0
    assert context.updated({"strength": 2.0}).without("layer_id").named() == {"strength": 2.0}
    with pytest.raises(AttributeError, match="the context has no 'strength'; it holds layer_id"):
        _ = context.strength


def test_a_model_method_is_a_hook_too() -> None:
    class Shouting(BaseModel):
        def final_forward(self, logits: Any) -> Any:
            return logits.flatten()

    model = Shouting(ARGS)
    assert model.hook_origins == {"final_forward": "model"}
    assert model(*make_inputs())[0].shape == (2 * 6 * 16,)


def test_hooks_are_called_by_name_as_in_sat() -> None:
    model = make_model()
    model.add_mixin("listener", mixin_of("plain"))
    assert list(model.hooks) == ["attention_fn"]
    assert len(model.hooks) == 1
    value = torch.ones(1)
    assert model.hooks["attention_fn"](None, None, value, None, None) is value
    assert "mlp_forward" not in model.hooks
    with pytest.raises(KeyError):
        model.hooks["mlp_forward"]


def test_a_wrap_can_ask_what_the_next_in_the_chain_declares() -> None:
    asked: list[bool] = []

    class Inner(BaseMixin):
        def mlp_forward(self, hidden_states: Any, *, strength: float = 0.0) -> Any:
            return hidden_states

    class TakesAll(BaseMixin):
        @non_conflict
        def mlp_forward(self, hidden_states: Any, *, old_impl: Any, **values: Any) -> Any:
            asked.append(old_impl.declares("strength"))
            return old_impl(hidden_states)

    class Outer(TakesAll):
        pass

    model = make_model()
    model.add_mixin("inner", Inner())
    model.add_mixin("middle", TakesAll())
    model.add_mixin("outer", Outer())
    model(*make_inputs())
    assert asked == [False, True] * 2  # **values is not a declaration
