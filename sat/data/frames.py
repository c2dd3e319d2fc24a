"""Which frames of a clip are used, and how they become pixels of the wanted size."""

import math

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from sat.data import handover
from sat.data.quarantine import BadClip

SIDE_MULTIPLE = 16
"""VAE 8x and patch 2: sides that the model takes without padding."""


def largest_4k_plus_1(count: int) -> int:
    """The largest 4k + 1 that is at most count (count >= 1): frame counts that the VAE takes without padding."""
    return (count - 1) // 4 * 4 + 1


def choose_frames(num_frames: int, clip_fps: float, fps: float, max_num_frames: int, skip: int) -> np.ndarray:
    """Frame numbers to read from a clip, by the rule of the released fine-tuning loader.

    With n frames at F frames per second, f the wanted fps, M = max_num_frames:

    - long, n / F · f > M: from `skip` on, every ((end - skip) // M)-th frame before end = int(skip + M / f · F);
    - else, n > M: the same with end = n - skip;
    - else: the largest 4k + 1 consecutive frames between `skip` and n - skip.

    Never more than the first M of them. Where the released rule cannot go on, this one does: numbers past the clip's
    last frame are left out, and a stride of 0 becomes 1; in the long case (a clip slower than fps) it then takes
    consecutive frames as far as the clip goes.

    Returns rising int64 numbers below n: at least one, at most M. Raises BadClip where no frame is left.
    """
    return np.array(frame_range(num_frames, clip_fps, fps, max_num_frames, skip), dtype=np.int64)


def frame_range(num_frames: int, clip_fps: float, fps: float, max_num_frames: int, skip: int) -> range:
    """The same as a range, which costs little where only its length is asked for."""
    if num_frames < 1:
        raise BadClip("the clip has no frames", reason="no frames")
    if not clip_fps > 0:
        raise BadClip(f"the clip's frame rate is {clip_fps}", reason="no frame rate")
    start = skip
    if num_frames / clip_fps * fps > max_num_frames:
        end = int(start + max_num_frames / fps * clip_fps)
        stride = (end - start) // max_num_frames
        if stride == 0:
            end, stride = start + max_num_frames, 1
        indices = range(start, min(end, num_frames), stride)
    elif num_frames > max_num_frames:
        end = num_frames - skip
        indices = range(start, end, max((end - start) // max_num_frames, 1))
    else:
        available = num_frames - 2 * skip
        indices = range(start, start + largest_4k_plus_1(available)) if available > 0 else range(0)
    if not len(indices):
        raise BadClip(
            f"the clip has {num_frames} frames; skipping {skip} at each end leaves none (skip_frms_num)",
            reason="too short",
        )
    return indices[:max_num_frames]


def same_area_size(height: int, width: int, video_size: tuple[int, int]) -> tuple[int, int]:
    """The size with the clip's own aspect ratio and about the area of video_size, sides multiples of SIDE_MULTIPLE."""
    scale = math.sqrt(video_size[0] * video_size[1] / (height * width))
    sides = (max(round(side * scale / SIDE_MULTIPLE), 1) * SIDE_MULTIPLE for side in (height, width))
    return next(sides), next(sides)


def size_of_short_side(height: int, width: int, video_size: tuple[int, int]) -> tuple[int, int]:
    """The size with an image's own aspect ratio and the short side of video_size, the long one at most as long as its.

    Sides are multiples of SIDE_MULTIPLE where those of video_size are.
    """
    short, longest = min(video_size), max(video_size)
    long = round(short * max(height, width) / min(height, width) / SIDE_MULTIPLE) * SIDE_MULTIPLE
    long = min(max(long, short), longest)
    return (long, short) if height > width else (short, long)


def next_smaller_size(height: int, width: int) -> tuple[int, int]:
    """The largest size within a clip's own whose sides are multiples of SIDE_MULTIPLE (at least one of each)."""
    sides = (max(side // SIDE_MULTIPLE, 1) * SIDE_MULTIPLE for side in (height, width))
    return next(sides), next(sides)


def fit_to_cover(clip_size: tuple[int, int], size: tuple[int, int]) -> tuple[tuple[int, int], tuple[int, int]]:
    """How a clip of clip_size = (rows, columns) comes to `size`: the size to resize it to, which covers `size` with the
    clip's own aspect ratio, and the (top, left) corner of the centre that is then cut out."""
    (rows, columns), (height, width) = clip_size, size
    if columns * height > rows * width:
        covering = (height, columns * height // rows)
    else:
        covering = (rows * width // columns, width)
    return covering, ((covering[0] - height) // 2, (covering[1] - width) // 2)


def pixels_to_levels(pixels: Tensor) -> Tensor:
    """Pixels in [-1, 1] as uint8, rounded; what lies outside is cut off."""
    return ((pixels.float().clamp(-1.0, 1.0) + 1.0) * 127.5).round().to(torch.uint8)


def levels_to_pixels(levels: Tensor) -> Tensor:
    """The other way: uint8 -> float32 in [-1, 1], the numbers that `frames_to_pixels` gives."""
    return (levels.float() - 127.5) / 127.5


def frames_to_pixels(frames: np.ndarray, size: tuple[int, int], num_frames: int) -> Tensor:
    """Resize to cover `size` = (height, width), cut out the centre, scale to [-1, 1], repeat the last frame.

    frames: uint8 (t h w 3) -> float32 (num_frames 3 height width), num_frames at least t.

    The resize is bicubic with antialiasing, in uint8: a tenth of the time of float32 (1.6 against 17 ms a frame, 720p
    to 480p on one core). The released loader resizes in float32 and rounds; on a natural clip 15 % of the values
    differ, by at most 3 of 255.
    """
    height, width = size
    pixels = rearrange(torch.from_numpy(frames), "t h w c -> t c h w")
    covering, (top, left) = fit_to_cover(frames.shape[1:3], size)
    if covering != frames.shape[1:3]:
        pixels = F.interpolate(pixels, covering, mode="bicubic", antialias=True, align_corners=False)
    pixels = pixels[:, :, top : top + height, left : left + width]
    result = handover.empty((num_frames, 3, height, width))
    result[: len(pixels)].copy_(pixels).sub_(127.5).div_(127.5)  # one buffer: a clip of 49x480x720 is 200 MB
    result[len(pixels) :] = result[len(pixels) - 1]
    return result
