"""Samples to batches, in worker processes."""

import os
import signal
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from multiprocessing import parent_process
from multiprocessing.connection import wait
from threading import Thread
from typing import Any, NamedTuple, Protocol

import torch
from torch.utils.data import DataLoader, Dataset

from sat.cogvideox.presets import TIME_FACTOR
from sat.conditioning.size import SIZE_KEYS
from sat.data import handover
from sat.data.quarantine import ReplacingDataset
from sat.errors import DataError, SatError


class PlannedPlace(NamedTuple):
    """One sample of a row that a plan made."""

    counter: int
    clip: int
    """Number in the dataset."""
    step: int
    """Optimizer step, 0 up."""
    place: int
    """Among the samples of that step."""
    num_samples: int
    """Of that step, on all ranks."""
    latent_frames: int
    """Of the clip as planned; what is longer is cut."""
    weight: float
    """Of the sample's loss in the sum over a row."""


class DataOrder(Protocol):
    """What a loader reads, e.g. a GlobalBatchSampler: batches of (sample counter, dataset index) or PlannedPlace."""

    seed: int
    """Also decides what replaces a bad clip."""

    def __iter__(self) -> Iterator[list[Any]]: ...


VIDEO_KEYS = ("pixels", "latents", "moments")
"""What a sample's video may come as."""


class CounterDataset(Dataset):
    """Reads (sample counter, dataset index): the item of that index, and its counter under `counter`."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, place: tuple[int, int] | PlannedPlace) -> dict[str, Any]:
        item = {**self.dataset[place[1]], "counter": place[0]}
        return cut_frames(item, place) if isinstance(place, PlannedPlace) else item


def cut_frames(item: dict[str, Any], planned: PlannedPlace) -> dict[str, Any]:
    """An item no longer than planned, with its place under `planned`."""
    return {**cut_to(item, planned.latent_frames), "planned": planned}


def cut_to(item: Mapping[str, Any], latent_frames: int) -> dict[str, Any]:
    """An item that comes to at most so many latent frames."""
    name = next(name for name in VIDEO_KEYS if name in item)
    limit = TIME_FACTOR * (latent_frames - 1) + 1 if name == "pixels" else latent_frames
    return {**item, name: item[name][:limit]}


def collate(samples: Sequence[Mapping[str, Any]], packed: bool = False) -> dict[str, Any]:
    """Samples -> one batch.

    - pixels, latents or moments: (b t c h w), whichever the samples have; packed: a list of (t c h w)
    - image: (b 1 3 h w), the first frame of clips that come as moments; packed: a list of (1 3 h w)
    - text_states: (b n x), where the captions' states come from a cache
    - counters: int64 (b,)
    - fps: float32 (b,); num_frames: int64 (b,), frames before padding
    - original_size_as_tuple, crop_coords_top_left, target_size_as_tuple: int64 (b, 2), those that all samples have
    - caption, key: lists; replaced, bad_key: lists, "" where the sample is the one that was drawn
    - of a mixture also set: a list of names
    - of planned rows also steps, places: lists; num_samples; weights: float64 (b,)

    Raises DataError where the samples differ in size.
    """
    video = next(name for name in VIDEO_KEYS if name in samples[0])
    if not packed and len({sample[video].shape for sample in samples}) > 1:
        sizes = "".join(f"\n  {sample['key']}: {tuple(sample[video].shape)}" for sample in samples)
        raise DataError(
            "the samples of one micro-batch differ in size (t c h w); use a micro-batch of 1, or make them equal with "
            f"size_mode: crop and short_clips: pad{sizes}"
        )
    tensors = [name for name in (video, "image") if name in samples[0]]
    return {
        **{name: own if packed else handover.stack(own) for name in tensors if (own := [one[name] for one in samples])},
        **(
            {"text_states": handover.stack([one["text_states"] for one in samples])}
            if "text_states" in samples[0]
            else {}
        ),
        "counters": torch.tensor([sample["counter"] for sample in samples], dtype=torch.int64),
        "fps": torch.tensor([sample["fps"] for sample in samples], dtype=torch.float32),
        "num_frames": torch.tensor([sample["num_frames"] for sample in samples], dtype=torch.int64),
        **{
            name: torch.tensor([sample[name] for sample in samples], dtype=torch.int64)
            for name in SIZE_KEYS
            if all(name in sample for sample in samples)
        },
        **{name: [sample[name] for sample in samples] for name in ("caption", "key", "replaced", "bad_key")},
        **({"set": [sample["set"] for sample in samples]} if "set" in samples[0] else {}),
        **_collate_plan([sample["planned"] for sample in samples if "planned" in sample]),
    }


def _collate_plan(planned: Sequence[PlannedPlace]) -> dict[str, Any]:
    if not planned:
        return {}
    return {
        "steps": [one.step for one in planned],
        "places": [one.place for one in planned],
        "num_samples": planned[0].num_samples,
        "weights": torch.tensor([one.weight for one in planned], dtype=torch.float64),
    }


class _Returning(Dataset):
    """A dataset that returns our errors as items: raised in a worker, their message would come out as a traceback."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, place: Any) -> dict[str, Any] | SatError:
        try:
            return self.dataset[place]
        except SatError as error:
            return error


