"""What weights are, by the names and shapes in their header: the model, its size, the configuration that fits."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

from sat.cogvideox import presets
from sat.compat.comfy_names import comfy_to_diffusers
from sat.compat.file_types import describe_vae
from sat.compat.lora_names import LORA_DOWN, LORA_UP
from sat.compat.sat_names import LEGACY_CLASSES
from sat.errors import CheckpointError
from sat.weights.headers import Header

CONFIGS = Path("configs")
RELEASED_VAE = "ch 128, ch_mult [1, 2, 2, 4], num_res_blocks 3, z_channels 16"
LAYER = re.compile(r"(.*?(?:layers|blocks|block|list|modulations)\.)(\d+)(\..*)")
"""A name within one of several equal layers: stem, number, rest."""
REQUIRED = (
    "time_embed.0.weight",
    "time_embed.2.weight",
    "mixins.patch_embed.text_proj.weight",
    "mixins.final_layer.linear.weight",
    "mixins.final_layer.adaLN_modulation.1.weight",
)
"""Weights outside the layers that every CogVideoX transformer has."""
REQUIRED_OF_DIFFUSERS = (
    "time_embedding.linear_1.weight",
    "time_embedding.linear_2.weight",
    "patch_embed.proj.weight",
    "patch_embed.text_proj.weight",
    "norm_out.linear.weight",
    "proj_out.weight",
)
"""The same under diffusers' names."""
REQUIRED_OF_VAE = tuple(f"{half}.conv_{end}.conv.weight" for half in ("encoder", "decoder") for end in ("in", "out"))
"""Weights of diffusers' VAE at the ends of its halves."""
OF_HIDDEN_SIZE = re.compile(
    r"query_key_value|attention\.dense|to_[qkv]\b|to_out[._]0|attn_out|blocks[._]\d+[._][qkv]\b"
)
"""Modules whose inputs are as wide as the transformer."""
NO_ALPHA = (
    "it does not say its alpha, without which its strength is unknown and --lora refuses it; "
    "tools/convert.py IT DST --to sat --lora-alpha X writes it in"
)
"""The one thing wrong with adapters that converting them mends."""
DOWN = re.compile(r"\.matrix_A\.0$|[._]lora[_.](?:A|down)\.")
"""What stands behind a module's name in that of the matrix which reduces to the rank."""
HALVES = ((".matrix_A.", ".matrix_B."), *zip(LORA_DOWN, LORA_UP))
"""What the names of an adapter's two matrices differ in."""


@dataclass
class Finding:
    """What a path is."""

    path: Path
    what: str
    facts: list[str] = field(default_factory=list)
    config: str | None = None
    """The model YAML that fits."""
    preset: presets.Preset | None = None
    """The released transformer, or the one of the same form."""
    problem: str | None = None
    parts: list["Finding"] = field(default_factory=list)

    def problems(self) -> list[tuple[Path, str]]:
        """All that is wrong, outermost first: (where, what)."""
        own = [(self.path, self.problem)] if self.problem else []
        return [*own, *(found for part in self.parts for found in part.problems())]

    def lines(self, indent: str = "") -> list[str]:
        """The finding in lines for people."""
        lines = [f"{indent}{self.path.name or self.path}: {self.what}"]
        if self.facts:
            lines.append(f"{indent}  {'; '.join(self.facts)}")
        if self.config is not None:
            lines.append(f"{indent}  fits {self.config}")
        for part in self.parts:
            lines += part.lines(f"{indent}  ")
        return lines


def describe(path: Path, header: Header, config: Mapping[str, Any] | None = None) -> Finding:
    """What the names and shapes in a file say. config: the diffusers config.json that lies beside it."""
    shapes = header.shapes
    family = presets.family_of(shapes)
    finding = Finding(path, family or "a file of tensors of no known model", facts=_counts(header))
    if family == presets.TRANSFORMER:
        _describe_transformer(finding, header)
    elif family == presets.VAE:
        _describe_vae(finding, header)
    elif family == presets.DIFFUSERS_TRANSFORMER:
        finding.facts.append("tools/fetch_weights.py NAME --from its folder makes SAT's files of it")
        _describe_diffusers(finding, header.shapes, "diffusers'", config or {})
    elif family == presets.DIFFUSERS_VAE:
        finding.facts.append("tools/fetch_weights.py NAME --from its folder makes SAT's files of it")
        missing = [name for name in REQUIRED_OF_VAE if name not in shapes]
        finding.problem = f"it lacks {listed(missing)}" if missing else None
    elif family == presets.COMFY_TRANSFORMER:
        finding.facts.append("tools/convert.py gives it SAT's or diffusers' names")
        _describe_comfy(finding, shapes)
    elif family in (presets.ADAPTERS, presets.DIFFUSERS_ADAPTERS):
        _describe_adapters(finding, family, header)
    elif family == presets.TEXT_ENCODER:
        _describe_text_encoder(finding, shapes)
    elif family == presets.CORE_MODEL:
        _describe_core(finding, shapes)
    elif family is None:
        finding.facts.append(f"names such as {listed(list(shapes))}")
        finding.problem = "it holds no weights of a kind known here" if shapes else "it holds no tensors"
    refused = sorted(header.classes - LEGACY_CLASSES)
    if refused:
        finding.problem = (
            f"it asks to load {', '.join(refused)}, neither a tensor nor known from SAT's checkpoints: it is refused"
        )
    return finding


