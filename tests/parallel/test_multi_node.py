"""The recipes of docs/multi_node.md, word for word, on two simulated machines."""

import os
import re
import shutil
import stat
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pytest

from sat.helpers import get_free_port
from tests.tiny import ROOT, TINY

pytestmark = pytest.mark.slow

RECIPES = dict(re.findall(r"```bash\n# ([^\n]*)\n(.*?)```", (ROOT / "docs" / "multi_node.md").read_text(), re.DOTALL))
SECONDS = 240.0
LAUNCHERS = ("RANK", "WORLD_SIZE", "LOCAL_", "MASTER_", "SLURM_", "OMPI_", "TORCHELASTIC_", "CROSS_")

STAND_IN = """#!{python}
# Starts what follows the options once for each task, with the variables that {name} sets.
import os, re, subprocess, sys
words, options = sys.argv[1:], {{}}
while words[0].startswith("-"):
    word = words.pop(0)
    if word == "-x":
        key, value = words.pop(0).split("=")
        os.environ[key] = value
    elif "=" not in word:
        options[word] = int(words.pop(0))
tasks = []
{body}
for environment in environments:
    tasks.append(subprocess.Popen(words, env={{**os.environ, **{{k: str(v) for k, v in environment.items()}}}}))
sys.exit(max(task.wait() for task in tasks))
"""
SRUN = """
nodes, each = options["--nodes"], options["--ntasks-per-node"]
environments = [
    dict(SLURM_PROCID=node * each + task, SLURM_LOCALID=task, SLURM_NTASKS=nodes * each, SLURM_NTASKS_PER_NODE=each,
         SLURM_NODEID=node, SLURM_STEP_ID=0, SLURM_JOB_ID=os.getpid(), SLURM_STEP_NODELIST="localhost,elsewhere")
    for node in range(nodes) for task in range(each)
]
"""
MPIRUN = """
size = options["-np"]
environments = [
    dict(OMPI_COMM_WORLD_RANK=rank, OMPI_COMM_WORLD_SIZE=size, OMPI_COMM_WORLD_LOCAL_RANK=rank % 2,
         OMPI_COMM_WORLD_LOCAL_SIZE=2)
    for rank in range(size)
]
"""


@pytest.fixture
def setting(tmp_path: Path) -> dict[str, str]:
    """What the recipes' variables stand for, and a search path with stand-ins for srun and mpirun."""
    for name, body in (("srun", SRUN), ("mpirun", MPIRUN)):
        script = tmp_path / name
        script.write_text(STAND_IN.format(python=sys.executable, name=name, body=body))
        script.chmod(script.stat().st_mode | stat.S_IXUSR)
    (tmp_path / "hostfile").write_text("node-1 slots=1\nnode-2 slots=1\n")
    own = {name: value for name, value in os.environ.items() if not name.startswith(LAUNCHERS)}
    return {
        **own,
        "PATH": f"{tmp_path}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "JOB": f"--base {TINY} --selfcheck args.model_parallel_size=2",
        "GPUS": "1",
        "RANKS": "4",
        "HOSTFILE": str(tmp_path / "hostfile"),
        "JOB_ID": "17",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(get_free_port()),
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
    }


