"""Files of LoRA adapters alone, and adapters put on a network.

A file is safetensors. Names are SAT's, from the network on: `transformer.layers.0.attention.dense.matrix_A.0` (r,
inputs), `..matrix_B.0` (outputs, r). Its metadata say the rest: `rank`, `alpha`, `targets`, `base_model`.
"""

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from sat.cogvideox.presets import ADAPTERS, describe_weights, family_of
from sat.errors import CheckpointError
from sat.model.finetune.lora2 import TARGETS, Adapter, LoraLinear, lora_layers, num_inputs, output_rules, wrap

log = logging.getLogger(__name__)

LORA_FILE = "lora.safetensors"
"""Name of the file beside a training run's weights."""

MATRIX = re.compile(r"(?P<projection>.*)\.(?P<matrix>matrix_[AB]\.\d+)$")
LAYER = re.compile(r"transformer\.layers\.(\d+)\.(.*)")


@dataclass(frozen=True)
class LoraFile:
    """One adapter: its matrices, whole, and what they mean."""

    source: str
    """Where it comes from, for messages."""
    weights: Mapping[str, Tensor]
    """The network's name of each matrix -> the matrix."""
    alpha: float
    base_model: str
    """The model that it was trained on, in words."""

    @property
    def rank(self) -> int:
        """The one rank of all projections. Raises CheckpointError where they have several."""
        ranks = {len(value) for name, value in self.weights.items() if ".matrix_A." in name}
        if len(ranks) != 1:
            raise CheckpointError(f"{self.source} has adapters of the ranks {sorted(ranks)}; one rank is expected")
        return next(iter(ranks))

    @property
    def targets(self) -> tuple[str, ...]:
        """Which of the TARGETS have adapters."""
        adapted = {match[2] for name in self.projections() if (match := LAYER.match(name))}
        return tuple(target for target, names in TARGETS.items() if adapted & set(names))

    @property
    def metadata(self) -> dict[str, str]:
        """What its file says beside the matrices."""
        return {
            "format": "pt",
            "rank": str(self.rank),
            "alpha": repr(self.alpha),
            "targets": ",".join(self.targets),
            "base_model": self.base_model,
        }

    def projections(self) -> dict[str, dict[str, Tensor]]:
        """Name of each projection -> its matrices, `matrix_A.0` and so on."""
        found: dict[str, dict[str, Tensor]] = {}
        for name, value in self.weights.items():
            match = MATRIX.match(name)
            if match is None:
                raise CheckpointError(f"{self.source} holds '{name}', which is no matrix of an adapter")
            found.setdefault(match["projection"], {})[match["matrix"]] = value
        return found


def lora_of(state: Mapping[str, Tensor], alpha: float, source: str, prefix: str = "") -> LoraFile:
    """The adapter in a network's state dict, whose names begin with `prefix`. CheckpointError where it has none."""
    weights = {name.removeprefix(prefix): value for name, value in state.items() if MATRIX.match(name)}
    if not weights:
        raise CheckpointError(f"{source} holds no adapters: none of its {len(state)} tensors is a matrix_A or matrix_B")
    base = {name.replace(".original.", "."): value.shape for name, value in state.items() if not MATRIX.match(name)}
    return LoraFile(source, weights, alpha, describe_weights(base) if base else "")


