"""`train_video.py ... --selfcheck`: does this cluster, at this layout, compute what one process computes?

In about a minute: every rank reports in; the bandwidth within each kind of group; then one step of a tiny network on
the configuration's own layout and ZeRO stage, against the same step that every rank takes by itself, without groups.
"""

import logging
import math
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sat.config import ConfigNode, instantiate_from_config
from sat.logs import setup_logging
from sat.mpu.collectives import all_reduce_bytes
from sat.mpu.gradients import sum_partial_gradients
from sat.mpu.launch import Launch, joined, read_launch
from sat.mpu.recorder import recorded
from sat.mpu.shards import cut_state, shard_rules
from sat.mpu.state import AXES, Axis, ParallelState, set_parallel_state
from sat.training.args import DeepSpeedConfig, deepspeed_config, train_args
from sat.training.layout import build_parallel_state
from sat.training.step import Stepper

log = logging.getLogger(__name__)

PATIENCE_MINUTES = 1.0
"""How long to wait for a rank or a collective, where args.timeout_minutes is not shorter."""

MEASURED_AXES: tuple[Axis, ...] = ("tp", "cp", "dp", "replicas")
MEASURED_BYTES = {"cuda": 256 << 20, "cpu": 8 << 20}
REPEATS = 3

LAYERS, HEAD_DIM, TIME_EMBED_DIM, CHANNELS, TEXT_WIDTH = 2, 16, 32, 4, 24
TEXT_LENGTH, FRAMES, ROWS, COLUMNS = 7, 3, 6, 10
"""52 tokens, which few numbers of ranks divide."""

DOUBLE_TOLERANCE = 1e-9
"""Relative; the worst of the layouts in tests/parallel is below 1e-10."""
SINGLE_TOLERANCE = 1e-3
"""Of a step of the weights, relative to its size; the worst seen is 1e-5. A sum or factor left out gives over 0.1."""


def selfcheck(config: ConfigNode, seed: int) -> bool:
    """Check the processes of this job; every rank must call it. Returns the verdict, the same on every rank."""
    setup_logging(read_launch().rank)
    minutes = min(train_args(config).timeout_minutes, PATIENCE_MINUTES)
    with joined(minutes) as launch, recorded(launch, minutes):
        return selfcheck_joined(config, seed, launch, minutes)


def selfcheck_joined(config: ConfigNode, seed: int, launch: Launch, timeout_minutes: float) -> bool:
    """The same within a process group that is there already."""
    started, args = time.perf_counter(), train_args(config)
    timeout = timedelta(minutes=timeout_minutes)
    parallel = build_parallel_state(config, args, launch.device.type, timeout=timeout)
    deepspeed = deepspeed_config(config, args, parallel.size("dp"), launch.device.type)
    _log_ranks(launch)
    layout = _describe_layout(parallel, deepspeed)
    log.info("%s", layout)
    _log_bandwidths(launch, parallel)
    heads = ((config["model"].get("network_config") or {}).get("params") or {}).get("num_attention_heads")
    check = _Check(heads or parallel.size("tp"), seed, launch, parallel)
    log.info("one step of a tiny network of %d heads, against one process:", check.num_heads)
    worst = [_worst_of_ranks(finding) for finding in (*check.gradients(), *check.step(deepspeed))]
    for finding in worst:
        log.info("%s", finding)
    wrong = [finding.what for finding in worst if not finding.is_right]
    if wrong and launch.is_main:
        log.error("selfcheck FAILED: not what one process computes (%s); do not train on this", ", ".join(wrong))
    if not wrong:
        log.info("selfcheck passed in %.0f s: %s", time.perf_counter() - started, layout)
    return not wrong


def _describe_layout(parallel: ParallelState, deepspeed: DeepSpeedConfig) -> str:
    dp, cp, tp = (parallel.size(axis) for axis in AXES)
    ways = f" (ulysses {parallel.size('ulysses')} x ring {parallel.size('ring')})" if cp > 1 else ""
    sequence = " with sequence parallelism" if parallel.sequence_parallel else ""
    return f"dp {dp} x cp {cp}{ways} x tp {tp}{sequence}, ZeRO stage {deepspeed.zero_stage}"


def _log_ranks(launch: Launch) -> None:
    hosts = launch.hosts or ("this machine",) * launch.world_size
    is_gpu = launch.device.type == "cuda"
    device = torch.cuda.get_device_name(launch.device) if is_gpu else "cpu"
    log.info(
        "all %d ranks are here, on %s by %s, torch %s", launch.world_size, device, dist.get_backend(), torch.__version__
    )
    for host in dict.fromkeys(hosts):
        own = [str(rank) for rank, other in enumerate(hosts) if other == host]
        log.info("  %-24s ranks %s", host, f"{own[0]} .. {own[-1]} ({len(own)})" if len(own) > 4 else ", ".join(own))


