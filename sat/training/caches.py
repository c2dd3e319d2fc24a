"""The caches of a run: what the encoders make of its clips and captions, computed before the first step.

`args.cache` says what is kept (latents, text or all), `args.cache_dir` where. See docs/caches.md.
"""

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import ConcatDataset, Dataset

from sat.cogvideox.engine import VideoDiffusionEngine
from sat.config import ConfigNode
from sat.data.cache import ABOUT, SHARDS, VERSION, CachedClips, Entries, Header, image_to_store, tensor_bytes
from sat.data.content import KnownFiles
from sat.errors import CacheError, ConfigError
from sat.mpu.launch import Launch
from sat.mpu.state import ParallelState
from sat.training.args import TrainArgs
from sat.training.files import write_json
from sat.training.fill import ClipWork, Computed, Fill, Outcome, TextWork, remove_abandoned
from sat.training.identity import differences
from sat.training.preview import clip_sizes, model_parts

log = logging.getLogger(__name__)

FIRST_FRAME = "split"
"""The rule of the VAE's first frame in training, see `sat.vae.causal_conv.FirstFrame`."""
LATENTS, TEXT = "latents", "text"
NOT_FACTS = ("pixels", "caption", "key")
"""What of an item is no fact of the clip's bytes."""


def check_cache(config: ConfigNode, args: TrainArgs) -> None:
    """Raise ConfigError where a configuration asks for a cache of what its model does not encode."""
    if args.cache == "none":
        return
    model, sizes = model_parts(config), clip_sizes(config)
    if "network_config" not in model:
        raise ConfigError(f"args.cache is {args.cache}, and the model section is no video model; leave args.cache out")
    if args.cache != TEXT and model.get("latent_input") and (sizes is None or sizes.num_frames > 1):
        raise ConfigError(
            f"args.cache is {args.cache}, and model.latent_input says that clips come as latents; set args.cache to "
            "text or none, or model.latent_input=false"
        )


# --- who encodes -----------------------------------------------------------------------------------------------------


def describe_module(module: nn.Module, leave_out: tuple[str, ...] = ()) -> dict[str, Any]:
    """Plain values that are the same for modules that compute the same: class, weights, and what it says of itself.

    leave_out: prefixes of names of weights that change nothing. A module whose weights do not decide all of its results
    has a method `identity()` that gives the rest.
    """
    content, dtypes = hashlib.blake2b(digest_size=16), set()
    for name, value in sorted([*module.named_parameters(), *module.named_buffers()]):
        if name.startswith(leave_out):
            continue
        content.update(f"{name} {value.dtype} {list(value.shape)}".encode())
        content.update(tensor_bytes(value))
        dtypes.add(str(value.dtype).removeprefix("torch."))
    identity: Callable[[], dict[str, Any]] = getattr(module, "identity", dict)
    return {
        "class": f"{type(module).__module__}.{type(module).__qualname__}",
        "weights": content.hexdigest(),
        "dtype": ", ".join(sorted(dtypes)),
        **identity(),
    }


def describe_vae(vae: Any) -> dict[str, Any]:
    """What decides the moments that a VAE gives."""
    layers = hashlib.blake2b(repr(getattr(vae, "encoder", vae)).encode(), digest_size=16).hexdigest()
    own = describe_module(vae, leave_out=("decoder.", "loss."))
    return {"version": VERSION, "first_frame": FIRST_FRAME, "layers": layers, **own}


def describe_text_encoders(conditioner: Any) -> dict[str, Any]:
    """What decides the text states that a conditioner gives."""
    encoders = [module for key, module in zip(conditioner.input_keys, conditioner.embedders) if key == "txt"]
    about: dict[str, Any] = {"version": VERSION}
    for place, encoder in enumerate(encoders):
        about.update({f"encoder {place} {key}": value for key, value in describe_module(encoder).items()})
    return about


# --- what it makes ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LatentsEncoder:
    """Clips to moments, each alone: an entry depends on nothing that shares a batch."""

    vae: Any
    device: torch.device

    @torch.no_grad()
    def __call__(self, item: Mapping[str, Any]) -> Computed:
        pixels: Tensor = item["pixels"]  # T 3 H W
        posterior = self.vae.posterior(pixels.unsqueeze(0).to(self.device), first_frame=FIRST_FRAME)
        mean, var = posterior.mean.double(), posterior.var.double()
        facts = {name: value for name, value in item.items() if name not in NOT_FACTS}
        facts |= {"mean": mean.mean().item(), "square": (mean.square() + var).mean().item()}
        return {"moments": posterior.moments[0], "image": image_to_store(pixels[0])}, facts


