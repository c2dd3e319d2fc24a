"""The `args:` section of sampling as typed values, and what follows from it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Literal

from sat.cogvideox.presets import TIME_FACTOR, VideoSizes, untrained_size, video_sizes
from sat.compat.sat_names import INEFFECTIVE_ARGS
from sat.config import ConfigNode, build_dataclass
from sat.errors import ConfigError
from sat.training.args import ComputeArgs, TrainArgs
from sat.training.preview import clip_fps, clip_params, clip_sizes


@dataclass(frozen=True, kw_only=True)
class SampleArgs(ComputeArgs):
    """What to sample. Names are SAT's where SAT has them."""

    load: str | None = None
    """Weights: a file, an iteration folder or a run directory."""
    weights: Literal["auto", "ema", "raw"] = "auto"
    """Which of them: the averaged ones (N-ema) where there are any, or the last ones of training."""
    force_inference: bool = False
    """Sample although the loaded weights lack some that the model has."""
    input_type: Literal["cli", "txt"] = "txt"
    """cli: prompts are typed in; txt: one prompt a line in input_file."""
    input_file: str | None = None
    output_dir: str = "outputs"
    batch_size: int = 1
    sampling_image_size: list[int] | None = None
    """[height, width] in pixels; the model's own by default."""
    num_frames: int | None = None
    """Frames of the video, 4k + 1; the model's own by default."""
    sampling_num_frames: int | None = None
    """The same in latent frames, as SAT counts them: with a patch of two frames (1.5), one of them is padding."""
    sampling_fps: int | None = None
    """By default that of the training clips, where they have one, else 8."""
    initial_noise: str | None = None
    """A file that tools/invert.py wrote: what every sample starts from, instead of noise of its own."""
    prefix: str | None = None
    """A clip, or a file of latents, whose end every sample begins with (the sampler's fixed_frames latent frames)."""
    latent_channels: int | None = None
    """The network's out_channels; another number is an error."""
    bf16: bool | None = None
    fp16: bool | None = None
    """Precision of the network; by default the one that it was trained in."""
    only_save_latents: bool = False
    guidance_parallel: bool = False
    """Compute the halves of guidance on two ranks, side by side."""
    reuse_threshold: float | None = None
    """Reuse the layers' work of an earlier step where the first layer changed less than this, relative. The log says at
    the end what that saved and how wrong it was. None: every step is computed whole."""
    lora: list[str] | None = None
    """Adapters to put on the model: files, or runs and iterations that trained them."""
    lora_scale: list[float] | None = None
    """What the effect of each is multiplied by; 1 by default."""
    image2video: bool = False
    """Whether prompts name an image, `PROMPT@@IMAGE`. Where the model continues images they always do."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.bf16 and self.fp16:
            raise ConfigError("args.bf16 and args.fp16 are both on; choose one (2B was trained in fp16, 5B in bf16)")
        for name in ("batch_size", "sampling_fps", "num_frames", "sampling_num_frames"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"args.{name} is {value}; give 1 or more")
        if self.reuse_threshold is not None and not 0.0 <= self.reuse_threshold < math.inf:
            raise ConfigError(
                f"args.reuse_threshold is {self.reuse_threshold:g}; give 0 (nothing is reused) or more, such as 0.1"
            )
        if self.sampling_image_size is not None and len(self.sampling_image_size) != 2:
            raise ConfigError(f"args.sampling_image_size is {self.sampling_image_size}; give [height, width]")
        if self.num_frames is not None and self.sampling_num_frames is not None:
            raise ConfigError(
                f"args.num_frames is {self.num_frames} and args.sampling_num_frames is {self.sampling_num_frames}; "
                "give one: frames of the video, or latent frames"
            )
        if self.lora_scale is not None and len(self.lora_scale) != len(self.lora or ()):
            raise ConfigError(
                f"there are {len(self.lora_scale)} LoRA scales and {len(self.lora or ())} LoRAs; give one for each"
            )


def sample_args(config: ConfigNode) -> SampleArgs:
    """The args section of a sampling run; keys that only training reads are passed over."""
    training_only = {field.name for field in fields(TrainArgs)}
    return build_dataclass(SampleArgs, config["args"], INEFFECTIVE_ARGS, also_known=training_only)


def takes_image(config: ConfigNode, args: SampleArgs) -> bool:
    """Whether the model continues images. Raises ConfigError where the args section says so and it does not."""
    takes = bool(config["model"].get("noised_image_input", False))
    if args.image2video and not takes:
        raise ConfigError(
            "args.image2video is on, and the model takes no image (model.noised_image_input is not true); "
            "load an image-to-video model, or leave it out"
        )
    return takes


def follows_image(config: ConfigNode, args: SampleArgs) -> bool:
    """Whether each video gets the aspect ratio of its image: where no size is asked for and the model was not trained
    at one alone, which a table of its positions would tell."""
    modules = config["model"]["network_config"]["params"].get("modules") or {}
    positions = modules.get("pos_embed_config") or {}
    has_table = (positions.get("params") or {}).get("learnable_pos_embed") or "Basic3D" in positions.get("target", "")
    return takes_image(config, args) and args.sampling_image_size is None and not has_table


def sampling_sizes(config: ConfigNode, args: SampleArgs) -> VideoSizes:
    """Sizes of the videos: from the args section where it says, else those of the model's training clips."""
    clips = clip_sizes(config)
    if clips is None:
        raise ConfigError("the model section has no network_config: this is no video model that could be sampled")
    network = config["model"]["network_config"]["params"]
    if args.latent_channels not in (None, network["out_channels"]):
        raise ConfigError(
            f"args.latent_channels is {args.latent_channels}, the network's out_channels is {network['out_channels']}; "
            "leave latent_channels out"
        )
    patch_size = network.get("patch_size", [1, 2, 2])
    num_frames = args.num_frames or _pixel_frames(args.sampling_num_frames, patch_size) or clips.num_frames
    height, width = args.sampling_image_size or (clips.height, clips.width)
    return video_sizes(num_frames, height, width, patch_size, clips.text_length)