def run_on(environments: Sequence[Mapping[str, str]], commands: Sequence[Sequence[str]]) -> list[tuple[int, str]]:
    """(Exit code, output) of one command for each machine, started together in the project's folder."""
    started = [
        subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        for command, environment in zip(commands, environments)
    ]
    try:
        outputs = [process.communicate(timeout=SECONDS)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    return [(process.returncode, output) for process, output in zip(started, outputs)]


@pytest.mark.parametrize(
    ("recipe", "machines", "ranks"),
    [
        ("torchrun, fixed places", 2, 2),
        ("torchrun, rendezvous", 2, 2),
        ("deepspeed, without ssh", 2, 2),
        ("Slurm, one task a GPU", 1, 2),
        ("Slurm, one torchrun a machine", 1, 2),
        ("mpirun", 1, 4),
    ],
)
def test_a_recipe_starts_the_job(setting: dict[str, str], recipe: str, machines: int, ranks: int) -> None:
    if recipe == "Slurm, one task a GPU":
        setting = {name: value for name, value in setting.items() if not name.startswith("MASTER_")}
    environments = [{**setting, "NODE_RANK": str(number)} for number in range(machines)]
    results = run_on(environments, [["bash", "-ec", RECIPES[recipe]]] * machines)
    output = "\n".join(text for _, text in results)
    assert [code for code, _ in results] == [0] * machines, output
    assert output.count(f"all {ranks} ranks are here") == 1, output
    assert output.count("selfcheck passed") == 1, output


def test_every_recipe_is_tested() -> None:
    assert set(RECIPES) == {
        "torchrun, fixed places",
        "torchrun, rendezvous",
        "deepspeed, without ssh",
        "Slurm, one task a GPU",
        "Slurm, one torchrun a machine",
        "mpirun",
    }


# --- two network namespaces: machines that share nothing but a cable -------------------------------------------------


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, timeout=10)


@pytest.fixture
def namespaces() -> Iterator[dict[str, tuple[str, str]]]:
    """Namespace -> (its end of the cable, its address)."""
    if shutil.which("ip") is None or os.geteuid() != 0:
        pytest.skip("network namespaces need root and iproute2")
    tag = str(os.getpid())
    made = {f"sat-a-{tag}": (f"sa{tag}", "10.77.0.1"), f"sat-b-{tag}": (f"sb{tag}", "10.77.0.2")}
    (first, (cable, _)), (_, (other_end, _)) = made.items()
    try:
        ip("netns", "add", first)
    except (subprocess.CalledProcessError, OSError):
        pytest.skip("this machine allows no network namespaces")
    try:
        for name in list(made)[1:]:
            ip("netns", "add", name)
        ip("link", "add", cable, "type", "veth", "peer", "name", other_end)
        for name, (device, address) in made.items():
            ip("link", "set", device, "netns", name)
            ip("-n", name, "addr", "add", f"{address}/24", "dev", device)
            ip("-n", name, "link", "set", device, "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield made
    finally:
        for name in made:
            subprocess.run(["ip", "netns", "del", name], capture_output=True, timeout=10)


def run_in(
    namespaces: Mapping[str, tuple[str, str]], setting: dict[str, str], names_interface: bool
) -> list[tuple[int, str]]:
    environments = []
    for number, (device, _) in enumerate(namespaces.values()):
        environment = {**setting, "NODE_RANK": str(number), "MASTER_ADDR": "10.77.0.1", "GPUS": "2"}
        if names_interface:
            environment["GLOO_SOCKET_IFNAME"] = device
        environments.append(environment)
    recipe = RECIPES["torchrun, fixed places"]
    return run_on(environments, [["ip", "netns", "exec", name, "bash", "-ec", recipe] for name in namespaces])


def test_two_machines_train_together(namespaces: dict[str, tuple[str, str]], setting: dict[str, str]) -> None:
    results = run_in(namespaces, setting, names_interface=True)
    output = "\n".join(text for _, text in results)
    assert [code for code, _ in results] == [0, 0], output
    assert "all 4 ranks are here" in output
    assert "dp 2 x cp 1 x tp 2" in output
    assert output.count("selfcheck passed") == 1


def test_a_network_that_does_not_connect_is_explained(
    namespaces: dict[str, tuple[str, str]], setting: dict[str, str]
) -> None:
    """Without the interface's name gloo takes the one that the machine's name leads to: here its own loopback."""
    setting["JOB"] += " args.timeout_minutes=0.3"
    for code, output in run_in(namespaces, setting, names_interface=False):
        assert code != 0
        assert "all ranks have reported in, but they cannot connect with each other by gloo" in output
        assert "GLOO_SOCKET_IFNAME" in output
