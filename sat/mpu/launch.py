"""Joining a job: which process this is, on which device, and the process group that connects it to the others.

Understands torchrun, deepspeed, Slurm's srun and Open MPI's mpirun by the environment variables that they set.
"""

import datetime
import logging
import os
import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist

from sat.errors import CommunicationError, LayoutError
from sat.mpu.rollcall import Report, call_roll, linger
from sat.mpu.state import ParallelState, set_parallel_state

log = logging.getLogger(__name__)

DEFAULT_PORT = 29500

NETWORK_HINT = (
    "where a machine has several networks, name the one that reaches the others (see `ip addr`) in "
    "GLOO_SOCKET_IFNAME on CPUs, in NCCL_SOCKET_IFNAME on GPUs, on every machine"
)


@dataclass(frozen=True)
class Launch:
    """This process within its job."""

    rank: int
    local_rank: int
    world_size: int
    device: torch.device
    local_size: int | None = None
    """Processes of the job on this machine, where the launcher says."""
    store: dist.Store | None = None
    """What the processes of the job can all write to and read from, once they have met."""
    hosts: tuple[str, ...] = ()
    """The machine of each rank, once they have met."""

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which speaks and writes for all."""
        return self.rank == 0


# --- what launchers say ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Place:
    """Rank and sizes as one launcher's variables have them."""

    rank: int
    world_size: int
    local_rank: int
    local_size: int | None
    source: str
    """The variables of rank and size with their values, for messages."""


@dataclass(frozen=True)
class _Names:
    rank: str
    world_size: str
    local_rank: str
    local_size: tuple[str, ...]

    def read(self) -> _Place | None:
        """What the variables say; None where rank or size is not set."""
        rank, world_size = _number(self.rank), _number(self.world_size)
        if rank is None or world_size is None:
            return None
        local_size = next((size for size in map(_number, self.local_size) if size is not None), None)
        source = f"{self.rank}={rank} and {self.world_size}={world_size}"
        return _Place(rank, world_size, _number(self.local_rank) or 0, local_size, source)


_TORCH = _Names("RANK", "WORLD_SIZE", "LOCAL_RANK", ("LOCAL_WORLD_SIZE", "LOCAL_SIZE"))
_OPEN_MPI = _Names(
    "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK", ("OMPI_COMM_WORLD_LOCAL_SIZE",)
)
_SLURM = _Names("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", ("SLURM_NTASKS_PER_NODE",))

_STARTED_BY_TORCHRUN_OR_DEEPSPEED = ("TORCHELASTIC_RUN_ID", "CROSS_RANK")


def _number(name: str) -> int | None:
    value = os.environ.get(name)
    if value is None:
        return None
    try:
        return int(value)
    except ValueError as error:
        raise LayoutError(f"the environment variable {name} is '{value}'; it must be a number") from error


def _scheduler() -> _Place | None:
    """What mpirun or srun says. Under both, mpirun is the inner one; outside srun, Slurm's variables name no task."""
    return _OPEN_MPI.read() or (_SLURM.read() if "SLURM_STEP_ID" in os.environ else None)


def _read_place() -> _Place:
    """This process' place in its job; that of a lone process where no launcher speaks."""
    if ("RANK" in os.environ) != ("WORLD_SIZE" in os.environ):
        raise LayoutError(
            "only one of the environment variables RANK and WORLD_SIZE is set; start with torchrun or deepspeed"
        )
    own, scheduler = _TORCH.read(), _scheduler()
    if own is None:
        return scheduler or _Place(0, 1, _number("LOCAL_RANK") or 0, None, "")
    # A scheduler that has started one task has started a shell, or a launcher like those that say so.
    is_nested = any(name in os.environ for name in _STARTED_BY_TORCHRUN_OR_DEEPSPEED)
    if scheduler is None or scheduler.world_size == 1 or is_nested:
        return own
    if (own.rank, own.world_size) != (scheduler.rank, scheduler.world_size):
        raise LayoutError(
            f"{own.source} contradict {scheduler.source}; unset RANK and WORLD_SIZE, the others are understood"
        )
    return own


def read_launch() -> Launch:
    """Rank and world size as the launcher has set them; one process alone where there is none."""
    place = _read_place()
    if not 0 <= place.rank < place.world_size:
        raise LayoutError(f"{place.source}: ranks count from 0 to the size less 1; start with torchrun or deepspeed")
    return Launch(place.rank, place.local_rank, place.world_size, _own_device(place.local_rank), place.local_size)


