"""What belongs to a transformer: its VAE and its text encoder, found beside it or where its configuration says."""

import logging
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path

from torch import Tensor

from sat.cogvideox.engine import TEXT_PREFIX
from sat.config import ConfigNode
from sat.convert import descriptions
from sat.convert.places import Place, Places, find_text_encoder, find_vae
from sat.errors import CheckpointError
from sat.weights.headers import read_json
from sat.weights.survey import TEXT_ENCODER_FOLDER

log = logging.getLogger(__name__)


def companion_vae(places: Places, section: ConfigNode, given: Path | None, leases: ExitStack) -> Place | None:
    """The user's, that of the tree, that of the configuration if it is on this disk."""
    if given is not None:
        return find_vae(given, leases)
    if places.vae is not None:
        return places.vae
    named = descriptions.look_up(section, "first_stage_config", "params", "ckpt_path")
    path = _first_there(places, "vae", [named] if named else [])
    return None if path is None else find_vae(path, leases)


def companion_text(places: Places, section: ConfigNode, given: Path | None) -> tuple[Path, Path] | None:
    """T5's folders of weights and of the tokenizer, found in the same order."""
    if given is not None:
        return find_text_encoder(given)
    if places.encoder is not None and places.tokenizer is not None:
        return places.encoder, places.tokenizer
    embedders = descriptions.look_up(section, "conditioner_config", "params", "emb_models", default=[])
    named = [descriptions.look_up(embedder, "params", "model_dir") for embedder in embedders]
    path = _first_there(places, TEXT_ENCODER_FOLDER, filter(None, named))
    return None if path is None else find_text_encoder(path)


def _first_there(places: Places, folder: str, named: Iterable[str]) -> Path | None:
    """A folder of this name beside the weights or up to three above, or the first named place that exists."""
    assert places.transformer is not None
    beside = [parent / folder for parent in places.transformer.file.parents[:3]]
    found = next((path for path in [*beside, *map(Path, named)] if path.exists()), None)
    if found is not None:
        log.info("taking %s", found)
    return found


def check_companions(
    place: Place, section: ConfigNode, vae: Mapping[str, Tensor] | None, text: tuple[Path, Path] | None
) -> None:
    """Raise CheckpointError where VAE or T5 are another model's, or where a T5 that was trained would be lost."""
    if any(name.startswith(TEXT_PREFIX) for name in place.header().tensors):
        raise CheckpointError(f"{place.path} holds a text encoder that was trained with it, which is not converted yet")
    channels = descriptions.network_params(section)["out_channels"]
    if vae is not None and (found := vae["decoder.conv_in.conv.weight"].shape[1]) != channels:
        raise CheckpointError(
            f"the VAE has {found} latent channels, the transformer makes {channels}; give its own: --vae"
        )
    wanted = descriptions.transformer_config(section)["text_embed_dim"]
    if text is not None and (width := read_json(text[0] / "config.json").get("d_model")) != wanted:
        raise CheckpointError(f"T5 in {text[0]} has states of width {width}, the transformer takes {wanted}; give --t5")
