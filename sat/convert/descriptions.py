"""One model described twice: SAT's `model:` section, and the JSON files of a diffusers folder.

The section is the one that everything else is made from. Where only diffusers' files are there, it is the YAML of the
released model of the same form with their numbers in it.
"""

from collections.abc import Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

from sat.cogvideox.presets import PRESETS, Preset
from sat.conditioning.image import released_image_scaling
from sat.config import ConfigNode, load_yaml
from sat.errors import ConfigError

PIPELINES = {False: "CogVideoXPipeline", True: "CogVideoXImageToVideoPipeline"}
"""Whether a model takes an image -> diffusers' class for it."""

SCHEDULERS = {"VideoDDIMSampler": "CogVideoXDDIMScheduler", "VPSDEDPMPP2MSampler": "CogVideoXDPMScheduler"}
"""Samplers that diffusers has, and its class for each; DDIM stands for the others."""

ROTARY = "dit_video_concat.Rotary3DPositionEmbeddingMixin"
SINCOS = "dit_video_concat.Basic3DPositionEmbeddingMixin"
DIFFUSERS_STRETCH = 1.875
"""spatial_interpolation_scale in all of diffusers' files. Rotary models read it only where a learned table has other
frames than the clip, and a fixed one takes its place."""

NORM_GROUPS = 32
"""Of the released VAE's norms."""
PLACES = ("ckpt_path", "model_dir")
"""Parameters that say where files are, not what a model is."""

# What diffusers' transformer cannot be told, with the value that it has: (place in params, value).
_FIXED = (
    (("use_SwiGLU",), False),
    (("use_RMSNorm",), False),
    (("elementwise_affine",), True),
    (("num_classes",), None),
    (("transformer_args", "layernorm_order"), "pre"),
    (("transformer_args", "use_final_layernorm"), True),
    (("modules", "adaln_layer_config", "params", "qk_ln"), True),
    (("modules", "pos_embed_config", "params", "rot_v"), False),
    (("modules", "pos_embed_config", "params", "theta"), 10000),
)


# --- a section ------------------------------------------------------------------------------------------------------


def look_up(node: Any, *keys: str, default: Any = None) -> Any:
    """The value at a place of nested mappings; the default where one of them is missing or null."""
    for key in keys:
        node = node.get(key) if isinstance(node, Mapping) else None
    return default if node is None else node


def network_params(section: Mapping[str, Any]) -> Mapping[str, Any]:
    """The transformer's parameters. Raises ConfigError where the section describes none, or another kind."""
    target = str(look_up(section, "network_config", "target", default=""))
    if not target.endswith(("dit_video_concat.DiffusionTransformer", "cogvideox.transformer.DiffusionTransformer")):
        raise ConfigError(
            f"the model section's network is '{target or 'missing'}'; only CogVideoX transformers are converted"
        )
    return section["network_config"]["params"]


def changed(network: ConfigNode, modules: Mapping[str, Any], **params: Any) -> ConfigNode:
    """A copy of a network_config with other parameters and modules."""
    copy = deepcopy(network)
    copy["params"].update(params)
    copy["params"]["modules"].update(modules)
    return copy


def of_tree(section: Mapping[str, Any], vae: Path, text_encoder: Path) -> dict[str, Any]:
    """A plain copy of a section without adapters that finds its VAE and T5 at these places."""
    copy = deepcopy(dict(section))
    copy["network_config"]["params"]["modules"].pop("lora_config", None)
    if "first_stage_config" in copy:
        copy["first_stage_config"]["params"]["ckpt_path"] = str(vae)
    for embedder in look_up(copy, "conditioner_config", "params", "emb_models", default=[]):
        if "model_dir" in (embedder.get("params") or {}):
            embedder["params"]["model_dir"] = str(text_encoder)
    return copy


def patch_of(section: Mapping[str, Any]) -> tuple[int, int, int]:
    """The patch in frames, rows, columns."""
    patch = network_params(section)["patch_size"]
    return (1, patch, patch) if isinstance(patch, int) else tuple(patch)


def has_learned_positions(section: Mapping[str, Any]) -> bool:
    """Whether a table of positions is trained."""
    positions = look_up(network_params(section), "modules", "pos_embed_config")
    return bool(look_up(positions, "params", "learnable_pos_embed", default=False))


