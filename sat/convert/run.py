"""A whole conversion: find, read, write, read back, compare, publish."""

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from sat.cogvideox import presets
from sat.compat.diffusers_names import dit_from_diffusers, vae_to_diffusers
from sat.conditioning.image import released_image_scaling
from sat.config import ConfigNode, load_config, load_yaml
from sat.convert import adapter_checking, checking, descriptions, writing
from sat.convert.adapters import (
    Adapters,
    adapters_to_diffusers,
    adapters_to_kohya,
    adapters_to_sat,
    largest_difference,
    merge_adapters,
)
from sat.convert.companions import check_companions, companion_text, companion_vae
from sat.convert.models import (
    LEFTOVERS,
    Transformer,
    find_section,
    read_adapters,
    read_diffusers,
    read_files,
    read_transformer,
    read_vae,
    sizes_of_vae,
)
from sat.convert.places import Place, Places, Weights, find_places, find_vae
from sat.errors import CheckpointError, ConfigError
from sat.training.preset import CONFIGS, MODEL_YAML
from sat.weights.describe import listed
from sat.weights.lora import LORA_FILE, LoraFile
from sat.weights.survey import TEXT_ENCODER_FOLDER

log = logging.getLogger(__name__)

Layout = Literal["sat", "diffusers", "comfy"]
Nodes = Literal["core", "wrapper"]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
FILE_ENDINGS = (".safetensors", ".pt")
ADAPTER_FILES = {"sat": LORA_FILE, "comfy": LORA_FILE, "diffusers": "pytorch_lora_weights.safetensors"}


@dataclass(frozen=True, kw_only=True)
class Request:
    """What is to be converted, and how."""

    source: Path
    target: Path
    to: Layout
    base: Sequence[Path] = ()
    """YAML files with the model section, where nothing beside the weights describes them."""
    vae: Path | None = None
    text_encoder: Path | None = None
    weights: Weights = "auto"
    dtype: str | None = None
    merge: bool = False
    merge_base: Path | None = None
    """The model that adapters are folded into, where they come without one."""
    lora_alpha: float | None = None
    nodes: Nodes = "core"
    """ComfyUI's own nodes, or those of ComfyUI-CogVideoXWrapper."""
    check: checking.Check = "auto"


def convert(request: Request) -> list[str]:
    """Convert; returns what was written and how it was checked, in lines for people.

    The target appears whole, and only if all checks pass. Raises SatError.
    """
    # The target first: one that is there costs no reading.
    with writing.staged(request.target) as staging, ExitStack() as leases:
        if request.check != "none":
            checking.load_diffusers()
        places = find_places(request.source, leases, request.weights)
        log.info("%s holds %s", request.source, places.words())
        if places.transformer is None and places.vae is None:
            lines = _convert_adapters_alone(request, places, staging, leases)
        elif places.transformer is None:
            assert places.vae is not None
            lines = _convert_vae_alone(request, places.vae, staging)
        else:
            lines = _convert_model(request, places, staging, leases)
    return [f"wrote {request.target}", *lines]


# --- adapters --------------------------------------------------------------------------------------------------------


def _convert_adapters_alone(request: Request, places: Places, staging: Path, leases: ExitStack) -> list[str]:
    assert places.adapters is not None
    adapters = read_adapters(places.adapters, request.lora_alpha)
    if not request.merge:
        return _write_adapters(
            request, adapters, places.adapters.header().metadata.get("base_model", ""), None, staging
        )
    if request.merge_base is None:
        raise CheckpointError(
            f"{request.source} holds adapters without the model that they belong to; give it: --merge-lora BASE"
        )
    base = find_places(request.merge_base, leases)
    if base.transformer is None:
        raise CheckpointError(f"--merge-lora {request.merge_base} holds {base.words()}, no transformer to fold into")
    section = find_section(base.transformer, request.base)
    transformer = read_transformer(base.transformer, section)
    return _write_model(request, base, replace(transformer, adapters=adapters), staging, leases)


