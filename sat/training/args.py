"""The `args:` and `deepspeed:` sections as typed values."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

from sat.compat.sat_names import INEFFECTIVE_ARGS
from sat.config import ConfigNode, build_dataclass, did_you_mean, warn_once
from sat.errors import ConfigError
from sat.training.lr import Style


@dataclass(frozen=True, kw_only=True)
class LayoutArgs:
    """How processes share the work of one model; what is left of them is data-parallel."""

    model_parallel_size: int = 1
    """Tensor-parallel ranks: they share every layer."""
    sequence_parallel: bool = False
    """Between the shared products, tensor-parallel ranks hold a part of the tokens each."""
    context_parallel_size: int = 1
    """Context-parallel ranks: they share the tokens of a clip."""
    context_parallel_mode: Literal["auto", "ulysses", "ring", "hybrid"] = "auto"
    """ulysses exchanges heads, ring passes keys and values on, hybrid does both; auto picks by the number of heads."""

    def __post_init__(self) -> None:
        for name in ("model_parallel_size", "context_parallel_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"args.{name} is {getattr(self, name)}; give 1 or more")
        if self.sequence_parallel and self.model_parallel_size == 1:
            raise ConfigError("args.sequence_parallel needs tensor parallelism; set args.model_parallel_size above 1")


LAYOUT_KEYS = tuple(field.name for field in fields(LayoutArgs))


@dataclass(frozen=True, kw_only=True)
class ComputeArgs(LayoutArgs):
    """How a model is computed; changes results by rounding only."""

    compile: bool = False
    """Let torch compile each layer of the transformer."""
    attention: Literal["auto", "flash", "flash3", "cudnn", "efficient", "math"] = "auto"
    """Which kernel attention runs on a GPU; auto times them at the start."""


@dataclass(frozen=True, kw_only=True)
class TrainArgs(ComputeArgs):
    """What a training run does. Names and defaults are SAT's where SAT has them."""

    experiment_name: str = "run"
    mode: Literal["pretrain", "finetune"] = "pretrain"
    """pretrain with `load` set continues that run; finetune starts a new one from its weights."""
    load: str | None = None
    """Weights to start from: a file, an iteration folder or a run directory."""
    weights: Literal["auto", "ema", "raw"] = "auto"
    """Which weights of `load` a finetuning run starts from: the averaged ones where there are any, or the last ones."""
    save: str | None = None
    """Folder for run directories. Nothing is saved without it."""
    resume: str = "auto"
    """auto continues the run in `save` that this configuration began; never starts a new one; or a path of a run."""
    resume_check: bool = True
    """After loading, compute the loss of a saved batch again and stop if it is another."""
    force_train: bool = False
    """Start although the loaded weights lack some that the model has."""
    from_text_to_video: bool = False
    """The loaded weights are a text-to-video model's, and the model continues images: it starts as the former."""

    train_iters: int | None = None
    """Optimizer steps. Give this or epochs."""
    epochs: float | None = None
    global_batch_size: int | None = None
    """Samples per optimizer step over all processes; derives the gradient accumulation."""
    train_data: list[str] | str | None = None
    """Folders or manifests; not needed for data that come from nowhere."""
    train_data_weights: list[float] | None = None
    """How often the clips of each folder of train_data come while those of a folder with 1 come once; as in SAT."""
    valid_data: list[str] | str | None = None
    num_workers: int = 1
    cache: Literal["none", "text", "latents", "all"] = "none"
    """What is encoded once and kept in cache_dir: captions, clips or both."""
    cache_dir: str | None = None
    """Folder of the cache; runs may share it."""
    cache_read_only: bool = False
    """Nothing is written to the cache; what it lacks is an error."""
    max_bad_share: float = 0.01
    """Share of unreadable clips at which the run stops."""

    log_interval: int = 1
    save_interval: int = 5000
    save_safetensors: bool = False
    """With each checkpoint also write the whole weights as one safetensors file."""
    max_failed_saves: int = 3
    """Failed saves in a row at which the run stops."""
    keep_last: int | None = None
    """Checkpoints that are kept; all by default."""
    keep_every: int | None = None
    """Besides, those of steps that are multiples of this."""
    keep_best: int = 0
    """Besides, so many with the lowest validation loss, of those that were saved at a step of eval_interval."""
    time_limit_minutes: float | None = None
    """Save and stop in time before so many minutes since the start are over."""
    max_skipped_steps: int = 10
    """Steps in a row with a loss or gradients that are not finite at which the run stops."""
    spike_deviations: float = 10.0
    """A loss so many deviations above the median of the last steps is reported; 0: none."""
    desync_interval: int | None = 100
    """Steps between comparisons of the weights that ranks have in common; null: never."""
    eval_interval: int | None = None
    eval_iters: int = 1
    """Validation batches: of eval_batch_size samples, by default of the global batch's size."""
    eval_batch_size: int | None = None
    log_sample: int = 0
    """Videos sampled at each validation, of the first captions of the validation set (and their first frames)."""
    eval_timesteps: list[int] | None = None
    """Timesteps of the validation loss; 100, 300, .. 900 by default."""

    lr_decay_style: Style = "linear"
    lr_decay_iters: int | None = None
    lr_decay_ratio: float = 0.1
    warmup: float = 0.01
    """Share of the decay's steps in which the learning rate rises."""
    auto_warmup_steps: int = 100
    """Steps at 5 % of the learning rate at the start of a finetune run."""

    checkpoint_activations: bool | None = None
    """Recompute activations in backward; overrides the model's transformer_args."""
    checkpoint_num_layers: int | None = None
    activations: str | None = None
    """What layers keep for backward: keep, recompute, keep_attention, recompute_every_N or offload; null: as
    checkpoint_activations says, which is keep or recompute."""
    timeout_minutes: float = 30.0
    """How long a collective may take before the job stops."""

    measure_matrix_rate: bool = False
    """At the start, time matrix products on this device; the metrics then have the share of their rate."""

    summary_dir: str = ""
    """Folder for TensorBoard; the run directory by default."""
    wandb: bool = False
    wandb_project_name: str = "sat"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.train_iters is not None and self.epochs is not None:
            raise ConfigError(f"args: train_iters {self.train_iters} and epochs {self.epochs} contradict; give one")
        for name in (
            "train_iters",
            "epochs",
            "global_batch_size",
            "log_interval",
            "save_interval",
            "eval_interval",
            "eval_iters",
            "max_failed_saves",
            "keep_last",
            "keep_every",
            "time_limit_minutes",
            "max_skipped_steps",
            "desync_interval",
        ):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ConfigError(f"args.{name} is {value}; give more than 0")
        if self.log_sample < 0:
            raise ConfigError(f"args.log_sample is {self.log_sample}; give a number of videos, or 0 for none")
        if self.from_text_to_video and (self.mode != "finetune" or self.load is None):
            raise ConfigError("args.from_text_to_video needs the weights to start from: args.load, args.mode=finetune")
        if self.cache != "none" and self.cache_dir is None:
            raise ConfigError(f"args.cache is {self.cache}, and args.cache_dir is not set; give a folder for the cache")
        for name in ("keep_best", "spike_deviations"):
            if getattr(self, name) < 0:
                raise ConfigError(f"args.{name} is {getattr(self, name)}; give 0 or more")
        if self.keep_last is None and (self.keep_every is not None or self.keep_best):
            raise ConfigError(
                "args.keep_every and args.keep_best say what is kept besides the last ones, and without args.keep_last "
                "every checkpoint is kept; set args.keep_last, or leave them out"
            )