def takes_image(section: Mapping[str, Any]) -> bool:
    """Whether the network has an image's latent appended to its channels."""
    params = network_params(section)
    return params["in_channels"] == 2 * params["out_channels"]


def image_scaling(section: Mapping[str, Any]) -> str:
    """How the latents of a condition image are scaled, see `scale_image_latents`."""
    return section.get("image_scaling") or released_image_scaling(patch_of(section)[0])


def set_image_scaling(section: ConfigNode, scaling: str) -> None:
    """Write a rule into a section, or leave the key out where it is the released weights' own."""
    section.pop("image_scaling", None)
    if scaling != released_image_scaling(patch_of(section)[0]):
        section["image_scaling"] = scaling


def differences(section: Mapping[str, Any], released: Mapping[str, Any]) -> list[str]:
    """Dotted names of what two sections say differently, apart from places of files and adapters."""
    own, theirs = _values(section), _values(released)
    return sorted(name for name in own.keys() | theirs.keys() if own.get(name) != theirs.get(name))


def _values(node: Any, name: str = "") -> dict[str, Any]:
    """Dotted name -> value of all that stands in nested mappings and lists of them; null is as good as nothing."""
    if isinstance(node, Mapping):
        entries = {key: value for key, value in node.items() if key not in (*PLACES, "lora_config")}
    elif isinstance(node, list) and any(isinstance(item, Mapping) for item in node):
        entries = dict(enumerate(node))
    else:
        return {} if node is None else {name: node}
    found = [_values(value, f"{name}.{key}" if name else str(key)) for key, value in entries.items()]
    return {key: value for part in found for key, value in part.items()}


def scale_factor(section: Mapping[str, Any]) -> float:
    """What latents are multiplied by before diffusion."""
    return float(section.get("scale_factor", 1.0))


# --- a section to diffusers' files -----------------------------------------------------------------------------------


def transformer_config(section: Mapping[str, Any]) -> dict[str, Any]:
    """config.json of CogVideoXTransformer3DModel. Raises ConfigError for what that class does not have."""
    params = network_params(section)
    _refuse_what_they_lack(params)
    positions = params["modules"]["pos_embed_config"]
    is_rotary = str(positions["target"]).endswith("Rotary3DPositionEmbeddingMixin")
    frames, rows, columns = patch_of(section)
    stretch = [_stretch(params, side) for side in ("height", "width", "time")]
    if rows != columns or stretch[0] != stretch[1]:
        raise ConfigError(
            f"diffusers has one number for rows and columns; the network's patch is {[frames, rows, columns]} and its "
            f"positions are stretched by {stretch[0]} and {stretch[1]}"
        )
    return {
        "_class_name": "CogVideoXTransformer3DModel",
        "activation_fn": "gelu-approximate",
        "attention_bias": True,
        "attention_head_dim": params["hidden_size"] // params["num_attention_heads"],
        "dropout": 0.0,
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "in_channels": params["in_channels"],
        "max_text_seq_length": look_up(positions, "params", "text_length"),
        "norm_elementwise_affine": True,
        "norm_eps": float(look_up(params, "transformer_args", "layernorm_epsilon", default=1e-5)),
        "num_attention_heads": params["num_attention_heads"],
        "num_layers": params["num_layers"],
        "ofs_embed_dim": params.get("ofs_embed_dim"),
        "out_channels": params["out_channels"],
        "patch_bias": True,
        "patch_size": rows,
        "patch_size_t": None if frames == 1 else frames,
        "sample_frames": params["num_frames"],
        "sample_height": params["latent_height"],
        "sample_width": params["latent_width"],
        "spatial_interpolation_scale": DIFFUSERS_STRETCH if is_rotary else stretch[0],
        "temporal_compression_ratio": params.get("time_compressed_rate", 4),
        "temporal_interpolation_scale": stretch[2],
        "text_embed_dim": look_up(params, "modules", "patch_embed_config", "params", "text_hidden_size"),
        "time_embed_dim": params.get("time_embed_dim") or params["hidden_size"],
        "timestep_activation_fn": "silu",
        "use_learned_positional_embeddings": has_learned_positions(section),
        "use_rotary_positional_embeddings": is_rotary,
    }


def _stretch(params: Mapping[str, Any], side: str) -> float:
    """By how much fixed positions are stretched: today's files say it of the network, those of 1.0 of its positions."""
    key = f"{side}_interpolation"
    return float(look_up(params, "modules", "pos_embed_config", "params", key, default=params.get(key, 1.0)))


