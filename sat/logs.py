"""Log lines: rank 0 speaks, other ranks only warn, with their rank in the line."""

import logging
import os
import sys

SAME_ON_EVERY_RANK = "same_on_every_rank"
"""Extra field of a record: rank 0 says it for all, also where it is a warning."""


def setup_logging(rank: int | None = None) -> None:
    """Send this package's log to stderr. The environment variable SAT_LOGLEVEL sets rank 0's level (default INFO).

    rank: by default what the launcher has put into the environment.
    """
    if rank is None:
        given = os.environ.get("RANK", "0")
        rank = int(given) if given.isdigit() else 0
    logger = logging.getLogger("sat")
    logger.handlers.clear()
    handler = logging.StreamHandler(sys.stderr)
    where = "" if rank == 0 else f"rank {rank} "
    handler.setFormatter(logging.Formatter(f"[%(asctime)s] {where}%(message)s", datefmt="%H:%M:%S"))
    if rank != 0:
        handler.addFilter(lambda record: not getattr(record, SAME_ON_EVERY_RANK, False))
    logger.addHandler(handler)
    logger.setLevel(os.environ.get("SAT_LOGLEVEL", "INFO") if rank == 0 else logging.WARNING)
    logger.propagate = False