def _counts(header: Header) -> list[str]:
    kinds = sorted({info.dtype for info in header.tensors.values()})
    facts = [f"{len(header.tensors):,} tensors, {sum(map(prod, header.shapes.values())):,} numbers"]
    facts += [", ".join(kinds)] if kinds else []
    if header.entries:
        facts.append(f"a training checkpoint: also {listed(header.entries)}")
    return facts


def _describe_transformer(finding: Finding, header: Header) -> None:
    kind = presets.transformer_kind(header.shapes)
    assert kind is not None  # the family says so
    finding.what = str(kind)
    finding.preset = kind.preset
    if kind.has_lora:
        finding.facts.append(_adapters(header))
    switches = (
        ("mixins.swiglu.", "SwiGLU"),
        (".third_layernorm.", "sandwich norms"),
        ("label_emb.", "vector condition"),
    )
    finding.facts += [word for part, word in switches if any(part in name for name in header.tensors)]
    if kind.preset is not None and kind.has_released_size:
        finding.config = str(CONFIGS / kind.preset.config)
    missing = _uneven_layers(header.tensors)
    missing += [name for name in REQUIRED if not any(own.endswith(name) for own in header.tensors)]
    if missing:
        finding.problem = f"it lacks {listed(missing)}"


def _describe_vae(finding: Finding, header: Header) -> None:
    own = {name.removeprefix("first_stage_model."): shape for name, shape in header.shapes.items()}
    options = describe_vae(own)
    if options is None:
        finding.problem = "half of the VAE is missing: it needs encoder.* and decoder.*"
        return
    finding.what = f"{presets.VAE}, the released one" if options == RELEASED_VAE else f"{presets.VAE}: {options}"
    if options == RELEASED_VAE:
        finding.config = f"first_stage_config of every {CONFIGS / 'cogvideox*.yaml'}"
    losses = sum(name.startswith("loss.") for name in own)
    if losses:
        finding.facts.append(f"{losses} weights of its training loss (ignore_keys: ['loss'])")


def _describe_comfy(finding: Finding, shapes: presets.Shapes) -> None:
    try:
        theirs = comfy_to_diffusers(shapes)
    except CheckpointError as error:
        finding.problem = str(error)
        return
    _describe_diffusers(finding, theirs, "ComfyUI's", {})
    if finding.problem is not None:
        finding.problem += " (under diffusers' names)"


def _describe_diffusers(finding: Finding, shapes: presets.Shapes, whose: str, config: Mapping[str, Any]) -> None:
    """A transformer under diffusers' names, whose own names may be another's."""
    preset = diffusers_preset(shapes, config)
    size = (
        shapes.get("patch_embed.proj.weight", (0,))[0],
        presets.count_layers(shapes, r"transformer_blocks\.(\d+)\."),
    )
    finding.preset = preset
    if preset is not None and size == (preset.hidden_size, preset.num_layers):
        finding.what = f"{preset.name} under {whose} names"
        finding.config = str(CONFIGS / preset.config)
    elif preset is not None:
        finding.what = f"a transformer in the form of {preset.name} under {whose} names"
    missing = _uneven_layers(shapes)
    if not any(name.startswith("time_condition_embed.") for name in shapes):  # CogView3-Plus
        missing += [name for name in REQUIRED_OF_DIFFUSERS if name not in shapes]
    layers = config.get("num_layers", size[1])
    if missing or layers != size[1]:
        finding.problem = f"it lacks {listed(missing) if missing else f'{layers - size[1]} of {layers} layers'}"


