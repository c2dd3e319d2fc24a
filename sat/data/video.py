"""Read and write video files with PyAV. Frames are numbered as a decoder gives them out: 0, 1, 2 ... in display order.

An image file is a clip of one frame; png files are written here byte by byte, which takes a few lines.
"""

import io
import os
import struct
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, BinaryIO

import av
import av.container
import numpy as np
from av.video.reformatter import ColorRange, Colorspace, VideoReformatter

from sat.data.quarantine import BadClip

_CONTAINER_KEYS = ("major_brand", "minor_version", "compatible_brands", "encoder")


@dataclass(frozen=True)
class ClipInfo:
    """What a file's header says of its first video stream."""

    num_frames: int
    fps: float
    """Average frames per second."""
    height: int
    """As stored: a clip filmed upright may be stored lying, and is turned when it is read."""
    width: int
    duration: float
    """Seconds."""


class Embedded:
    """A clip that lies within another file, with the name that messages give it.

    open: gives the clip's bytes as a file that can be read from any place on.
    """

    def __init__(self, name: str, open: Callable[[], BinaryIO]) -> None:
        self.name, self.open = name, open

    def __str__(self) -> str:
        return self.name


ClipFile = str | Path | Embedded


@contextmanager
def _opened(path: ClipFile) -> Iterator[BinaryIO]:
    with path.open() if isinstance(path, Embedded) else Path(path).open("rb") as stream:
        yield stream


@contextmanager
def _open(path: ClipFile) -> Iterator[tuple[av.container.InputContainer, av.VideoStream]]:
    """The file and its first video stream, set to decode on the calling thread. FFmpeg's errors become BadClip."""
    try:
        with ExitStack() as resources:
            if isinstance(path, Embedded):
                source: Any = resources.enter_context(_opened(path))
                size = source.seek(0, io.SEEK_END)
                source.seek(0)
            else:
                source, size = str(path), Path(path).stat().st_size
            if size == 0:
                raise BadClip(f"{path} is empty (0 bytes)", reason="empty file")
            container = resources.enter_context(av.open(source))
            if not container.streams.video:
                raise BadClip(f"{path} has no video stream", reason="no video stream")
            stream = container.streams.video[0]
            stream.codec_context.thread_type = "NONE"
            stream.codec_context.thread_count = 1
            yield container, stream
    except FileNotFoundError as error:
        raise BadClip(f"{path} does not exist", reason="missing file") from error
    except (av.FFmpegError, OSError) as error:
        raise BadClip(f"{path} cannot be read: {error.strerror or error}") from error


def probe(path: ClipFile, count: bool = False) -> ClipInfo:
    """Describe a clip without decoding it.

    The number of frames is the header's where it has one, else that of the packets. count=True always counts packets,
    which leaves out frames that an edit list hides, and finds a file that was cut short. Raises BadClip.
    """
    with _open(path) as (container, stream):
        num_frames = stream.frames
        if count or not num_frames:
            num_frames = sum(1 for packet in container.demux(stream) if packet.size and not packet.is_discard)
            missing = _missing_bytes(path, container.format.name)
            if missing:
                raise BadClip(f"{path} was cut short: {missing} bytes are missing", reason="cut short")
        if not num_frames:
            raise BadClip(f"{path} holds no frames", reason="no frames")
        fps = float(stream.average_rate or stream.guessed_rate or 0)
        duration = num_frames / fps if fps else 0.0
        return ClipInfo(num_frames, fps, stream.codec_context.height, stream.codec_context.width, duration)


def _missing_bytes(path: ClipFile, format_name: str) -> int:
    """How far the boxes of an mp4 or mov file reach past its end.

    FFmpeg takes such a file for a shorter clip without a word. Only the top level is walked: a few small reads.
    """
    if "mp4" not in format_name.split(","):
        return 0
    place = 0
    with _opened(path) as file:
        size = file.seek(0, io.SEEK_END)
        while place < size:
            file.seek(place)
            head = file.read(16)
            length = int.from_bytes(head[:4], "big")
            if length == 1:
                length = int.from_bytes(head[8:16], "big")
            if length < 8:  # 0 means "to the end of the file"; 1 to 7 are padding after the last box
                return 0
            place += length
    return place - size


