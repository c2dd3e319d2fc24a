"""Where released weights are: a table that users may override with a YAML file of the same form.

Sizes and checksums are not listed: they were not verified against the servers when this table was written. A hub's own
checksum is used where it sends one; `files` of a place takes those that you know.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sat.cogvideox.presets import PRESETS, Preset
from sat.config import did_you_mean, load_yaml
from sat.errors import ConfigError
from sat.weights.download import Expected


@dataclass(frozen=True)
class Source:
    """A place that holds weights: a folder on disk, a folder on a web server, or one archive or file in either."""

    address: str
    files: Mapping[str, Expected] = field(default_factory=dict)
    """Path below the address -> what is known of that file. Where the address is one file, there is one entry."""


HUGGING_FACE = "https://huggingface.co/zai-org/{}/resolve/main/"
MODEL_SCOPE = "https://www.modelscope.cn/models/ZhipuAI/{}/resolve/master/"


def _hubs(*repositories: str) -> tuple[Source, ...]:
    return tuple(Source(hub.format(name)) for name in repositories for hub in (HUGGING_FACE, MODEL_SCOPE))


SOURCES: Mapping[str, Sequence[Source]] = {
    "cogvideox-2b": _hubs("CogVideoX-2b"),
    "cogvideox-5b": _hubs("CogVideoX-5b"),
    "cogvideox-5b-i2v": _hubs("CogVideoX-5b-I2V"),
    "cogvideox1.5-5b": _hubs("CogVideoX1.5-5B-SAT", "CogVideoX1.5-5B"),
    "cogvideox1.5-5b-i2v": _hubs("CogVideoX1.5-5B-SAT", "CogVideoX1.5-5B-I2V"),
}
"""Name -> places in the order in which they are asked. Of the 1.0 models only diffusers' weights are still online: the
SAT archives' links lead to a web page since 2026. Each part comes from the first place that has it."""


def released_model(name: str) -> Preset:
    """The released model of a name such as `cogvideox-5b-i2v`, in any case."""
    by_name = {preset.name.lower(): preset for preset in PRESETS}
    if name.lower() not in by_name:
        raise ConfigError(f"there is no released model '{name}'{did_you_mean(name.lower(), by_name)}; {_known()}")
    return by_name[name.lower()]


def read_sources(file: Path) -> dict[str, Sequence[Source]]:
    """The table with the entries of a user's YAML file in the place of its own.

    NAME: [ADDRESS, {address: ADDRESS, files: {PATH: {size: BYTES, sha256: HEX}}}, ...]
    """
    table = load_yaml(file)
    result = dict(SOURCES)
    for name, places in table.items():
        if name not in SOURCES:
            raise ConfigError(f"{table.where(name)} is no released model{did_you_mean(name, SOURCES)}; {_known()}")
        if not isinstance(places, list) or not places:
            raise ConfigError(f"{table.where(name)} must be a list of places")
        result[name] = [_read_place(table.where(name), place) for place in places]
    return result


def _known() -> str:
    return f"released models: {', '.join(SOURCES)}"


def _read_place(where: str, place: Any) -> Source:
    if isinstance(place, str):
        return Source(place)
    if not isinstance(place, dict) or not isinstance(place.get("address"), str) or set(place) - {"address", "files"}:
        raise ConfigError(f"{where}: a place is an address, or a mapping of 'address' and 'files'")
    files = {path: _read_known(f"{where}: {path}", known) for path, known in (place.get("files") or {}).items()}
    return Source(place["address"], files)


def _read_known(where: str, known: Any) -> Expected:
    if isinstance(known, dict) and not set(known) - {"size", "sha256"}:
        size, checksum = known.get("size"), known.get("sha256")
        if isinstance(size, int | None) and isinstance(checksum, str | None):
            return Expected(size, checksum)
    raise ConfigError(f"{where} takes a size (a whole number of bytes) and a sha256 (64 hexadecimal digits)")