def _refuse_what_they_lack(params: Mapping[str, Any]) -> None:
    is_stretched = look_up(params, "modules", "pos_embed_config", "params", "positions") == "interpolate"
    spans_frames = not isinstance(params["patch_size"], int) and params["patch_size"][0] > 1
    if is_stretched and spans_frames:  # without patches in time diffusers stretches them itself
        raise ConfigError("diffusers does not stretch the rotary positions of 1.5, as positions: interpolate does")
    for keys, theirs in _FIXED:
        own = look_up(params, *keys, default=theirs)
        if own != theirs:
            raise ConfigError(
                f"diffusers' transformer cannot have network_config.params.{'.'.join(keys)} = {own}; there it is "
                f"{theirs}, so these weights would give other numbers"
            )


def scheduler_config(section: Mapping[str, Any]) -> dict[str, Any]:
    """scheduler_config.json of the sampler that the section names."""
    sampler = str(look_up(section, "sampler_config", "target", default="")).rpartition(".")[2]
    levels = look_up(section, "denoiser_config", "params", "discretization_config", "params", default={})
    unknown = [key for key in ("keep_start", "post_shift") if levels.get(key)]
    if unknown:
        raise ConfigError(f"diffusers' schedulers have no {unknown[0]}, which the section's discretization sets")
    return {
        "_class_name": SCHEDULERS.get(sampler, "CogVideoXDDIMScheduler"),
        "beta_end": levels.get("linear_end", 0.012),
        "beta_schedule": "scaled_linear",
        "beta_start": levels.get("linear_start", 0.00085),
        "clip_sample": False,
        "num_train_timesteps": levels.get("num_timesteps", 1000),
        "prediction_type": "v_prediction",
        "rescale_betas_zero_snr": True,
        "set_alpha_to_one": True,
        "snr_shift_scale": float(levels.get("shift_scale", 1.0)),
        "steps_offset": 0,
        "timestep_spacing": "trailing",
    }


def vae_config(section: Mapping[str, Any], sizes: Mapping[str, Any]) -> dict[str, Any]:
    """config.json of AutoencoderKLCogVideoX. sizes: what the VAE's weights tell, see `vae_sizes`."""
    levels = len(sizes["ch_mult"])
    params = look_up(section, "network_config", "params", default={})
    return {
        "_class_name": "AutoencoderKLCogVideoX",
        "act_fn": "silu",
        "block_out_channels": [round(sizes["ch"] * factor) for factor in sizes["ch_mult"]],
        "down_block_types": ["CogVideoXDownBlock3D"] * levels,
        "force_upcast": True,
        "in_channels": 3,
        "invert_scale_latents": image_scaling(section) != "multiply",
        "latent_channels": sizes["z_channels"],
        "layers_per_block": sizes["num_res_blocks"],
        "norm_eps": 1e-6,
        "norm_num_groups": norm_groups(section),
        "out_channels": 3,
        "sample_height": params["latent_height"] << (levels - 1),
        "sample_width": params["latent_width"] << (levels - 1),
        "scaling_factor": scale_factor(section),
        "temporal_compression_ratio": params.get("time_compressed_rate", 4),
        "up_block_types": ["CogVideoXUpBlock3D"] * levels,
        "use_post_quant_conv": False,
        "use_quant_conv": False,
    }


def norm_groups(section: Mapping[str, Any] | None) -> int:
    """Groups of the VAE's norms, which leave no trace in its weights."""
    keys = ("first_stage_config", "params", "encoder_config", "params", "norm_groups")
    return int(look_up(section, *keys, default=NORM_GROUPS))


def model_index(section: Mapping[str, Any], parts: Sequence[str]) -> dict[str, Any]:
    """model_index.json of a folder with these parts; those that are not there are null, to be passed by the caller."""
    classes = {
        "scheduler": ["diffusers", scheduler_config(section)["_class_name"]],
        "text_encoder": ["transformers", "T5EncoderModel"],
        "tokenizer": ["transformers", "T5Tokenizer"],
        "transformer": ["diffusers", "CogVideoXTransformer3DModel"],
        "vae": ["diffusers", "AutoencoderKLCogVideoX"],
    }
    own = {part: (value if part in parts else [None, None]) for part, value in classes.items()}
    return {"_class_name": PIPELINES[takes_image(section)], **own}


