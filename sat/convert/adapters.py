"""LoRA adapters in the layouts of files: SAT's, diffusers' and PEFT's, kohya's and ComfyUI's.

Between reading and writing there is one form: diffusers' name of a module -> `Adapter`. Letters: r rank, i and o inputs
and outputs of the module.
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sat.compat.comfy_names import COMFY_PREFIXES
from sat.compat.lora_names import (
    DIFFUSERS_METADATA,
    LORA_ALPHA,
    LORA_DOWN,
    LORA_FLAT_ROOTS,
    LORA_FUSED,
    LORA_FUSED_PARTS,
    LORA_MODULES,
    LORA_ROOTS,
    LORA_TARGETS,
    LORA_UP,
)
from sat.compat.patterns import matched, renamed
from sat.config import did_you_mean
from sat.errors import CheckpointError

SAT_ALPHA = "sat_alpha"
"""The entry in a file's metadata with the alpha that was multiplied into the matrices of a file for diffusers."""

_SAT_NAME = re.compile(r"(?:.*?\.)?(transformer\.layers\.\d+\..+)\.matrix_([AB])\.(\d+)")


@dataclass(frozen=True)
class Adapter:
    """A low-rank update of a module's weight: W + up · down · alpha / r (Hu et al. 2021, arXiv:2106.09685, eq. 3)."""

    down: Tensor
    """(r i)"""
    up: Tensor
    """(o r)"""
    alpha: float

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    def update(self) -> Tensor:
        """What is added to the weight: (o i) float32."""
        return self.up.float() @ self.down.float() * self.scale


Adapters = dict[str, Adapter]


# --- SAT -------------------------------------------------------------------------------------------------------------


def is_sat_adapter(name: str) -> bool:
    """Whether a weight of a SAT state dict belongs to an adapter."""
    return _SAT_NAME.fullmatch(name) is not None


def adapters_from_sat(state: Mapping[str, Tensor], alpha: float) -> Adapters:
    """The adapters among the weights of a SAT state dict; alpha is that of the run which trained them."""
    pairs: dict[str, dict[str, Tensor]] = {}
    for name, value in state.items():
        match = _SAT_NAME.fullmatch(name)
        if match:
            pairs.setdefault(_module_of_sat(match[1], int(match[3]), name), {})[match[2]] = value
    halves = {module: (pair.get("A"), pair.get("B")) for module, pair in pairs.items()}
    return {module: Adapter(down, up, alpha) for module, (down, up) in _whole(halves).items()}


def _module_of_sat(projection: str, index: int, name: str) -> str:
    match = matched(LORA_FUSED, projection)
    if match and match.end() == len(projection) and index < len(LORA_FUSED_PARTS):
        return LORA_FUSED_PARTS[index].format(**match.groupdict())
    found = renamed(projection, LORA_MODULES, 0, 1) if index == 0 else None
    if found is None:
        raise CheckpointError(f"this project has no place for the adapter '{name}'")
    return found


def adapters_to_sat(adapters: Adapters) -> tuple[dict[str, Tensor], float]:
    """SAT's names, bare, with the alpha that all modules share there, as they share the rank.

    Where all share them already, the matrices are as they were. Else those of lower rank are filled up with zeros, and
    alpha becomes the rank: the scales go into `up`. A block of a fused projection without an adapter gets one of zeros.
    """
    adapters = _uniform(adapters)
    state: dict[str, Tensor] = {}
    for module, adapter in adapters.items():
        projection, index = _place_in_sat(module)
        state[f"{projection}.matrix_A.{index}"], state[f"{projection}.matrix_B.{index}"] = adapter.down, adapter.up
        if projection.endswith("query_key_value"):
            for other in range(len(LORA_FUSED_PARTS)):
                state.setdefault(f"{projection}.matrix_A.{other}", torch.zeros_like(adapter.down))
                state.setdefault(f"{projection}.matrix_B.{other}", torch.zeros_like(adapter.up))
    return state, next(iter(adapters.values())).alpha


def _place_in_sat(module: str) -> tuple[str, int]:
    for index, pattern in enumerate(LORA_FUSED_PARTS):
        match = matched(pattern, module)
        if match:
            return LORA_FUSED.format(**match.groupdict()), index
    found = renamed(module, LORA_MODULES, 1, 0)
    if found is None:
        raise CheckpointError(
            f"SAT has no place for an adapter on '{module}'; fold the adapters into their model with --merge-lora BASE"
        )
    return found, 0


def _uniform(adapters: Adapters) -> Adapters:
    if len({(adapter.rank, adapter.alpha) for adapter in adapters.values()}) == 1:
        return adapters
    rank = max(adapter.rank for adapter in adapters.values())
    return {module: _raised(adapter, rank) for module, adapter in adapters.items()}