def _write_adapters(
    request: Request, adapters: Adapters, base_model: str, base: Transformer | None, staging: Path
) -> list[str]:
    """One file. base_model: what the adapters were trained on, in words, where that is known; base: its weights."""
    if request.dtype is not None:
        dtype = DTYPES[request.dtype]
        adapters = {name: replace(one, down=one.down.to(dtype), up=one.up.to(dtype)) for name, one in adapters.items()}
    file = _file_in(staging, ADAPTER_FILES[request.to])
    if request.to == "sat":
        state, alpha = adapters_to_sat(adapters)
        writing.write_sat_adapters(LoraFile(str(request.source), state, alpha, base_model), file)
    else:
        metadata = {"base_model": base_model} if base_model else {}
        if request.to == "diffusers":
            state, more = adapters_to_diffusers(adapters)
            metadata |= more
        else:
            state = adapters_to_kohya(adapters, request.nodes == "core")
        writing.write_adapters(state, metadata, file)
    with ExitStack() as leases:
        place = find_places(file, leases).adapters
        assert place is not None
        back = read_adapters(place)
    largest = largest_difference(adapters, back)
    ranks = sorted({adapter.rank for adapter in adapters.values()})
    scales = sorted({adapter.scale for adapter in adapters.values()})
    words = f"adapters on {len(adapters)} modules, rank {_numbers(ranks)}, scale alpha / rank = {_numbers(scales)}"
    if not largest <= checking.LIMIT:
        raise CheckpointError(f"the adapters that were written add something else, nothing was kept ({largest:.1e})")
    lines = [words, f"checked: what they add on random input, read back, float32: largest difference {largest:.1e}"]
    if request.check == "none":
        return [*lines, "not compared with diffusers' classes (--check none)"]
    # The file on the side that it is for, its source on the other.
    ours, others = (back, adapters) if request.to == "sat" else (adapters, back)
    theirs = read_files(place) if request.to == "diffusers" else adapters_to_diffusers(others)[0]
    found = adapter_checking.compare_adapters(ours, theirs, base, request.check)
    return [*lines, f"checked: {_judged([found])[0]}" if isinstance(found, checking.Difference) else found]


def _numbers(values: Sequence[float]) -> str:
    return ", ".join(f"{value:g}" for value in values)


# --- the VAE ---------------------------------------------------------------------------------------------------------


def _convert_vae_alone(request: Request, place: Place, staging: Path) -> list[str]:
    if request.merge:
        raise CheckpointError(f"{request.source} holds a VAE; there are no adapters to fold in")
    section = load_config(request.base)["model"] if request.base else None
    if request.to == "diffusers" and section is None:
        raise ConfigError(
            "the factor by which latents are scaled is not in a VAE's weights, and diffusers wants it in config.json; "
            "name the model that the VAE is for, as with --base configs/cogvideox_5b.yaml"
        )
    state = _cast(read_vae(place), request.dtype)
    sizes = sizes_of_vae(state, place.path)
    with writing.progress(writing.num_bytes(state)) as bar:
        if request.to == "sat":
            written = _file_in(staging, "3d-vae.pt")
            writing.write_sat_vae(state, written, bar)
        elif request.to == "diffusers":
            assert section is not None
            written = staging
            writing.write_diffusers_vae(state, sizes, section, written, bar)
        else:
            written = _file_in(staging, "vae.safetensors")
            writing.write_comfy_vae(state, len(sizes["ch_mult"]), written, bar)
    return _check_vae(request, state, sizes, section, written)


def _check_vae(
    request: Request, state: Mapping[str, Tensor], sizes: Mapping[str, Any], section: ConfigNode | None, written: Path
) -> list[str]:
    with ExitStack() as leases:
        back = read_vae(find_vae(written, leases))
    lines = [checking.compare_states(back, state, "the VAE")]
    if request.check != "none":
        theirs = vae_to_diffusers(back, len(sizes["ch_mult"]))
        lines += _judged(checking.compare_vaes(state, theirs, sizes, section))
    return [f"checked: {line}" for line in lines]


# --- a model ---------------------------------------------------------------------------------------------------------


def _convert_model(request: Request, places: Places, staging: Path, leases: ExitStack) -> list[str]:
    assert places.transformer is not None
    if request.merge_base is not None:
        raise CheckpointError(f"--merge-lora takes no BASE here: {request.source} holds its own transformer")
    section = find_section(places.transformer, request.base)
    transformer = read_transformer(places.transformer, section, request.lora_alpha)
    _check_reading(places.transformer, transformer)
    if request.merge and not transformer.adapters:
        raise CheckpointError(f"{request.source} holds no adapters to fold in; leave out --merge-lora")
    if transformer.adapters and not request.merge:
        log.info("these are adapters and the weights under them: writing the adapters (--merge-lora: the whole model)")
        shapes = {name: value.shape for name, value in transformer.state.items()}
        return _write_adapters(request, transformer.adapters, presets.describe_weights(shapes), transformer, staging)
    return _write_model(request, places, transformer, staging, leases)