def _collate_or_return(
    samples: Sequence[Mapping[str, Any] | SatError], packed: bool = False
) -> dict[str, Any] | SatError:
    error = next((sample for sample in samples if isinstance(sample, SatError)), None)
    if error is not None:
        return error
    try:
        return collate(samples, packed)  # type: ignore[arg-type]  # no errors among them
    except SatError as found:
        return found


class _RaisingLoader(DataLoader):
    """Raises, in the main process, what `_Returning` and `_collate_or_return` have returned."""

    def __iter__(self) -> Iterator[dict[str, Any]]:  # type: ignore[override]  # not torch's iterator itself
        # Keeps no batch: freeing a large one, 50 ms for 200 MB, would come in the next call as a wait for data.
        return map(_or_raise, super().__iter__())


def _or_raise(batch: dict[str, Any] | SatError) -> dict[str, Any]:
    if isinstance(batch, SatError):
        raise batch
    return batch


def build_loader(
    dataset: Any, sampler: DataOrder, num_workers: int, packed: bool = False, lengths: Sequence[int] | None = None
) -> DataLoader:
    """Batches of `collate`, in the sampler's order.

    dataset: map-style, e.g. SFTDataset, SyntheticLatents or a torch ConcatDataset of them. Bad clips are replaced (see
        ReplacingDataset); hand `bad_key` and `replaced` of each batch to a Quarantine.
    num_workers: processes that decode, two batches ahead each; 0 decodes in this process. They stay until the loader
        is deleted, and leave Ctrl-C and SIGTERM to this process, whose end ends them.
    packed: clips stay a list, of any sizes. lengths: tokens of each clip; what replaces a clip is no longer than it.
    """
    return _RaisingLoader(
        _Returning(CounterDataset(ReplacingDataset(dataset, sampler.seed, lengths))),
        batch_sampler=sampler,
        collate_fn=partial(_collate_or_return, packed=packed),
        num_workers=num_workers,
        prefetch_factor=2 if num_workers else None,
        persistent_workers=num_workers > 0,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=_start_worker,
        generator=torch.Generator(),  # the loader draws seeds for its workers; not from the global stream
    )


def read_in_workers(dataset: Dataset, order: Iterable[int], num_workers: int) -> Iterator[Any]:
    """The items of some numbers, read as they are and in that order, two for each worker ahead."""
    loader = _RaisingLoader(
        _Returning(dataset),
        batch_size=None,
        sampler=order,
        num_workers=num_workers,
        prefetch_factor=2 if num_workers else None,
        worker_init_fn=_start_worker,
        generator=torch.Generator(),
    )
    return iter(loader)


def _start_worker(worker_id: int) -> None:
    signal.set_wakeup_fd(-1)  # forked with that of the main process, which would take our signals for its own
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    main_process = parent_process()
    assert main_process is not None and main_process.pid is not None
    if hasattr(signal, "sigwaitinfo"):  # not on macOS
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # before any thread starts, which has the same mask
        Thread(target=_end_when_told, args=(main_process.pid,), daemon=True).start()
    Thread(target=_end_with, args=(main_process.sentinel,), daemon=True).start()


def _end_with(main_process: int) -> None:
    """End when the main process does. torch's workers look for it, too, but not if it was gone before they began to."""
    wait([main_process])
    os._exit(0)


def _end_when_told(main_process: int) -> None:
    """End at the main process' SIGTERM, and at no other's.

    Job schedulers send it to every process of a job, and the main one needs clips for the step after which it saves.
    """
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != main_process:
        pass
    os._exit(0)
