"""The end of a conversion of adapters: both systems' transformers run with them, on random input.

The base is the model that comes with them, or one of random weights and their width. Of many layers, the first adapted
ones are run.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from importlib.util import find_spec
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from sat.cogvideox.presets import PRESETS
from sat.compat.diffusers_names import dit_from_diffusers
from sat.config import load_yaml
from sat.convert import checking
from sat.convert.adapters import Adapters, adapters_to_sat, merge_adapters
from sat.convert.models import Transformer
from sat.errors import CheckpointError
from sat.model.finetune.lora2 import Adapter, wrap
from sat.training.fit import build_on_meta
from sat.training.preset import CONFIGS
from sat.weights.lora import LoraFile

LAYER = re.compile(r"transformer_blocks\.(\d+)\.(.*)")
HEAD_DIMS = (64, 32, 16)
"""Of random bases: the released one, or a smaller one where that does not divide the width."""
WIDTHS = {"attn1.to_q": 1, "attn1.to_k": 1, "attn1.to_v": 1, "attn1.to_out.0": 1, "ff.net.0.proj": 1}
"""Modules of a layer whose inputs are as wide as the transformer."""


def compare_adapters(
    ours: Adapters, theirs: Mapping[str, Tensor], base: Transformer | None, check: checking.Check
) -> str | checking.Difference:
    """Our transformer with the adapters `ours`, and CogVideoXTransformer3DModel with `theirs` loaded.

    theirs: the state dict of a file for `load_lora_weights`. base: the model under the adapters, where there is one.
    Returns a line that says why, where it cannot be run. Raises CheckpointError where diffusers takes not all of them.
    """
    if find_spec("peft") is None:
        return "not run through diffusers' transformer with the adapters loaded: that needs pip install peft"
    width = _width(ours)
    head_dim = next((size for size in HEAD_DIMS if width % size == 0), None)
    if base is None and head_dim is None:
        return f"not run through both transformers: nothing says what model the adapters are for (width {width})"
    numbers = sorted({int(match[1]) for name in ours if (match := LAYER.match(name))})
    num_layers = min(_num_layers(check, width, len(numbers)), len(numbers))
    kept = {number: place for place, number in enumerate(numbers[:num_layers])}
    base = base or random_base(ours, width, width // (head_dim or 1), max(num_layers, 1))
    weights = base.to_diffusers()
    modules = {name: placed for name in ours if (placed := _placed(name, kept)) and _fits(ours, name, weights, placed)}
    if not modules:
        return "not run through both transformers: no adapter fits the base"
    own = {placed: ours[name] for name, placed in modules.items()}
    state = {
        f"transformer.{modules[module]}{name.removeprefix(f'transformer.{module}')}": value.float()
        for name, value in theirs.items()
        if (module := name.removeprefix("transformer.").partition(".lora_")[0]) in modules
    }
    num_layers = max(num_layers, 1)
    expected = checking.run_theirs(base.section, weights, num_layers, lambda network: _load(network, state, len(own)))
    epsilon = checking.EPSILON["diffusers"]
    try:
        lora = LoraFile("the adapters", *adapters_to_sat(own), "")
    except CheckpointError:  # some sit on modules that have no adapters in SAT: folded in
        folded = {**base.state, **dit_from_diffusers(merge_adapters(_whole(weights), own))}
        output = checking.run_ours(replace(base, state=folded), num_layers, epsilon)
    else:
        output = checking.run_ours(base, num_layers, epsilon, lambda network: _attach(network, lora))
    what = f"our transformer and diffusers' with the adapters loaded, {len(own)} of {len(ours)} modules, float32"
    return checking.difference(what, output, expected)


def _width(adapters: Adapters) -> int:
    """Hidden size of the model that adapters are for, by the modules whose inputs or outputs are that wide."""
    for name, adapter in adapters.items():
        part = match[2] if (match := LAYER.match(name)) else ""
        if part in WIDTHS:
            return adapter.down.shape[1]
        if part == "ff.net.2":
            return len(adapter.up)
    return 0


def _num_layers(check: checking.Check, width: int, adapted: int) -> int:
    if isinstance(check, int):
        return check
    is_small = adapted * 16 * width**2 <= checking.AUTO_NUMBERS  # 16 d²: about a layer's weights
    return adapted if check == "all" or is_small else checking.AUTO_LAYERS


def _placed(name: str, kept: Mapping[int, int]) -> str | None:
    """A module's name where the layers that are run stand side by side; None for those of the others."""
    match = LAYER.match(name)
    if match is None:
        return name
    place = kept.get(int(match[1]))
    return None if place is None else f"transformer_blocks.{place}.{match[2]}"


def _fits(adapters: Adapters, name: str, weights: Mapping[str, Tensor], placed: str) -> bool:
    weight = weights.get(f"{placed}.weight")
    sizes = (len(adapters[name].up), adapters[name].down.shape[1])
    return weight is not None and sizes == (len(weight), prod(weight.shape[1:]))


def random_base(adapters: Iterable[str], width: int, num_heads: int, num_layers: int) -> Transformer:
    """A transformer of the width that adapters have, with random numbers in every weight."""
    has_ofs = any(name.startswith("ofs_embedding") for name in adapters)
    preset = next((one for one in PRESETS if one.hidden_size == width), PRESETS[1]) if not has_ofs else PRESETS[-1]
    section = load_yaml(CONFIGS / preset.config)["model"]
    params: Any = section["network_config"]["params"]
    params.update(hidden_size=width, num_attention_heads=num_heads, num_layers=num_layers)
    positions = params["modules"]["pos_embed_config"]["params"]
    if "hidden_size_head" in positions:
        positions["hidden_size_head"] = width // num_heads
    network = build_on_meta(section["network_config"])
    assert network is not None  # parts of this project's own
    generator = torch.Generator().manual_seed(0)
    state = {
        name: torch.randn(value.shape, generator=generator) / max(value.shape[-1], 1) ** 0.5
        for name, value in network.state_dict().items()
    }
    return Transformer(state, section)


def _whole(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.float() for name, value in weights.items()}


def _attach(network: nn.Module, lora: LoraFile) -> None:
    for name, matrices in lora.projections().items():
        wrapped = wrap(network, name, [Adapter(0, lora.rank, lora.alpha / lora.rank)])
        wrapped.fill({key: value.float() for key, value in matrices.items()})


def _load(network: Any, state: Mapping[str, Tensor], count: int) -> None:
    """As `load_lora_weights` of diffusers' pipelines does, which passes over what it does not know."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    network.load_lora_adapter(dict(state), prefix="transformer")
    found = sum(isinstance(module, BaseTunerLayer) for module in network.modules())
    if found != count:
        raise CheckpointError(f"diffusers loads adapters on {found} modules; the file has {count}")
