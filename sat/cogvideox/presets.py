"""The released models as data: their sizes, how to tell their weights apart, and what follows from a size."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod

from sat.errors import ConfigError

SPACE_FACTOR = 8
"""Pixels per latent along rows and columns."""
TIME_FACTOR = 4
"""Pixel frames per latent frame, after the first."""
LATENT_CHANNELS = 16
"""Channels of the latents that every released model makes."""


@dataclass(frozen=True)
class Preset:
    """What tells one released transformer from the others."""

    name: str
    config: str
    """Its model YAML, in the folder configs/."""
    hidden_size: int
    num_layers: int
    in_channels: int
    patch_size: tuple[int, int, int]
    has_position_table: bool
    has_ofs: bool


PRESETS = (
    Preset("CogVideoX-2B", "cogvideox_2b.yaml", 1920, 30, 16, (1, 2, 2), True, False),
    Preset("CogVideoX-5B", "cogvideox_5b.yaml", 3072, 42, 16, (1, 2, 2), False, False),
    Preset("CogVideoX-5B-I2V", "cogvideox_5b_i2v.yaml", 3072, 42, 32, (1, 2, 2), True, False),
    Preset("CogVideoX1.5-5B", "cogvideox1.5_5b.yaml", 3072, 42, 16, (2, 2, 2), False, False),
    Preset("CogVideoX1.5-5B-I2V", "cogvideox1.5_5b_i2v.yaml", 3072, 42, 32, (2, 2, 2), False, True),
)

TABLE_REACH = 300
"""latent_height and latent_width in the released files of 1.5: how far their rotary tables reach."""
LARGEST_CLIP = (768, 1360)
"""Rows and columns in pixels that those models were trained at."""
SHORTEST_SHARE = 4
"""Clips of a smaller share of the trained frames are warned of."""

Shapes = Mapping[str, Sequence[int]]

TRANSFORMER = "CogVideoX transformer"
ADAPTERS = "LoRA adapters"
DIFFUSERS_ADAPTERS = "LoRA adapters under diffusers' names"
DIFFUSERS_TRANSFORMER = "diffusers CogVideoX transformer"
COMFY_TRANSFORMER = "CogVideoX transformer under ComfyUI's names"
VAE = "CogVideoX VAE"
DIFFUSERS_VAE = "diffusers CogVideoX VAE"
TEXT_ENCODER = "T5 text encoder"
OPTIMIZER_STATE = "optimizer state"
CORE_MODEL = "SAT transformer without video mixins"

FAMILIES = (
    (TRANSFORMER, r"mixins\.patch_embed\.proj\.weight$"),
    (ADAPTERS, r"\.matrix_A\.\d+$"),
    (DIFFUSERS_ADAPTERS, r"\.lora_(A|B|down|up)\."),
    (DIFFUSERS_TRANSFORMER, r"(^|\.)transformer_blocks\.\d+\."),
    (COMFY_TRANSFORMER, r"(^|\.)blocks\.\d+\.attn_out\.weight$"),
    (VAE, r"(^|\.)(encoder\.down|decoder\.up)\.\d+\.block\."),
    (DIFFUSERS_VAE, r"(^|\.)(encoder\.down|decoder\.up)_blocks\."),
    (TEXT_ENCODER, r"(^|\.)encoder\.block\.\d+\.layer\."),
    (OPTIMIZER_STATE, r"^(master|exp_avg)\|"),
    (CORE_MODEL, r"(^|[./])transformer\.layers\.\d+\."),
)
"""What a state dict may be, and a name that only it has; the first that is found decides."""


def family_of(names: Iterable[str]) -> str | None:
    """The family of FAMILIES that a state dict of these names belongs to."""
    names = list(names)
    for family, pattern in FAMILIES:
        if any(re.search(pattern, name) for name in names):
            return family
    return None


@dataclass(frozen=True)
class TransformerKind:
    """What names and shapes tell of a CogVideoX transformer."""

    preset: Preset | None
    """The released model of the same form: inputs, patches, positions. Its size may be another."""
    hidden_size: int
    num_layers: int
    patch_inputs: int
    """Numbers that make one video token."""
    has_lora: bool = False
    has_release_1_layout: bool = False

    @property
    def has_released_size(self) -> bool:
        """Whether width and depth are the released model's too."""
        preset = self.preset
        return preset is not None and (self.hidden_size, self.num_layers) == (preset.hidden_size, preset.num_layers)

    def __str__(self) -> str:
        more = " with LoRA" if self.has_lora else ""
        more += " in the layout of release 1.0" if self.has_release_1_layout else ""
        if self.preset is not None and self.has_released_size:
            return f"{self.preset.name}{more}"
        size = f"hidden_size {self.hidden_size}, {self.num_layers} layers"
        if self.preset is not None:
            return f"a transformer in the form of {self.preset.name} of {size}{more}"
        return f"a CogVideoX-like transformer of {size}, {self.patch_inputs} inputs to a patch{more}"


def transformer_kind(shapes: Shapes) -> TransformerKind | None:
    """What kind of CogVideoX transformer a state dict is, whatever stands before its names; None if it is none."""
    anchor = "mixins.patch_embed.proj.weight"
    prefix = next((name.removesuffix(anchor) for name in shapes if name.endswith(anchor)), None)
    if prefix is None:
        return None
    own = {name.removeprefix(prefix): tuple(shape) for name, shape in shapes.items()}
    kernel, inputs = own[anchor], prod(own[anchor][1:])
    return TransformerKind(
        preset=find_preset(
            inputs,
            own.get("mixins.final_layer.linear.weight", (0,))[0],
            "mixins.pos_embed.pos_embedding" in own,
            "ofs_embed.0.weight" in own,
        ),
        hidden_size=kernel[0],
        num_layers=count_layers(own, r"transformer\.layers\.(\d+)\."),
        patch_inputs=inputs,
        has_lora=any("matrix_A" in name for name in own),
        has_release_1_layout=len(kernel) == 4,
    )


