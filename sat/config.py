"""YAML files and `key=value` words in, typed values and built objects out.

The sections of a configuration are SAT's: `args`, `model`, `data`, `deepspeed`. Files merge left to right, then come
the `key=value` words of the command line. Every value remembers the file and line that set it, so that an error can
point there.
"""

import dataclasses
import difflib
import importlib
import inspect
import logging
import re
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import yaml

from sat.compat.sat_names import INEFFECTIVE, RELEASED_MODULES, TARGETS
from sat.errors import ConfigError
from sat.logs import SAME_ON_EVERY_RANK

log = logging.getLogger(__name__)

SECTIONS = ("args", "model", "data", "deepspeed")
STAGES = "stages"
"""Beside the sections: a list of mappings that hold sections of their own, see `sat.training.stages`."""
COMMAND_LINE = "the command line"


@dataclass(frozen=True)
class Origin:
    """Where a value was set."""

    file: str
    line: int | None = None

    def __str__(self) -> str:
        return self.file if self.line is None else f"{self.file} line {self.line}"


class ConfigNode(dict):
    """A mapping of a configuration that knows its dotted `path` and where each of its keys was set (`origins`)."""

    def __init__(self, path: str = "") -> None:
        super().__init__()
        self.path = path
        self.origins: dict[Any, Origin] = {}

    def path_of(self, key: Any) -> str:
        """The dotted path of one key, e.g. `model.network_config.params.num_layers`."""
        return f"{self.path}.{key}" if self.path else str(key)

    def where(self, key: Any) -> str:
        """Path and place of one key, for messages: `args.lr (configs/a.yaml line 3)`."""
        origin = self.origins.get(key)
        return f"{self.path_of(key)} ({origin})" if origin else self.path_of(key)

    def plain(self) -> dict:
        """The same content as ordinary dicts and lists."""
        return _plain(self)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return value


# --- reading ---------------------------------------------------------------------------------------------------------


class _Loader(yaml.SafeLoader):
    """YAML 1.1 with one repair: `1e-5` is a number (as YAML 1.2 and users have it), not a word."""


class _Dumper(yaml.SafeDumper):
    """Its counterpart: the word `1e-5` is put in quotes, and so is text of several lines, which keeps it on one."""


_EXPONENT = re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$")
for _side in (_Loader, _Dumper):
    _side.add_implicit_resolver("tag:yaml.org,2002:float", _EXPONENT, list("-+0123456789"))
_Dumper.add_representer(
    str,
    lambda dumper, text: dumper.represent_scalar("tag:yaml.org,2002:str", text, style='"' if "\n" in text else None),
)


def _convert(loader: _Loader, node: yaml.Node, file: str, path: str) -> Any:
    if isinstance(node, yaml.MappingNode):
        result = ConfigNode(path)
        for key_node, value_node in node.value:
            key = loader.construct_object(key_node)
            if key in result:
                raise ConfigError(
                    f"{file} line {key_node.start_mark.line + 1}: key '{result.path_of(key)}' is given twice "
                    f"(first on line {result.origins[key].line}); delete one of the two"
                )
            result[key] = _convert(loader, value_node, file, result.path_of(key))
            result.origins[key] = Origin(file, key_node.start_mark.line + 1)
        return result
    if isinstance(node, yaml.SequenceNode):
        return [_convert(loader, item, file, f"{path}[{index}]") for index, item in enumerate(node.value)]
    return loader.construct_object(node)


def _parse(text: str, file: str, path: str = "") -> Any:
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        return None if node is None else _convert(loader, node, file, path)
    except yaml.YAMLError as error:
        raise ConfigError(f"{file} is not valid YAML: {error}") from error
    finally:
        loader.dispose()


