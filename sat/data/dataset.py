"""Clips on disk or in shards: clip number -> pixels or latents and caption, read when asked for."""

from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import numpy as np
from torch.utils.data import Dataset

from sat.cogvideox.presets import SPACE_FACTOR, TIME_FACTOR
from sat.data.clip import Clip
from sat.data.content import Source
from sat.data.frames import (
    fit_to_cover,
    frame_range,
    frames_to_pixels,
    largest_4k_plus_1,
    next_smaller_size,
    same_area_size,
)
from sat.data.manifest import CAPTION_ADVICE, NO_CAPTION, SIZE_KEYS, ClipIndex, scan
from sat.data.quarantine import BadClip, named
from sat.data.shards import ShardClip, is_shards
from sat.data.video import probe, read_frames
from sat.errors import ConfigError, DataError


class SFTDataset(Dataset):
    """Clips of a folder, a JSONL manifest or tar shards (see `sat.data.manifest.scan` for what is found).

    data_dir: the folder, the manifest, or the path, pattern or URL of shards (see `sat.data.shards`).
    video_size: [height, width] of the pixels.
    fps, max_num_frames, skip_frms_num: which frames are used, see `sat.data.frames.choose_frames`. Image files count as
        one frame and skip none.
    size_mode: `crop` resizes to cover video_size and cuts out the centre, as released; `keep` keeps each clip's own
        aspect ratio at the area of video_size, sides multiples of 16; `native` does so for clips of a larger area and
        leaves smaller ones at their own size, for rows of mixed resolutions.
    short_clips: `pad` repeats the last frame up to max_num_frames, as released; `keep` gives only real frames, the
        largest 4k + 1 of them where there are fewer than max_num_frames, and is what a run that plans rows asks for
        where its section says nothing; `drop` leaves out clips that do not last for max_num_frames at fps after
        skipping at both ends.
    missing_caption: `error`, or `empty` for an empty text.
    caption_key: which key of a manifest's rows, or member or JSON key of a shard, is the caption.
    root: the folder in which the clips of a manifest lie, by default its own.
    read_headers: open every file once at the start, so that unreadable and too short clips are dropped and listed in
        `index.summary()`; otherwise they are found when they are drawn.
    strict: False lists wrong rows and missing captions in `index.dropped` instead of stopping at them.

    `index` is the list of clips. `self[i]` raises BadClip, with the clip's key, where clip i cannot be used. Raises
    ConfigError for wrong settings, DataError where there are no clips or, with `error`, clips without a caption.
    """

    def __init__(
        self,
        data_dir: str | Path,
        video_size: Sequence[int],
        fps: float,
        max_num_frames: int,
        skip_frms_num: float = 3,
        size_mode: Literal["crop", "keep", "native"] = "crop",
        short_clips: Literal["pad", "keep", "drop"] = "pad",
        missing_caption: Literal["error", "empty"] = "error",
        caption_key: str = "caption",
        root: str | Path | None = None,
        read_headers: bool = False,
        strict: bool = True,
    ) -> None:
        if len(video_size) != 2 or min(video_size) < 1:
            raise ConfigError(f"video_size is {list(video_size)}; give [height, width] in pixels")
        if fps <= 0 or max_num_frames < 1 or skip_frms_num < 0:
            raise ConfigError(
                f"fps {fps}, max_num_frames {max_num_frames}, skip_frms_num {skip_frms_num}: "
                "the first must be above 0, the second 1 or more, the third 0 or more"
            )
        for name, value, choices in (
            ("size_mode", size_mode, ("crop", "keep", "native")),
            ("short_clips", short_clips, ("pad", "keep", "drop")),
            ("missing_caption", missing_caption, ("error", "empty")),
        ):
            if value not in choices:
                raise ConfigError(f"{name} is {value!r}; give {' or '.join(choices)}")
        self.video_size = (int(video_size[0]), int(video_size[1]))
        self.fps = float(fps)
        self.max_num_frames = int(max_num_frames)
        self.skip = int(skip_frms_num)
        self.size_mode = size_mode
        self.short_clips = short_clips
        self.require_caption = missing_caption == "error"
        self.index = scan(
            data_dir,
            root=root,
            caption_key=caption_key,
            require_caption=self.require_caption,
            read_headers=read_headers,
            check=self._choose_frames,
            strict=strict,
        )
        if strict:
            refuse_bare(self.index)

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """One sample: a mapping with

        - pixels: float32 (t c h w) in [-1, 1], RGB
        - caption: str
        - key: str, the clip's name
        - fps: frames per second of these frames, the clip's own divided by the stride
        - num_frames: frames before padding
        - original_size_as_tuple, crop_coords_top_left, target_size_as_tuple: (rows, columns) of the file, the corner of
          what was cut out of the resized clip, and (rows, columns) of the pixels: a condition of image models
        """
        clip = self.index[index]
        with named(clip.key):
            return self._load(clip)

    def name(self, index: int) -> str:
        """The key of a clip; nothing is read."""
        return self.index[index].key

    def caption(self, index: int) -> str:
        """The caption of a clip, which is not read. Raises BadClip."""
        clip = self.index[index]
        with named(clip.key):
            return self._caption(clip)

    def source(self, index: int) -> Source:
        """A clip and all that decides which pixels are made of it."""
        clip = self.index[index]
        reading = {
            "video_size": list(self.video_size),
            "size_mode": self.size_mode,
            "fps": self.fps,
            "max_num_frames": self.max_num_frames,
            "skip": 0 if clip.is_image else self.skip,
            "short_clips": self.short_clips,
        }
        return Source(clip, reading)

    def latent_sizes(self) -> np.ndarray:
        """Latent frames, rows and columns of every clip as it will be read, int64 (clips, 3), from the headers alone.

        Raises DataError where a manifest does not give num_frames, fps, height and width and no header was read.
        """
        self._refuse_unknown()
        sizes = np.array([self._latent_size(*told) for told in self.index.sizes.tolist()], dtype=np.int64)
        return sizes.reshape(-1, 3)[self.index.which_size]

    def _latent_size(self, num_frames: float, fps: float, rows: float, columns: float, is_image: float) -> list[int]:
        """Latent frames, rows and columns of what is read of a clip of this size."""
        frames = self.max_num_frames
        if self.short_clips == "keep":
            frames = len(self._range(num_frames, fps, bool(is_image)))
        height, width = self._size_of(int(rows), int(columns))
        return [(frames - 1) // TIME_FACTOR + 1, height // SPACE_FACTOR, width // SPACE_FACTOR]

    def _refuse_unknown(self) -> None:
        """Raise DataError for the first clip whose size is needed and not known."""
        needed = ["num_frames", "fps"] if self.short_clips == "keep" else []
        needed += ["height", "width"] if self.size_mode != "crop" else []
        unknown = self.index.sizes[:, [SIZE_KEYS.index(key) for key in needed]] == 0
        if unknown.any():
            number = int(unknown.any(axis=1)[self.index.which_size].argmax())
            lacking = [key for key, one in zip(needed, unknown[self.index.which_size[number]]) if one]
            raise DataError(
                f"{self.index.source}: {self.index[number].key} has no {', '.join(lacking)}, by which rows are "
                "planned; write them into the manifest or the shard's JSON, or set data.params.read_headers: true"
            )

    def _size_of(self, rows: int, columns: int) -> tuple[int, int]:
        """(height, width) of the pixels of a clip whose file has so many rows and columns."""
        if self.size_mode == "crop":
            return self.video_size
        area = self.video_size[0] * self.video_size[1]
        if self.size_mode == "native" and rows * columns <= area:
            return next_smaller_size(rows, columns)
        return same_area_size(rows, columns, self.video_size)

    def _caption(self, clip: Clip) -> str:
        caption = clip.caption()
        if self.require_caption and not caption:
            raise BadClip(f"{clip.caption_path} is empty", reason=NO_CAPTION)
        return caption

    def _load(self, clip: Clip) -> dict[str, Any]:
        caption = self._caption(clip)
        file = clip.load()
        info = probe(file, count=True)
        indices = self._choose_frames(clip, info.num_frames, info.fps)
        frames = read_frames(file, np.array(indices))
        size = self._size_of(frames.shape[1], frames.shape[2])
        _, corner = fit_to_cover(frames.shape[1:3], size)
        num_frames = self.max_num_frames if self.short_clips == "pad" else len(frames)
        stride = indices.step if len(indices) > 1 else 1
        return {
            "pixels": frames_to_pixels(frames, size, num_frames),
            "caption": caption,
            "key": clip.key,
            "fps": info.fps / stride,
            "num_frames": len(indices),
            "original_size_as_tuple": frames.shape[1:3],
            "crop_coords_top_left": corner,
            "target_size_as_tuple": size,
        }

    def _choose_frames(self, clip: Clip, num_frames: int, clip_fps: float) -> range:
        try:
            return self._range(num_frames, clip_fps, clip.is_image)
        except BadClip as bad:
            raise BadClip(f"{clip.place}: {bad}", reason=bad.reason) from bad

    def _range(self, num_frames: float, clip_fps: float, is_image: bool) -> range:
        """The frames to read of a clip. Raises BadClip."""
        skip = 0 if is_image else self.skip
        indices = frame_range(int(num_frames), clip_fps, self.fps, self.max_num_frames, skip)
        if self.short_clips == "drop":
            needed = self.max_num_frames * (1 if is_image else clip_fps / self.fps) + 2 * skip
            if num_frames < needed or len(indices) < self.max_num_frames:
                raise BadClip(f"{num_frames} frames are fewer than the {needed:g} needed", reason="too short")
        if self.short_clips == "keep" and len(indices) < self.max_num_frames:
            indices = indices[: largest_4k_plus_1(len(indices))]
        return indices


class LatentShards(Dataset):
    """Latents that stand in tar shards, encoded by whoever packed them.

    data_dir: the path, pattern or URL of the shards (see `sat.data.shards`). A member that ends in .safetensors holds a
        tensor `moments`, mean and log-variance of the VAE (t 2c h w), or `latents`, not scaled (t c h w); one that ends
        in .npy holds moments.
    fps: of clips that have no fps in the shard; needed where one lacks it.
    missing_caption, caption_key, strict: as for SFTDataset.

    Items have `moments` or `latents`, float32, and SFTDataset's caption, key, fps and num_frames.
    """

    def __init__(
        self,
        data_dir: str,
        fps: float | None = None,
        missing_caption: Literal["error", "empty"] = "error",
        caption_key: str = "caption",
        strict: bool = True,
    ) -> None:
        if missing_caption not in ("error", "empty"):
            raise ConfigError(f"missing_caption is {missing_caption!r}; give error or empty")
        if not is_shards(str(data_dir)):
            raise ConfigError(f"data_dir is {data_dir}; give the path, pattern or URL of shards, which end in .tar")
        self.fps = fps
        self.index = scan(
            data_dir,
            caption_key=caption_key,
            require_caption=missing_caption == "error",
            read_headers=False,
            strict=strict,
            want_latents=True,
        )
        if strict:
            refuse_bare(self.index)
        unknown = next(
            (clip for clip in map(self.index.__getitem__, range(len(self))) if not clip.row.get("fps")), None
        )
        if fps is None and unknown is not None:
            raise DataError(f"{unknown.key} has no fps in its shard; set data.params.fps for such clips")

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, index: int) -> dict[str, Any]:
        clip = self.index[index]
        assert isinstance(clip, ShardClip)
        with named(clip.key):
            name, tensor = clip.latents()
        fps = clip.row.get("fps") or self.fps
        assert fps is not None
        return {
            name: tensor,
            "caption": clip.caption(),
            "key": clip.key,
            "fps": float(fps),
            "num_frames": int(clip.num_frames or TIME_FACTOR * (len(tensor) - 1) + 1),
        }

    def caption(self, index: int) -> str:
        """The caption of a clip, which is not read."""
        return self.index[index].caption()

    def latent_sizes(self) -> np.ndarray:
        """Latent frames, rows and columns of every clip, int64 (clips, 3), from the index."""
        shapes = (self.index[number].row["latents"] for number in range(len(self)))
        told = chain.from_iterable((t, h, w) for t, _, h, w in shapes)
        return np.fromiter(told, dtype=np.int64, count=3 * len(self)).reshape(-1, 3)


def refuse_bare(index: ClipIndex) -> None:
    """Raise DataError where clips were dropped because they have no caption."""
    bare = [clip for clip in index.dropped if clip.reason == NO_CAPTION]
    if bare:
        first = "".join(f"\n  {clip.key}: {clip.detail}" for clip in bare[:5])
        raise DataError(
            f"{len(bare)} of {len(index) + len(index.dropped)} clips of {index.source} have no caption; "
            f"{CAPTION_ADVICE}. The first:{first}"
        )
