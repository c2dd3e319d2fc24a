"""Checkpoints in SAT's layout: reading weights, with nothing but tensors and plain values allowed.

RUN/latest                                   the iteration, e.g. 1000
RUN/1000/mp_rank_00_model_states.pt          {'module': state dict, 'iteration': 1000}
RUN/1000/optimizer_rank_00000.safetensors    master weights and optimizer state that this rank holds
RUN/1000/training_state.json                 step, data position, seed, layout
RUN/1000/manifest.json                       size and checksum of every file; written last
RUN/1000-ema/mp_rank_00_model_states.pt      the averaged weights, where the optimizer keeps them
"""

import importlib
import logging
import pickle
import re
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy
import torch
from safetensors import safe_open
from torch import Tensor

from sat.compat.sat_names import LEGACY_CLASSES
from sat.errors import CheckpointError
from sat.mpu.shards import ShardRule, shard_rules
from sat.mpu.state import ParallelState
from sat.vae.checkpoint import refuse_foreign
from sat.weights.finding import CheckpointPath, find_checkpoint, model_file

log = logging.getLogger(__name__)


def load_weights(path: str | Path, mp_rank: int = 0) -> dict[str, Tensor]:
    """The state dict of a checkpoint (file, iteration folder or run directory), memory-mapped where it can be."""
    file = find_checkpoint(path).weights(mp_rank)
    if file.suffix == ".safetensors":
        return _read_safetensors(file)
    content = load_pickle(file)
    for key in ("module", "state_dict"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
            break
    if not isinstance(content, Mapping) or not all(isinstance(value, Tensor) for value in content.values()):
        raise CheckpointError(
            f"{file} holds no state dict: there is neither 'module' nor 'state_dict' in it, nor bare tensors"
        )
    return dict(content)


def _read_safetensors(file: Path) -> dict[str, Tensor]:
    try:
        with safe_open(file, framework="pt") as reader:
            return {name: reader.get_tensor(name) for name in reader.keys()}  # noqa: SIM118 (not a mapping)
    except Exception as error:  # safetensors raises its own, undocumented types
        raise CheckpointError(f"{file} is not a whole safetensors file ({error}); copy or download it again") from error


def load_pickle(file: Path) -> Any:
    """Read a torch file, allowing tensors and plain values, and the known classes of legacy training checkpoints."""
    try:
        with file.open("rb") as stream:
            is_zip = stream.read(2) == b"PK"
    except OSError as error:
        raise CheckpointError(f"cannot read {file}: {error.strerror}") from error
    if is_zip and not zipfile.is_zipfile(file):
        raise CheckpointError(f"{file} is half a file: its end is missing; copy or download it again")
    refuse_foreign(file)
    try:
        wanted = set(torch.serialization.get_unsafe_globals_in_checkpoint(file)) if is_zip else set()
        refused = sorted(wanted - LEGACY_CLASSES)
        if refused:
            raise CheckpointError(_refusal(file, refused))
        if not wanted:
            return torch.load(file, map_location="cpu", weights_only=True, mmap=is_zip)
        log.info("%s is a legacy checkpoint; allowed besides tensors: %s", file, ", ".join(sorted(wanted)))
        with torch.serialization.safe_globals(
            [*(_find_class(name) for name in sorted(wanted)), *_numpy_dtypes(wanted)]
        ):
            return torch.load(file, map_location="cpu", weights_only=True, mmap=is_zip)
    except CheckpointError:
        raise
    except pickle.UnpicklingError as error:  # torch's text advises to load the file without these checks
        named = re.search(r"GLOBAL (\S+)", str(error))
        if named:
            raise CheckpointError(_refusal(file, [named[1]])) from error
        raise CheckpointError(f"{file} is not a torch file of weights; copy or download it again") from error
    except Exception as error:  # bytes that are no pickle do whatever they happen to mean as one
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"{file} cannot be read as a torch file ({reason}); copy or download it again") from error


def _refusal(file: Path, names: Sequence[str]) -> str:
    return (
        f"{file} asks to load {', '.join(names)}, which is neither a tensor nor known from SAT's checkpoints; "
        "it could run any code, so it is refused"
    )


def _numpy_dtypes(wanted: set[str]) -> list[type]:
    """What numpy.dtype builds: its classes are not named in the file."""
    if "numpy.dtype" not in wanted:
        return []
    return [value for name, value in vars(numpy.dtypes).items() if name.endswith("DType")]


def _find_class(name: str) -> Any:
    """(class, name in the file), as safe_globals takes it: numpy moved its internals between versions."""
    module_name, _, attribute = name.rpartition(".")
    for candidate in (module_name, module_name.replace("numpy.core", "numpy._core")):
        try:
            return (getattr(importlib.import_module(candidate), attribute), name)
        except (ImportError, AttributeError):
            continue
    raise CheckpointError(f"the checkpoint holds a {name}, and {module_name.split('.')[0]} is not installed to read it")


def weight_files(checkpoint: CheckpointPath) -> list[Path]:
    """The files of weights of all tensor-parallel ranks of a checkpoint, in order."""
    if checkpoint.is_file:
        return [checkpoint.path]
    count = len(list(checkpoint.path.glob("mp_rank_*_model_states.pt")))
    for rank in range(count):
        if not checkpoint.weights(rank).is_file():
            raise CheckpointError(f"{checkpoint.path} has {count} files of weights, but {model_file(rank)} is missing")
    return [checkpoint.weights(rank) for rank in range(count)]


def load_parts(checkpoint: CheckpointPath) -> list[dict[str, Tensor]]:
    """The state dicts of all tensor-parallel ranks of a checkpoint, in order."""
    return [load_weights(file) for file in weight_files(checkpoint)]


