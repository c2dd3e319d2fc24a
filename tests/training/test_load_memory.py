"""Loading one file of weights takes the memory of the rank's own share and little more, at any layout.

Counted is anonymous memory: pages of the mapped file are the kernel's to drop. Little more is one parameter and its
cut, so the networks have many layers or small ones: the largest parameter of 5B is 0.7 % of it, of these 2 and 4 %.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.side_by_side import resident
from sat.config import instantiate_from_config
from sat.mpu.state import ParallelState, set_parallel_state
from sat.training.checkpoint import fit_weights, load_parts
from sat.weights.finding import open_checkpoint
from tests.cogvideox.tiny import network_config
from tests.ranks import run_ranks
from tests.training.crashes import memory_folder

LORA = {"lora_config": {"target": "sat.model.finetune.lora2.LoraMixin", "params": {"r": 4}}}
MOST = 1.2
"""Times the rank's share of the weights."""


class Peak:
    """The most anonymous memory of this process in a `with` block beyond that at its start, MiB."""

    def __enter__(self) -> "Peak":
        self.before = self.most = resident("RssAnon")
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._look)
        self._thread.start()
        return self

    def _look(self) -> None:
        while not self._done.wait(0.001):
            self.most = max(self.most, resident("RssAnon"))

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()
        self.most = max(self.most, resident("RssAnon"))

    @property
    def added(self) -> float:
        return self.most - self.before


def config(width: int, layers: int, **more: Any) -> dict[str, Any]:
    sizes = {"hidden_size": width, "num_attention_heads": 4, "time_embed_dim": 64}
    found = network_config("5B", num_layers=layers, extra_modules=more.get("modules"), **sizes)
    found["params"]["modules"]["pos_embed_config"]["params"]["hidden_size_head"] = width // 4
    return found


def write_file(rank: int, file: str, width: int, layers: int) -> float:
    """One file with the weights of a whole network, MiB."""
    network = instantiate_from_config(config(width, layers))
    torch.save({"module": network.state_dict(), "iteration": 1}, file)
    return Path(file).stat().st_size / 2**20


def load(rank: int, file: str, width: int, layers: int, modules: Any) -> tuple[float, float]:
    """(MiB that loading adds at its peak, the network among it; MiB of this rank's share)."""
    world = torch.distributed.get_world_size()
    parallel = ParallelState.build(tp=world)
    set_parallel_state(parallel)
    torch.zeros(4, 4) @ torch.zeros(4, 4)  # what torch takes at its first use is not the loader's
    with Peak() as peak, open_checkpoint(file) as checkpoint:
        network = instantiate_from_config(config(width, layers, modules=modules))
        is_adapter = (lambda name: "matrix_" in name) if modules else (lambda name: False)
        fit_weights(network, load_parts(checkpoint), file, str, is_adapter, parallel)
    return peak.added, sum(value.nbytes for value in network.state_dict().values()) / 2**20


@contextmanager
def whole_file(tmp_path: Path, width: int, layers: int) -> Iterator[tuple[str, float]]:
    with memory_folder(tmp_path) as folder:
        file = str(folder / "weights.pt")
        (size,) = run_ranks(write_file, 1, file, width, layers)
        yield file, size


def check(tmp_path: Path, width: int, layers: int) -> None:
    with whole_file(tmp_path, width, layers) as (file, size):
        for world, modules in ((1, None), (2, None), (1, LORA)):
            for added, share in run_ranks(load, world, file, width, layers, modules, timeout=280.0):
                print(
                    f"file {size:.0f} MiB, tp {world}{', LoRA' * bool(modules)}: share {share:.0f}, added {added:.0f}"
                )
                assert share == pytest.approx(size / world, rel=0.1)
                assert 0.9 * share < added <= MOST * share


def test_a_file_of_200_mb(tmp_path: Path) -> None:
    check(tmp_path, 512, 16)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_file_of_the_machine_s_scale(tmp_path: Path) -> None:
    check(tmp_path, 2048, 9)
