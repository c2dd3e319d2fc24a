"""Launchers' environment variables, the meeting of the ranks, and what is said when some do not come."""

import os
from collections.abc import Mapping

import pytest
import torch
import torch.distributed as dist

from sat.errors import CommunicationError, LayoutError
from sat.mpu import launch as launch_module
from sat.mpu.launch import first_host, joined, meeting_point, read_launch
from sat.mpu.rollcall import Report, host_of, name_ranks
from tests.ranks import launched, run_processes

PREFIXES = ("RANK", "WORLD_SIZE", "LOCAL_", "MASTER_", "SLURM_", "OMPI_", "TORCHELASTIC_", "CROSS_")

SRUN = {
    "SLURM_PROCID": "5",
    "SLURM_NTASKS": "8",
    "SLURM_LOCALID": "1",
    "SLURM_NTASKS_PER_NODE": "4",
    "SLURM_STEP_ID": "2",
    "SLURM_JOB_ID": "41234",
    "SLURM_STEP_NODELIST": "node[03-04]",
}
MPIRUN = {
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}
TORCHRUN = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "x"}


def use(monkeypatch: pytest.MonkeyPatch, environment: Mapping[str, str]) -> None:
    """Let the launcher's variables be these and no others."""
    for name in list(os.environ):
        if name.startswith(PREFIXES):
            monkeypatch.delenv(name)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, (0, 1, 0, None)),
        (TORCHRUN, (3, 4, 1, 2)),
        ({"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_SIZE": "2", "CROSS_RANK": "0"}, (1, 2, 1, 2)),
        (SRUN, (5, 8, 1, 4)),
        (MPIRUN, (1, 2, 1, 2)),
        ({**SRUN, **MPIRUN}, (1, 2, 1, 2)),  # mpirun within a Slurm job: Slurm counts mpirun's own helpers
        ({**SRUN, **TORCHRUN}, (3, 4, 1, 2)),  # srun starts one torchrun on each machine
        ({name: SRUN[name] for name in SRUN if name != "SLURM_STEP_ID"}, (0, 1, 0, None)),
        ({**SRUN, "SLURM_PROCID": "0", "SLURM_NTASKS": "1", "RANK": "1", "WORLD_SIZE": "2"}, (1, 2, 0, None)),
    ],
    ids=[
        "alone",
        "torchrun",
        "deepspeed",
        "srun",
        "mpirun",
        "mpirun in slurm",
        "torchrun by srun",
        "batch script, no srun",
        "by hand in a shell of srun",
    ],
)
def test_launchers_are_understood(
    monkeypatch: pytest.MonkeyPatch, environment: Mapping[str, str], expected: tuple[int, int, int, int | None]
) -> None:
    use(monkeypatch, environment)
    launch = read_launch()
    assert (launch.rank, launch.world_size, launch.local_rank, launch.local_size) == expected


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        (
            {**SRUN, "RANK": "0", "WORLD_SIZE": "8"},
            "RANK=0 and WORLD_SIZE=8 contradict SLURM_PROCID=5 and SLURM_NTASKS=8; unset RANK and WORLD_SIZE",
        ),
        (
            {**MPIRUN, "RANK": "1", "WORLD_SIZE": "4"},
            "RANK=1 and WORLD_SIZE=4 contradict OMPI_COMM_WORLD_RANK=1 and OMPI_COMM_WORLD_SIZE=2",
        ),
        ({"RANK": "0"}, "only one of the environment variables RANK and WORLD_SIZE is set"),
        ({"RANK": "one", "WORLD_SIZE": "2"}, "the environment variable RANK is 'one'; it must be a number"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK=2 and WORLD_SIZE=2: ranks count from 0 to the size less 1"),
    ],
)
def test_contradictions_are_refused(
    monkeypatch: pytest.MonkeyPatch, environment: Mapping[str, str], message: str
) -> None:
    use(monkeypatch, environment)
    with pytest.raises(LayoutError, match=message):
        read_launch()


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        (SRUN, ("node03", 20000 + (41234 + 2 * 1009) % 10000)),
        ({**SRUN, "MASTER_PORT": "1234"}, ("node03", 1234)),
        ({**SRUN, "MASTER_ADDR": "10.0.0.7"}, ("10.0.0.7", 29500)),
        (MPIRUN, ("127.0.0.1", 29500)),
        ({**SRUN, **MPIRUN}, ("127.0.0.1", 29500)),
        ({**TORCHRUN, "MASTER_ADDR": "10.0.0.7", "MASTER_PORT": "1234"}, ("10.0.0.7", 1234)),
    ],
)
def test_where_the_ranks_meet(
    monkeypatch: pytest.MonkeyPatch, environment: Mapping[str, str], expected: tuple[str, int]
) -> None:
    use(monkeypatch, environment)
    assert meeting_point(read_launch()) == expected


def test_several_machines_under_mpirun_need_an_address(monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, {**MPIRUN, "OMPI_COMM_WORLD_SIZE": "4"})
    with pytest.raises(LayoutError, match=r"MASTER_ADDR is not set.*mpirun: -x MASTER_ADDR="):
        meeting_point(read_launch())