def _raised(adapter: Adapter, rank: int) -> Adapter:
    """The same update at a higher rank and a scale of 1."""
    extra = rank - adapter.rank
    down = torch.cat([adapter.down, adapter.down.new_zeros(extra, adapter.down.shape[1])])
    up = _scaled(adapter.up, adapter.scale)
    return Adapter(down, torch.cat([up, up.new_zeros(len(up), extra)], dim=1), float(rank))


# --- diffusers, PEFT, kohya, ComfyUI ---------------------------------------------------------------------------------


def adapters_from_names(
    state: Mapping[str, Tensor], metadata: Mapping[str, str], alpha: float | None = None
) -> Adapters:
    """The adapters of a file under any names but SAT's.

    alpha comes from the argument, else from the file (`.alpha` beside each module, or the metadata that diffusers
    writes), else it is the rank, as diffusers takes it. What `adapters_to_diffusers` scaled is scaled back where that
    is exact. Raises CheckpointError for names of other modules and for halves of adapters.
    """
    found: dict[str, dict[str, Tensor]] = {"down": {}, "up": {}, "alpha": {}}
    for name, value in state.items():
        part, module = _parse(name)
        found[part][module] = value
    halves = {
        module: (found["down"].get(module), found["up"].get(module)) for module in {**found["down"], **found["up"]}
    }
    stored = _stored_alphas(metadata)
    adapters = {}
    for module, (down, up) in _whole(halves).items():
        own = float(found["alpha"][module]) if module in found["alpha"] else stored(module)
        chosen = alpha if alpha is not None else own
        if chosen is None and SAT_ALPHA in metadata:
            up, chosen = _scaled_back(up, down, float(metadata[SAT_ALPHA]))
        adapters[module] = Adapter(down, up, float(len(down)) if chosen is None else chosen)
    return adapters


def _parse(name: str) -> tuple[str, str]:
    """(down, up or alpha; diffusers' module) of a name in a file of adapters."""
    for part, endings in (("down", LORA_DOWN), ("up", LORA_UP), ("alpha", LORA_ALPHA)):
        for ending in endings:
            if name.endswith(ending):
                module = _module_of(name.removesuffix(ending))
                if module is not None:
                    return part, module
    known = [f"transformer.{pattern.format(layer=0)}{LORA_DOWN[0]}" for pattern in LORA_TARGETS]
    raise CheckpointError(f"no module of a CogVideoX transformer has the adapter '{name}'{did_you_mean(name, known)}")


def _module_of(text: str) -> str | None:
    """Diffusers' name of a module that a file names in diffusers' or in ComfyUI's way, with dots or underscores."""
    for root in LORA_FLAT_ROOTS:
        if text.startswith(root):
            return _unflattened(text.removeprefix(root))
    for root in LORA_ROOTS:
        text = text.removeprefix(root)
    name = (renamed(f"{text}.", COMFY_PREFIXES, 1, 0) or text).removesuffix(".")
    return name if any(_is_all_of(pattern, name) for pattern in LORA_TARGETS) else None


def _unflattened(text: str) -> str | None:
    for pattern in LORA_TARGETS:
        for spelling in (pattern, _comfy_module(pattern)):
            match = matched(spelling.replace(".", "_"), text)
            if match and match.end() == len(text):
                return pattern.format(**match.groupdict())
    return None


def _is_all_of(pattern: str, name: str) -> bool:
    match = matched(pattern, name)
    return match is not None and match.end() == len(name)


def _comfy_module(module: str) -> str:
    """ComfyUI's name of a module of diffusers', which may be a pattern."""
    marked = module.replace("{layer}", "0")
    return (renamed(f"{marked}.", COMFY_PREFIXES, 0, 1) or "").removesuffix(".").replace(".0.", ".{layer}.", 1)


def _stored_alphas(metadata: Mapping[str, str]) -> Any:
    """module -> alpha, by the metadata in which diffusers and PEFT keep it; None where they keep none."""
    try:
        content = json.loads(metadata.get(DIFFUSERS_METADATA, "{}"))
    except ValueError:
        content = {}
    settings = {name.removeprefix("transformer."): value for name, value in content.items()}
    patterns: dict[str, float] = settings.get("alpha_pattern") or {}

    def alpha_of(module: str) -> float | None:
        for pattern, value in patterns.items():
            if re.match(rf"(.*\.)?({pattern})$", module):
                return float(value)
        return None if settings.get("lora_alpha") is None else float(settings["lora_alpha"])

    return alpha_of