def _check_reading(place: Place, transformer: Transformer) -> None:
    """What was read under other names than SAT's must be the same under those again."""
    if place.family != presets.TRANSFORMER:
        checking.compare_states(transformer.to_diffusers(), read_diffusers(place), str(place.path))


def _write_model(
    request: Request, places: Places, transformer: Transformer, staging: Path, leases: ExitStack
) -> list[str]:
    """The whole model of a transformer, with its adapters folded in, and the VAE and T5 that belong to it."""
    assert places.transformer is not None
    if transformer.adapters:
        merged = dit_from_diffusers(merge_adapters(transformer.to_diffusers(), transformer.adapters))
        log.info("folded %d adapters in", len(transformer.adapters))
        transformer = replace(transformer, state={**transformer.state, **merged}, adapters={})
    transformer = replace(transformer, state=_cast(transformer.state, request.dtype))
    vae = companion_vae(places, transformer.section, request.vae, leases)
    vae_state = None if vae is None else _cast(read_vae(vae), request.dtype)
    text = None if request.to == "comfy" else companion_text(places, transformer.section, request.text_encoder)
    check_companions(places.transformer, transformer.section, vae_state, text)
    total = writing.num_bytes(transformer.state) + (0 if vae_state is None else writing.num_bytes(vae_state))
    with writing.progress(total) as bar:
        return _WRITERS[request.to](_Job(request, transformer, vae_state, vae, text, staging, bar))


@dataclass(frozen=True)
class _Job:
    """What the writer of a layout works with."""

    request: Request
    transformer: Transformer
    vae: Mapping[str, Tensor] | None
    vae_place: Place | None
    text: tuple[Path, Path] | None
    staging: Path
    bar: Any

    def sizes(self) -> dict[str, Any]:
        assert self.vae is not None and self.vae_place is not None
        return sizes_of_vae(self.vae, self.vae_place.path)

    def lines(self, transformer: Path, vae: Path) -> list[str]:
        """How all that was written is checked."""
        section = self.transformer.section
        kind = presets.transformer_kind({name: value.shape for name, value in self.transformer.state.items()})
        precisions = sorted({str(value.dtype).removeprefix("torch.") for value in self.transformer.state.values()})
        numbers = sum(value.numel() for value in self.transformer.state.values())
        words = f"transformer: {kind}, {numbers:,} numbers, {', '.join(precisions)}"
        lines = [words, *_check_transformer(self.request, self.transformer, transformer)]
        if self.vae is not None:
            lines += _check_vae(self.request, self.vae, self.sizes(), section, vae)
        return lines


def _write_sat(job: _Job) -> list[str]:
    tree = job.staging
    writing.write_sat_transformer(job.transformer, tree / "transformer", job.bar)
    if job.vae is not None:
        writing.write_sat_vae(job.vae, tree / "vae" / "3d-vae.pt", job.bar)
    if job.text is not None:
        writing.write_sat_text_encoder(*job.text, tree / TEXT_ENCODER_FOLDER, job.bar)
    kind = presets.transformer_kind({name: value.shape for name, value in job.transformer.state.items()})
    lines = job.lines(tree / "transformer", tree / "vae" / "3d-vae.pt")
    return [*lines, *_describe_tree(job, kind), *_scaling_line(job.transformer.section)]


def _describe_tree(job: _Job, kind: presets.TransformerKind | None) -> list[str]:
    """Write the model section of a tree that no released YAML describes, which is a line for people."""
    section, target = job.transformer.section, job.request.target
    released, words = ConfigNode(), "no released size"
    if kind is not None and kind.preset is not None and kind.has_released_size:
        released = load_yaml(CONFIGS / kind.preset.config)
        own = descriptions.differences(section, released["model"])
        if not own:
            return []
        words = f"not as {kind.preset.config} in {listed(own)}"
    writing.write_model_yaml(section, released, target.absolute(), job.staging / MODEL_YAML)
    return [f"{words}: {target / MODEL_YAML} describes it; args.load of this folder finds that, or give it as --base"]


def _scaling_line(section: Mapping[str, Any]) -> list[str]:
    """A line where the latents of a condition image are not scaled as the released configuration says."""
    own, usual = descriptions.image_scaling(section), released_image_scaling(descriptions.patch_of(section)[0])
    if not descriptions.takes_image(section) or own == usual:
        return []
    return [f"the image's latents are scaled with image_scaling: {own}; the released configuration says {usual}"]


