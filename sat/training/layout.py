"""The ranks' layout that a configuration asks for."""

from datetime import timedelta

from sat.config import ConfigNode
from sat.mpu.state import ParallelState, choose_ulysses, divide
from sat.training.args import LayoutArgs


def build_parallel_state(
    config: ConfigNode, args: LayoutArgs, device_type: str, guidance: int = 1, timeout: timedelta | None = None
) -> ParallelState:
    """Divide the processes of the job; every rank must call it. The network's heads decide how cp ranks cooperate."""
    tp, cp, ulysses = args.model_parallel_size, args.context_parallel_size, _ulysses(config, args)
    return ParallelState.build(tp, cp, device_type, ulysses, args.sequence_parallel, guidance, timeout)


def check_layout(config: ConfigNode, args: LayoutArgs, world: int) -> int:
    """Data-parallel ranks that `world` processes would have. Raises LayoutError where they cannot be divided so."""
    _ulysses(config, args)
    return divide(world, args.model_parallel_size, args.context_parallel_size)


def _ulysses(config: ConfigNode, args: LayoutArgs) -> int:
    tp, cp = args.model_parallel_size, args.context_parallel_size
    network = (config["model"].get("network_config") or {}).get("params") or {}
    num_heads = network.get("num_attention_heads", tp)
    return choose_ulysses(args.context_parallel_mode, cp, -(-num_heads // max(tp, 1)))
