"""The demo set: captions and clips of one moving shape, and a checker of clips that has no learned part.

A caption is `a {colour} {shape} moving {direction} on a {background} background`, or `... standing still on ...`:
6 x 3 x 5 x 3 = 270 of them. Letters for shapes: t frames, h w rows and columns; colours are RGB, 0 to 255.
"""

import itertools
import re
from dataclasses import astuple, dataclass, fields
from functools import cache

import numpy as np

from sat.errors import DataError

SIZE = 32
"""Side of a clip in pixels: 4 latent rows at 8x compression."""
FPS = 8

COLOURS = {
    "red": (250, 55, 45),
    "green": (45, 220, 70),
    "blue": (60, 115, 255),
    "yellow": (250, 225, 50),
    "purple": (190, 70, 240),
    "white": (245, 245, 245),
}
SHAPES = ("square", "circle", "triangle")
MOTIONS = {
    "moving left": (0, -1),
    "moving right": (0, 1),
    "moving up": (-1, 0),
    "moving down": (1, 0),
    "standing still": (0, 0),
}
"""Words -> direction in rows and columns."""
BACKGROUNDS = {"black": (8, 8, 8), "blue-grey": (30, 42, 62), "brown": (60, 30, 10)}

SHAPE_SIZE = (8.0, 12.0)
"""Smallest and largest side, in pixels."""
TRAVEL = (11.2, 15.2)
"""Shortest and longest way in one clip, in pixels: 1.4 to 1.9 a frame in 9 frames."""

_CAPTION = re.compile(
    f"a ({'|'.join(COLOURS)}) ({'|'.join(SHAPES)}) ({'|'.join(MOTIONS)}) on a ({'|'.join(BACKGROUNDS)}) background"
)


@dataclass(frozen=True)
class Scene:
    """What a caption says, or what the checker sees; "" where it sees nothing that has a name."""

    colour: str
    shape: str
    motion: str
    background: str

    @property
    def caption(self) -> str:
        return f"a {self.colour} {self.shape} {self.motion} on a {self.background} background"


ATTRIBUTES = tuple(field.name for field in fields(Scene))


def parse_caption(caption: str) -> Scene:
    """The scene of a caption. Raises DataError for a text that is not one of the grammar."""
    match = _CAPTION.fullmatch(caption.strip())
    if match is None:
        raise DataError(f"'{caption}' is not a caption of the demo set, e.g. '{all_scenes()[0].caption}'")
    return Scene(*match.groups())


def all_scenes() -> list[Scene]:
    """Every caption of the grammar."""
    return list(itertools.starmap(Scene, itertools.product(COLOURS, SHAPES, MOTIONS, BACKGROUNDS)))


def is_held_out(scene: Scene) -> bool:
    """Whether no clip with this colour, shape and motion is in the training set, on any background.

    9 of the 90 triples, laid over the table of shapes and motions like a Latin square: each value of each attribute,
    and each pair of values of two attributes, is still seen in training.
    """
    colour, shape = list(COLOURS).index(scene.colour), SHAPES.index(scene.shape)
    motion = list(MOTIONS).index(scene.motion)
    return (shape + motion) % 5 < 3 and colour == (5 * shape + motion) % len(COLOURS)


@cache
def training_scenes() -> list[Scene]:
    """Every caption that is not held out, mixed so that any few in a row differ in most attributes."""
    scenes = [scene for scene in all_scenes() if not is_held_out(scene)]
    return [scenes[number * 151 % len(scenes)] for number in range(len(scenes))]


# --- drawing ---------------------------------------------------------------------------------------------------------


def draw(scene: Scene, num_frames: int, generator: np.random.Generator) -> np.ndarray:
    """A clip of the scene: uint8 (t h w 3). Size, place and speed are drawn; the shape stays inside the frame."""
    size, travel = generator.uniform(*SHAPE_SIZE), generator.uniform(*TRAVEL)
    direction = np.array(MOTIONS[scene.motion], dtype=np.float64)
    reach = size / 2 + 1 + np.abs(direction) * travel / 2  # rows, columns that the path needs on each side
    middle = generator.uniform(reach, SIZE - reach)
    path = middle + np.linspace(-0.5, 0.5, num_frames)[:, None] * direction * travel  # t 2
    grid = np.arange(SIZE) + 0.5
    rows = grid[None, :, None] - path[:, 0, None, None]
    columns = grid[None, None, :] - path[:, 1, None, None]
    cover = np.clip(0.5 - _distance(scene.shape, rows, columns, size / 2), 0, 1)[..., None]  # t h w 1
    colours = np.array([BACKGROUNDS[scene.background], COLOURS[scene.colour]], dtype=np.float64)
    return np.round(colours[0] + cover * (colours[1] - colours[0])).astype(np.uint8)