@dataclass(frozen=True)
class TextEncoder:
    """Captions to text states, each alone."""

    conditioner: Any

    @torch.no_grad()
    def __call__(self, caption: str) -> Computed:
        return {"states": self.conditioner([caption])["crossattn"][0]}, {}


# --- the caches ------------------------------------------------------------------------------------------------------


class Cache:
    """The entries that one encoder has made, and how to make more."""

    def __init__(self, kind: str, about: dict[str, Any], args: TrainArgs, launch: Launch) -> None:
        assert args.cache_dir is not None
        self.kind, self.about, self.args, self.launch = kind, about, args, launch
        self.root = Path(args.cache_dir)
        name = hashlib.blake2b(json.dumps(about, sort_keys=True).encode(), digest_size=8).hexdigest()
        self.entries = Entries(self.root / f"{kind}-{name}")
        self.counts: Counter[str] = Counter(found=0, computed=0, unusable=0)
        """Over all datasets that were completed."""
        self._open()

    def _open(self) -> None:
        """Take in the shards that there are; all processes take those that rank 0 sees."""
        found: list[Any] = [None]
        if self.launch.is_main:
            try:
                found[0] = self._prepare()
            except CacheError as error:
                found[0] = error
        dist.broadcast_object_list(found)
        if isinstance(found[0], CacheError):
            raise found[0]
        self.entries.add_shards(found[0])

    def _prepare(self) -> list[str]:
        """On rank 0: the names of all whole shards. What is damaged goes, where the cache may be written."""
        folder = self.entries.folder
        if not self.args.cache_read_only:
            try:
                folder.mkdir(parents=True, exist_ok=True)
                write_json(folder / ABOUT, self.about)
            except OSError as error:
                raise CacheError(
                    f"args.cache_dir {self.root} cannot be written ({error.strerror}); give a folder that can, or, "
                    "where it is complete, set args.cache_read_only=true"
                ) from error
            remove_abandoned(folder)
        names = []
        for path in sorted(folder.glob(SHARDS)):
            try:
                Header.read(path)
            except CacheError as error:
                if self.args.cache_read_only:
                    raise
                log.warning("%s: removed", error)
                path.unlink()
                continue
            names.append(path.name)
        return names

    def fill(self, work: Any, encode: Callable[[Any], Computed], team: Sequence[int]) -> Outcome:
        """Complete the cache for a dataset. Every process must call it; raises CacheError where it may not be written
        and lacks something. team: the processes that encode together, by rank."""
        job = Fill(work, self.entries, None if self.args.cache_read_only else encode, self.root, team)
        outcome = job.run(self.launch, self.args.num_workers, f"cache {self.kind}")
        self.entries.add_shards(outcome.names)
        if outcome.missing:
            raise CacheError(self._lacking(outcome, len(work)))
        self.counts.update(found=outcome.found, computed=outcome.computed, unusable=outcome.unusable)
        log.info(
            "cache of %s in %s: %d of %d were there, %d computed%s",
            self.kind,
            self.entries.folder,
            outcome.found,
            len(work),
            outcome.computed,
            f", {outcome.unusable} cannot be used (e.g. {outcome.examples[0]})" if outcome.unusable else "",
        )
        if outcome.computed and (others := self.others()):
            log.info("what is in %s was not used: %s", self.root, others)
        return outcome

    def _lacking(self, outcome: Outcome, count: int) -> str:
        others = self.others()
        return (
            f"args.cache_read_only is on, and {self.root} lacks the {self.kind} of {outcome.missing} of {count} clips, "
            f"e.g. {outcome.examples[0]}; run tools/precompute.py with this configuration and "
            "args.cache_read_only=false" + (f". There is {others}" if others else "")
        )

    def others(self) -> str:
        """What other encoders have made, in words."""
        found = []
        for path in sorted(self.root.glob(f"{self.kind}-*/{ABOUT}")):
            if path.parent != self.entries.folder and any(path.parent.glob(SHARDS)):
                about = json.loads(path.read_text(encoding="utf-8"))
                found.append(f"{path.parent.name} of another encoder ({'; '.join(differences(about, self.about))})")
        return ", ".join(found)


