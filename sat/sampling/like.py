"""`--like sat` and `--like diffusers`: every knob in which the two systems sample the same weights differently.

The table is the documentation: what each does, and the key of the `model:` section that makes ours do the same. Where
there is no key, the knob is named all the same, with what happens here.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import yaml

from sat.config import ConfigNode

System = Literal["sat", "diffusers"]
SYSTEMS: tuple[System, ...] = ("sat", "diffusers")

VIDEO = ("1.0", "1.5")
GUIDER = "sampler_config.params.guider_config"
CONSTANT_GUIDANCE = "sgm.modules.diffusionmodules.guiders.VanillaCFG"


@dataclass(frozen=True)
class Knob:
    """One difference."""

    name: str
    sat: str
    """What SAT's sample_video.py does, with the released YAML files."""
    diffusers: str
    """What diffusers' pipelines do by default."""
    here: str = ""
    """What happens here, where no key sets it."""
    models: Sequence[str] = VIDEO
    """The kinds of model that have it, see `kind_of`."""
    key: str = ""
    """Key of the model section; its first two parts must be there for it to be set."""
    sat_value: Any = None
    diffusers_value: Any = None
    """Values for the key; None: that system's way cannot be set."""
    of_target: str = ""
    """What the name of the target ends with whose parameter the key is, where others stand in the same place."""
    of_images: bool = False
    """Whether only models have it that continue images."""


KNOBS = (
    Knob(
        name="unconditional branch of guidance",
        sat="text states of zeros",
        diffusers="text states of the empty prompt",
        key="conditioner_config.params.unconditional",
        sat_value="zero",
        diffusers_value="empty_prompt",
    ),
    Knob(
        name="noise levels",
        sat="rescaled among the chosen steps; the clean estimate snaps to the nearest of the 1000 training levels",
        diffusers="training levels, so that nothing snaps",
        models=(*VIDEO, "image"),
        key="sampler_config.params.discretization_config.params.levels",
        sat_value="steps",
        diffusers_value="table",
    ),
    Knob(
        name="timesteps",
        sat="floor of an even spacing",
        diffusers="rounded, and a step leads to timestep - 1000 // num_steps, which need not be the next one",
        here="as SAT; the two agree where num_steps divides 1000",
        models=(*VIDEO, "image"),
    ),
    Knob(
        name="guidance over the steps",
        sat="as sampler_config says; the released files have DynamicCFG, whose scale follows the training timestep",
        diffusers="constant, unless use_dynamic_cfg=True, which is DynamicCFG",
        here="as sampler_config says",
        key=GUIDER,
        sat_value="schedule released",
        diffusers_value="constant",
    ),
    Knob(
        name="sampler",
        sat="as sampler_config says; the released files have SDE-DPM-Solver++(2M)",
        diffusers="the folder's scheduler: DDIM, or SDE-DPM-Solver++(2M) where a script asks for it",
        here="as sampler_config says; VideoDDIMSampler and VPSDEDPMPP2MSampler are the two",
    ),
    Knob(
        name="epsilon of the final modulated norm",
        sat="1e-6",
        diffusers="1e-5",
        key="network_config.params.modules.final_layer_config.params.eps",
        sat_value=1e-6,
        diffusers_value=1e-5,
    ),
    Knob(
        name="norm after the last layer",
        sat="LayerNorm without weights, then the final modulated norm",
        diffusers="the final modulated norm alone",
        models=("image",),
        key="network_config.params.transformer_args.use_final_layernorm",
        sat_value=True,
        diffusers_value=False,
    ),
    Knob(
        name="rotary positions at another size than 480x720",
        sat="the front of a larger table: positions keep their unit",
        diffusers="stretched over the trained range",
        models=("1.0",),
        key="network_config.params.modules.pos_embed_config.params.positions",
        sat_value="slice",
        diffusers_value="interpolate",
        of_target="Rotary3DPositionEmbeddingMixin",
    ),
    Knob(
        name="fixed sin-cos positions (2B) at another size",
        sat="the first rows of the stored table, whatever the grid",
        diffusers="computed for the grid",
        here="as diffusers, with a warning",
        models=("1.0",),
    ),
    Knob(
        name="padding latent of an odd number of latent frames",
        sat="counted in sampling_num_frames (22 for 81 frames), dropped before decoding",
        diffusers="added by the pipeline, dropped before decoding",
        here="added and taken off within sampling; sampling_num_frames counts it, num_frames speaks of the video",
        models=("1.5",),
    ),
    Knob(
        name="scale of the image's latents",
        sat="none: as the VAE gives them",
        diffusers="divided by the scale factor (invert_scale_latents)",
        models=("1.5",),
        key="image_scaling",
        sat_value="none",
        diffusers_value="divide",
        of_images=True,
    ),
    Knob(
        name="latents of the image",
        sat="drawn from the VAE's posterior",
        diffusers="drawn from the VAE's posterior",
        here="its mean: nothing is drawn",
        of_images=True,
    ),
    Knob(
        name="chunks of the VAE's decoder",
        sat="ten at most, the clip's first frame treated like all others",
        diffusers="3, 2, 2, ... latents, the clip's first frame apart",
        here="as first_stage_config.params.decode_preset says; main_intended by default, with the first frame apart",
        models=("1.5",),
        key="first_stage_config.params.decode_preset",
        sat_value="main_shipped",
    ),
    Knob(
        name="text tokens",
        sat="224",
        diffusers="226",
        here="as the encoder's max_length and pos_embed_config's text_length say",
        models=("1.5",),
    ),
    Knob(
        name="precision of the latents between steps",
        sat="float32",
        diffusers="the weights' own",
        here="float32",
        models=(*VIDEO, "image"),
    ),
    Knob(
        name="random numbers",
        sat="one stream for the whole process; SDE steps draw twice and use the second draw",
        diffusers="the generator that is passed; SDE steps draw twice, too",
        here="a stream for each (seed, prompt number); args.initial_noise takes the first noise from a file",
        models=(*VIDEO, "image"),
    ),
)


