"""Who is there: ranks report through the job's store, when they meet and when something fails."""

import json
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta

import torch.distributed as dist

from sat.errors import CommunicationError

log = logging.getLogger(__name__)

REMINDER_SECONDS = 60.0
LATENESS_SECONDS = 5.0
"""How much later than the others rank 0 may have started to count, when they wait for its word."""

LINGER_SECONDS = 1.0

_ROLL = "roll"


@dataclass(frozen=True)
class Report:
    """What a rank says of itself."""

    rank: int
    host: str
    local_rank: int
    local_size: int | None
    """Ranks on its machine, where its launcher says."""


def call_roll(store: dist.Store, own: Report, world_size: int, seconds: float) -> tuple[str, ...]:
    """Wait until every rank has reported in; returns their machines, by rank.

    Raises CommunicationError, on every rank that did report in, with the ranks that have not after that time.
    """
    store.set(_here(own.rank), json.dumps(asdict(own)))
    if own.rank == 0:
        store.set(_ROLL, json.dumps(_count(store, world_size, seconds)))
    else:
        try:
            store.wait([_ROLL], timedelta(seconds=seconds + LATENESS_SECONDS))
        except RuntimeError as error:
            raise CommunicationError(_describe_missing([0], [own], world_size, seconds)) from error
    roll = json.loads(store.get(_ROLL))
    if "problem" in roll:
        linger(own.rank)
        raise CommunicationError(roll["problem"])
    return tuple(roll["hosts"])


def linger(rank: int) -> None:
    """Rank 0 holds the store that the others still ask: it is the last to go."""
    if rank == 0:
        time.sleep(LINGER_SECONDS)


def _here(rank: int) -> str:
    return f"here {rank}"


def _count(store: dist.Store, world_size: int, seconds: float) -> Mapping[str, object]:
    """What rank 0 tells the others: the machines of all, or who is missing."""
    missing = _await_all(store, world_size, seconds)
    reports = [Report(**json.loads(store.get(_here(rank)))) for rank in range(world_size) if rank not in missing]
    if missing:
        return {"problem": _describe_missing(missing, reports, world_size, seconds)}
    return {"hosts": [report.host for report in reports]}


def _await_all(store: dist.Store, world_size: int, seconds: float) -> list[int]:
    """The ranks that have not reported in when all are there or the time is up."""
    started, next_reminder = time.monotonic(), REMINDER_SECONDS
    missing = list(range(world_size))
    while True:
        missing = [rank for rank in missing if not store.check([_here(rank)])]
        waited = time.monotonic() - started
        if not missing or waited > seconds:
            return missing
        if waited > next_reminder:
            log.warning("waiting for %s for %.0f s", name_ranks(missing), waited)
            next_reminder += REMINDER_SECONDS
        time.sleep(min(0.05 + waited / 20, 1.0))


def name_ranks(ranks: Sequence[int]) -> str:
    """`rank 3`, `ranks 1, 2 and 7`; of more than ten, how many and the first."""
    if len(ranks) == 1:
        return f"rank {ranks[0]}"
    if len(ranks) > 10:
        return f"{len(ranks)} ranks ({', '.join(map(str, ranks[:10]))}, ...)"
    return f"ranks {', '.join(map(str, ranks[:-1]))} and {ranks[-1]}"


def _describe_missing(missing: Sequence[int], reports: Sequence[Report], world_size: int, seconds: float) -> str:
    hosts = sorted({host for host in (host_of(rank, reports) for rank in missing) if host is not None})
    where = f" on {', '.join(hosts)}" if hosts else ""
    return (
        f"{name_ranks(missing)} of {world_size}{where} did not report in within {seconds:.0f} s: see what the log "
        "there says, and whether the launcher started a process there at all"
    )


def host_of(rank: int, reports: Sequence[Report]) -> str | None:
    """The machine of a silent rank, where a neighbour there has said how many ranks it has."""
    for report in reports:
        first = report.rank - report.local_rank
        if report.local_size is not None and first <= rank < first + report.local_size:
            return report.host
    return None


def report_failure(store: dist.Store, rank: int, world_size: int, seconds: float) -> list[int]:
    """Tell the others that this rank has failed; returns the ranks that do not say the same within that time."""
    silent, started = list(range(world_size)), time.monotonic()
    try:
        store.set(_failed(rank), "")
        while silent and time.monotonic() - started < seconds:
            silent = [other for other in silent if not store.check([_failed(other)])]
            time.sleep(0.1)
    except RuntimeError:  # the store has gone with rank 0
        return [0] if 0 in silent else silent
    linger(rank)
    return silent


def _failed(rank: int) -> str:
    return f"failed {rank}"