def load_yaml(path: str | Path) -> ConfigNode:
    """Read one YAML file whose top level is a mapping."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot read the configuration {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"the configuration {path} is not a text file; --base takes YAML files") from error
    tree = _parse(text, str(path))
    if tree is None:
        return ConfigNode()
    if not isinstance(tree, ConfigNode):
        raise ConfigError(f"{path} holds {_describe(tree)}; a configuration is a mapping with {', '.join(SECTIONS)}")
    return tree


def merge(base: ConfigNode, overlay: ConfigNode) -> ConfigNode:
    """Overlay wins key by key; lists are replaced whole, and so are the parameters of a target that changes."""
    result = ConfigNode(base.path or overlay.path)
    result.update(base)
    result.origins.update(base.origins)
    changes_target = "target" in base and "target" in overlay and base["target"] != overlay["target"]
    for key, value in overlay.items():
        mergeable = isinstance(result.get(key), ConfigNode) and isinstance(value, ConfigNode)
        keep = mergeable and not (changes_target and key == "params")
        result[key] = merge(result[key], value) if keep else value
        result.origins[key] = overlay.origins[key]
    if changes_target and "params" not in overlay:
        result.pop("params", None)
    return result


def _apply_override(root: ConfigNode, word: str) -> None:
    name, equals, text = word.partition("=")
    keys = name.split(".")
    if not equals or not all(keys):
        raise ConfigError(
            f"cannot read '{word}' on the command line; write section.key=value, e.g. args.train_iters=20"
        )
    value = _parse(text, COMMAND_LINE, name) if text else None
    node: Any = root
    for depth, key in enumerate(keys[:-1]):
        if isinstance(node, list):
            node = node[_list_index(node, key, keys[:depth], word)]
            continue
        if not isinstance(node.get(key), ConfigNode | list):
            node[key] = ConfigNode(node.path_of(key))
            node.origins[key] = Origin(COMMAND_LINE)
        node = node[key]
    if isinstance(node, list):
        node[_list_index(node, keys[-1], keys[:-1], word)] = value
    else:
        node[keys[-1]] = value
        node.origins[keys[-1]] = Origin(COMMAND_LINE)


def _list_index(items: list, key: str, parents: Sequence[str], word: str) -> int:
    if not key.isdigit() or int(key) >= len(items):
        raise ConfigError(f"'{word}': {'.'.join(parents)} is a list of {len(items)}; name one of its places, 0 up")
    return int(key)


def split_overrides(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """File names and `key=value` words of a command line that mixes them, as `--base A.yaml args.lr=1` does."""
    files = [word for word in words if "=" not in word or _is_path(word)]
    return files, [word for word in words if word not in files]


def _is_path(word: str) -> bool:
    try:
        return Path(word).exists()
    except OSError:  # longer than the name of a file can be
        return False


def load_config(
    paths: Sequence[str | Path], overrides: Iterable[str] = (), below: ConfigNode | None = None
) -> ConfigNode:
    """Merge YAML files left to right, then `section.key=value` words.

    below: a configuration that all of them are laid over. Returns the root node with the sections `args`, `model`,
    `data` and `deepspeed` (each present, perhaps empty), and `stages` where they are given. Raises ConfigError for
    unreadable files and unknown sections.
    """
    root = below or ConfigNode()
    for path in paths:
        tree = load_yaml(path)
        for section in [key for key, value in tree.items() if value is None]:
            del tree[section]  # a heading with nothing below it takes nothing away
        root = merge(root, tree)
    for word in overrides:
        _apply_override(root, word)
    for key, value in root.items():
        if key == STAGES:
            _check_stages(root)
            continue
        if key not in SECTIONS:
            names = (*SECTIONS, STAGES)
            raise ConfigError(
                f"unknown section {root.where(key)}{did_you_mean(key, names)}; sections: {', '.join(names)}"
            )
        if value is not None and not isinstance(value, ConfigNode):
            raise ConfigError(f"{root.where(key)} is {_describe(value)}; give a mapping of keys")
    for section in SECTIONS:
        if root.get(section) is None:
            root[section] = ConfigNode(section)
    return root


def _check_stages(root: ConfigNode) -> None:
    stages = root[STAGES]
    if stages == []:
        raise ConfigError(f"{root.where(STAGES)} is empty; give a list of stages, or leave it out")
    if not isinstance(stages, list):
        raise ConfigError(f"{root.where(STAGES)} is {_describe(stages)}; give a list of stages")
    for number, stage in enumerate(stages):
        if not isinstance(stage, ConfigNode):
            raise ConfigError(f"{root.where(STAGES)}: stage {number + 1} is {_describe(stage)}; give a mapping")
        for section in SECTIONS:
            if stage.get(section) is not None and not isinstance(stage[section], ConfigNode):
                raise ConfigError(f"{stage.where(section)} is {_describe(stage[section])}; give a mapping of keys")


# --- writing ---------------------------------------------------------------------------------------------------------


def dump_config(config: Mapping) -> str:
    """The configuration as YAML text that `load_yaml` reads back."""
    return yaml.dump(_plain(config), Dumper=_Dumper, sort_keys=False, default_flow_style=None, width=120)


def annotate_config(config: ConfigNode) -> str:
    """The configuration as YAML text, each value followed by the file and line that set it."""
    lines: list[tuple[str, str]] = []

    def scalar(value: Any) -> str:
        text = yaml.dump(_plain(value), Dumper=_Dumper, default_flow_style=True, width=1 << 20)
        return text.removesuffix("\n").removesuffix("\n...")

    def walk(node: ConfigNode, indent: str) -> None:
        for key, value in node.items():
            origin = f"# {node.origins[key]}" if key in node.origins else ""
            if isinstance(value, ConfigNode) and value:
                lines.append((f"{indent}{scalar(key)}:", ""))
                walk(value, indent + "  ")
            elif isinstance(value, list) and any(isinstance(item, ConfigNode) and item for item in value):
                lines.append((f"{indent}{scalar(key)}:", origin))
                for item in value:
                    if isinstance(item, ConfigNode) and item:
                        lines.append((f"{indent}  -", ""))
                        walk(item, indent + "    ")
                    else:
                        lines.append((f"{indent}  - {scalar(item)}", ""))
            else:
                lines.append((f"{indent}{scalar(key)}: {scalar(value)}", origin))

    walk(config, "")
    width = min(max((len(text) for text, origin in lines if origin), default=0), 72)
    return "\n".join(f"{text:<{width}}  {origin}".rstrip() for text, origin in lines)


# --- messages --------------------------------------------------------------------------------------------------------


def did_you_mean(name: Any, known: Iterable[str]) -> str:
    """`; did you mean 'x'?` for the known name nearest to `name`, or nothing."""
    close = difflib.get_close_matches(str(name), list(known), n=1, cutoff=0.6)
    return f"; did you mean '{close[0]}'?" if close else ""


def _describe(value: Any) -> str:
    names = {dict: "a mapping", list: "a list", str: "a text", bool: "a yes/no value", int: "a number"}
    for kind, name in names.items():
        if isinstance(value, kind):
            return f"{name} ({value!r})" if kind not in (dict, list) else name
    return repr(value)


_warned: set[str] = set()


def warn_once(message: str) -> None:
    """Log a warning on what all ranks read alike, the first time that this process meets it; rank 0 shows it."""
    if message not in _warned:
        _warned.add(message)
        log.warning(message, extra={SAME_ON_EVERY_RANK: True})


# --- sections as dataclasses -----------------------------------------------------------------------------------------

T = TypeVar("T")


def build_dataclass(
    cls: type[T], node: Mapping, ineffective: Mapping[str, str] | None = None, also_known: Iterable[str] = ()
) -> T:
    """Fill a dataclass from a mapping, checking names and types.

    Keys in `ineffective` warn once with their reason; keys in `also_known` belong to another reader and are passed
    over; any other unknown key is an error that names the nearest field.
    """
    node = _as_node(node)
    hints = typing.get_type_hints(cls)
    fields = [field.name for field in dataclasses.fields(cls)]  # type: ignore[arg-type]
    values = {}
    for key, value in node.items():
        if key in fields:
            values[key] = _check_type(value, hints[key], node.where(key))
        elif ineffective and key in ineffective:
            warn_once(f"{node.where(key)} has no effect here: {ineffective[key]}")
        elif key not in also_known:
            raise ConfigError(f"unknown key {node.where(key)}{did_you_mean(key, [*fields, *also_known])}")
    return cls(**values)


def _as_node(node: Mapping) -> ConfigNode:
    if isinstance(node, ConfigNode):
        return node
    result = ConfigNode()
    result.update(node)
    return result


def _check_type(value: Any, hint: Any, where: str) -> Any:
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        options = typing.get_args(hint)
        if value is None and type(None) in options:
            return None
        errors = []
        for option in options:
            if option is type(None):
                continue
            try:
                return _check_type(value, option, where)
            except ConfigError as error:
                errors.append(error)
        raise errors[0]
    if origin is typing.Literal:
        choices = typing.get_args(hint)
        if value not in choices:
            raise ConfigError(f"{where} is {value!r}; give one of {', '.join(map(str, choices))}")
        return value
    if origin in (list, tuple):
        item_hint = typing.get_args(hint)[0]
        if not isinstance(value, list | tuple):
            raise ConfigError(f"{where} is {_describe(value)}; give a list")
        items = [_check_type(item, item_hint, f"{where}[{index}]") for index, item in enumerate(value)]
        return tuple(items) if origin is tuple else items
    if hint is Any:
        return value
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if hint is int and isinstance(value, float) and value.is_integer():
        return int(value)
    if hint is str and isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        words = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}
        raise ConfigError(f"{where} is {_describe(value)}; give {words.get(hint, hint)}")
    return value


# --- targets ---------------------------------------------------------------------------------------------------------


def resolve_target(target: str) -> Callable[..., Any]:
    """The class or function behind a `target:` string: a released name, one of ours, or a user's own dotted path."""
    path = TARGETS.get(target, target)
    if path is target and target.startswith(RELEASED_MODULES):
        near = did_you_mean(target, TARGETS)
        raise ConfigError(f"target '{target}' is a released name that this project does not have{near}")
    module_name, dot, name = path.rpartition(".")
    if not dot:
        raise ConfigError(f"target '{target}' is not a dotted path{did_you_mean(target, TARGETS)}")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not module_name.startswith(error.name):
            raise
        near = did_you_mean(target, TARGETS)
        raise ConfigError(f"target '{target}': there is no module '{error.name}' on the Python path{near}") from error
    try:
        return getattr(module, name)
    except AttributeError as error:
        near = did_you_mean(name, vars(module))
        raise ConfigError(f"target '{target}': module '{module_name}' has no '{name}'{near}") from error