# --- diffusers' files to a section -----------------------------------------------------------------------------------


def section_from_diffusers(
    config: Mapping[str, Any], vae: Mapping[str, Any], scheduler: Mapping[str, Any], configs: Path
) -> ConfigNode:
    """The model section of a transformer's config.json, with the VAE's and the scheduler's where they are there.

    configs: the folder of the released models' YAML files.
    """
    section: ConfigNode = load_yaml(configs / _preset_of(config).config)["model"]
    params = section["network_config"]["params"]
    heads, width = config["num_attention_heads"], config["attention_head_dim"]
    frames = config.get("patch_size_t") or 1
    params.update(
        hidden_size=heads * width,
        num_layers=config["num_layers"],
        num_attention_heads=heads,
        time_embed_dim=config["time_embed_dim"],
        num_frames=config["sample_frames"],
        time_compressed_rate=config["temporal_compression_ratio"],
        latent_height=config["sample_height"],
        latent_width=config["sample_width"],
        patch_size=[frames, config["patch_size"], config["patch_size"]],
        in_channels=config["in_channels"],
        out_channels=config["out_channels"],
    )
    params.pop("ofs_embed_dim", None)
    if config.get("ofs_embed_dim"):
        params["ofs_embed_dim"] = config["ofs_embed_dim"]
    if config.get("norm_eps", 1e-5) != 1e-5:
        params["transformer_args"]["layernorm_epsilon"] = config["norm_eps"]
    params["modules"]["pos_embed_config"] = _positions(config, width)
    params["modules"]["patch_embed_config"]["params"]["text_hidden_size"] = config["text_embed_dim"]
    section["conditioner_config"]["params"]["emb_models"][0]["params"]["max_length"] = config["max_text_seq_length"]
    if vae:
        _take_vae(section, vae)
    if "snr_shift_scale" in scheduler:
        _take_shift(section, scheduler["snr_shift_scale"])
    return section


def _preset_of(config: Mapping[str, Any]) -> Preset:
    """The released model of the same generation and task, and of the same positions where there are several."""
    frames, is_image = config.get("patch_size_t") or 1, config["in_channels"] == 2 * config["out_channels"]
    fitting = [
        preset for preset in PRESETS if (preset.patch_size[0], preset.in_channels == 32) == (min(frames, 2), is_image)
    ]
    has_table = not config["use_rotary_positional_embeddings"] or config.get("use_learned_positional_embeddings")
    return next((preset for preset in fitting if preset.has_position_table == has_table), fitting[0])


def _positions(config: Mapping[str, Any], width: int) -> dict[str, Any]:
    length = config["max_text_seq_length"]
    if config["use_rotary_positional_embeddings"]:
        learned = {"learnable_pos_embed": True} if config.get("use_learned_positional_embeddings") else {}
        return {"target": ROTARY, "params": {"hidden_size_head": width, "text_length": length, **learned}}
    stretch = {f"{side}_interpolation": config["spatial_interpolation_scale"] for side in ("height", "width")}
    if config["temporal_interpolation_scale"] != 1.0:
        stretch["time_interpolation"] = config["temporal_interpolation_scale"]
    return {"target": SINCOS, "params": {"text_length": length, **stretch}}


def _take_vae(section: ConfigNode, vae: Mapping[str, Any]) -> None:
    section["scale_factor"] = vae["scaling_factor"]
    if takes_image(section):
        set_image_scaling(section, "divide" if vae.get("invert_scale_latents", False) else "multiply")
    widths = vae["block_out_channels"]
    for half in ("encoder_config", "decoder_config"):
        section["first_stage_config"]["params"][half]["params"].update(
            z_channels=vae["latent_channels"],
            ch=widths[0],
            ch_mult=[width // widths[0] for width in widths],
            num_res_blocks=vae["layers_per_block"],
            **({} if vae["norm_num_groups"] == NORM_GROUPS else {"norm_groups": vae["norm_num_groups"]}),
        )


def _take_shift(section: ConfigNode, shift: float) -> None:
    discretization = {"shift_scale": shift}
    section["denoiser_config"]["params"]["discretization_config"]["params"] = dict(discretization)
    section["sampler_config"]["params"]["discretization_config"]["params"] = dict(discretization)
    draw = section["loss_fn_config"]["params"]["sigma_sampler_config"]["params"]
    draw["discretization_config"]["params"] = dict(discretization)