class Caches:
    """What a run reads instead of computing it."""

    def __init__(self, args: TrainArgs, vae: Any, conditioner: Any, launch: Launch, parallel: ParallelState) -> None:
        """vae, conditioner: on the process' device. Every process must call it."""
        self.args, self.launch, self.parallel = args, launch, parallel
        self.latents = self.texts = None
        if args.cache in (LATENTS, "all"):
            self.encode_latents = LatentsEncoder(_check_vae(vae), launch.device)
            self.latents = Cache(LATENTS, self._once(describe_vae, vae), args, launch)
        if args.cache in (TEXT, "all"):
            self.encode_text = TextEncoder(_check_conditioner(conditioner))
            self.texts = Cache(TEXT, self._once(describe_text_encoders, conditioner), args, launch)

    def _once(self, describe: Callable[[Any], dict[str, Any]], module: Any) -> dict[str, Any]:
        """A description that rank 0 makes for all: hashing takes a second a gigabyte."""
        found: list[Any] = [describe(module) if self.launch.is_main else None]
        dist.broadcast_object_list(found)
        return found[0]

    def complete(self, dataset: Dataset, limits: Mapping[int, int]) -> Dataset:
        """The dataset with what it reads in the cache, all of which is there when this returns.

        limits: latent frames of the clips that a plan cuts, 0 of those that it leaves out. Every process must call it.
        """
        if not isinstance(dataset, ConcatDataset):
            return self._complete(dataset, limits)
        start = 0
        for place, (part, end) in enumerate(zip(dataset.datasets, dataset.cumulative_sizes)):
            own = {number - start: limit for number, limit in limits.items() if start <= number < end}
            dataset.datasets[place] = self._complete(part, own)
            start = end
        return dataset

    def _complete(self, dataset: Any, limits: Mapping[int, int]) -> Dataset:
        latents = texts = None
        keys: Sequence[bytes] | np.ndarray = ()
        if self.latents is not None:
            if not hasattr(dataset, "source"):
                raise ConfigError(
                    f"args.cache is {self.args.cache}, and {type(dataset).__name__} does not say of which files its "
                    "clips are made: it needs the methods source, caption and name of SFTDataset; or set args.cache to "
                    "text"
                )
            latents = self.latents.entries
            work = ClipWork(dataset, latents, KnownFiles(self.latents.root), limits)
            group = self.parallel.group("cp")  # its ranks share a clip in the VAE
            team = [self.launch.rank] if group is None else dist.get_process_group_ranks(group)
            keys = self.latents.fill(work, self.encode_latents, team).keys
        if self.texts is not None:
            texts = self.texts.entries
            self.texts.fill(TextWork(dataset, texts), self.encode_text, [self.launch.rank])
        return CachedClips(dataset, latents, keys, texts)

    def free_encoders(self, engine: VideoDiffusionEngine, is_sampled: bool) -> None:
        """Let go what training no longer needs. is_sampled: the run samples as it goes, which takes both encoders."""
        if is_sampled:
            log.info("the encoders stay in memory: args.log_sample samples with them")
            return
        if self.texts is not None:
            engine.conditioner.free_text_encoders()
            log.info("freed the text encoders: their cache is complete")
        if self.latents is not None and engine.image_conditioner is not None:
            log.info("the VAE stays in memory: it encodes first frames, on which each step puts other noise")
        elif self.latents is not None:
            engine.free_vae()
            log.info("freed the VAE: its cache is complete")
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _check_vae(vae: Any) -> Any:
    if vae is None:
        raise ConfigError("args.cache keeps latents, and the model has no first_stage_config to make them with")
    if not hasattr(vae, "posterior"):
        raise ConfigError(
            f"args.cache keeps latents, and {type(vae).__name__} gives no posterior to keep; set args.cache to text or "
            "none"
        )
    return vae


def _check_conditioner(conditioner: Any) -> Any:
    if conditioner is None:
        raise ConfigError("args.cache keeps text states, and the model has no conditioner_config to make them with")
    if conditioner.is_trainable:
        raise ConfigError(
            "args.cache keeps text states, and the text encoder is trained (is_trainable), so that they change; set "
            "args.cache to latents or none"
        )
    return conditioner