def _distance(shape: str, rows: np.ndarray, columns: np.ndarray, half: float) -> np.ndarray:
    """Distance in pixels from a shape's edge, negative inside. half: half of its width and height."""
    if shape == "square":
        return np.maximum(np.abs(rows), np.abs(columns)) - half
    if shape == "circle":
        return np.hypot(rows, columns) - half
    slope = (2 * np.abs(columns) - (rows + half)) / np.sqrt(5)  # sides from the top's middle to the lower corners
    return np.maximum(rows - half, slope)


# --- checking --------------------------------------------------------------------------------------------------------

LEAST_CONTRAST = 60
"""Sum over RGB; a clip whose brightest pixels differ less than this from the background shows nothing."""
LEAST_TRAVEL = 3.0
"""Pixels; a shape that moves less stands still."""
SQUARE_FILL, CIRCLE_FILL = 0.89, 0.68
"""A shape that fills more than the first of its bounding box is a square, more than the second a circle, else a
triangle. On 1,080 clips read from H.264, the 1st to 99th percentiles are: squares 0.91 to 1, circles 0.71 to 0.87,
triangles 0.48 to 0.66.
"""


def see(frames: np.ndarray) -> Scene:
    """What a clip shows: uint8 (t h w 3) -> scene.

    - background: the clip's median colour, by its nearest name;
    - shape's pixels: those that differ from the background by more than half of what the brightest do;
    - colour: mean of the more different half of them, by its nearest name;
    - shape: by how much of its bounding box it fills, median over the frames;
    - motion: from the first two to the last two frames' centres, along the longer axis.
    """
    levels = frames.astype(np.float64)
    background = np.median(levels, axis=(0, 1, 2))
    contrast = np.abs(levels - background).sum(-1)  # t h w
    brightest = np.sort(contrast.ravel())[-8 * len(frames) :].mean()
    background_name = _nearest(background, BACKGROUNDS)
    if brightest < LEAST_CONTRAST:
        return Scene("", "", "", background_name)
    masks = contrast > brightest / 2
    core = masks & (contrast >= np.median(contrast[masks]))
    colour = _nearest(levels[core].mean(0), COLOURS)
    seen = [mask for mask in masks if mask.any()]
    return Scene(colour, _shape_name(seen), _motion_name(seen), background_name)


def _nearest(colour: np.ndarray, names: dict[str, tuple[int, int, int]]) -> str:
    return min(names, key=lambda name: float(np.square(colour - np.array(names[name])).sum()))


def _shape_name(masks: list[np.ndarray]) -> str:
    fills = []
    for mask in masks:
        rows, columns = np.nonzero(mask)
        fills.append(len(rows) / (np.ptp(rows) + 1) / (np.ptp(columns) + 1))
    fill = np.median(fills)
    return "square" if fill > SQUARE_FILL else "circle" if fill > CIRCLE_FILL else "triangle"


def _motion_name(masks: list[np.ndarray]) -> str:
    if len(masks) < 4:
        return ""
    centres = np.array([np.argwhere(mask).mean(0) for mask in masks])
    moved = centres[-2:].mean(0) - centres[:2].mean(0)
    axis = int(np.argmax(np.abs(moved)))
    if abs(moved[axis]) < LEAST_TRAVEL:
        return "standing still"
    direction = [0, 0]
    direction[axis] = int(np.sign(moved[axis]))
    return next(name for name, step in MOTIONS.items() if step == tuple(direction))


def agreement(wanted: Scene, seen: Scene) -> dict[str, bool]:
    """Attribute by attribute, and `all`: whether what was seen is what was wanted."""
    same = {name: ours == theirs for name, ours, theirs in zip(ATTRIBUTES, astuple(wanted), astuple(seen))}
    return {**same, "all": all(same.values())}