@pytest.mark.parametrize(
    ("nodes", "expected"),
    [
        ("gpu1", "gpu1"),
        ("gpu1,gpu2", "gpu1"),
        ("node[03-07,9],gpu1", "node03"),
        ("node[10,20]", "node10"),
        ("rack[1-2]n[04-05]-ib,x", "rack1n04-ib"),
    ],
)
def test_firsthost_of_a_slurm_list(nodes: str, expected: str) -> None:
    assert first_host(nodes) == expected


@pytest.mark.parametrize(
    ("visible", "environment", "expected"),
    [
        (4, {**TORCHRUN, "LOCAL_RANK": "3"}, "cuda:3"),
        (1, {**SRUN, "SLURM_LOCALID": "3"}, "cuda:0"),  # srun --gpus-per-task=1
    ],
)
def test_the_own_gpu(
    monkeypatch: pytest.MonkeyPatch, visible: int, environment: Mapping[str, str], expected: str
) -> None:
    use(monkeypatch, environment)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: visible)
    assert str(read_launch().device) == expected


def test_two_processes_do_not_share_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, TORCHRUN)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(LayoutError, match="local rank 1 has no GPU of its own: this machine shows 1"):
        read_launch()


def join(minutes: float) -> tuple[str, list[str]]:
    """What joining says: an error, or the machines of all ranks and the sum of their ranks."""
    try:
        with joined(minutes) as launch:
            total = torch.tensor(float(launch.rank))
            dist.all_reduce(total)
            return str(int(total)), list(launch.hosts)
    except CommunicationError as error:
        return str(error), []


@pytest.mark.parametrize("launcher", ["torchrun", "srun", "mpirun"])
def test_ranks_meet_under_every_launcher(launcher: str) -> None:
    environments = launched(3)
    if launcher == "srun":
        common = {**SRUN, "SLURM_NTASKS": "3", "SLURM_STEP_NODELIST": "localhost", "SLURM_JOB_ID": str(os.getpid())}
        environments = [{**common, "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)} for rank in range(3)]
    if launcher == "mpirun":
        port = environments[0]["MASTER_PORT"]
        common = {"OMPI_COMM_WORLD_SIZE": "3", "OMPI_COMM_WORLD_LOCAL_SIZE": "3", "MASTER_PORT": port}
        environments = [
            {**common, "OMPI_COMM_WORLD_RANK": str(rank), "OMPI_COMM_WORLD_LOCAL_RANK": str(rank)} for rank in range(3)
        ]
    for total, hosts in run_processes(join, environments, 0.5):
        assert total == "3"
        assert len(hosts) == 3


def test_a_missing_rank_is_named() -> None:
    for message, _ in run_processes(join, launched(3, ranks=[0, 1]), 0.1):
        assert message.startswith(
            f"rank 2 of 3 on {os.uname().nodename} did not report in within 6 s: see what the log"
        )


@pytest.mark.slow
def test_a_missing_rank_0_is_named() -> None:
    environments = launched(3, ranks=[1, 2])
    for rank, (message, _) in enumerate(run_processes(join, environments, 0.05), start=1):
        port = environments[0]["MASTER_PORT"]
        assert message.startswith(f"rank {rank} cannot reach rank 0 at MASTER_ADDR 127.0.0.1, MASTER_PORT {port} (")
        assert "no firewall lies between them" in message


def test_a_port_that_is_taken_is_named() -> None:
    (environment,) = launched(2, ranks=[0])
    listener = dist.TCPStore("127.0.0.1", int(environment["MASTER_PORT"]), is_master=True, wait_for_workers=False)
    ((message, _),) = run_processes(join, [environment], 0.05)
    assert f"rank 0 cannot open port {listener.port} on 127.0.0.1" in message
    assert "give a free one in MASTER_PORT" in message


def join_over_no_network() -> str:
    os.environ["GLOO_SOCKET_IFNAME"] = "none0"
    return join(0.2)[0]


def test_ranks_that_meet_but_cannot_connect_hear_of_the_network() -> None:
    for rank, message in enumerate(run_processes(join_over_no_network, launched(2))):
        assert message.startswith(f"rank {rank} on {os.uname().nodename}: all ranks have reported in, but they cannot")
        assert launch_module.NETWORK_HINT in message


def test_names_of_ranks() -> None:
    assert name_ranks([3]) == "rank 3"
    assert name_ranks([1, 2, 7]) == "ranks 1, 2 and 7"
    assert name_ranks(list(range(64))) == "64 ranks (0, 1, 2, 3, 4, 5, 6, 7, 8, 9, ...)"


def test_machine_of_a_silent_rank() -> None:
    reports = [Report(0, "a", 0, 2), Report(3, "b", 1, 2), Report(4, "c", 0, None)]
    assert [host_of(rank, reports) for rank in (1, 2, 5)] == ["a", "b", None]