def read_frames(path: ClipFile, indices: Sequence[int] | np.ndarray) -> np.ndarray:
    """Read frames by number: uint8 (len(indices) h w 3), RGB, turned upright, in the order asked for.

    Decodes from the start to the highest number, so that frame i is the i-th in every container, at a constant frame
    rate or not. Raises BadClip where the clip ends before that, is known to be damaged or cannot be decoded.
    """
    wanted = {int(index) for index in indices}
    found: dict[int, np.ndarray] = {}
    reformatter = VideoReformatter()
    with _open(path) as (container, stream):
        for number, frame in enumerate(_decode(container, stream)):
            if frame.is_corrupt:
                raise BadClip(f"{path} is damaged at frame {number}", reason="damaged")
            if number in wanted:
                rgb = reformatter.reformat(frame, format="rgb24", threads=1).to_ndarray()
                found[number] = np.rot90(rgb, frame.rotation // 90) if frame.rotation else rgb
            if len(found) == len(wanted):
                break
        else:
            raise BadClip(
                f"{path} ends early: {len(found)} of {len(wanted)} frames could be decoded, the last wanted is number "
                f"{max(wanted)}",
                reason="cut short",
            )
    sizes = {frame.shape for frame in found.values()}
    if len(sizes) > 1:
        raise BadClip(f"{path} changes its frame size: {sorted(sizes)}", reason="changes size")
    return np.stack([found[int(index)] for index in indices])


def _decode(container: av.container.InputContainer, stream: av.VideoStream) -> Iterator[av.VideoFrame]:
    """All frames in display order. PyAV 18 leaks a packet where its demuxer is dropped half-way instead of closed."""
    packets: Any = container.demux(stream)  # a generator, which its type does not say
    with closing(packets):
        for packet in packets:
            yield from packet.decode()


def write_mp4(
    path: str | Path,
    frames: np.ndarray | Iterable[np.ndarray],
    fps: float,
    metadata: Mapping[str, str] | None = None,
    crf: int = 18,
) -> None:
    """Write an H.264 file (yuv420p, BT.709) that browsers and editors play.

    frames: uint8 (t h w 3), RGB, or an iterator of such chunks, of which one at a time is held. An odd side gets its
    last row or column twice: the format has even sides only.
    metadata: texts that `read_metadata` gives back.
    crf: 0 (largest) to 51 (worst); 18 is hard to tell from the original.

    The file appears whole or not at all. Raises ValueError for frames of another shape or type, or none.
    """
    path = Path(path)
    chunks = [frames] if isinstance(frames, np.ndarray) else frames
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with av.open(
            str(temporary), "w", format="mp4", options={"movflags": "use_metadata_tags+faststart"}
        ) as container:
            container.metadata.update(metadata or {})
            # Without the macroblock tree: on frames of few blocks x264 computes it from memory that it has not set, and
            # the same frames give different files (found with MALLOC_PERTURB_, x264 of PyAV 18).
            options = {"crf": str(crf), "mbtree": "0"}
            stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001), options=options)
            stream.pix_fmt = "yuv420p"
            context = stream.codec_context
            context.thread_count = 1
            context.colorspace = context.color_primaries = context.color_trc = Colorspace.ITU709
            context.color_range = ColorRange.MPEG
            reformatter = VideoReformatter()
            size = None
            for picture in _pictures(chunks):
                if size is None:
                    size = picture.shape
                    stream.height, stream.width = picture.shape[:2]
                if picture.shape != size:
                    raise ValueError(f"frames of one file differ in size: {size} and then {picture.shape}")
                frame = reformatter.reformat(
                    av.VideoFrame.from_ndarray(picture, format="rgb24"),
                    format="yuv420p",
                    dst_colorspace=Colorspace.ITU709,
                    dst_color_range=ColorRange.MPEG,
                    threads=1,
                )
                container.mux(stream.encode(frame))
            if size is None:
                raise ValueError(f"no frames to write to {path}")
            container.mux(stream.encode())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_png(path: str | Path, picture: np.ndarray, metadata: Mapping[str, str] | None = None) -> None:
    """Write a picture, uint8 (h w 3), RGB, without loss.

    metadata: texts that image programs show, as iTXt chunks (PNG 2nd edition, ISO/IEC 15948, sec. 11.3.4.5). The file
    appears whole or not at all. Raises ValueError for a picture of another shape or type.
    """
    if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[-1] != 3:
        raise ValueError(f"the picture is {picture.dtype} {picture.shape}; give uint8 (h w 3)")
    path = Path(path)
    height, width = picture.shape[:2]
    rows = np.zeros((height, 1 + 3 * width), dtype=np.uint8)  # each begins with 0: stored as it is, no filter
    rows[:, 1:] = picture.reshape(height, -1)
    parts = [
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)),
        *((b"iTXt", f"{key}\0\0\0\0\0{text}".encode()) for key, text in (metadata or {}).items()),
        (b"IDAT", zlib.compress(rows.tobytes())),
        (b"IEND", b""),
    ]
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(_png_chunk(kind, content) for kind, content in parts))
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _png_chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def _pictures(chunks: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    """Single frames (h w 3), their sides made even."""
    for chunk in chunks:
        if chunk.dtype != np.uint8 or chunk.ndim != 4 or chunk.shape[-1] != 3:
            raise ValueError(f"frames are {chunk.dtype} {chunk.shape}; give uint8 (t h w 3)")
        height, width = chunk.shape[1:3]
        for picture in np.pad(chunk, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), mode="edge"):
            yield np.ascontiguousarray(picture)


def read_metadata(path: str | Path) -> dict[str, str]:
    """The texts that were stored with `write_mp4` (the container's own bookkeeping left out). Raises BadClip."""
    with _open(path) as (container, _):
        return {key: value for key, value in container.metadata.items() if key not in _CONTAINER_KEYS}
