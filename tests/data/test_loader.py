"""Batches, worker processes, Ctrl-C."""

import os
import signal
import subprocess
import sys
import time
import weakref

import psutil
import pytest
import torch

from sat.data.dataset import SFTDataset
from sat.data.loader import CounterDataset, build_loader, collate
from sat.data.quarantine import ReplacingDataset
from sat.data.sampler import GlobalBatchSampler, ShuffledEpochs
from sat.data.synthetic import COLOURS, SyntheticImages, SyntheticLatents
from sat.errors import DataError


def sampler_for(dataset, **changes):
    settings = {"global_batch_size": 4, "micro_batch_size": 2, "end_step": 3}
    return GlobalBatchSampler(ShuffledEpochs(len(dataset), 3), **{**settings, **changes})


@pytest.fixture
def clips(make_set):
    return SFTDataset(make_set(5), video_size=(32, 40), fps=8, max_num_frames=9)


def test_a_batch(clips):
    dataset = CounterDataset(ReplacingDataset(clips))
    batch = collate([dataset[100, 3], dataset[101, 0]])
    assert batch["pixels"].shape == (2, 9, 3, 32, 40) and batch["counters"].tolist() == [100, 101]
    assert batch["caption"] == ["clip number 3", "clip number 0"]
    assert batch["key"] == ["set/videos/3.mp4", "set/videos/0.mp4"]
    assert batch["replaced"] == batch["bad_key"] == ["", ""]
    assert batch["fps"].tolist() == [8, 8] and batch["num_frames"].tolist() == [9, 9]
    assert batch["original_size_as_tuple"].tolist() == [[32, 40], [32, 40]]
    assert "original_size_as_tuple" not in collate([dataset[1, 1], _without_sizes(dataset[0, 0])])


def _without_sizes(sample):
    return {key: value for key, value in sample.items() if not key.startswith("original_size")}


@pytest.mark.parametrize("num_workers", [0, 2])
def test_workers_change_nothing(clips, num_workers):
    sampler = sampler_for(clips)
    batches = list(build_loader(clips, sampler, num_workers))
    assert [batch["counters"].tolist() for batch in batches] == [[2 * step, 2 * step + 1] for step in range(6)]
    for batch, places in zip(batches, sampler):
        assert batch["key"] == [clips.index[index].key for _, index in places]


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_batch_that_is_let_go_is_freed_before_the_next_is_asked_for(clips, num_workers):
    batches = iter(build_loader(clips, sampler_for(clips), num_workers))
    batch = next(batches)
    pixels = weakref.ref(batch["pixels"])
    assert pixels() is not None
    del batch
    assert pixels() is None
    assert next(batches)["counters"].tolist() == [2, 3]