def join_adapters(parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Whole matrices of those of all tensor-parallel ranks in order."""
    dims = {name: _split_dim(name) for name in parts[0]}
    return {
        name: parts[0][name] if dim is None else torch.cat([part[name] for part in parts], dim)
        for name, dim in dims.items()
    }


def _split_dim(name: str) -> int | None:
    """Along which dimension ranks share a matrix: B where they share the outputs of the projection, A where the
    inputs; the other one is whole on each."""
    shares_inputs = re.search(r"\.(dense|dense_4h_to_h)\.matrix_", name) is not None
    is_a = ".matrix_A." in name
    return None if is_a != shares_inputs else 1 if is_a else 0


# --- files -----------------------------------------------------------------------------------------------------------


def write_lora(path: Path, lora: LoraFile) -> None:
    """Write an adapter."""
    save_file({name: value.contiguous() for name, value in lora.weights.items()}, path, metadata=lora.metadata)


def read_lora(path: Path) -> LoraFile:
    """Read what `write_lora` wrote. Raises CheckpointError for other files, and for one that says no alpha."""
    try:
        with safe_open(path, framework="pt") as reader:
            weights = {name: reader.get_tensor(name) for name in reader.keys()}  # noqa: SIM118 (not a mapping)
            metadata = reader.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} is not a whole safetensors file ({error}); copy or download it again") from error
    family = family_of(weights)
    if family != ADAPTERS:
        found = f"holds {family}" if family else f"holds no adapters but names such as {', '.join([*weights][:3])}"
        raise CheckpointError(f"{path} {found}; give a file with SAT's names, as tools/convert.py makes of others")
    if "alpha" not in metadata:
        raise CheckpointError(
            f"{path} does not say its alpha, without which its strength is unknown; add 'alpha' to its metadata"
        )
    return LoraFile(str(path), weights, float(metadata["alpha"]), metadata.get("base_model", ""))


# --- on a network ----------------------------------------------------------------------------------------------------


@torch.no_grad()
def attach_loras(network: nn.Module, loras: Sequence[LoraFile]) -> None:
    """Put adapters, of one file or several, on a network that has none, and say how well they fit.

    Its layers then compute W x + Σ scale · alpha / rank · B A x; `lora_scale` of a call sets the scales, 1 by default.
    Raises CheckpointError where a file's projections are not those of the network.
    """
    if lora_layers(network):
        raise CheckpointError(
            "the loaded weights have adapters of their own; load the base model's weights and give both as --lora"
        )
    found = describe_weights({name: value.shape for name, value in network.state_dict().items()})
    modules = dict(network.named_modules())
    for lora in loras:
        _check_fit(lora, modules)
        if lora.base_model and lora.base_model != found:
            log.warning("%s was trained on %s and is put on %s", lora.source, lora.base_model, found)
    matrices = [lora.projections() for lora in loras]
    for name in dict.fromkeys(name for own in matrices for name in own):
        own = [(number, lora) for number, lora in enumerate(loras) if name in matrices[number]]
        wrapped = wrap(network, name, [Adapter(number, lora.rank, lora.alpha / lora.rank) for number, lora in own])
        wrapped.fill(_side_by_side([matrices[number][name] for number, _ in own]))
    for number, lora in enumerate(loras):
        _report(network, number, lora)


def _check_fit(lora: LoraFile, modules: Mapping[str, nn.Module]) -> None:
    """Every projection of a file must be one of the network, of the same sizes."""
    projections = lora.projections()
    strange = [name for name in projections if not hasattr(modules.get(name), "weight")]
    wrong = [name for name in projections if name not in strange and not _fits(projections[name], modules[name])]
    total = len(lora.weights)
    fitting = total - sum(len(projections[name]) for name in (*strange, *wrong))
    if strange or wrong:
        lines = [f"{lora.source} does not fit the model: {fitting}/{total} modules do"]
        lines += [f"  the model has no {name}" for name in strange[:3]]
        for name in wrong[:3]:
            lines.append(f"  {name} has {_sizes(projections[name])}, the model's has {_wanted(modules[name])}")
        lines += [f"  it was trained on {lora.base_model}"] if lora.base_model else []
        raise CheckpointError("\n".join(lines))


def _wanted(linear: Any) -> str:
    """Inputs of a whole projection, and outputs of each of its blocks."""
    return _in_words(num_inputs(linear), [sum(rule.chunks) for rule in output_rules(linear)])


def _sizes(matrices: Mapping[str, Tensor]) -> str:
    """The same of an adapter."""
    blocks = [len(value) for name, value in sorted(matrices.items()) if "_B" in name]
    return _in_words(next(value.shape[1] for name, value in matrices.items() if "_A" in name), blocks)


def _in_words(inputs: int, blocks: Sequence[int]) -> str:
    return f"{inputs} inputs and {' + '.join(map(str, blocks))} outputs"


def _fits(matrices: Mapping[str, Tensor], linear: Any) -> bool:
    names = {f"matrix_{letter}.{number}" for letter in "AB" for number in range(len(output_rules(linear)))}
    return matrices.keys() == names and _sizes(matrices) == _wanted(linear)


def _side_by_side(adapters: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The matrices of several adapters of a projection as those of one, of the sum of their ranks."""
    return {
        name: torch.cat([adapter[name].float() for adapter in adapters], dim=0 if "_A" in name else 1)
        for name in adapters[0]
    }


def _report(network: nn.Module, number: int, lora: LoraFile) -> None:
    """How many of a file's matrices are in place, and how much they change the weights."""
    layers = lora_layers(network)
    shares = [_share_of_weight(layers[name], number) for name in lora.projections()]
    total, share = len(lora.weights), sum(shares) / len(shares)
    log.info(
        "%s: %d/%d modules, rank %d, alpha %g, on %s; mean |dW| / |W| %.3g %%",
        *(lora.source, total, total, lora.rank, lora.alpha, ", ".join(lora.targets), 100 * share),
    )
    if share == 0.0:
        log.warning("%s changes nothing: its B matrices are zero, as before the first step of training", lora.source)


def _share_of_weight(linear: LoraLinear, number: int) -> float:
    """|dW| / |W| (Frobenius) of one adapter of a projection, by |B A|² = tr((BᵀB)(A Aᵀ)), which takes no whole dW."""
    start = sum(adapter.rank for adapter in linear.adapters if adapter.number < number)
    adapter = next(adapter for adapter in linear.adapters if adapter.number == number)
    rows = slice(start, start + adapter.rank)
    pairs = [(a[rows].float(), b[:, rows].float()) for a, b in zip(linear.matrix_A, linear.matrix_B)]
    square = torch.stack([((b.T @ b) * (a @ a.T)).sum() for a, b in pairs]).sum().clamp(min=0.0)
    return adapter.scaling * float(square.sqrt() / linear.original.weight.float().norm())