def adapters_to_diffusers(adapters: Adapters) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Names and metadata for `load_lora_weights`, whose loader of a file without settings takes alpha / r = 1.

    The scale is therefore multiplied into `up`, in float32 where its own precision would round: so every version of
    diffusers and PEFT gives the same update. The metadata keep alpha for the way back.
    """
    state: dict[str, Tensor] = {}
    for module, adapter in adapters.items():
        state[f"transformer.{module}{LORA_DOWN[0]}"] = adapter.down
        state[f"transformer.{module}{LORA_UP[0]}"] = _scaled(adapter.up, adapter.scale)
    alphas = {(adapter.rank, adapter.alpha) for adapter in adapters.values()}
    return state, ({SAT_ALPHA: str(alphas.pop()[1])} if len(alphas) == 1 else {})


def adapters_to_kohya(adapters: Adapters, has_comfy_names: bool) -> dict[str, Tensor]:
    """kohya's names with an `alpha` beside each module, as ComfyUI reads them.

    has_comfy_names: modules are called as in ComfyUI's own transformer, else as in diffusers'.
    """
    state: dict[str, Tensor] = {}
    for module, adapter in adapters.items():
        name = _comfy_name(module) if has_comfy_names else module
        root = f"{LORA_FLAT_ROOTS[1]}{name.replace('.', '_')}"
        state[f"{root}.lora_down.weight"], state[f"{root}.lora_up.weight"] = adapter.down, adapter.up
        state[f"{root}.alpha"] = torch.tensor(adapter.alpha)
    return state


def _comfy_name(module: str) -> str:
    found = renamed(f"{module}.", COMFY_PREFIXES, 0, 1)
    assert found is not None  # LORA_TARGETS holds no other modules
    return found.removesuffix(".")


# --- what they do ----------------------------------------------------------------------------------------------------


def merge_adapters(state: Mapping[str, Tensor], adapters: Adapters) -> dict[str, Tensor]:
    """A state dict under diffusers' names with the updates added, in float32 before they are rounded.

    Raises CheckpointError where an adapter's module is not there or has other sizes.
    """
    merged = dict(state)
    for module, adapter in adapters.items():
        weight = state.get(f"{module}.weight")
        if weight is None:
            raise CheckpointError(f"the adapters have one on '{module}', which the model does not have")
        if (len(weight), weight[0].numel()) != (len(adapter.up), adapter.down.shape[1]):
            raise CheckpointError(
                f"the adapter on '{module}' is for a weight of {(len(adapter.up), adapter.down.shape[1])}, the model's "
                f"is {tuple(weight.shape)}; they belong to different models"
            )
        merged[f"{module}.weight"] = (weight.float() + adapter.update().view_as(weight)).to(weight.dtype)
    return merged


def largest_difference(adapters: Adapters, others: Adapters, seed: int = 0) -> float:
    """Of what the adapters add to their modules' outputs on random inputs, both in float32."""
    generator = torch.Generator().manual_seed(seed)
    largest = 0.0
    for module, adapter in adapters.items():
        inputs = torch.randn(4, adapter.down.shape[1], generator=generator)
        outputs = [inputs @ one.down.float().T @ one.up.float().T * one.scale for one in (adapter, others[module])]
        largest = max(largest, float((outputs[0] - outputs[1]).abs().max()))
    return largest


def _whole(halves: Mapping[str, Sequence[Tensor | None]]) -> dict[str, tuple[Tensor, Tensor]]:
    """The pairs of matrices; an error where one is missing or they do not fit together."""
    result = {}
    for module, (down, up) in halves.items():
        if down is None or up is None:
            raise CheckpointError(f"the adapter on '{module}' has only one of its two matrices; copy the file again")
        if down.dim() != 2 or up.dim() != 2 or len(down) != up.shape[1]:
            raise CheckpointError(
                f"the adapter on '{module}' has matrices of {tuple(down.shape)} and {tuple(up.shape)}, which do not fit"
            )
        result[module] = (down, up)
    return result


def _scaled(up: Tensor, scale: float) -> Tensor:
    """scale · up, in float32 where its own precision would lose something."""
    product = up * scale
    is_exact = torch.equal(product / scale, up) if scale else True
    return product if is_exact else up.float() * scale


def _scaled_back(up: Tensor, down: Tensor, alpha: float) -> tuple[Tensor, float | None]:
    """`up` before alpha / r was multiplied in, with alpha; as it is where the quotient would be rounded."""
    scale = alpha / len(down)
    if math.frexp(scale)[0] != 0.5:  # no power of two
        return up, None
    quotient = up / scale
    narrow = quotient.to(down.dtype)
    return (narrow if torch.equal(narrow.to(quotient.dtype), quotient) else quotient), alpha