def _write_diffusers(job: _Job) -> list[str]:
    folder = job.staging
    writing.write_diffusers_transformer(job.transformer, folder / "transformer", job.bar)
    if job.vae is not None:
        writing.write_diffusers_vae(job.vae, job.sizes(), job.transformer.section, folder / "vae", job.bar)
    if job.text is not None:
        writing.write_diffusers_text_encoder(*job.text, folder, job.bar)
    writing.write_pipeline(job.transformer, folder)
    missing = [name for name, part in (("a VAE (--vae)", job.vae), ("T5 (--t5)", job.text)) if part is None]
    lines = job.lines(folder / "transformer", folder / "vae")
    section = job.transformer.section
    if descriptions.takes_image(section) and descriptions.image_scaling(section) == "none":
        lines.append(
            f"not the same in diffusers: it divides the image's latents by {descriptions.scale_factor(section):g}, as "
            "with its released files of 1.5; this model's configuration leaves them as they are (image_scaling: none, "
            f"which {LEFTOVERS} keeps for the way back)"
        )
    if missing:
        lines.append(f"without {' and '.join(missing)}: pass them to from_pretrained, or convert again with them")
    return lines


def _write_comfy(job: _Job) -> list[str]:
    has_comfy_names, name = job.request.nodes == "core", job.request.target.stem
    file, vae = job.staging, job.staging
    if not _is_file(job.request.target):
        file = job.staging / "diffusion_models" / f"{name}.safetensors"
        vae = job.staging / "vae" / f"{name}_vae.safetensors"
    elif job.vae is not None:
        job = replace(job, vae=None)
        log.info("the target is one file: without the VAE")
    writing.write_comfy_transformer(job.transformer, file, has_comfy_names, job.bar)
    if job.vae is not None:
        writing.write_comfy_vae(job.vae, len(job.sizes()["ch_mult"]), vae, job.bar)
    if has_comfy_names and descriptions.patch_of(job.transformer.section)[0] == 1:
        log.warning(
            "ComfyUI's own nodes give models of release 1.0 other positions than those they were trained with, as read "
            "in their code; --nodes wrapper writes for ComfyUI-CogVideoXWrapper (docs/conversion.md)"
        )
    return [*job.lines(file, vae), *_scaling_line(job.transformer.section)]


_WRITERS: Mapping[Layout, Callable[[_Job], list[str]]] = {
    "sat": _write_sat,
    "diffusers": _write_diffusers,
    "comfy": _write_comfy,
}


def _check_transformer(request: Request, transformer: Transformer, written: Path) -> list[str]:
    with ExitStack() as leases:
        place = find_places(written, leases).transformer
    assert place is not None
    theirs = transformer.to_diffusers()
    if place.family == presets.TRANSFORMER:
        back, expected = read_transformer(place, transformer.section).to_file(), transformer.to_file()
    else:
        expected = theirs
        back = theirs = read_diffusers(place)
    lines = [checking.compare_states(back, expected, "the transformer")]
    del back, expected
    num_layers = checking.num_layers_to_run(transformer, request.check)
    if num_layers == 0:
        return [*(f"checked: {line}" for line in lines), "not compared with diffusers' classes (--check none)"]
    positions = checking.compare_positions(transformer)
    if positions is not None:
        positions.check(max(checking.LIMIT, torch.finfo(_precision(transformer)).eps))
        lines.append(str(positions))
    lines += _judged(checking.compare_transformers(transformer, theirs, num_layers))
    return [f"checked: {line}" for line in lines]


def _precision(transformer: Transformer) -> torch.dtype:
    return transformer.state["mixins.patch_embed.proj.bias"].dtype


def _judged(differences: Sequence[checking.Difference]) -> list[str]:
    for difference in differences:
        difference.check()
    return [str(difference) for difference in differences]


def _is_file(path: Path) -> bool:
    """Whether a target that is not there yet is to be a file."""
    return path.suffix in FILE_ENDINGS


def _file_in(staging: Path, name: str) -> Path:
    return staging if _is_file(staging) else staging / name


def _cast(state: Mapping[str, Tensor], dtype: str | None) -> dict[str, Tensor]:
    """Floating-point tensors in another precision."""
    if dtype is None:
        return dict(state)
    return {name: value.to(DTYPES[dtype]) if value.is_floating_point() else value for name, value in state.items()}
