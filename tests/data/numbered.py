"""Clips whose frames say their own number."""

import numpy as np

_BITS = 10


def numbered_frames(num_frames: int) -> np.ndarray:
    """uint8 (t 32 40 3): frame i shows i in binary, one 8x8 block a digit, in two rows of five."""
    digits = (np.arange(num_frames)[:, None] >> np.arange(_BITS)) & 1  # t 10
    blocks = digits.reshape(num_frames, 2, 5).repeat(16, axis=1).repeat(8, axis=2)  # t 32 40
    return np.repeat(blocks[..., None] * 255, 3, axis=-1).astype(np.uint8)


def frame_numbers(frames: np.ndarray) -> list[int]:
    """The numbers that frames (t 32 40 3) show, in any range of values that black and white span evenly."""
    middle = (float(frames.max()) + float(frames.min())) / 2
    blocks = frames.mean(-1).reshape(len(frames), 2, 16, 5, 8).mean((2, 4)).reshape(len(frames), _BITS)
    return [int(number) for number in (blocks > middle) @ (1 << np.arange(_BITS))]
