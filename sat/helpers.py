"""Small helpers of SAT's that users' scripts import."""

import logging
import socket

import torch.distributed as dist

logger = logging.getLogger("sat")


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def print_rank0(msg: object, level: int = logging.INFO, flush: bool = True) -> None:
    """Log a message on rank 0 only. `flush` is SAT's; handlers flush by themselves."""
    if _rank() == 0:
        logger.log(level, "%s", msg)


def print_all(msg: object, level: int = logging.INFO, flush: bool = True) -> None:
    """Log a message on every rank, with its number."""
    logger.log(level, "rank %d: %s", _rank(), msg)


def get_free_port() -> int:
    """A TCP port of this machine that nothing listens on now."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as listener:
        listener.bind(("", 0))
        return listener.getsockname()[1]
