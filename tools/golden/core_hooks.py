"""Recordings of the hook rules: `hooks/chains.json`, `arguments.json`, `reinit.json`."""

import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sat.model import BaseMixin, BaseModel, non_conflict, replacable
from tools.golden.common import CannotReplay, Case, Checks, Folder, RecordingError

ARGS = {"num_layers": 1, "vocab_size": 11, "hidden_size": 16, "num_attention_heads": 2, "max_sequence_length": 12}
IDS = torch.zeros(1, 5, dtype=torch.long)
POSITIONS = torch.arange(5).unsqueeze(0)
MARKS: dict[str, Callable] = {"plain": lambda method: method, "replacable": replacable, "non_conflict": non_conflict}

RESULTS: dict[str, Callable[..., Any]] = {
    "word_embedding_forward": lambda input_ids: torch.zeros(*input_ids.shape, ARGS["hidden_size"]),
    "position_embedding_forward": lambda position_ids: None,
    "attention_fn": lambda query, key, value, mask, dropout: value,
}
"""What a replacement returns, so that the forward pass goes on; any other hook returns its first tensor."""


# --- chains ----------------------------------------------------------------------------------------------------------


def hook_method(hook: str, kind: str, name: str, calls: list[str]) -> Callable:
    """A hook method that writes down when it runs."""
    result = RESULTS.get(hook, lambda first, *others: first)

    def instead(self: Any, *tensors: Any, **values: Any) -> Any:
        calls.append(name)
        return result(*tensors)

    def around(self: Any, *tensors: Any, old_impl: Callable, **values: Any) -> Any:
        calls.append(f"{name} in")
        output = old_impl(*tensors, **values)
        calls.append(f"{name} out")
        return output

    if kind == "non_conflict_without_old_impl":
        return non_conflict(instead)
    if kind not in MARKS:
        raise CannotReplay(f"the kind of mixin '{kind}' is not known here")
    return MARKS[kind](around if kind == "non_conflict" else instead)


def mixin_with(method: Callable, hook: str) -> BaseMixin:
    """A mixin that has one hook."""
    return type("RecordedMixin", (BaseMixin,), {hook: method})()