# --- bandwidth -------------------------------------------------------------------------------------------------------


def _log_bandwidths(launch: Launch, parallel: ParallelState) -> None:
    """One line for each axis: all its groups sum a tensor at the same time."""
    if launch.world_size > 1:
        log.info("what a rank sends while its group sums %d MiB:", MEASURED_BYTES[launch.device.type] >> 20)
    for axis in MEASURED_AXES:
        group = parallel.group(axis)
        if group is None or (axis == "replicas" and 1 in (parallel.size("dp"), parallel.size("cp"))):
            continue  # nothing to measure, or the same ranks as another axis
        rates: list[Any] = [None] * launch.world_size
        dist.all_gather_object(rates, _bandwidth(group, launch.device))
        slowest = min(range(launch.world_size), key=rates.__getitem__)
        log.info(
            "  %-9s %4d ranks %10.2f GB/s, the slowest %.2f, rank %d",
            axis,
            parallel.size(axis),
            statistics.median(rates),
            rates[slowest],
            slowest,
        )


def _bandwidth(group: dist.ProcessGroup, device: torch.device) -> float:
    """GB/s that this rank sends while its group sums a tensor, by the ring algorithm's count."""
    tensor = torch.ones(MEASURED_BYTES[device.type] // 4, device=device)
    times = []
    for _ in range(1 + REPEATS):  # the first one connects
        _synchronize(device)
        started = time.perf_counter()
        dist.all_reduce(tensor, group=group)
        _synchronize(device)
        times.append(time.perf_counter() - started)
    return float(all_reduce_bytes(tensor.nbytes, group.size())) / statistics.median(times[1:]) / 1e9


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# --- one step --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Finding:
    """How far something of this rank is from what one process has."""

    what: str
    difference: float
    tolerance: float
    place: str = ""

    @property
    def is_right(self) -> bool:
        return self.difference < self.tolerance  # not a number is wrong

    def __str__(self) -> str:
        verdict = "equal" if self.is_right else "WRONG"
        where = f", at {self.place}" if self.difference else ""
        return f"  {self.what:<40} {verdict}  difference {self.difference:.0e} of {self.tolerance:.0e} allowed{where}"


def _worst_of_ranks(own: _Finding) -> _Finding:
    """The finding of the rank that is furthest off; every rank must call it."""
    findings: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(findings, own)
    worst = max(range(len(findings)), key=lambda rank: findings[rank].difference)
    return replace(findings[worst], place=f"{findings[worst].place} on rank {worst}")


def _compare(what: str, own: Mapping[str, Tensor], expected: Mapping[str, Tensor], tolerance: float) -> _Finding:
    """The largest difference over the largest expected entry of the same tensor, or over 1e-6 of rounding."""
    worst, place = 0.0, ""
    for name, value in own.items():
        scale = expected[name].abs().max().clamp(min=1e-6)
        difference = float((value - expected[name]).abs().max() / scale)
        if not difference <= worst:
            worst, place = difference if math.isfinite(difference) else math.inf, name.removeprefix("network.")
    return _Finding(what, worst, tolerance, place)


class _Regression(nn.Module):
    """A network and its squared distance from a target."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The values of each sample (b,)."""
        output = self.network(inputs["latents"], inputs["timesteps"], inputs["text"])
        return {"loss": (output - inputs["target"]).square().flatten(1).mean(dim=1)}


class _Check:
    """The tiny network, whole and on the layout, with random numbers in every weight, and a sample for each dp rank."""

    def __init__(self, num_heads: int, seed: int, launch: Launch, parallel: ParallelState) -> None:
        self.num_heads, self.launch, self.parallel = num_heads, launch, parallel
        torch.manual_seed(seed)
        self.generator = torch.Generator().manual_seed(seed)
        samples, dp_rank = parallel.size("dp"), parallel.rank("dp")
        latents = (samples, FRAMES, CHANNELS, ROWS, COLUMNS)
        self.inputs = {
            "latents": self._draw(*latents),
            "target": self._draw(*latents),
            "text": self._draw(samples, TEXT_LENGTH, TEXT_WIDTH),
            "timesteps": torch.arange(samples).to(launch.device) * 97 % 1000,
        }
        self.own_inputs = {name: value[dp_rank : dp_rank + 1] for name, value in self.inputs.items()}
        set_parallel_state(ParallelState())
        self.whole = self._build()
        with torch.no_grad():
            for parameter in self.whole.parameters():
                parameter.add_(0.1 * self._draw(*parameter.shape))
        self.whole_loss = self.whole(self.inputs)["loss"].mean()
        self.whole_loss.backward()
        set_parallel_state(parallel)

    def _draw(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float64).to(self.launch.device)

    def _build(self) -> _Regression:
        """The network of this rank, in float64."""
        network = instantiate_from_config(_network_config(self.num_heads))
        return _Regression(network).double().to(self.launch.device)

    def _build_own(self) -> _Regression:
        """The same with this rank's part of the whole one's weights."""
        own = self._build()
        own.load_state_dict(self._cut(own, self.whole.state_dict()))
        return own

    def _cut(self, own: nn.Module, whole: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return cut_state(whole, shard_rules(own), self.parallel.rank("tp"), self.parallel.size("tp"))

    def _whole_gradients(self) -> dict[str, Tensor]:
        return {name: _gradient(parameter) for name, parameter in self.whole.named_parameters()}

    def gradients(self) -> Sequence[_Finding]:
        """Loss and gradients in float64, where only a mistake makes a difference."""
        own = self._build_own()
        sum_partial_gradients(own, self.parallel)
        loss = own(self.own_inputs)["loss"].mean()
        loss.backward()
        losses = {"loss": self._mean_over(loss.detach(), "dp")}
        gradients = {name: self._mean_over(_gradient(p), "replicas") for name, p in own.named_parameters()}
        return [
            _compare("loss, float64", losses, {"loss": self.whole_loss.detach()}, DOUBLE_TOLERANCE),
            _compare("gradients, float64", gradients, self._cut(own, self._whole_gradients()), DOUBLE_TOLERANCE),
        ]

    def _mean_over(self, value: Tensor, axis: Axis) -> Tensor:
        group = self.parallel.group(axis)
        if group is None:
            return value
        total = value.clone()
        dist.all_reduce(total, group=group)
        return total / group.size()

    def step(self, config: DeepSpeedConfig) -> Sequence[_Finding]:
        """Gradient norm, and the change of the weights by a clipped step, in float32 through DeepSpeed."""
        expected_norm = float(torch.nn.utils.get_total_norm(list(self._whole_gradients().values())))
        clip, lr = 0.5 * expected_norm, 10.0
        own = self._build_own().float()
        before = {name: value.detach().cpu().clone() for name, value in own.state_dict().items()}
        stepper = Stepper(own, _plain_float32(config, clip, lr), self.launch, self.parallel)
        stepper.accumulate({name: _single(value) for name, value in self.own_inputs.items()})
        norm = stepper.update(lr)
        expected = {name: -lr * 0.5 * value.cpu() for name, value in self._cut(own, self._whole_gradients()).items()}
        after = stepper.weights(lambda _, value: value.cpu().clone()) or {}
        changes = {name: after[name].double() - before[name].double() for name in expected if name in after}
        own_norm, whole_norm = ({"norm": torch.tensor(value, dtype=torch.float64)} for value in (norm, expected_norm))
        what = f"ZeRO stage {config.zero_stage}, float32"
        return [
            _compare(f"gradient norm, {what}", own_norm, whole_norm, SINGLE_TOLERANCE),
            _compare(f"step of the weights, {what}", changes, expected, SINGLE_TOLERANCE),
        ]


def _gradient(parameter: nn.Parameter) -> Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


def _single(value: Tensor) -> Tensor:
    return value.float() if value.is_floating_point() else value


def _plain_float32(config: DeepSpeedConfig, clip: float, lr: float) -> DeepSpeedConfig:
    """The run's own ZeRO settings with plain gradient descent in float32, one sample to a rank."""
    return replace(
        config,
        micro_batch_size=1,
        grad_accum_steps=1,
        precision="fp32",
        gradient_clipping=clip,
        optimizer={"type": "SGD", "params": {"lr": lr}},
        rest={key: value for key, value in config.rest.items() if key not in ("bf16", "fp16")},
    )


def _network_config(num_heads: int) -> dict[str, Any]:
    """A network of the 5B form, 16 channels to a head."""
    positions = {"hidden_size_head": HEAD_DIM, "text_length": TEXT_LENGTH}
    modules = {
        "pos_embed_config": {"target": "dit_video_concat.Rotary3DPositionEmbeddingMixin", "params": positions},
        "patch_embed_config": {
            "target": "dit_video_concat.ImagePatchEmbeddingMixin",
            "params": {"text_hidden_size": TEXT_WIDTH},
        },
        "adaln_layer_config": {"target": "dit_video_concat.AdaLNMixin"},
        "final_layer_config": {"target": "dit_video_concat.FinalLayerMixin"},
    }
    params = {
        "num_layers": LAYERS,
        "hidden_size": num_heads * HEAD_DIM,
        "num_attention_heads": num_heads,
        "num_frames": 4 * FRAMES - 3,
        "latent_height": ROWS,
        "latent_width": COLUMNS,
        "time_embed_dim": TIME_EMBED_DIM,
        "patch_size": [1, 2, 2],
        "in_channels": CHANNELS,
        "out_channels": CHANNELS,
        "modules": modules,
    }
    return {"target": "dit_video_concat.DiffusionTransformer", "params": params}