BESIDE_TARGET = ("target", "params", "is_trainable", "input_key", "ucg_rate")
"""What a mapping with a target may hold: the last three are of the conditioner's entries, which reads them itself."""


def target_of(config: Mapping) -> Callable[..., Any]:
    """The class or function that a `{target: ..., params: {...}}` mapping names; an error says where it stands."""
    node = _as_node(config)
    if "target" not in node:
        raise ConfigError(
            f"{node.path or 'the mapping'} has no 'target'; it holds {', '.join(map(str, node)) or 'nothing'}"
        )
    for key in node:
        if key not in BESIDE_TARGET:
            near = did_you_mean(key, BESIDE_TARGET)
            raise ConfigError(f"unknown key {node.where(key)}{near}; beside target stands params alone")
    try:
        return resolve_target(node["target"])
    except ConfigError as error:
        raise ConfigError(f"{node.where('target')}: {error}") from error


def instantiate_from_config(config: Mapping, **supplied: Any) -> Any:
    """Build the object that `{target: ..., params: {...}}` describes.

    A parameter is handed to the constructor by its own name; one called `NAME_config` whose constructor knows only
    `NAME` is built first and handed over as an object. `supplied` values fill what the constructor takes and the
    parameters leave open. Released parameters without effect warn once; any other unknown one is an error.
    """
    node, factory = _as_node(config), target_of(config)
    params = _as_node(node.get("params") or {})
    accepted = inspect.signature(factory).parameters
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in accepted.values())
    names = [
        name
        for name, parameter in accepted.items()
        if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
    ]
    ineffective = INEFFECTIVE.get(TARGETS.get(node["target"], node["target"]), {})
    arguments: dict[str, Any] = {}
    for key, value in params.items():
        stem = str(key).removesuffix("_config")
        if key in names:
            arguments[key] = value
        elif stem != key and stem in names:
            arguments[stem] = None if value is None else instantiate_from_config(value)
        elif key in ineffective:
            warn_once(f"{params.where(key)} has no effect here: {ineffective[key]}")
        elif takes_any:
            arguments[key] = value
        else:
            known = [name for name in names if name not in supplied]
            near = did_you_mean(key, known if stem == key else [f"{name}_config" for name in known])
            raise ConfigError(f"unknown key {params.where(key)}{near}; {node['target']} takes {', '.join(known)}")
    for key, value in supplied.items():
        if key not in arguments and (key in names or takes_any):
            arguments[key] = value
    missing = [name for name in names if accepted[name].default is inspect.Parameter.empty and name not in arguments]
    if missing:
        raise ConfigError(f"{params.path or node['target']}: {node['target']} also needs {', '.join(missing)}")
    return factory(**arguments)
