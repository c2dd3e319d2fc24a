"""Weights of the VAE on disk: the released `3d-vae.pt`, and run directories that our trainer writes."""

import os
import pickle
import re
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from sat.compat.file_types import FOREIGN_STARTS, describe_vae
from sat.errors import CheckpointError
from sat.vae.causal_conv import inflate_kernels
from sat.weights.finding import find_checkpoint, is_iteration_folder, model_file, open_checkpoint
from sat.weights.whole import iteration_names, read_latest

ENGINE_PREFIX = "first_stage_model."
MAX_NAMES = 8
"""Names listed in a message before `and N more`."""


def load_vae_state(path: str | Path) -> dict[str, Tensor]:
    """Tensors by name (`encoder...`, `decoder...`, perhaps `loss...`) from a file or folder of weights.

    path: a released `3d-vae.pt` ({'state_dict': ...}), a file of a run ({'module': ...}), the folder of one of its
    iterations, or the run directory: of this the iteration that `latest` names, or the newest whole one. Where there
    is a manifest the content is compared with it. Only tensors and plain values are unpickled. Raises CheckpointError
    that says what the file looks like.
    """
    with open_vae_state(path) as state:
        return state


@contextmanager
def open_vae_state(path: str | Path) -> Iterator[dict[str, Tensor]]:
    """`load_vae_state`, with the folder held against deletion for the time of a `with` block: tensors may be mapped."""
    _check_there(Path(path))
    with open_checkpoint(path) as checkpoint:
        yield _state(checkpoint.weights())


def _state(file: Path) -> dict[str, Tensor]:
    content = _read(file)
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{file} holds a {type(content).__name__}, not a dict with 'state_dict'")
    for key in ("state_dict", "module"):
        if isinstance(content.get(key), Mapping):
            return _tensors(file, content[key])
    names = [str(key) for key in content]
    hint = ""
    if any(name.startswith(("encoder.", "decoder.")) for name in names):
        hint = "; it looks like a bare state dict: save it again as {'state_dict': weights}"
    raise CheckpointError(f"{file} has neither 'state_dict' nor 'module'; it holds {_listed(names)}{hint}")


def load_vae(vae: nn.Module, path: str | Path, ignore_keys: Iterable[str] = ()) -> None:
    """Fill `vae` with the weights at `path`, in the precision that it has. Names must match one for one.

    ignore_keys: prefixes of names to pass over, in the file (as `loss` in the released one) and in the model. Weights
    of a network of images (time_kernel 1) are inflated, see `CausalConv3d`.
    """
    with open_vae_state(path) as found:
        _fill(vae, found, path, tuple(ignore_keys))


def _fill(vae: nn.Module, found: Mapping[str, Tensor], path: str | Path, ignored: tuple[str, ...]) -> None:
    state = {name: tensor for name, tensor in found.items() if not name.startswith(ignored)}
    inflate_kernels(vae, state)
    own = vae.state_dict()
    complaints = []
    missing = [name for name in own if name not in state and not name.startswith(ignored)]
    unexpected = [name for name in state if name not in own]
    misfits = [
        f"{name} {tuple(tensor.shape)} instead of {tuple(own[name].shape)}"
        for name, tensor in state.items()
        if name in own and tensor.shape != own[name].shape
    ]
    if missing:
        complaints.append(f"{len(missing)} missing: {_listed(missing)}")
    if unexpected:
        complaints.append(f"{len(unexpected)} not in the model: {_listed(unexpected)}")
    if misfits:
        complaints.append(f"{len(misfits)} of another shape: {_listed(misfits)}")
    if complaints:
        advice = f"the file looks like {describe_state(state)}; the model is {describe_state(own)}"
        if unexpected and all(name.startswith("loss.") for name in unexpected) and not missing and not misfits:
            advice = "they belong to training only; set ignore_keys: ['loss']"
        raise CheckpointError(f"{path} does not fit the VAE: {'; '.join(complaints)}. {advice}")
    vae.load_state_dict(state, strict=False)


def save_vae_state(state: Mapping[str, Tensor], path: str | Path) -> None:
    """Write a VAE's state dict as a released `3d-vae.pt`. The file appears whole or not at all."""
    path = Path(path)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        torch.save({"state_dict": tensors}, partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def describe_state(state: Mapping[str, Tensor]) -> str:
    """The options that weights were made with, or the names of weights that are no VAE's."""
    options = describe_vae({name: tensor.shape for name, tensor in state.items()})
    if options is not None:
        return options
    return f"no VAE of this kind ({_listed(list(state))})" if state else "an empty state dict"


def find_vae_file(path: Path) -> Path:
    """The file of weights that a path names, as far as names and sizes tell. Raises CheckpointError."""
    _check_there(path)
    return find_checkpoint(path).weights()


def _check_there(path: Path) -> None:
    """Raise CheckpointError for a path that is neither a file nor a folder of weights."""
    if path.is_file():
        return
    if not path.is_dir():
        raise CheckpointError(
            f"there is no file or folder {path}; check ckpt_path (relative paths start at {Path.cwd()})"
        )
    if not is_iteration_folder(path) and not iteration_names(path) and read_latest(path)[0] is None:
        held = _listed(sorted(entry.name for entry in path.iterdir()))
        raise CheckpointError(f"the folder {path} has no weights at {path / model_file(0)}; it holds {held}")


def refuse_foreign(file: Path) -> bytes:
    """The first bytes of a file; raises CheckpointError for what is often found in the place of weights."""
    with file.open("rb") as stream:
        start = stream.read(64)
    for sign, description in FOREIGN_STARTS.items():
        if start.lstrip().startswith(sign):
            raise CheckpointError(f"{file} is {description}")
    return start


def _read(file: Path) -> object:
    start = refuse_foreign(file)
    try:
        return torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError) as error:
        asked = re.search(r"GLOBAL (\S+)", str(error))
        if asked:
            raise CheckpointError(
                f"{file} asks to load {asked[1]}, which is no tensor and could run any code, so it is refused"
            ) from error
        size = file.stat().st_size
        kind = "cut short (an archive without its end)" if start.startswith(b"PK") else "no file that torch.save wrote"
        raise CheckpointError(f"{file} ({size} bytes) is {kind}; copy or download it again") from error


def _tensors(file: Path, state: Mapping) -> dict[str, Tensor]:
    """The VAE's part of a state dict, without the prefix that it has inside a whole engine."""
    named = {str(name): value for name, value in state.items() if isinstance(value, Tensor)}
    inside = {
        name.removeprefix(ENGINE_PREFIX): value for name, value in named.items() if name.startswith(ENGINE_PREFIX)
    }
    tensors = inside or named
    if not tensors:
        raise CheckpointError(f"{file} holds no tensors")
    return tensors


def _listed(names: list[str]) -> str:
    rest = f" and {len(names) - MAX_NAMES} more" if len(names) > MAX_NAMES else ""
    return (", ".join(names[:MAX_NAMES]) or "nothing") + rest