SAMPLE_ONLY = (
    "batch_size",
    "bf16",
    "force_inference",
    "fp16",
    "guidance_parallel",
    "image2video",
    "initial_noise",
    "input_dir",
    "input_file",
    "input_type",
    "latent_channels",
    "lora",
    "lora_scale",
    "num_frames",
    "only_save_latents",
    "output_dir",
    "prefix",
    "sampling_fps",
    "sampling_image_size",
    "sampling_num_frames",
    "seed",
)
"""Keys of the args section that only sampling reads; a training config may hold them."""


def train_args(config: ConfigNode) -> TrainArgs:
    """The args section of a training run."""
    return build_dataclass(TrainArgs, config["args"], INEFFECTIVE_ARGS, also_known=SAMPLE_ONLY)


DEEPSPEED_KEYS = [
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "gradient_clipping",
    "zero_optimization",
    "bf16",
    "fp16",
    "optimizer",
    "scheduler",
    "steps_per_print",
    "zero_allow_untested_optimizer",
    "zero_force_ds_cpu_optimizer",
    "activation_checkpointing",
    "wall_clock_breakdown",
    "dump_state",
    "prescale_gradients",
    "gradient_predivide_factor",
    "communication_data_type",
    "seq_parallel_communication_data_type",
    "sparse_gradients",
    "amp",
    "data_types",
    "comms_logger",
    "flops_profiler",
    "monitor_config",
    "tensorboard",
    "wandb",
    "csv_monitor",
    "memory_breakdown",
    "disable_allgather",
    "aio",
    "elasticity",
    "autotuning",
    "compression_training",
    "data_efficiency",
    "checkpoint",
    "compile",
    "torch_autocast",
    "timers",
    "zenflow",
]
"""Top-level keys that DeepSpeed's configuration has."""

