"""The optimizer step: a DeepSpeed engine behind a few plain calls."""

import logging
import math
import os
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sat.config import ConfigNode, did_you_mean
from sat.errors import ConfigError, TrainingError
from sat.mpu.gradients import check_copies, sum_partial_gradients
from sat.mpu.launch import Launch
from sat.mpu.shards import is_sharded
from sat.mpu.state import ParallelState
from sat.training.args import DEPRECATED_ZERO, DeepSpeedConfig
from sat.training.health import GradientWatch
from sat.training.optim import build_optimizer, parameter_groups
from sat.training.optimizer_state import Fragment, StoredState

log = logging.getLogger(__name__)


def _import_deepspeed(device_type: str) -> Any:
    """DeepSpeed, set up so that it compiles nothing at start and keeps quiet."""
    if device_type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    # Of collectives that DeepSpeed calls under their old names.
    warnings.filterwarnings("ignore", message="`torch.distributed.*is deprecated", category=FutureWarning)
    try:
        import deepspeed
    except ImportError as error:
        raise ImportError("training needs DeepSpeed: pip install deepspeed") from error
    deepspeed.utils.logger.setLevel(os.environ.get("SAT_DEEPSPEED_LOGLEVEL", "ERROR"))
    _import_muon()
    # A shared-memory collective for inference: building it takes a compiler and a minute, and training never calls it.
    # DeepSpeed looks up nothing else in this table, which it would fill by trying the compiler on all its operations.
    vars(deepspeed.ops).setdefault("__compatible_ops__", {})["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend="nccl" if device_type == "cuda" else "gloo", auto_mpi_discovery=False)
    return deepspeed


def _import_muon() -> None:
    """Import DeepSpeed's Muon, which ZeRO looks up in every run, with its functions as they are: no run here uses them.

    They ask torch for compilation as they are defined, and that alone imports its compiler: seconds of every start.
    """
    from deepspeed.runtime import compiler

    decorator = compiler.compile
    compiler.compile = lambda: lambda function: function
    try:
        import deepspeed.runtime.zero.muon.original_muon  # noqa: F401
    except ImportError:  # a release without it
        pass
    finally:
        compiler.compile = decorator


class DeepSpeedGroups:
    """The groups that DeepSpeed asks for, under the names that it asks by.

    Context-parallel ranks count as data-parallel ones: every replica of a weight is in one group. (With the methods for
    sequence groups, ZeRO-3 partitions over a part of the replicas and is wrong.)
    """

    def __init__(self, parallel: ParallelState) -> None:
        self.parallel = parallel

    def get_model_parallel_rank(self) -> int:
        return self.parallel.rank("tp")

    def get_model_parallel_world_size(self) -> int:
        return self.parallel.size("tp")

    def get_model_parallel_group(self) -> dist.ProcessGroup | None:
        return self.parallel.true_group("tp")

    get_tensor_model_parallel_rank = get_model_parallel_rank
    get_tensor_model_parallel_world_size = get_model_parallel_world_size
    get_tensor_model_parallel_group = get_model_parallel_group

    def get_data_parallel_rank(self) -> int:
        return self.parallel.rank("replicas")

    def get_data_parallel_world_size(self) -> int:
        return self.parallel.size("replicas")

    def get_data_parallel_group(self) -> dist.ProcessGroup | None:
        return self.parallel.true_group("replicas")


def check_with_deepspeed(section: ConfigNode, config: DeepSpeedConfig, launch: Launch) -> None:
    """Raise ConfigError where DeepSpeed's own reading of the configuration refuses a key or a value of the section."""
    deepspeed = _import_deepspeed(launch.device.type)
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from pydantic import ValidationError  # what DeepSpeed's classes raise

    zero = section.get("zero_optimization") or ConfigNode()
    for key in zero:
        if key not in {*DeepSpeedZeroConfig.model_fields, *DEPRECATED_ZERO}:
            raise ConfigError(f"unknown key {zero.where(key)}{did_you_mean(key, DeepSpeedZeroConfig.model_fields)}")
    try:
        deepspeed.DeepSpeedConfig(config.as_deepspeed())
    except ValidationError as error:
        raise ConfigError(f"DeepSpeed does not take the deepspeed section: {error}") from error


class Stepper:
    """Gradients, their accumulation and the update, by DeepSpeed ZeRO.

    module: forward(inputs) -> dict of per-sample values (b,), `loss` among them. Only parameters that require a
    gradient are trained. After construction the weights are the same on every data-parallel rank.
    """

    def __init__(self, module: nn.Module, config: DeepSpeedConfig, launch: Launch, parallel: ParallelState) -> None:
        deepspeed = _import_deepspeed(launch.device.type)
        self.config = config
        self.parallel = parallel
        check_copies(module, parallel)
        sum_partial_gradients(module, parallel)
        self.names = {parameter: name for name, parameter in module.named_parameters() if parameter.requires_grad}
        if not self.names:
            raise ConfigError(
                "nothing to train: every parameter is frozen; shorten model.not_trainable_prefixes or add a lora_config"
            )
        groups = parameter_groups(module, config.lr)
        places = {parameter: place for place, group in enumerate(groups) for parameter in group["params"]}
        self.watch = GradientWatch(self.names, places)
        is_on_gpu = launch.device.type == "cuda" and not config.offloads_optimizer
        self.optimizer = build_optimizer(groups, config.optimizer, is_on_gpu)
        self.engine, *_ = deepspeed.initialize(
            model=module,
            optimizer=self.optimizer,
            config=config.as_deepspeed(),
            mpu=DeepSpeedGroups(parallel),
            dist_init_required=False,
        )
        self.micro_step = 0
        self.was_updated = True
        """Whether the last update was made; it is left out where the gradients' norm is not finite."""

    @property
    def module(self) -> nn.Module:
        """The trained module, in the precision that DeepSpeed gave it."""
        return self.engine.module

    def accumulate(self, inputs: Any, weights: Tensor | None = None) -> dict[str, Tensor]:
        """Forward and backward of one micro batch; returns the weighted sums of its per-sample values, detached.

        weights (b,): of each sample in the loss, by default 1/b. Where a loss is not finite, every gradient becomes
        NaN, so that the update will be left out.
        """
        self.engine.train()
        values = self.engine(inputs)
        self.losses = values["loss"].detach()
        sums = {name: _weighted(value, weights) for name, value in values.items()}
        poison = torch.where(self.losses.isfinite().all(), 1.0, math.nan)  # no wait for the device, and 1 is exact
        self.engine.backward(sums["loss"] * poison)
        self.micro_step += 1
        if self.micro_step % self.config.grad_accum_steps:
            self.engine.step()  # not a boundary: DeepSpeed only counts
        return {name: value.detach() for name, value in sums.items()}

    @torch.no_grad()
    def evaluate(self, inputs: Any) -> dict[str, Tensor]:
        """The per-sample values of a batch, nothing trained."""
        self.engine.eval()
        return self.engine(inputs)

    def update(self, lr: float) -> float:
        """The optimizer step at a learning rate, after the last micro batch; returns the norm before clipping.

        Without a finite norm the update is left out (`was_updated`). Raises TrainingError where fp16 has no smaller
        loss scale left.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
        if self.config.zero_stage == 0:
            return self._update_plainly()
        try:
            self.engine.step()
        except Exception as error:  # DeepSpeed's scaler raises no type of its own
            if "loss scale already at minimum" not in str(error):
                raise
            raise TrainingError(
                f"fp16: the loss scale has fallen to its minimum {self.loss_scale:g} and the gradients still overflow, "
                "though the losses may be finite. The weights have grown too large for fp16: use deepspeed.bf16, lower "
                "the learning rate, or set deepspeed.fp16.min_loss_scale lower"
            ) from error
        self.was_updated = not self.engine.optimizer.overflow
        return float(self.engine.get_global_grad_norm())

    def _update_plainly(self) -> float:
        """At ZeRO stage 0: DeepSpeed adds gradients up and steps; norm, clipping and leaving out are done here."""
        norm = self._plain_norm()
        self.was_updated = bool(norm.isfinite())
        gradients = [parameter.grad for parameter in self.names if parameter.grad is not None]
        if not self.was_updated:
            for parameter in self.names:
                parameter.grad = None
        elif self.config.gradient_clipping:
            torch._foreach_mul_(gradients, (self.config.gradient_clipping / (norm + 1e-6)).clamp(max=1.0))
        self.engine.step()
        return float(norm)

    def _plain_norm(self) -> Tensor:
        """Norm over the parameters of all tensor-parallel ranks; what they hold copies of counts once."""
        counted = [
            p.grad for p in self.names if p.grad is not None and (is_sharded(p) or self.parallel.rank("tp") == 0)
        ]
        norm = torch.nn.utils.get_total_norm(counted) if counted else torch.zeros(())
        group = self.parallel.group("tp")
        if group is None:
            return norm
        square = norm.square()
        dist.all_reduce(square, group=group)
        return square.sqrt()

    @property
    def loss_scale(self) -> float | None:
        """The loss scale of fp16 training."""
        return float(self.engine.loss_scale()) if self.config.precision == "fp16" else None

    # --- state -------------------------------------------------------------------------------------------------------

    def fragments(self) -> list[Fragment]:
        """This rank's optimizer state, as views of the live tensors."""
        if self.config.zero_stage == 0:
            return [self._whole(parameter, name) for parameter, name in self.names.items()]
        return self._partitions() if self.config.zero_stage == 3 else self._runs()

    def _runs(self) -> list[Fragment]:
        """ZeRO 1 and 2: this rank has a run of a flat group of parameters."""
        found = []
        zero = self.engine.optimizer
        if hasattr(zero, "bf16_groups"):  # what DeepSpeed takes where bf16 gradients are added up in float32
            groups, flats = zero.bf16_groups, zero.fp32_groups_flat_partition
        else:
            groups, flats = zero.bit16_groups, zero.single_partition_of_fp32_groups
        for parameters, flat in zip(groups, flats):
            state = zero.optimizer.state[flat]
            for parameter in parameters:
                if parameter._hp_mapping is None:  # another rank's share of the group
                    continue
                own, place = parameter._hp_mapping.lp_fragment_address, parameter._hp_mapping.hp_fragment_address
                tensors, numbers = _split_state(state, flat.shape)
                views = {
                    kind: value.detach().narrow(0, place.start, place.numel)
                    for kind, value in {"master": flat, **tensors}.items()
                }
                found.append(Fragment(self.names[parameter], own.start, parameter.shape, views, numbers))
        return found

    def _partitions(self) -> list[Fragment]:
        """ZeRO 3: every parameter is cut into equal parts, the last of them padded."""
        found = []
        zero = self.engine.optimizer
        for parameter, name in self.names.items():
            group, offset, length = zero.grad_position[zero.get_param_id(parameter)]
            flat, total = zero.fp32_partitioned_groups_flat[group], parameter.ds_numel  # type: ignore[attr-defined]
            start = self.parallel.rank("replicas") * length
            count = min(max(total - start, 0), length)
            tensors, numbers = _split_state(zero.optimizer.state[flat], flat.shape)
            views = {
                kind: value.detach().narrow(0, offset, count) for kind, value in {"master": flat, **tensors}.items()
            }
            found.append(Fragment(name, min(start, total), parameter.ds_shape, views, numbers))  # type: ignore[attr-defined]
        return found

    def _whole(self, parameter: nn.Parameter, name: str) -> Fragment:
        tensors, numbers = _split_state(self._base_optimizer().state[parameter], parameter.shape)
        views = {kind: value.detach().view(-1) for kind, value in {"master": parameter, **tensors}.items()}
        return Fragment(name, 0, parameter.shape, views, numbers)

    def _base_optimizer(self) -> torch.optim.Optimizer:
        return getattr(self.engine.optimizer, "optimizer", self.engine.optimizer)

    def allocate_state(self, stored: StoredState) -> None:
        """Make empty optimizer state of the kinds that a checkpoint has, as the optimizer would at its first step."""
        optimizer = self._base_optimizer()
        if self.config.zero_stage == 3:
            masters = self.engine.optimizer.fp32_partitioned_groups_flat
        else:
            masters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        for parameter in masters:
            state, name = optimizer.state[parameter], self.names.get(parameter)  # no name: a flat group of parameters
            for kind in stored.tensor_kinds(name):
                state[kind] = torch.zeros_like(parameter)
            for kind in stored.number_kinds(name):
                state[kind] = torch.tensor(0.0)

    def weights(self, keep: Callable[[str, Tensor], Tensor]) -> dict[str, Tensor] | None:
        """The module's state dict on the first of the replicas, None on others; every rank must call it.

        keep(name, value) returns what is to be kept of a value that may change or go right after.
        """
        is_first = self.parallel.rank("replicas") == 0
        own = self.module.state_dict()
        if self.config.zero_stage < 3:
            return {name: keep(name, value.detach()) for name, value in own.items()} if is_first else None
        import deepspeed

        parameters = dict(self.module.named_parameters(remove_duplicate=False))
        whole = {}
        for name, value in own.items():
            with deepspeed.zero.GatheredParameters([parameters[name]] if name in parameters else []):
                if is_first:
                    whole[name] = keep(name, parameters.get(name, value).detach())
        return whole if is_first else None

    def aliases(self) -> dict[str, str]:
        """Further name of a trained parameter that has several -> the name by which it is trained."""
        named = self.module.named_parameters(remove_duplicate=False)
        return {name: own for name, value in named if (own := self.names.get(value, name)) != name}

    def scaler_state(self) -> dict[str, float]:
        """The plain numbers of the fp16 loss scaler."""
        if self.config.precision != "fp16":
            return {}
        scaler = self.engine.optimizer.loss_scaler
        return {
            key: value for key, value in vars(scaler).items() if key in _SCALER_KEYS and isinstance(value, int | float)
        }

    def load_scaler_state(self, state: Mapping[str, float]) -> None:
        """Set what `scaler_state` returned."""
        if self.config.precision != "fp16":
            return
        for key, value in state.items():
            setattr(self.engine.optimizer.loss_scaler, key, value)


def _weighted(values: Tensor, weights: Tensor | None) -> Tensor:
    return values.mean() if weights is None else (values * weights.to(values)).sum()


_SCALER_KEYS = ("cur_scale", "cur_iter", "cur_hysteresis", "last_overflow_iter")


def _split_state(state: dict[str, Any], shape: torch.Size) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Optimizer state of one tensor: what has its shape, and single numbers."""
    tensors = {kind: value for kind, value in state.items() if isinstance(value, Tensor) and value.shape == shape}
    numbers = {kind: value for kind, value in state.items() if isinstance(value, Tensor) and value.dim() == 0}
    return tensors, {kind: value for kind, value in numbers.items() if kind not in tensors}
