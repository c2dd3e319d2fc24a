"""Ways to share a run out over devices, and what each takes: memory, time, traffic."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any, get_args

from sat.model.activations import Activations, Kept
from sat.mpu.state import ContextMode, choose_ulysses
from sat.mpu.traffic import zero_bytes
from sat.training.devices import GIB, Device, Precision
from sat.training.planning.memory import Memory, Zero, memory_of
from sat.training.planning.passes import Encoders, Pass, Pieces, Work, pretend_layout, take_apart

DEVICES_OF_A_MACHINE = 8
USABLE = 0.95
"""Of a device's memory: the rest is torch's context, NCCL's buffers and what lies between blocks."""
CONVOLUTION_SHARE = 0.2
"""Of the peak in bf16, what the VAE's convolutions in TF32 reach: a guess."""
OVERLAP = 0.7
"""Share of backward in which gradients can be sent, where they overlap it."""
LAUNCH_SECONDS = 6e-6
"""What the host takes to start a kernel in eager mode: where the device is faster, it waits."""
UPDATE_BYTES = 22
"""What an update with Adam reads and writes for a weight, without the state's own numbers."""


@dataclass(frozen=True)
class Layout:
    """How a run is shared out; each field is named as the key that sets it."""

    model_parallel_size: int = 1
    context_parallel_size: int = 1
    stage: int = 0
    activations: str = "keep"
    offload_optimizer: bool = False

    def changes(self, other: "Layout") -> list[str]:
        """The words for the command line that lead from `other` here."""
        return [
            _KEYS[field.name].format(getattr(self, field.name))
            for field in fields(self)
            if getattr(self, field.name) != getattr(other, field.name)
        ]


_KEYS = {
    "model_parallel_size": "args.model_parallel_size={}",
    "context_parallel_size": "args.context_parallel_size={}",
    "stage": "deepspeed.zero_optimization.stage={}",
    "activations": "args.activations={}",
    "offload_optimizer": "deepspeed.zero_optimization.offload_optimizer.device=cpu",
}


@dataclass(frozen=True)
class Estimate:
    """What a step takes in one layout."""

    layout: Layout
    dp: int
    accumulation: int
    memory: Memory
    device: Device
    seconds: Mapping[str, float]
    """Of a step, by what they are spent on."""
    sent_bytes: float
    """By a rank in a step."""
    host_bytes: float
    """Of a rank's activations, in the host's memory."""
    model_flops: float
    """Of a device in a step."""
    precision: Precision

    @property
    def fits(self) -> bool:
        """Whether a device holds it."""
        return self.memory.peak <= USABLE * self.device.memory_gib * GIB

    @cached_property
    def step_seconds(self) -> float:
        """Of a step, predicted."""
        return sum(self.seconds.values())

    @property
    def mfu(self) -> float:
        """Predicted."""
        return self.model_flops / self.step_seconds / self.device.peak_tflops(self.precision) / 1e12


