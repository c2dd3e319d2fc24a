"""Start ranks for tests: `run_ranks(fn, world, *args)` runs fn(rank, *args) in `world` gloo processes.

A fork server that has torch and DeepSpeed loaded starts them in a fraction of a second, and a file store never races
for a port. An error on any rank fails the test with that rank's traceback. `run_processes` starts them as a launcher
would, to meet by themselves.
"""

import datetime
import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from sat.helpers import get_free_port

PRELOAD = [
    *("torch", "torch.distributed", "deepspeed", "deepspeed.runtime.zero.muon.muon_optimizer"),
    *("deepspeed.module_inject.auto_ep_layer", "sat.training.loop", "sat.cogvideox.transformer", "sat.data.synthetic"),
    *("pytest", "hypothesis.strategies", "tools.make_tiny_t5", "torch.utils.tensorboard"),
]
"""What ranks import, directly or with the file of the test: seconds of work, which the fork server does once."""
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "TORCHDYNAMO_DISABLE": "1"}


def _context() -> Any:
    os.environ.update(ENVIRONMENT)  # the server reads it when it starts
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    return context


def _rank(rank: int, world: int, store: str, queue: Any, fn: Callable, args: tuple) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world))
    try:
        timeout = datetime.timedelta(seconds=60)
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world, timeout=timeout)
        try:
            result = fn(rank, *args)
            dist.barrier()
        finally:
            dist.destroy_process_group()
        queue.put((rank, result, None))
    except BaseException:
        queue.put((rank, None, traceback.format_exc()))
        raise


def _process(number: int, environment: Mapping[str, str], queue: Any, fn: Callable, args: tuple) -> None:
    import torch

    torch.set_num_threads(1)
    os.environ.update(environment)
    try:
        queue.put((number, fn(*args), None))
    except BaseException:
        queue.put((number, None, traceback.format_exc()))
        raise


def run_ranks(fn: Callable, world: int, *args: Any, timeout: float = 120.0) -> list[Any]:
    """Results of all ranks, in order of rank. Values must be picklable; `fn` must be a module's function."""
    context = _context()
    with tempfile.TemporaryDirectory() as folder:
        queue = context.Queue()
        processes = [
            context.Process(target=_rank, args=(rank, world, f"{folder}/store", queue, fn, args), daemon=True)
            for rank in range(world)
        ]
        return _results(processes, queue, timeout)


def run_processes(
    fn: Callable, environments: Sequence[Mapping[str, str]], *args: Any, timeout: float = 120.0
) -> list[Any]:
    """Results of fn(*args) in one process for each environment, as a launcher starts them: without a process group."""
    context = _context()
    queue = context.Queue()
    processes = [
        context.Process(target=_process, args=(number, environment, queue, fn, args), daemon=True)
        for number, environment in enumerate(environments)
    ]
    return _results(processes, queue, timeout)


def launched(world: int, ranks: Iterable[int] | None = None) -> list[dict[str, str]]:
    """Environments as torchrun makes them on one machine, for all ranks or some."""
    common = {
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(get_free_port()),
    }
    return [
        {**common, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in (range(world) if ranks is None else ranks)
    ]


def _results(processes: Sequence[Any], queue: Any, timeout: float) -> list[Any]:
    for process in processes:
        process.start()
    try:
        outcomes = [queue.get(timeout=timeout) for _ in processes]
    finally:
        for process in processes:
            process.join(timeout=10)
            if process.is_alive():
                process.kill()
    outcomes.sort(key=lambda outcome: outcome[0])
    errors = [f"rank {rank}:\n{error}" for rank, _, error in outcomes if error]
    if errors:
        raise AssertionError("\n".join(errors))
    return [result for _, result, _ in outcomes]