def test_making_a_loader_leaves_the_global_random_stream_alone(clips):
    torch.manual_seed(0)
    state = torch.get_rng_state()
    next(iter(build_loader(clips, sampler_for(clips), 0)))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_bad_clips_are_replaced_alike_at_any_number_of_workers(make_set, num_workers):
    folder = make_set(5)
    content = (folder / "videos" / "2.mp4").read_bytes()
    (folder / "videos" / "2.mp4").write_bytes(content[: len(content) // 2])
    dataset = SFTDataset(folder, video_size=(32, 40), fps=8, max_num_frames=9)
    sampler = sampler_for(dataset, end_step=5)
    expected = [ReplacingDataset(dataset, sampler.seed)[index] for places in sampler for _, index in places]
    found = [
        (key, bad_key, replaced)
        for batch in build_loader(dataset, sampler, num_workers)
        for key, bad_key, replaced in zip(batch["key"], batch["bad_key"], batch["replaced"])
    ]
    assert found == [(item["key"], item["bad_key"], item["replaced"]) for item in expected]
    bad = [item for item in found if item[1]]
    assert len(bad) == 4 and all(item[1] == "set/videos/2.mp4" and "was cut short" in item[2] for item in bad)


def test_an_error_in_a_worker_comes_through(make_set):
    folder = make_set(2)
    for path in (folder / "videos").iterdir():
        path.write_bytes(b"")
    dataset = SFTDataset(folder, video_size=(32, 40), fps=8, max_num_frames=9)
    with pytest.raises(DataError, match=r"nor any of the 1 tried in its place"):
        list(build_loader(dataset, sampler_for(dataset), 1))


def test_samples_of_different_size_are_refused_with_their_names(make_set):
    dataset = CounterDataset(ReplacingDataset(SFTDataset(make_set(1), (64, 64), 8, 9)))
    sample = dataset[0, 0]
    other = {**sample, "key": "set/videos/9.mp4", "pixels": sample["pixels"][:5]}
    with pytest.raises(DataError, match=r"use a micro-batch of 1, or .*size_mode: crop") as caught:
        collate([sample, other])
    assert str(caught.value).splitlines()[1:] == [
        "  set/videos/0.mp4: (9, 3, 64, 64)",
        "  set/videos/9.mp4: (5, 3, 64, 64)",
    ]


def test_synthetic_latents():
    dataset = SyntheticLatents(num_samples=64, num_frames=3, channels=16, height=4, width=6)
    batches = list(build_loader(dataset, sampler_for(dataset, end_step=16), 0))
    latents = torch.cat([batch["latents"] for batch in batches])
    assert latents.shape == (64, 3, 16, 4, 6) and "pixels" not in batches[0]
    assert 0.7 < latents.std() < 1.3
    assert len({caption for batch in batches for caption in batch["caption"]}) == 8
    assert len(set(dataset[5]["latents"].flatten().tolist())) > 100
    longer = SyntheticLatents(10**9, 3, 16, 4, 6)
    torch.testing.assert_close(longer[5]["latents"], dataset[5]["latents"], rtol=0, atol=0)


def test_a_synthetic_image_shows_its_caption_in_the_middle():
    images = SyntheticImages(40, 32, 48)
    assert torch.equal(images[3]["pixels"], SyntheticImages(4, 32, 48)[3]["pixels"])
    assert {images[index]["caption"].split()[1] for index in range(40)} == set(COLOURS)
    for index in range(40):
        sample = images[index]
        assert sample["pixels"].shape == (1, 3, 32, 48)
        assert tuple(sample["pixels"][0, :, 16, 24].tolist()) == pytest.approx(COLOURS[sample["caption"].split()[1]])
        assert sample["pixels"][0, :, 0, 0].tolist() == pytest.approx([-0.6] * 3)
    with pytest.raises(IndexError, match="sample 40 of 40"):
        images[40]


def test_a_blob_moves_where_its_caption_says():
    dataset = SyntheticLatents(40, num_frames=5, channels=4, height=16, width=16)
    for index in range(40):
        sample = dataset[index]
        weight = sample["latents"].abs().sum(1)  # t h w
        rows = (weight.sum(2) * torch.arange(16.0)).sum(1) / weight.sum((1, 2))
        columns = (weight.sum(1) * torch.arange(16.0)).sum(1) / weight.sum((1, 2))
        moved = {"down": rows[-1] - rows[0], "right": columns[-1] - columns[0]}
        moved |= {"up": -moved["down"], "left": -moved["right"]}
        assert sample["caption"].split()[-1] == max(moved, key=lambda name: moved[name])


LOOP = """
import os, sys, time
from sat.data.loader import build_loader
from sat.data.sampler import GlobalBatchSampler, ShuffledEpochs
from sat.data.synthetic import COLOURS, SyntheticImages, SyntheticLatents

dataset = SyntheticLatents(100, 3, 4, 4, 4)
loader = build_loader(dataset, GlobalBatchSampler(ShuffledEpochs(100, 0), global_batch_size=2, micro_batch_size=2), 2)
for batch in loader:
    print(os.getpid(), flush=True)
    time.sleep(0.01)
"""


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_workers_end_with_the_main_process(how):
    """Ctrl-C reaches the whole process group: the main process alone reports it, and no worker stays."""
    process = subprocess.Popen(
        [sys.executable, "-c", LOOP], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    assert process.stdout is not None
    process.stdout.readline()
    workers = psutil.Process(process.pid).children(recursive=True)
    assert len(workers) >= 2
    if how == signal.SIGINT:
        os.killpg(process.pid, how)
    else:
        process.kill()
    _, errors = process.communicate(timeout=30)
    gone, alive = psutil.wait_procs(workers, timeout=30)
    assert not alive and len(gone) == len(workers)
    if how == signal.SIGINT:
        assert errors.count("KeyboardInterrupt") == 1, errors


LATE = """\
import time
from sat.data import loader

start = loader._start_worker
loader._start_worker = lambda number: (time.sleep(2 * number), start(number))
"""


def test_a_worker_that_begins_after_the_main_process_was_killed_ends():
    command = [sys.executable, "-c", LATE + LOOP]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert process.stdout is not None
    process.stdout.readline()  # the first worker's batch, while the second still sleeps
    process.kill()
    process.communicate(timeout=30)  # returns when no worker holds the pipe


def test_workers_end_when_the_loader_goes(clips):
    others = psutil.Process().children(recursive=True)  # such as the server that other tests fork ranks from
    loader = build_loader(clips, sampler_for(clips, end_step=None), 2)
    batches = iter(loader)
    next(batches)
    workers = [process for process in psutil.Process().children(recursive=True) if process not in others]
    assert len(workers) >= 2
    del batches, loader
    deadline = time.monotonic() + 20
    while any(worker.is_running() and worker.status() != psutil.STATUS_ZOMBIE for worker in workers):
        assert time.monotonic() < deadline
        time.sleep(0.05)