def _own_device(local_rank: int) -> torch.device:
    """The process' GPU, or the CPU. A scheduler may show each process nothing but its own GPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    count = torch.cuda.device_count()
    if count == 1 and _scheduler() is not None and "RANK" not in os.environ:
        return torch.device("cuda", 0)
    if local_rank >= count:
        raise LayoutError(
            f"local rank {local_rank} has no GPU of its own: this machine shows {count}; "
            "start as many processes as there are GPUs"
        )
    return torch.device("cuda", local_rank)


def meeting_point(launch: Launch) -> tuple[str, int]:
    """Address and port of rank 0, where the others go: MASTER_ADDR and MASTER_PORT, or what the scheduler implies."""
    port = _number("MASTER_PORT")
    if "MASTER_ADDR" in os.environ:
        return os.environ["MASTER_ADDR"], DEFAULT_PORT if port is None else port
    nodes = os.environ.get("SLURM_STEP_NODELIST")
    if _OPEN_MPI.read() is None and nodes:
        job, step = _number("SLURM_JOB_ID") or 0, _number("SLURM_STEP_ID") or 0
        return first_host(nodes), 20000 + (job + 1009 * step) % 10000 if port is None else port
    if launch.local_size == launch.world_size:
        return "127.0.0.1", DEFAULT_PORT if port is None else port
    raise LayoutError(
        "MASTER_ADDR is not set, and nothing else says where rank 0 runs; set it to that machine's name or address "
        "on all of them (mpirun: -x MASTER_ADDR=$(hostname) on the first machine)"
    )


def first_host(nodes: str) -> str:
    """The first machine of a list in Slurm's short form: `node[03-07,9],gpu1` -> node03."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])*", nodes)
    assert first is not None
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", first.group())


# --- meeting ---------------------------------------------------------------------------------------------------------


@contextmanager
def joined(timeout_minutes: float = 30.0) -> Iterator[Launch]:
    """Join the job's process group (nccl on GPUs, gloo on CPUs) for the time of a `with` block.

    A process started alone gets a group of one, so that the same code serves every launcher. timeout_minutes: how long
    to wait for the others, here and in every collective. Raises CommunicationError where ranks are missing.
    """
    launch = read_launch()
    timeout = datetime.timedelta(minutes=timeout_minutes)
    if launch.device.type == "cuda":
        torch.cuda.set_device(launch.device)
        # When a collective times out, torch writes the last ones of all ranks to files, see docs/multi_node.md.
        os.environ.setdefault("TORCH_FR_BUFFER_SIZE", "2000")
        os.environ.setdefault("TORCH_NCCL_TRACE_BUFFER_SIZE", "2000")  # the name before torch 2.9
        os.environ.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "1")
    else:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed looks for a GPU and warns
    if launch.world_size == 1:
        launch = replace(launch, store=dist.HashStore(), hosts=(socket.gethostname(),))
    else:
        store = _open_store(launch, timeout)
        own = Report(launch.rank, socket.gethostname(), launch.local_rank, launch.local_size)
        launch = replace(launch, store=store, hosts=call_roll(store, own, launch.world_size, timeout.total_seconds()))
    _connect(launch, timeout)
    try:
        yield launch
    finally:
        set_parallel_state(ParallelState())  # its groups go
        if dist.is_initialized():
            dist.destroy_process_group()


def _open_store(launch: Launch, timeout: datetime.timedelta) -> dist.Store:
    """Reach the store through which the processes meet. Rank 0 holds it, or torchrun's agent where it says so."""
    address, port = meeting_point(launch)
    local_rank = launch.local_rank if launch.device.index is None else launch.device.index
    own = {"RANK": launch.rank, "WORLD_SIZE": launch.world_size, "LOCAL_RANK": local_rank}
    # DeepSpeed reads these, whatever the launcher.
    os.environ.update({name: str(value) for name, value in own.items()}, MASTER_ADDR=address, MASTER_PORT=str(port))
    is_agents = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    try:
        store = dist.TCPStore(
            address,
            port,
            is_master=launch.rank == 0 and not is_agents,
            timeout=timeout,
            wait_for_workers=False,
        )
    except (RuntimeError, ValueError) as error:
        raise CommunicationError(_unreachable(launch, address, port, error)) from error
    return dist.PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)


def _unreachable(launch: Launch, address: str, port: int, error: Exception) -> str:
    reason = str(error).splitlines()[0]
    if launch.rank == 0:
        return (
            f"rank 0 cannot open port {port} on {address} ({reason}); give a free one in MASTER_PORT on all machines, "
            "and rank 0's own machine in MASTER_ADDR"
        )
    return (
        f"rank {launch.rank} cannot reach rank 0 at MASTER_ADDR {address}, MASTER_PORT {port} ({reason}); check that "
        "rank 0 was started, that all machines name the same two, and that no firewall lies between them"
    )


def _connect(launch: Launch, timeout: datetime.timedelta) -> None:
    """Connect every process with every other."""
    os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed insists on it
    backend = "nccl" if launch.device.type == "cuda" else "gloo"
    try:
        dist.init_process_group(
            backend, store=launch.store, rank=launch.rank, world_size=launch.world_size, timeout=timeout
        )
        dist.barrier(device_ids=[launch.device.index] if launch.device.type == "cuda" else None)
    except RuntimeError as error:
        linger(launch.rank)
        raise CommunicationError(
            f"rank {launch.rank} on {launch.hosts[launch.rank]}: all ranks have reported in, but they cannot connect "
            f"with each other by {backend} ({str(error).splitlines()[0]}); {NETWORK_HINT}"
        ) from error
