"""What encoders made of clips and captions, read from disk instead of computed at every step.

    DIR/latents-ID/about.json            which VAE made them; ID is a hash of that
    DIR/latents-ID/NAME.safetensors      KEY/moments: mean and log-variance of a clip's latents (t 2c h w);
                                         KEY/image: its first frame (3 H W), on which image to video puts noise
    DIR/text-ID/about.json               which text encoders, with weights, tokenizer and length
    DIR/text-ID/NAME.safetensors         KEY/states: the states of a caption (n x)

A shard has a name of its own, gets it when it is whole and on disk, and never changes. Its metadata say of each KEY
the checksums of its tensors and what else is known of the clip (fps, num_frames, ...). KEY is a hash of what decides
the tensors besides the encoder: of a caption its text, of a clip the bytes of its file and how they are read.

Moments rather than latents: the posterior is still drawn from the sample's own stream, so training on a cache gives the
numbers of training on the clips.
"""

import json
import zlib
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from sat.data.content import KEY_TYPE, Source, make_key
from sat.data.frames import levels_to_pixels, pixels_to_levels
from sat.data.quarantine import BadClip
from sat.errors import CacheError

ABOUT = "about.json"
SHARDS = "*.safetensors"
VERSION = 1
"""Of what a key stands for: raise it when the same key would come to other tensors."""
ENTRIES = "entries"
BAD = "bad"
"""Of an entry of a clip that cannot be used: [message, reason]."""
OPEN_HEADERS = 32

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "U8": torch.uint8}


def latents_key(source: Source, digest: str, latent_frames: int | None) -> str:
    """KEY of a clip whose file has that hash; latent_frames where a plan has it cut to so many."""
    return make_key(version=VERSION, file=digest, reading=dict(source.reading), latent_frames=latent_frames)


def text_key(caption: str) -> str:
    """KEY of a caption."""
    return make_key(version=VERSION, caption=caption)


def tensor_bytes(tensor: Tensor) -> Any:
    """A tensor's numbers as a buffer."""
    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()


def checksum(tensor: Tensor) -> int:
    """CRC-32 of a tensor's numbers."""
    return zlib.crc32(tensor_bytes(tensor))


@dataclass(frozen=True)
class Header:
    """What a shard says of itself."""

    start: int
    """Where its numbers begin, in bytes."""
    tensors: Mapping[str, Mapping[str, Any]]
    entries: Mapping[str, Mapping[str, Any]]

    @classmethod
    def read(cls, path: Path) -> "Header":
        """Raises CacheError for a file that is no whole shard."""
        try:
            with path.open("rb") as file:
                length = int.from_bytes(file.read(8), "little")
                content = json.loads(file.read(length))
            entries = json.loads(content.pop("__metadata__")[ENTRIES])
            size = 8 + length + max((tensor["data_offsets"][1] for tensor in content.values()), default=0)
        except OSError as error:
            raise CacheError(f"{path} cannot be read: {error.strerror}") from error
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, MemoryError) as error:
            raise CacheError(f"{path} is no shard of a cache ({error}); {REPAIR}") from error
        if path.stat().st_size != size:
            raise CacheError(f"{path} has {path.stat().st_size:,} bytes instead of {size:,}; {REPAIR}")
        return cls(8 + length, content, entries)


REPAIR = "delete it, and what it held is computed anew at the next start"