def _pixel_frames(latent_frames: int | None, patch_size: int | Sequence[int]) -> int | None:
    """Frames of a video whose latent frames are counted as SAT does: all that the network is given."""
    patch_frames = 1 if isinstance(patch_size, int) else patch_size[0]
    if latent_frames is None or patch_frames == 1:
        return latent_frames and TIME_FACTOR * (latent_frames - 1) + 1
    if latent_frames % patch_frames:
        raise ConfigError(
            f"{latent_frames} latent frames are not a multiple of the {patch_frames} frames of a patch; "
            f"set args.sampling_num_frames to {latent_frames + patch_frames - latent_frames % patch_frames}, or give "
            f"args.num_frames={TIME_FACTOR * (latent_frames - 1) + 1}"
        )
    return TIME_FACTOR * (latent_frames - 2) + 1


def size_warning(config: ConfigNode, sizes: VideoSizes) -> str | None:
    """What to say where a model is asked for clips of sizes that it was not trained on."""
    trained = clip_sizes(config)
    patch_size = config["model"]["network_config"]["params"].get("patch_size", 1)
    keeps_aspect = clip_params(config).get("size_mode") == "keep"
    is_1_5 = not isinstance(patch_size, int) and patch_size[0] > 1
    return untrained_size(sizes, trained, keeps_aspect or is_1_5) if trained is not None else None


def sampling_fps(config: ConfigNode, args: SampleArgs) -> float:
    """Frames per second of the videos."""
    return args.sampling_fps or clip_fps(config)


def sampling_precision(config: ConfigNode, args: SampleArgs) -> Literal["fp32", "bf16", "fp16"]:
    """The network's precision: from the args section where it says, else that of the training run."""
    if args.bf16 is not None or args.fp16 is not None:
        return "bf16" if args.bf16 else "fp16" if args.fp16 else "fp32"
    trained = {name: (config["deepspeed"].get(name) or {}).get("enabled", False) for name in ("bf16", "fp16")}
    return "bf16" if trained["bf16"] else "fp16" if trained["fp16"] else "fp32"