@dataclass(frozen=True)
class Job:
    """What is to be planned: the work, the devices, and what the configuration says of both."""

    work: Work
    encoders: Encoders
    zero: Zero
    device: Device
    world: int
    global_batch: int | None
    accumulation: int
    mode: ContextMode
    precision: Precision
    clip_flops: float
    """Forward and backward of a clip, nothing twice."""

    def batches(self, layout: Layout) -> tuple[int, int] | None:
        """Data-parallel ranks and accumulation; None where the layout does not divide."""
        shared = layout.model_parallel_size * layout.context_parallel_size
        if self.world % shared:
            return None
        dp = self.world // shared
        if self.global_batch is None:
            return dp, self.accumulation
        accumulation, rest = divmod(self.global_batch, dp * self.work.rows)
        return (dp, accumulation) if not rest and accumulation else None

    def is_possible(self, layout: Layout) -> bool:
        """Whether it divides, and can be run without numbers: rings cannot."""
        tp, cp = layout.model_parallel_size, layout.context_parallel_size
        heads = self.work.network["num_attention_heads"]
        needs_stage = self.precision != "fp32" and layout.stage == 0
        if tp > heads or needs_stage or self.batches(layout) is None or (layout.offload_optimizer and not layout.stage):
            return False
        if layout.activations == "keep_attention" and layout.stage == 3:
            return False
        if self.zero.needs_whole_parameters and (layout.stage or tp > 1):
            return False
        return cp == 1 or choose_ulysses(self.mode, cp, -(-heads // tp)) == cp


COMPARED = ("keep", "recompute", "keep_attention", *(f"recompute_every_{n}" for n in (2, 3, 4, 8)), "offload")
"""Choices of what layers keep."""


def sensible_layouts(world: int, configured: Layout) -> Iterator[Layout]:
    """Layouts to compare: tensor or context parallelism within a machine, not both; each choice of what layers keep;
    every stage, with and without offload; and the configured one."""
    sizes = [size for size in (1, 2, 4, 8) if size <= min(world, DEVICES_OF_A_MACHINE) and world % size == 0]
    splits = [(1, 1), *((size, 1) for size in sizes[1:]), *((1, size) for size in sizes[1:])]
    own = (configured.model_parallel_size, configured.context_parallel_size)
    for tp, cp in dict.fromkeys([own, *splits]):
        for activations in dict.fromkeys([configured.activations, *COMPARED]):
            for stage in (0, 1, 2, 3):
                for offload in (False, True):
                    yield Layout(tp, cp, stage, activations, offload)


def estimate_all(job: Job, layouts: Sequence[Layout]) -> list[Estimate]:
    """What each possible layout takes; the process must pretend to be of job.world ranks."""
    pieces: dict[tuple[int, int], Pieces] = {}
    passes: dict[tuple[tuple[int, int], str], Pass] = {}
    found = []
    for layout in filter(job.is_possible, layouts):
        split = (layout.model_parallel_size, layout.context_parallel_size)
        if split not in pieces:
            pieces[split] = take_apart(job.work, pretend_layout(job.work, *split, job.mode))
        key = (split, layout.activations)
        if key not in passes:
            passes[key] = pieces[split].whole(job.work.groups(layout.activations))
        found.append(estimate(job, layout, passes[key]))
    return found


def estimate(job: Job, layout: Layout, run: Pass) -> Estimate:
    """What a layout takes whose first rank does `run` for a micro batch."""
    batches = job.batches(layout)
    assert batches is not None
    dp, accumulation = batches
    replicas = job.world // layout.model_parallel_size
    zero = replace(job.zero, stage=layout.stage, offload=layout.offload_optimizer)
    samples = accumulation * job.work.samples
    of_zero = float(zero_bytes(zero.element_bytes * run.trained, replicas, layout.stage, accumulation))
    of_layers = accumulation * float(run.forward.sent_bytes + run.backward.sent_bytes)
    return Estimate(
        layout=layout,
        dp=dp,
        accumulation=accumulation,
        memory=memory_of(run, zero, replicas, job.encoders),
        device=job.device,
        seconds=_seconds(job, run, zero, replicas, accumulation, of_layers, of_zero),
        sent_bytes=of_zero + of_layers,
        host_bytes=run.forward.host_bytes,
        model_flops=job.clip_flops * samples * dp / job.world,
        precision=job.precision,
    )


def _seconds(
    job: Job, run: Pass, zero: Zero, replicas: int, accumulation: int, of_layers: float, of_zero: float
) -> dict[str, float]:
    device, tera = job.device, 1e12
    peak = device.peak_tflops(job.precision) * tera
    both = run.forward + run.backward
    matrices = both.products / (peak * device.matrix_share)
    forward_share, backward_share = device.attention_shares
    # Published rates of backward count the scores that it computes again: 5 products where 4 are counted here.
    attention = both.attention_forward / forward_share / peak + 1.25 * both.attention_backward / backward_share / peak
    elements = both.moved_bytes / (device.copy_tb_s * tera * device.copy_share)
    busy = matrices + attention + elements
    host = max(both.operations * LAUNCH_SECONDS - busy, 0.0)
    link = 1e9 * device.link_share * device.link_gb_s
    far = link if job.world <= DEVICES_OF_A_MACHINE else 1e9 * device.link_share * device.network_gb_s
    hidden = OVERLAP * accumulation * busy * 2 / 3 if zero.num_buckets > 1 or zero.stage == 3 else 0.0
    own = run.trained / (replicas if zero.stage else 1)
    update = own * (UPDATE_BYTES + 8 * zero.state_kinds) / (device.copy_tb_s * tera * device.copy_share)
    host_link = 1e9 * device.host_share * device.host_gb_s
    if zero.offload:
        update = own * (UPDATE_BYTES + 8 * zero.state_kinds) / 100e9 + 3 * zero.element_bytes * own / host_link
    clips = accumulation * job.work.samples
    encoding = clips * (
        job.encoders.encoding.products / (device.half_tflops * tera * CONVOLUTION_SHARE)
        + job.encoders.encoding.moved_bytes / (device.copy_tb_s * tera * device.copy_share)
    )
    return {
        "matrix products": accumulation * matrices,
        "attention": accumulation * attention,
        "other operations": accumulation * elements,
        "waiting for the host": accumulation * host,
        "copies to the host and back": accumulation * both.host_bytes / host_link,
        "encoding": encoding,
        "sending in layers": of_layers / link,
        "sending gradients and weights": max(of_zero / far - hidden, of_zero / far / 3),
        "update": update,
    }


def choose(estimates: Sequence[Estimate]) -> Estimate | None:
    """The fastest layout that fits; the plainest of those within two hundredths of it."""
    fitting = [one for one in estimates if one.fits]
    if not fitting:
        return None
    limit = 1.02 * min(one.step_seconds for one in fitting)
    return min((one for one in fitting if one.step_seconds <= limit), key=lambda one: _plainness(one.layout))


def _plainness(layout: Layout) -> tuple[Any, ...]:
    shared = layout.model_parallel_size * layout.context_parallel_size
    choice = Activations.parse(layout.activations)
    return (layout.offload_optimizer, shared, layout.stage, get_args(Kept).index(choice.kept), choice.every)


def smallest_change(estimates: Sequence[Estimate], configured: Layout) -> Estimate | None:
    """The layout that fits with the fewest keys changed, the fastest of several."""
    fitting = [one for one in estimates if one.fits]
    return min(fitting, key=lambda one: (len(one.layout.changes(configured)), one.step_seconds), default=None)