class _Warnings(logging.Handler):
    """Counts warnings about replaced hooks, and keeps them from the screen, in a `with` block."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.logger = logging.getLogger("sat.model.hooks")
        self.count = 0

    def emit(self, record: logging.LogRecord) -> None:
        self.count += "is replaced by" in record.getMessage()

    def __enter__(self) -> "_Warnings":
        self.logger.addHandler(self)
        self.propagated, self.logger.propagate = self.logger.propagate, False
        return self

    def __exit__(self, *_: object) -> None:
        self.logger.removeHandler(self)
        self.logger.propagate = self.propagated


def add_in_order(model: BaseModel, hook: str, added: Sequence[Sequence[str]], calls: list[str]) -> str | None:
    """Add recorded mixins; the name of the error that stopped it, after which the model must be as it was before."""
    for name, kind in added:
        before = list(model.mixins), model.hook_origins
        try:
            model.add_mixin(name, mixin_with(hook_method(hook, kind, name, calls), hook))
        except ValueError as error:
            if (list(model.mixins), model.hook_origins) != before:
                raise RecordingError("the error left the model changed") from error
            return "ValueError"
    return None


def replay_chain(chain: Mapping[str, Any], checks: Checks, warnings: _Warnings) -> None:
    """Add the mixins in order, run the model once, delete the last one."""
    hook, calls = chain["hook"], []  # type: tuple[str, list[str]]
    label = f"{hook} with {', '.join(kind for _, kind in chain['added'])}"
    on_model = {hook: hook_method(hook, "plain", "model", calls)} if chain.get("defined_on_model") else {}
    model = type("RecordedModel", (BaseModel,), on_model)(ARGS)
    warned_before = warnings.count
    raised = add_in_order(model, hook, chain["added"], calls)
    last = chain["added"][-1][0]
    checks.equal(f"{label}: raises", raised, chain.get("raises"))
    checks.equal(f"{label}: last added", last, chain.get("last_added", last))
    if raised:
        checks.equal(f"{label}: origin", chain.get("origin"), None)
        return
    checks.equal(f"{label}: origin", model.hook_origins.get(hook), chain["origin"])
    if "replacement_warnings" in chain:
        checks.equal(f"{label}: warnings", warnings.count - warned_before, chain["replacement_warnings"])
    with torch.no_grad():
        model.eval()(IDS, POSITIONS, None)
    checks.equal(f"{label}: calls", calls, chain["calls_one_layer"])
    if "origin_after_deleting_last" in chain:
        model.del_mixin(last)
        checks.equal(f"{label}: deleted", model.hook_origins.get(hook), chain["origin_after_deleting_last"])


def replay_chains(content: Mapping[str, Any], checks: Checks) -> None:
    with _Warnings() as warnings:
        for chain in content["cases"]:
            replay_chain(chain, checks, warnings)


# --- arguments -------------------------------------------------------------------------------------------------------

RECORDED_CALL = re.compile(r"model\(ids, position_ids, -1, (?P<names>.*)\) on a one-layer decoder, .*")


class ListenerMixin(BaseMixin):
    """Writes down what each hook is called with."""

    def __init__(self, heard: dict[str, dict[str, Any]]) -> None:
        super().__init__()
        self.heard = heard


def _listen(hook: str) -> Callable:
    def method(self: ListenerMixin, *tensors: Any, old_impl: Callable, **values: Any) -> Any:
        name = hook
        if hook == "attention_fn":
            name += " (cross)" if values.get("cross_attention") else " (self)"
        self.heard[name] = {
            "n_positional": len(tensors),
            "positional": [_describe(tensor) for tensor in tensors],
            "keywords": sorted(values),
        }
        return old_impl(*tensors, **values)

    return non_conflict(method)


def _describe(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"Tensor({', '.join(map(str, value.shape))})"
    return type(value).__name__


def _shape(text: str) -> tuple[int, ...]:
    match = re.fullmatch(r"Tensor\(([\d, ]+)\)", text)
    if match is None:
        raise RecordingError(f"'{text}' is no description of a tensor")
    return tuple(int(number) for number in match[1].split(","))


def _recorded_values(names: str, shapes: Sequence[tuple[int, ...]]) -> dict[str, Any]:
    """The keyword values of the recorded call; tensors are written as `...`."""
    mask_shape, encoder_shape = shapes
    known = {"cross_attention_mask": torch.ones(mask_shape), "encoder_outputs": torch.ones(encoder_shape)}
    values = {}
    for word in names.split(", "):
        name, _, text = word.partition("=")
        if text == "..." and name not in known:
            raise CannotReplay(f"the shape of '{name}' in the recorded call is not known here")
        values[name] = known[name] if text == "..." else int(text)
    return values


def replay_arguments(content: Mapping[str, Any], checks: Checks) -> None:
    call = RECORDED_CALL.fullmatch(content["call"])
    if call is None:
        raise CannotReplay(f"the recorded call is not known here: {content['call']}")
    for mode in ("eval_mode", "train_mode"):
        recorded = content[mode]
        cross = recorded["cross_attention_forward"]["positional"]
        _, heads, _, head_dim = _shape(recorded["attention_fn (self)"]["positional"][0])
        sizes = {"hidden_size": heads * head_dim, "num_attention_heads": heads, "is_decoder": True}
        model = BaseModel({**ARGS, **sizes})
        heard: dict[str, dict[str, Any]] = {}
        hooks = {name.removesuffix(" (self)").removesuffix(" (cross)") for name in recorded}
        listener = type("Listener", (ListenerMixin,), {hook: _listen(hook) for hook in hooks})(heard)
        model.add_mixin("listener", listener)
        model.train(mode == "train_mode")
        ids = torch.zeros(_shape(recorded["word_embedding_forward"]["positional"][0]), dtype=torch.long)
        values = _recorded_values(call["names"], [_shape(text) for text in cross[1:]])
        model(ids, torch.arange(ids.shape[1]).expand_as(ids), -1, **values)
        checks.equal(f"{mode}: hooks that ran", sorted(heard), sorted(recorded))
        for hook in sorted(set(heard) & set(recorded)):
            for key, expected in recorded[hook].items():
                checks.equal(f"{mode}: {key} of {hook}", heard[hook].get(key), expected)


# --- reinit ----------------------------------------------------------------------------------------------------------


class ReinitMixin(BaseMixin):
    """Writes down when it is initialised, by which model, and whether it sees that model's transformer."""

    def __init__(self, name: str, heard: list[list[Any]]) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(1))
        self.name = name
        self.heard = heard

    def reinit(self, parent_model: BaseModel | None = None) -> None:
        own_transformer = parent_model is not None and self.transformer is parent_model.transformer
        self.heard.append([self.name, parent_model is not None, own_transformer])


def replay_reinit(content: Mapping[str, Any], checks: Checks) -> None:
    heard: list[list[Any]] = []

    def taken() -> list[list[Any]]:
        words = list(heard)
        heard.clear()
        return words

    model = BaseModel(ARGS)
    model.add_mixin("a", ReinitMixin("a", heard))
    model.add_mixin("b", ReinitMixin("b", heard), reinit=True)
    checks.equal("after_add_b_with_reinit", taken(), content["after_add_b_with_reinit"])
    model.reinit(["a"])
    checks.equal("after_reinit_names_a", taken(), content["after_reinit_names_a"])
    model.reinit()
    checks.equal("after_reinit_none", taken(), content["after_reinit_none"])
    names = sorted(name for name in model.state_dict() if name.startswith("mixins."))
    checks.equal("state_dict_keys_of_mixins", names, content["state_dict_keys_of_mixins"])
    mixin = model.get_mixin("a")
    same = mixin.transformer is model.transformer
    checks.equal("the pointer", same, content["mixin_transformer_is_model_transformer"])
    is_child = "transformer" in dict(mixin.named_children())
    checks.equal("the pointer as a child", is_child, content["mixin_transformer_registered_as_child"])


# --- all -------------------------------------------------------------------------------------------------------------


def find(folder: Folder) -> Iterator[Case]:
    """The cases of `hooks/`."""
    kinds: tuple[tuple[tuple[str, ...], Callable[[Mapping[str, Any], Checks], None]], ...] = (
        (("call", "eval_mode", "train_mode"), replay_arguments),
        (("after_reinit_none", "state_dict_keys_of_mixins"), replay_reinit),
    )
    for keys, function in kinds:
        for path, content in folder.with_keys(*keys):
            yield Case(folder.name(path), (path,), partial(function, content))
    for path, content in folder.with_keys("cases"):
        if _is_chains(content["cases"]):
            yield Case(folder.name(path), (path,), partial(replay_chains, content))


def _is_chains(cases: Any) -> bool:
    return isinstance(cases, list) and bool(cases) and all("hook" in case and "added" in case for case in cases)
