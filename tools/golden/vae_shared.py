"""Recordings of the VAE cut up: one clip on several processes (context parallelism), and tiles along space."""

import json
import logging
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from sat.mpu.state import ParallelState
from sat.vae import VideoAutoencoder
from sat.vae.shard import FrameShard
from sat.vae.sharing import deal_frames, gather_shares, take_share
from tools.golden.common import CannotReplay, Case, Checks, Folder, Recording, read_metadata
from tools.golden.vae_networks import build_recorded, compare, find_config, tensor_names, turn

# --- processes -------------------------------------------------------------------------------------------------------


def run_world(world: int, fn: Callable[..., Any], *args: Any) -> Any:
    """What fn(*args) gives on the first of `world` gloo processes; `fn` must be a module's function."""
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(_rank, (world, folder, fn, args), nprocs=world, start_method="spawn")
        return torch.load(Path(folder) / "result.pt", weights_only=True)


def _rank(rank: int, world: int, folder: str, fn: Callable[..., Any], args: tuple) -> None:
    torch.set_num_threads(1)
    logging.getLogger("sat").addHandler(logging.NullHandler())
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    result = fn(*args)
    if rank == 0:
        torch.save(result, Path(folder) / "result.pt")
    dist.barrier()
    dist.destroy_process_group()


# --- one clip on several processes -----------------------------------------------------------------------------------


@torch.no_grad()
def replay_single(path: Path, content: Mapping[str, Any], checks: Checks) -> None:
    """What one process gives, from a recording of several."""
    recording, vae = Recording(path), build_recorded(content)
    compare(checks, "single/moments", turn(vae.posterior(turn(recording["x"])).moments), recording["single/moments"])
    compare(checks, "single/decoded", turn(vae.decode(turn(recording["z"]))), recording["single/decoded"])


@torch.no_grad()
def run_shared(content: Mapping[str, Any], pixels: Tensor, latents: Tensor) -> dict[str, Tensor]:
    """Moments and decoded pixels, shared: with norms over the whole clip, and with each process' own."""
    vae = build_recorded(content)
    vae.parallel = ParallelState.build(cp=dist.get_world_size())
    group = vae.parallel.group("cp")
    assert group is not None
    shard = FrameShard(group, length=group.size(), one_clip=False)
    rule = "split" if shard.index == 0 else "later"
    frames, counts = deal(vae, pixels, group.size())
    moments = turn(vae.encoder(turn(take_share(pixels, frames, 0, group)), None, rule, shard))
    decoded = turn(vae.decoder(turn(take_share(latents, counts, 0, group)), None, rule, shard))
    return {
        "moments": vae.posterior(pixels).moments,
        "decoded": vae.decode(latents),
        "local_norm/moments": gather_shares(moments, counts, group),
        "local_norm/decoded": gather_shares(decoded, frames, group),
    }


def deal(vae: VideoAutoencoder, pixels: Tensor, world: int) -> tuple[list[int], list[int]]:
    """(pixel frames, latents) of each process."""
    return deal_frames(pixels.shape[1], vae.encoder.num_halvings, "split", world)


def replay_world(path: Path, content: Mapping[str, Any], world: int, checks: Checks) -> None:
    """What `world` processes give together."""
    recording = Recording(path)
    pixels, latents = turn(recording["x"]), turn(recording["z"])
    recorded = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))[str(world)]
    own = [list(counts) for counts in deal(build_recorded(content), pixels, world)]
    theirs = [[share[key] for share in recorded] for key in ("video_frames_in", "latent_frames_in")]
    if own != theirs:
        raise CannotReplay(f"frames are dealt differently: {own} here, {theirs} recorded")
    results = run_world(world, run_shared, content, pixels, latents)
    for name in ("moments", "decoded"):
        compare(checks, f"{name} on {world} processes", turn(results[name]), recording[f"single/{name}"])
        local = f"local_norm/{name}"
        compare(checks, f"world{world}/{local}", turn(results[local]), recording[f"world{world}/{local}"])


# --- tiles -----------------------------------------------------------------------------------------------------------


def read_tiling(metadata: Mapping[str, str]) -> dict[str, int]:
    """Fields of a Tiling from a recording's metadata, whose overlaps are shares of a tile."""
    fields = {}
    for name in ("height", "width"):
        size = int(metadata[f"tile_sample_{name}"])
        part, whole = metadata[f"overlap_{name}"].split("/")
        fields.update({name: size, f"overlap_{name}": size * int(part) // int(whole)})
    return fields


@torch.no_grad()
def replay_tiles(path: Path, content: Mapping[str, Any], checks: Checks) -> None:
    """diffusers' tiles: clips of fewer than 16 frames are encoded whole, latents decoded two at a time."""
    recording = checks.open(path)
    vae = build_recorded(content, tile=read_tiling(read_metadata(path)))
    moments = vae.posterior(turn(recording["x"]), first_frame="parity").moments
    compare(checks, "moments", turn(moments), recording["moments"])
    compare(checks, "decoded", turn(vae.decode_chunked(turn(recording["z"]), "v1")), recording["decoded"])


# --- all -------------------------------------------------------------------------------------------------------------


def _replay_with_config(replay: Callable[..., None], folder: Folder, path: Path, *args: Any) -> None:
    replay(path, find_config(folder, path), *args)


def find(folder: Folder) -> Iterator[Case]:
    """The cases of clips that are cut up."""
    for path in folder.with_suffix(".safetensors"):
        names, title = tensor_names(path), folder.name(path)
        if "single/moments" in names:
            yield Case(title, (path,), partial(_replay_with_config, replay_single, folder, path))
            for world in worlds(names):
                replay = partial(_replay_with_config, replay_world, folder, path, world)
                yield Case(f"{title}:world{world}", (path, path.with_suffix(".json")), replay)
        elif "tile_sample_height" in (read_metadata(path) if names else {}):
            yield Case(title, (path,), partial(_replay_with_config, replay_tiles, folder, path))


def worlds(names: Sequence[str]) -> list[int]:
    """Numbers of processes in a recording's names."""
    return sorted({int(match[1]) for name in names if (match := re.match(r"world(\d+)/", name))})