def fit_weights(
    module: torch.nn.Module,
    parts: Sequence[Mapping[str, Tensor]],
    source: str,
    describe: Callable[[Mapping[str, Any]], str],
    may_miss: Callable[[str], bool] = lambda name: False,
    parallel: ParallelState | None = None,
) -> list[str]:
    """Load the state dicts of all tensor-parallel ranks of a checkpoint into a module, whole or this rank's part of it.

    Names and shapes must fit; what is missing must be allowed by `may_miss` and is returned. `describe` puts shapes
    into words (which released model they look like) for the message of a misfit.
    """
    own, rules = module.state_dict(), shard_rules(module)
    sources, place = _sources(module, parts), _place(parallel)
    loaded = {name: _own_part([_meta(value) for value in of], rules.get(name), *place) for name, of in sources.items()}
    unexpected = sorted(set(loaded) - set(own))
    missing = sorted(set(own) - set(loaded))
    wrong = [name for name in own if name in loaded and loaded[name].shape != own[name].shape]
    forbidden = [name for name in missing if not may_miss(name)]
    if unexpected or forbidden or wrong:
        looks = describe({name: value.shape for name, value in parts[0].items()})
        lines = [f"{source} does not fit the model: it looks like {looks}"]
        lines[0] += f", and the configuration builds {describe({name: value.shape for name, value in own.items()})}"
        for title, names in (("missing", forbidden), ("not in the model", unexpected)):
            if names:
                lines.append(f"  {title} ({len(names)}): {', '.join(names[:4])}{', ...' if len(names) > 4 else ''}")
        for name in wrong[:4]:
            lines.append(f"  {name}: {tuple(loaded[name].shape)} in the file, {tuple(own[name].shape)} in the model")
        raise CheckpointError("\n".join(lines))
    with torch.no_grad():  # one by one: no more than one parameter is in memory twice
        for name, of in sources.items():
            own[name].copy_(_own_part(of, rules.get(name), *place))
    return missing


def join_parts(
    module: torch.nn.Module, parts: Sequence[Mapping[str, Tensor]], parallel: ParallelState | None = None
) -> dict[str, Tensor]:
    """What a module, whole or this rank's part of it, takes of the state dicts of all tensor-parallel ranks.

    Under today's names; the module itself may be without memory.
    """
    rules, place = shard_rules(module), _place(parallel)
    return {name: _own_part(of, rules.get(name), *place) for name, of in _sources(module, parts).items()}


def _sources(module: torch.nn.Module, parts: Sequence[Mapping[str, Tensor]]) -> dict[str, list[Tensor]]:
    """Every tensor's parts of all tensor-parallel ranks, under today's names."""
    renamed = [dict(part) for part in parts]
    for part in renamed:
        _run_renames(module, part)
    return {name: [part[name] for part in renamed if name in part] for name in renamed[0]}


def _place(parallel: ParallelState | None) -> tuple[int, int]:
    """(rank, size) of the tensor-parallel axis."""
    parallel = parallel or ParallelState()
    return parallel.rank("tp"), parallel.size("tp")


def _meta(tensor: Tensor) -> Tensor:
    """Its shape and precision without its numbers."""
    return torch.empty_like(tensor, device="meta")


def _own_part(parts: Sequence[Tensor], rule: ShardRule | None, rank: int, size: int) -> Tensor:
    """A rank's part of a parameter of which a checkpoint holds the parts of some number of ranks, or copies.

    What has other sizes than the rule is returned as it is, to be reported.
    """
    if rule is None or parts[0].dim() <= rule.dim:
        return parts[0]
    length = sum(rule.chunks)
    lengths = [part.shape[rule.dim] for part in parts]
    if lengths[0] == length:  # SAT keeps some parameters whole on every rank that are split here
        return rule.cut(parts[0], rank, size)
    if lengths != [rule.size(number, len(parts)) for number in range(len(parts))]:
        return parts[0]
    return parts[rank] if len(parts) == size else rule.cut(rule.join(parts), rank, size)


def reshard(
    parts: Sequence[Mapping[str, Tensor]], rules: Mapping[str, ShardRule], size: int
) -> Iterator[dict[str, Tensor]]:
    """The state dicts of `size` tensor-parallel ranks, of those of any other number; one at a time.

    rules: how the parameters are split, see `sat.mpu.shards.shard_rules`. Raises CheckpointError where they do not fit.
    """
    lacking = sorted(set(rules) - set(parts[0]))
    if lacking:
        raise CheckpointError(
            f"the weights lack {len(lacking)} that the model splits over ranks: {', '.join(lacking[:3])}"
        )
    copies = [name for name in parts[0] if name not in rules]
    apart = [name for name in copies if any(not torch.equal(part[name], parts[0][name]) for part in parts[1:])]
    if apart:
        log.warning(
            "%d weights are not the same on all ranks; rank 0's are taken: %s", len(apart), ", ".join(apart[:3])
        )
    for rank in range(size):
        state = dict(parts[0])
        for name, rule in rules.items():
            state[name] = _own_part([part[name] for part in parts], rule, rank, size)
            if state[name].shape[rule.dim] != rule.size(rank, size):
                shapes = ", ".join(str(tuple(part[name].shape)) for part in parts)
                raise CheckpointError(
                    f"{name} is {shapes} on the ranks of the checkpoint, which is no split of {sum(rule.chunks)} along "
                    f"dimension {rule.dim}; give the configuration that the weights were trained with"
                )
        yield state


def _run_renames(module: torch.nn.Module, state: dict[str, Tensor]) -> None:
    """Let the modules bring older layouts to today's, as they do when torch loads a state dict."""
    for prefix, child in module.named_modules():
        for hook in child._load_state_dict_pre_hooks.values():
            hook(state, f"{prefix}." if prefix else "", {}, True, [], [], [])