_MISPLACED = dict.fromkeys(
    ("loss_scale", "loss_scale_window", "hysteresis", "min_loss_scale"), "it belongs under deepspeed.fp16"
)
_OWN_BUSINESS = {
    "train_batch_size": "it is micro batch x accumulation x processes; set args.global_batch_size",
    "scheduler": "the learning rate follows args.lr_decay_style and args.warmup",
    "activation_checkpointing": "activations are recomputed as args.checkpoint_activations says",
}
DEPRECATED_ZERO = {
    "cpu_offload": "DeepSpeed dropped it; give offload_optimizer: {device: cpu}",
    "load_from_fp32_weights": "a run that goes on always takes the optimizer's float32 weights",
}
_UNEQUAL: tuple[tuple[str, Any, str], ...] = (
    ("prescale_gradients", False, "ZeRO 2 and 3 refuse it, and averaging after the sum does the same"),
    ("gradient_predivide_factor", 1, "ZeRO 2 and 3 refuse it, and averaging after the sum does the same"),
    ("zero_optimization.cpu_offload", False, "its name is offload_optimizer: {device: cpu} now"),
    ("zero_optimization.zero_quantized_gradients", False, "rounded gradients make results depend on the ranks"),
    ("zero_optimization.zero_quantized_weights", False, "rounded weights make results depend on the ranks"),
    ("zero_optimization.zenflow", None, "late updates make results depend on timing"),
    ("elasticity.enabled", False, "it changes the global batch with the number of processes"),
    ("data_efficiency.enabled", False, "the data's order is a function of the seed alone"),
    ("compression_training", None, "it changes the weights that are trained"),
    ("sparse_gradients", False, "DeepSpeed has dropped it"),
    ("amp.enabled", False, "enable deepspeed.bf16 or deepspeed.fp16"),
)
"""Key, its harmless value, and why any other is refused: the numbers of one process are the numbers of all layouts."""

_BYTES = {"fp32": 4, "bf16": 2, "bfp16": 2, "fp16": 2}


@dataclass(frozen=True)
class DeepSpeedConfig:
    """The deepspeed section, checked: what this package decides by it, and the rest as DeepSpeed takes it."""

    micro_batch_size: int
    grad_accum_steps: int
    zero_stage: int
    precision: Literal["fp32", "bf16", "fp16"]
    gradient_clipping: float
    optimizer: Mapping[str, Any]
    rest: Mapping[str, Any]
    """Further keys, handed to DeepSpeed unchanged."""

    @property
    def lr(self) -> float:
        """Peak learning rate."""
        return float((self.optimizer.get("params") or {}).get("lr", 1e-4))

    @property
    def offloads_optimizer(self) -> bool:
        """Whether the optimizer's state and its update are the host's."""
        zero = self.rest.get("zero_optimization") or {}
        return (zero.get("offload_optimizer") or {}).get("device", "none") != "none"

    def as_deepspeed(self) -> dict[str, Any]:
        """The mapping that `deepspeed.initialize` takes."""
        config: dict[str, Any] = {
            **self.rest,
            "train_micro_batch_size_per_gpu": self.micro_batch_size,
            "gradient_accumulation_steps": self.grad_accum_steps,
            # At stage 0 the step clips by itself: DeepSpeed would, but keeps the norm to itself.
            "gradient_clipping": self.gradient_clipping if self.zero_stage else 0.0,
            "steps_per_print": 1 << 30,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,  # the optimizer is ours, on an offloaded state too
        }
        zero = {
            key: value
            for key, value in dict(config.get("zero_optimization") or {}).items()
            if key not in DEPRECATED_ZERO
        }
        config["zero_optimization"] = {**zero, "stage": self.zero_stage}
        return config