class Entries:
    """The entries of one encoder. Takes 36 bytes of memory for each; tensors are read when they are asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.names: list[str] = []
        self._keys, self._shards = np.empty(0, KEY_TYPE), np.empty(0, np.int32)
        self._headers: dict[int, Header] = {}

    def __len__(self) -> int:
        return len(self._keys)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_headers": {}}

    def add_shards(self, names: Iterable[str]) -> None:
        """Take in further shards. Raises CacheError for one that is damaged."""
        keys, shards = [self._keys], [self._shards]
        for name in names:
            own = np.array(list(Header.read(self.folder / name).entries), dtype=KEY_TYPE)
            keys.append(own)
            shards.append(np.full(len(own), len(self.names), np.int32))
            self.names.append(name)
        self._keys, first = np.unique(np.concatenate(keys), return_index=True)
        self._shards = np.concatenate(shards)[first]

    def __contains__(self, key: str) -> bool:
        return self._find(key) is not None

    def facts(self, key: str) -> dict[str, Any]:
        """What is known of an entry besides its tensors."""
        return dict(self._header(self._find_or_fail(key)).entries[key])

    def facts_of(self, keys: Collection[str]) -> Iterator[dict[str, Any]]:
        """The same of those of many entries that there are, shard by shard."""
        for number, name in enumerate(self.names):
            for key, facts in Header.read(self.folder / name).entries.items():
                if key in keys and self._find(key) == number:
                    yield dict(facts)

    def read(self, key: str) -> dict[str, Tensor]:
        """The tensors of an entry, by name. Raises CacheError where they are not what was written."""
        shard = self._find_or_fail(key)
        header, path = self._header(shard), self.folder / self.names[shard]
        sums = header.entries[key]["crc32"]
        found = {}
        for name in sums:
            found[name] = _read_tensor(path, header.start, header.tensors[f"{key}/{name}"])
            if checksum(found[name]) != sums[name]:
                raise CacheError(f"{path} is damaged: the {name} of entry {key} have another checksum; {REPAIR}")
        return found

    def _find(self, key: str) -> int | None:
        place = int(np.searchsorted(self._keys, key.encode()))
        is_there = place < len(self._keys) and self._keys[place] == key.encode()
        return int(self._shards[place]) if is_there else None

    def _find_or_fail(self, key: str) -> int:
        if (shard := self._find(key)) is None:
            raise KeyError(f"{self.folder} has no entry {key}")
        return shard

    def _header(self, shard: int) -> Header:
        if shard not in self._headers:
            if len(self._headers) == OPEN_HEADERS:
                self._headers.pop(next(iter(self._headers)))
            self._headers[shard] = Header.read(self.folder / self.names[shard])
        return self._headers[shard]


def _read_tensor(path: Path, start: int, about: Mapping[str, Any]) -> Tensor:
    """One tensor of a shard. The file is opened, read and closed: there may be more of them than a process may have
    open, and one that is mapped into memory and then cut kills the process."""
    begin, end = about["data_offsets"]
    buffer = bytearray(end - begin)
    try:
        with path.open("rb") as file:
            file.seek(start + begin)
            num_read = file.readinto(buffer)
    except OSError as error:
        raise CacheError(f"{path} cannot be read: {error.strerror}") from error
    if num_read != len(buffer):
        raise CacheError(f"{path} was cut while it was in use; {REPAIR}")
    if not buffer:
        return torch.empty(about["shape"], dtype=_DTYPES[about["dtype"]])
    return torch.frombuffer(buffer, dtype=_DTYPES[about["dtype"]]).view(about["shape"])


def image_to_store(image: Tensor) -> Tensor:
    """A frame (3 H W) in [-1, 1] as it is kept: uint8 where nothing is lost by it."""
    levels = pixels_to_levels(image)
    return levels if torch.equal(levels_to_pixels(levels), image) else image


class CachedClips(Dataset):
    """A dataset of which latents, texts or both are read from a cache; all else is its own.

    latents, keys: where the clips are, and the KEY of each, empty where it had none when it was looked at. An item then
    has `moments` (t 2c h w) and `image`, the first frame (1 3 H W) in [-1, 1], in the place of `pixels`, and no file is
    opened for it. texts: gives `text_states` (n x). Raises BadClip for what the dataset itself cannot read, and for
    what has changed since the cache was looked through.
    """

    def __init__(
        self, dataset: Any, latents: Entries | None, keys: Sequence[bytes] | np.ndarray, texts: Entries | None
    ) -> None:
        self.dataset, self.latents, self.keys, self.texts = dataset, latents, keys, texts

    def __len__(self) -> int:
        return len(self.dataset)

    @property
    def index(self) -> Any:
        """The dataset's own list of clips."""
        return self.dataset.index

    def __getitem__(self, index: int) -> dict[str, Any]:
        item = self.dataset[index] if self.latents is None else self._clip(index, self.latents)
        if self.texts is None:
            return item
        key = text_key(item["caption"])
        if key not in self.texts:
            raise _changed(item["key"], "caption")
        return {**item, "text_states": self.texts.read(key)["states"]}

    def _clip(self, index: int, latents: Entries) -> dict[str, Any]:
        key = bytes(self.keys[index]).decode()
        if not key or key not in latents:
            raise _changed(self.dataset[index]["key"], "file")  # a clip that cannot be read says so itself
        caption, name = self.dataset.caption(index), self.dataset.name(index)
        facts = latents.facts(key)
        facts.pop("crc32")
        if BAD in facts:
            message, reason = facts[BAD]
            raise BadClip(message, reason, name)
        tensors = latents.read(key)
        image = tensors["image"]
        return {
            **facts,
            "moments": tensors["moments"],
            "image": (levels_to_pixels(image) if image.dtype == torch.uint8 else image).unsqueeze(0),
            "caption": caption,
            "key": name,
        }


def _changed(name: str, what: str) -> BadClip:
    return BadClip(f"the {what} of {name} has changed since the run began: it is not in the cache", "changed", name)
