"""What follows from a configuration, and what contradicts itself in it, without building anything."""

from collections.abc import Mapping
from typing import Any

from sat.cogvideox.presets import TIME_FACTOR, VideoSizes, network_pixels, video_sizes
from sat.config import ConfigNode
from sat.errors import ConfigError

PLANS = ("pack", "bucket")
"""What of data.params plans rows of clips."""


def clip_sizes(config: Mapping[str, Any]) -> VideoSizes | None:
    """Sizes of a training clip: the data's where they are given, else the network's; of a mixture, the largest one's.

    None for models without a clip. Raises ConfigError where they do not fit the VAE and the patches, or contradict each
    other.
    """
    return _largest_clip(config)[0]


def clip_params(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The params of the data set that training clips come from; of a mixture, of the set with the largest ones."""
    return _largest_clip(config)[1]


def _largest_clip(config: Mapping[str, Any]) -> tuple[VideoSizes | None, Mapping[str, Any]]:
    """(sizes, params of the set)"""
    found = [(_sizes_of(config, params), params) for params in data_sets(config)]
    return max(found, key=lambda one: 0 if one[0] is None else one[0].num_frames * one[0].height * one[0].width)


def data_sets(config: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The params of the data section, or of each set that is drawn from where it is a mixture."""
    params = params_of(config, "data")
    sets = params.get("sets")
    if not isinstance(sets, Mapping):
        return [params]
    amounts = params.get("weights") or params.get("repeats")
    left_out = {name for name, amount in amounts.items() if amount == 0} if isinstance(amounts, Mapping) else ()
    nodes = {name: node for name, node in sets.items() if isinstance(node, Mapping) and name not in left_out}
    return [params_of(sets, name) for name in nodes] or [params]


def _sizes_of(config: Mapping[str, Any], data: Mapping[str, Any]) -> VideoSizes | None:
    """Sizes of the clips of a set."""
    network = params_of(model_parts(config), "network_config")
    sides = ("latent_height", "latent_width")
    if not network or not {"video_size", *sides} & {*data, *network}:
        return None
    frames = (data, "max_num_frames") if "max_num_frames" in data else (network, "num_frames")
    num_frames = _number(*frames) if frames[1] in frames[0] else 1
    if "video_size" in data:
        height, width = data["video_size"]
        source = _where(data, "video_size")
    else:
        missing = [key for key in sides if key not in network]
        if missing:
            raise ConfigError(
                f"network_config has no {' and '.join(missing)}; give the size of an eighth of the pixels"
            )
        height, width = network_pixels(*(_number(network, name) for name in sides))
        source = ", ".join(_where(network, name) for name in sides)
    patch_size, text = network.get("patch_size", [1, 2, 2]), text_length(model_parts(config))
    try:
        return video_sizes(num_frames, height, width, patch_size, text)
    except ConfigError as error:
        wrong = _where(*frames) if (num_frames - 1) % TIME_FACTOR else source
        raise ConfigError(f"{wrong}: {error}") from error


DEFAULT_FPS = 8


def clip_fps(config: Mapping[str, Any]) -> float:
    """Frames per second of a training clip: the data's where they say it."""
    return clip_params(config).get("fps") or DEFAULT_FPS


def text_length(model: Mapping[str, Any]) -> int:
    """Text tokens of the model: the encoder's max_length, which must be the position table's text_length."""
    positions = params_of(params_of(model, "network_config").get("modules") or {}, "pos_embed_config")
    embedders = text_encoders(model)
    encoder = (embedders[0].get("params") or {}) if embedders else {}
    stored, encoded = positions.get("text_length"), encoder.get("max_length")
    _check_equal(encoder, "max_length", positions, "text_length")
    return encoded if encoded is not None else stored or 0


def check_numbers(config: ConfigNode) -> None:
    """Raise ConfigError where two numbers of a configuration contradict each other, naming both and who set them.

    Numbers that a configuration does not give, as a user's own network may not, are not looked at.
    """
    clip_sizes(config)
    model = model_parts(config)
    network = params_of(model, "network_config")
    encoder = params_of(params_of(model, "first_stage_config"), "encoder_config")
    _check_heads(network)
    _check_equal(encoder, "z_channels", network, "out_channels")
    for data in data_sets(config):
        _check_equal(data, "channels", network, "out_channels")
        _check_latent_sides(network, data)


def _check_equal(one: Mapping[str, Any], key: str, other: Mapping[str, Any], other_key: str) -> None:
    if key in one and other_key in other and one[key] != other[other_key]:
        raise ConfigError(
            f"{_where(one, key)} is {one[key]} and {_where(other, other_key)} is {other[other_key]}; give both the same"
        )


def _check_heads(network: Mapping[str, Any]) -> None:
    if not {"hidden_size", "num_attention_heads"} <= network.keys():
        return
    hidden_size, heads = _number(network, "hidden_size"), _number(network, "num_attention_heads")
    if hidden_size % heads:
        raise ConfigError(
            f"{_where(network, 'hidden_size')} is {hidden_size}, which does not divide by "
            f"{_where(network, 'num_attention_heads')} {heads}; change one of them"
        )
    positions = params_of(network.get("modules") or {}, "pos_embed_config")
    if positions.get("hidden_size_head", hidden_size // heads) != hidden_size // heads:
        raise ConfigError(
            f"{_where(positions, 'hidden_size_head')} is {positions['hidden_size_head']}, and "
            f"{_where(network, 'hidden_size')} {hidden_size} over {_where(network, 'num_attention_heads')} {heads} "
            f"gives heads of {hidden_size // heads}; leave hidden_size_head out, or change one of them"
        )


def _check_latent_sides(network: Mapping[str, Any], data: Mapping[str, Any]) -> None:
    """Latents that come straight from the data have their sides in the data's params."""
    patch_size = network.get("patch_size", 1)
    sides = (patch_size, patch_size) if isinstance(patch_size, int) else patch_size[-2:]
    for name, patch in zip(("height", "width"), sides):
        if name in data and data[name] % patch:
            raise ConfigError(
                f"{_where(data, name)} is {data[name]} latents, which do not divide into patches of {patch} "
                f"({_where(network, 'patch_size')}); give a multiple of {patch}"
            )


def model_parts(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """What describes the model: its section, or the params of the target that the section names."""
    return params_of(config, "model") if "target" in config["model"] else config["model"]


def text_encoders(model: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The entries of the conditioner."""
    return params_of(model, "conditioner_config").get("emb_models") or []


def params_of(node: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """The params of a `{target, params}` mapping, empty where there are none."""
    return (node.get(key) or {}).get("params") or {}


def _where(node: Mapping[str, Any], key: str) -> str:
    return node.where(key) if isinstance(node, ConfigNode) else key


def _number(node: Mapping[str, Any], key: str) -> int:
    value = node.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConfigError(f"{_where(node, key)} is {value!r}; give a whole number, 1 or more")
    return value


def derived_lines(config: ConfigNode) -> list[str]:
    """What the configuration comes to, in lines for people."""
    sizes = clip_sizes(config)
    if sizes is None:
        return []
    network = params_of(model_parts(config), "network_config")
    t, h, w = sizes.grid
    keeps_ratio = clip_params(config).get("size_mode") == "keep"
    what = "clip" if len(data_sets(config)) == 1 else "largest clip of the mixture"
    lines = [
        f"{what}: {sizes.num_frames} frames of {sizes.height}x{sizes.width} pixels"
        + (" or, at each clip's own aspect ratio, of about this area" if keeps_ratio else ""),
        f"{sizes.latent_frames} latent frames of {sizes.latent_height}x{sizes.latent_width}, grid {t}x{h}x{w}",
        f"{sizes.video_tokens:,} + {sizes.text_length} tokens",
    ]
    if {"hidden_size", "num_attention_heads"} <= network.keys():
        heads = network["num_attention_heads"]
        lines.append(f"{heads} heads of {network['hidden_size'] // heads} channels")
    return lines