def deepspeed_config(config: ConfigNode, args: TrainArgs, dp_size: int, device_type: str) -> DeepSpeedConfig:
    """Check the deepspeed section and derive the accumulation that args.global_batch_size asks for."""
    node = config["deepspeed"]
    for key in node:
        if key in _MISPLACED:
            warn_once(f"{node.where(key)} has no effect here: {_MISPLACED[key]}")
        elif key in _OWN_BUSINESS:
            warn_once(f"{node.where(key)} has no effect here: {_OWN_BUSINESS[key]}")
        elif key not in DEEPSPEED_KEYS:
            raise ConfigError(f"unknown key {node.where(key)}{did_you_mean(key, DEEPSPEED_KEYS)}")
    zero = node.get("zero_optimization") or ConfigNode()
    for key in zero:
        if key in DEPRECATED_ZERO:
            warn_once(f"{zero.where(key)} has no effect here: {DEPRECATED_ZERO[key]}")
    for key, switch in (("bf16", "check_grad_overflow"), ("zero_optimization", "compute_grad_norm")):
        if (section := node.get(key) or ConfigNode()).get(switch) is False:
            raise ConfigError(
                f"{section.where(switch)} is false: infinite gradients would go into the weights; leave it out"
            )
    precision = _precision(node, device_type)
    _refuse_unequal(node, precision)
    stage = _zero_stage(node, precision)
    micro = _positive(node, "train_micro_batch_size_per_gpu", 1)
    accumulation = _positive(node, "gradient_accumulation_steps", 1)
    if args.global_batch_size is not None:
        accumulation = _derive_accumulation(args.global_batch_size, micro, dp_size)
    own = {
        "train_micro_batch_size_per_gpu",
        "gradient_accumulation_steps",
        "gradient_clipping",
        "optimizer",
        *_OWN_BUSINESS,
        *_MISPLACED,
    }
    return DeepSpeedConfig(
        micro_batch_size=micro,
        grad_accum_steps=accumulation,
        zero_stage=stage,
        precision=precision,
        gradient_clipping=float(node.get("gradient_clipping", 0.0)),
        optimizer=node.get("optimizer") or {},
        rest={key: value for key, value in node.plain().items() if key not in own},
    )


def _positive(node: ConfigNode, key: str, default: int) -> int:
    value = node.get(key, default)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConfigError(f"{node.where(key)} is {value!r}; give a whole number, 1 or more")
    return value


def _precision(node: ConfigNode, device_type: str) -> Literal["fp32", "bf16", "fp16"]:
    bf16, fp16 = (bool((node.get(name) or {}).get("enabled", False)) for name in ("bf16", "fp16"))
    if bf16 and fp16:
        raise ConfigError(
            "deepspeed.bf16 and deepspeed.fp16 are both enabled; enable one (2B was trained in fp16, 5B in bf16)"
        )
    if fp16 and device_type != "cuda":
        raise ConfigError("deepspeed.fp16 is enabled, which DeepSpeed refuses on a CPU; use bf16, or neither for fp32")
    return "bf16" if bf16 else "fp16" if fp16 else "fp32"


def _refuse_unequal(node: ConfigNode, precision: str) -> None:
    """Raise ConfigError for what would make the numbers depend on the layout, or is not done at some."""
    for path, harmless, reason in _UNEQUAL:
        owner, key = _owner(node, path)
        if owner.get(key, harmless) not in (harmless, None):
            raise ConfigError(f"{owner.where(key)} is {owner[key]!r}, which is not available here: {reason}")
    for path in ("communication_data_type", "data_types.grad_accum_dtype"):
        owner, key = _owner(node, path)
        if _BYTES.get(owner.get(key) or precision, 4) < _BYTES[precision]:
            raise ConfigError(
                f"{owner.where(key)} is {owner[key]!r} in training with {precision}: gradients would be rounded on "
                "their way, and results depend on the number of ranks; leave it out"
            )


def _owner(node: ConfigNode, path: str) -> tuple[ConfigNode, str]:
    """The mapping that holds the last key of a dotted path, an empty one where there is none, and that key."""
    *parents, key = path.split(".")
    for parent in parents:
        found = node.get(parent)
        node = found if isinstance(found, ConfigNode) else ConfigNode(node.path_of(parent))
    return node, key


def _zero_stage(node: ConfigNode, precision: str) -> int:
    zero = node.get("zero_optimization") or {}
    stage = zero.get("stage", 0)
    if stage not in (0, 1, 2, 3):
        raise ConfigError(f"deepspeed.zero_optimization.stage is {stage!r}; give 0, 1, 2 or 3")
    if precision != "fp32" and stage == 0:
        warn_once(f"{precision} runs at ZeRO stage 1: at stage 0 DeepSpeed's first Adam step is a step off")
        return 1
    return stage


def _derive_accumulation(global_batch_size: int, micro_batch_size: int, dp_size: int) -> int:
    per_pass = micro_batch_size * dp_size
    if dp_size > global_batch_size:
        raise ConfigError(
            f"{dp_size} processes cannot share a global batch of {global_batch_size}; "
            "start fewer processes or raise args.global_batch_size"
        )
    if global_batch_size % per_pass:
        raise ConfigError(
            f"args.global_batch_size {global_batch_size} is not a multiple of {per_pass} "
            f"(micro batch {micro_batch_size} x {dp_size} data-parallel processes); "
            "change it or deepspeed.train_micro_batch_size_per_gpu"
        )
    return global_batch_size // per_pass
