"""What a rank's memory holds, part by part, under DeepSpeed's ZeRO.

The network's activations are counted by running it without numbers (`passes`); what DeepSpeed and the optimizer hold
follows from their code and is written here. tests/training/planning compares the sum with what training steps allocate.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sat.ops import FusedEmaAdam, Muon
from sat.training.args import DeepSpeedConfig
from sat.training.optim import needs_whole_parameters, optimizer_class
from sat.training.planning.passes import Encoders, Pass

SINGLE = 4
"""Bytes of a number in float32."""
DEEPSPEED_BUCKET = 500_000_000
"""Numbers in the buffer that gradients are gathered in; ZeRO's reduce_bucket_size where it is set."""
MAX_LIVE = 1_000_000_000
"""Numbers of weights that ZeRO 3 keeps gathered; its stage3_max_live_parameters."""
NO_ENCODERS = Encoders()


@dataclass(frozen=True)
class Zero:
    """How weights, gradients and optimizer state are kept."""

    stage: int
    element_bytes: int
    """Of a weight in the network."""
    state_kinds: int
    """Numbers that the optimizer keeps for each weight,"""
    has_average: bool
    """a moving average of the weight among them."""
    update_kinds: int
    """Numbers for each weight that an update needs for its time."""
    needs_whole_parameters: bool = False
    """Whether the optimizer takes no parts of them, as ZeRO and tensor parallelism would give it."""
    bucket: int = DEEPSPEED_BUCKET
    num_buckets: int = 1
    max_live: int = MAX_LIVE
    offload: bool = False
    """The optimizer's state and its update are the host's."""

    @classmethod
    def of(cls, config: DeepSpeedConfig, device_type: str = "cuda") -> "Zero":
        """What the deepspeed section asks for."""
        section: Mapping[str, Any] = config.rest.get("zero_optimization") or {}
        optimizer = optimizer_class(config.optimizer)
        is_ema, is_sgd, is_muon = issubclass(optimizer, FusedEmaAdam), optimizer.__name__ == "SGD", optimizer is Muon
        has_momentum = bool((config.optimizer.get("params") or {}).get("momentum"))
        overlaps = section.get("overlap_comm", config.zero_stage == 3)
        # torch's Adam goes over all weights at once on a GPU, and makes one temporary of each, on a CPU two.
        temporaries = 0 if is_sgd or is_muon else 1 if is_ema or device_type == "cuda" else 2
        kinds = 3 if is_ema else int(has_momentum) if is_sgd else 1 if is_muon else 2  # Muon's of matrices: nearly all
        return cls(
            stage=config.zero_stage,
            element_bytes=SINGLE if config.precision == "fp32" else 2,
            state_kinds=kinds,
            has_average=is_ema,
            update_kinds=temporaries,
            needs_whole_parameters=needs_whole_parameters(optimizer),
            bucket=int(section.get("reduce_bucket_size", DEEPSPEED_BUCKET)),
            num_buckets=2 if overlaps and config.zero_stage < 3 else 1,
            max_live=int(section.get("stage3_max_live_parameters", MAX_LIVE)),
            offload=config.offloads_optimizer,
        )


@dataclass(frozen=True)
class Memory:
    """Bytes of a rank, part by part."""

    weights: float
    optimizer: float
    """Master weights and the optimizer's state, without"""
    average: float
    """the moving average of the weights."""
    gradients: float
    """As they are kept until the update."""
    buffers: float
    """DeepSpeed's, and weights that ZeRO 3 has gathered."""
    activations: float
    """With the inputs."""
    encoders: float
    """Weights of the VAE and the text encoder."""
    moments: Mapping[str, float]
    """What is held in all at the moments at which it may be most."""

    @property
    def peak(self) -> float:
        """The most that is ever held."""
        return max(self.moments.values())

    @property
    def peak_moment(self) -> str:
        """When that is."""
        return max(self.moments, key=lambda name: self.moments[name])


def memory_of(run: Pass, zero: Zero, replicas: int, encoders: Encoders = NO_ENCODERS) -> Memory:
    """What a rank holds whose weights `replicas` ranks share."""
    element, trained = zero.element_bytes, run.trained
    own = trained / replicas if zero.stage else trained  # of what a rank updates
    state = 0.0 if zero.offload else SINGLE * own
    weights = element * (trained + run.frozen) / (replicas if zero.stage == 3 else 1)
    optimizer = state * ((zero.stage > 0) + zero.state_kinds - zero.has_average)
    average = state * zero.has_average
    gradients = 0.0 if zero.offload else element * own
    encoder_weights = encoders.vae_bytes + encoders.text_bytes
    held = weights + optimizer + average + encoder_weights
    activations: float = run.inputs + run.activations
    if zero.stage == 0:  # gradients of all weights, and at the end a copy of them to be summed
        buffers: float = element * min(trained, DEEPSPEED_BUCKET)
        end = gradients + max(buffers, run.last_activations)
    elif zero.stage == 3:  # gradients and their buffer are always there; weights are gathered and dropped again
        held += gradients + element * zero.bucket
        live = element * min(trained + run.frozen, zero.max_live) * (1 - 1 / replicas)
        buffers = element * zero.bucket + live
        activations += live
        end = live + run.last_activations
    else:  # at stage 1 gradients stay until all are there, at 2 each bucket is summed and a share of it kept
        buffers = element * zero.num_buckets * zero.bucket
        activations += buffers
        whole = element * trained if zero.stage == 1 and trained > zero.bucket else 0
        end = buffers + gradients + whole + run.last_activations
    moments = {
        "forward": held + activations,
        "end of backward": held + end,
        "update": held + (gradients if zero.stage < 3 else 0) + _update(run, zero, own),
        "encoding": held + encoders.encoding_bytes,
    }
    return Memory(
        weights, optimizer, average, gradients, buffers, run.inputs + run.activations, encoder_weights, moments
    )


def _update(run: Pass, zero: Zero, own: float) -> float:
    """What the optimizer's step needs for its time: gradients in float32, and temporaries."""
    if zero.offload:
        return 0.0
    if zero.stage == 0:
        return SINGLE * zero.update_kinds * (run.largest if zero.update_kinds == 2 else own)
    return SINGLE * own * (1 + zero.update_kinds)
