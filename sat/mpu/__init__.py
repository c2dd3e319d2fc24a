"""Ranks and shards: parallel state, collectives, sharded layers, random streams. Knows no model."""

from sat.mpu.context import SequenceShard
from sat.mpu.cross_entropy import vocab_parallel_cross_entropy
from sat.mpu.gradients import mark_partial, sum_partial_gradients
from sat.mpu.layers import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding
from sat.mpu.mappings import (
    copy_to_model_parallel_region,
    gather_from_model_parallel_region,
    reduce_from_model_parallel_region,
    scatter_to_model_parallel_region,
)
from sat.mpu.shards import ShardRule, shard_rules
from sat.mpu.sharing import broadcast_data, get_cuda_rng_tracker
from sat.mpu.state import (
    ParallelState,
    destroy_model_parallel,
    get_data_parallel_group,
    get_data_parallel_rank,
    get_data_parallel_world_size,
    get_model_parallel_group,
    get_model_parallel_rank,
    get_model_parallel_src_rank,
    get_model_parallel_world_size,
    get_parallel_state,
    initialize_model_parallel,
    model_parallel_is_initialized,
    set_parallel_state,
)
from sat.mpu.traffic import Traffic, count_traffic

__all__ = [
    "ColumnParallelLinear",
    "ParallelState",
    "RowParallelLinear",
    "SequenceShard",
    "ShardRule",
    "Traffic",
    "VocabParallelEmbedding",
    "broadcast_data",
    "copy_to_model_parallel_region",
    "count_traffic",
    "destroy_model_parallel",
    "gather_from_model_parallel_region",
    "get_cuda_rng_tracker",
    "get_data_parallel_group",
    "get_data_parallel_rank",
    "get_data_parallel_world_size",
    "get_model_parallel_group",
    "get_model_parallel_rank",
    "get_model_parallel_src_rank",
    "get_model_parallel_world_size",
    "get_parallel_state",
    "initialize_model_parallel",
    "mark_partial",
    "model_parallel_is_initialized",
    "reduce_from_model_parallel_region",
    "scatter_to_model_parallel_region",
    "set_parallel_state",
    "shard_rules",
    "sum_partial_gradients",
    "vocab_parallel_cross_entropy",
]