def count_layers(names: Iterable[str], pattern: str) -> int:
    """How many different numbers stand at a pattern's group at the beginning of names."""
    return len({match[1] for match in map(re.compile(pattern).match, names) if match})


def find_preset(patch_inputs: int, patch_outputs: int, has_position_table: bool, has_ofs: bool) -> Preset | None:
    """The released model of a form: numbers in and out of one patch, and what its state dict holds besides."""
    # Patches span two frames where they hold 2 x 2 x 2 latents of 16 channels; the sides of a patch leave no trace.
    frames = 2 if patch_outputs and patch_outputs % (8 * LATENT_CHANNELS) == 0 else 1
    takes_image = patch_inputs == 2 * patch_outputs
    if not takes_image and patch_inputs != patch_outputs:
        return None
    for preset in PRESETS:
        form = (preset.patch_size[0], preset.in_channels == 2 * LATENT_CHANNELS, preset.has_position_table)
        if form == (frames, takes_image, has_position_table) and preset.has_ofs == has_ofs:
            return preset
    return None


def describe_weights(shapes: Shapes) -> str:
    """What a state dict looks like, from its names and shapes: a released model's name, or its sizes."""
    kind = transformer_kind(shapes)
    if kind is not None:
        return str(kind)
    family = family_of(shapes)
    if family is None:
        return "no CogVideoX transformer"
    return f"{family} weights (convert them first)" if family == DIFFUSERS_TRANSFORMER else f"{family} weights"


@dataclass(frozen=True)
class VideoSizes:
    """The numbers that follow from a clip's size: nobody writes them by hand."""

    num_frames: int
    height: int
    width: int
    latent_frames: int
    latent_height: int
    latent_width: int
    grid: tuple[int, int, int]
    text_length: int

    @property
    def video_tokens(self) -> int:
        """Tokens of the clip."""
        return self.grid[0] * self.grid[1] * self.grid[2]

    def __str__(self) -> str:
        t, h, w = self.grid
        return (
            f"{self.num_frames} frames of {self.height}x{self.width} -> {self.latent_frames} latent frames of "
            f"{self.latent_height}x{self.latent_width} -> grid {t}x{h}x{w}, "
            f"{self.video_tokens:,} + {self.text_length} tokens"
        )


def video_sizes(
    num_frames: int,
    height: int,
    width: int,
    patch_size: int | Sequence[int],
    text_length: int,
    time_factor: int = TIME_FACTOR,
) -> VideoSizes:
    """Latents, grid and tokens of a clip in pixels; a size that is not whole is an error that names both neighbours."""
    o, p, q = (1, patch_size, patch_size) if isinstance(patch_size, int) else patch_size
    if num_frames < 1 or (num_frames - 1) % time_factor:
        below = max((num_frames - 1) // time_factor * time_factor + 1, 1)
        raise ConfigError(
            f"{num_frames} frames are not {time_factor}k + 1, as the VAE needs; give {below} or {below + time_factor}"
        )
    for name, size, patch in (("height", height, p), ("width", width, q)):
        step = SPACE_FACTOR * patch
        if size < step or size % step:
            below = max(size // step * step, step)
            raise ConfigError(
                f"{name} {size} is not a multiple of {step} ({SPACE_FACTOR} pixels per latent x patch {patch}); "
                f"give {below} or {below + step}"
            )
    latent_frames = (num_frames - 1) // time_factor + 1
    latent_height, latent_width = height // SPACE_FACTOR, width // SPACE_FACTOR
    grid = (-(-latent_frames // o), latent_height // p, latent_width // q)
    return VideoSizes(num_frames, height, width, latent_frames, latent_height, latent_width, grid, text_length)


def network_pixels(latent_height: int, latent_width: int) -> tuple[int, int]:
    """Rows and columns in pixels of the clips that a network's configuration speaks of."""
    if latent_height == latent_width == TABLE_REACH:
        return LARGEST_CLIP
    return SPACE_FACTOR * latent_height, SPACE_FACTOR * latent_width


def untrained_size(sizes: VideoSizes, trained: VideoSizes, any_aspect: bool) -> str | None:
    """A warning where clips are far from those that a model was trained on in length or size; None where not.

    any_aspect: it was trained on clips of any aspect ratio, from a square of their short side to their area. A clip of
    less than a quarter of the trained frames counts as far.
    """
    area, whole = sizes.height * sizes.width, trained.height * trained.width
    same_size = (sizes.height, sizes.width) == (trained.height, trained.width)
    area_fits = any_aspect and min(trained.height, trained.width) ** 2 <= area <= whole
    if trained.num_frames / SHORTEST_SHARE <= sizes.num_frames <= trained.num_frames and (same_size or area_fits):
        return None
    return (
        f"{sizes.num_frames} frames of {sizes.height}x{sizes.width} are asked for, and the model was trained on "
        f"{trained.num_frames} of {trained.height}x{trained.width}"
        f"{', or of other aspect ratios with that short side' if any_aspect else ''}: they may look worse"
    )