def diffusers_preset(shapes: presets.Shapes, config: Mapping[str, Any]) -> presets.Preset | None:
    """The released model, or the one of the same form, of a transformer under diffusers' names.

    Fixed positions leave no trace in the weights: whether they are rotary, config.json says; without it, the width.
    """
    kernel, head = shapes.get("patch_embed.proj.weight"), shapes.get("proj_out.weight")
    if kernel is None or head is None:
        return None
    is_rotary = config.get("use_rotary_positional_embeddings", kernel[0] != presets.PRESETS[0].hidden_size)
    has_table = "patch_embed.pos_embedding" in shapes or not is_rotary
    return presets.find_preset(prod(kernel[1:]), head[0], has_table, "ofs_embedding.linear_1.weight" in shapes)


def _describe_text_encoder(finding: Finding, shapes: presets.Shapes) -> None:
    layers = presets.count_layers(shapes, r"encoder\.block\.(\d+)\.")
    table = shapes.get("shared.weight") or shapes.get("encoder.embed_tokens.weight") or (0, 0)
    size = f"{layers} layers of width {table[1]}, {table[0]:,} pieces"
    is_released = (layers, table[1]) == (24, 4096)
    finding.what = f"{presets.TEXT_ENCODER}{' v1.1 XXL, as released' if is_released else ''}"
    finding.facts.append(size)
    missing = _uneven_layers(name for name in shapes if "relative_attention_bias" not in name)
    if missing:
        finding.problem = f"it lacks {listed(missing)}"


def _describe_core(finding: Finding, shapes: presets.Shapes) -> None:
    layers = max(int(match[1]) for name in shapes if (match := re.search(r"transformer\.layers\.(\d+)\.", name))) + 1
    mixins = sorted({match[1] for name in shapes if (match := re.search(r"mixins\.([^.]+)\.", name))})
    finding.facts.append(f"{layers} layers")
    finding.facts += [f"mixins {', '.join(mixins)}"] if mixins else []


def _describe_adapters(finding: Finding, family: str, header: Header) -> None:
    """Adapters alone: what they are for, by the file's own word or by their widths and layers; halves of them."""
    finding.facts.append(_adapters(header))
    named = [one for one in presets.PRESETS if header.metadata.get("base_model", "").split(" with ")[0] == one.name]
    fitting = named or _bases(header.shapes)
    if fitting:
        finding.facts.append(f"for {' or '.join(one.name for one in fitting)}")
        finding.config = " or ".join(str(CONFIGS / one.config) for one in fitting)
    if len(fitting) == 1:
        finding.preset = fitting[0]
    missing = _missing_halves(header.shapes)
    if missing:
        finding.problem = f"it lacks {listed(missing)}: an adapter has two matrices"
    elif family == presets.ADAPTERS and "alpha" not in header.metadata:
        finding.problem = NO_ALPHA


def _bases(shapes: presets.Shapes) -> list[presets.Preset]:
    """The released models whose width and depth adapters fit."""
    widths = {
        shape[1] for name, shape in shapes.items() if DOWN.search(name) and OF_HIDDEN_SIZE.search(DOWN.split(name)[0])
    }
    layers = [int(match[1]) for name in shapes if (match := re.search(r"(?:layers|blocks)[._](\d+)[._]", name))]
    return [one for one in presets.PRESETS if widths == {one.hidden_size} and max(layers, default=-1) < one.num_layers]


def _missing_halves(names: Iterable[str]) -> list[str]:
    """Matrices whose other half is there; names differ in one word only."""
    names = set(names)
    others = {one: other for pair in HALVES for one, other in (pair, pair[::-1])}
    wanted = [name.replace(own, other) for name in names for own, other in others.items() if own in name]
    return sorted(set(wanted) - names)


def _adapters(header: Header) -> str:
    shapes = header.shapes
    down = [shape[0] for name, shape in shapes.items() if DOWN.search(name)]
    ranks = ", ".join(map(str, sorted(set(down))))
    own = [f"{key} {header.metadata[key]}" for key in ("alpha", "targets", "base_model") if header.metadata.get(key)]
    return ", ".join([f"LoRA of rank {ranks} on {len(down)} modules", *own])


def _uneven_layers(names: Iterable[str]) -> list[str]:
    """Names that some layers have and others lack; adapters may be on some layers only."""
    found: dict[str, dict[str, set[int]]] = {}
    for name in names:
        match = LAYER.match(name.replace(".original.", "."))
        if match and "matrix_" not in name:
            found.setdefault(match[1], {}).setdefault(match[3], set()).add(int(match[2]))
    missing = []
    for stem, rests in found.items():
        wanted = range(max(max(numbers) for numbers in rests.values()) + 1)
        missing += [f"{stem}{n}{rest}" for rest, numbers in rests.items() for n in wanted if n not in numbers]
    return missing


def listed(names: Sequence[str], most: int = 4) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return (", ".join(names[:most]) or "nothing") + more