def kind_of(model: Mapping[str, Any]) -> str:
    """`image` for CogView3-Plus, `1.5` for a video model with a patch in time, else `1.0`."""
    network = model.get("network_config") or {}
    if str(network.get("target", "")).endswith(("dit.DiffusionTransformer", "CogView3PlusTransformer")):
        return "image"
    patch_size = (network.get("params") or {}).get("patch_size", 2)
    return "1.5" if isinstance(patch_size, Sequence) and patch_size[0] > 1 else "1.0"


def overrides_like(config: ConfigNode, system: System) -> tuple[list[str], list[str]]:
    """What makes a configuration sample like another system: `key=value` words, and the list of knobs for people."""
    words, lines = [], [f"sampling like {system}; the two systems differ in:"]
    for knob in KNOBS:
        if kind_of(config["model"]) not in knob.models:
            continue
        if knob.of_images and not config["model"].get("noised_image_input"):
            continue
        own = _words(knob, config["model"], system)
        words.extend(own)
        done = f"set {', '.join(own)}" if own else knob.here or "nothing to set: the configuration lacks that part"
        lines.append(f"  {knob.name}\n    sat: {knob.sat}\n    diffusers: {knob.diffusers}\n    here: {done}")
    return words, lines


def _words(knob: Knob, model: Mapping[str, Any], system: System) -> list[str]:
    value = knob.sat_value if system == "sat" else knob.diffusers_value
    is_there = knob.of_images or model.get(knob.key.split(".")[0]) is not None
    if value is None or not is_there or not _target_of(knob, model).endswith(knob.of_target):
        return []
    if knob.key == GUIDER:
        return _guider_words(model, system)
    return [f"model.{knob.key}={yaml.safe_dump(value).split()[0]}"]


def _target_of(knob: Knob, model: Mapping[str, Any]) -> str:
    """The target whose parameter a knob's key is."""
    node: Any = model
    for key in knob.key.split(".")[:-2]:
        node = node.get(key) or {}
    return str(node.get("target", ""))


def _guider_words(model: Mapping[str, Any], system: System) -> list[str]:
    """For SAT the released form of a dynamic guider; for diffusers a constant scale in its place."""
    guider = model["sampler_config"]["params"].get("guider_config") or {}
    if not str(guider.get("target", "")).endswith("DynamicCFG"):
        return []
    if system == "sat":
        return [f"model.{GUIDER}.params.schedule=released"]
    kept = {key: value for key, value in guider["params"].items() if key in ("scale", "two_passes")}
    built = {"target": CONSTANT_GUIDANCE, "params": kept}
    return [f"model.{GUIDER}={yaml.safe_dump(built, default_flow_style=True, width=1000).strip()}"]
