"""Video files: what a file holds, chosen frames as RGB, small files written.

Letters: T frames, H W pixels.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from fractions import Fraction
from itertools import islice, pairwise
from pathlib import Path

import av
import numpy as np
import numpy.typing as npt
from av.container import InputContainer
from av.stream import Disposition
from av.video.reformatter import Colorspace, Interpolation, VideoReformatter
from av.video.stream import VideoStream

from tvit_cli.errors import RunError, VideoError

Frames = npt.NDArray[np.uint8]

# fmt: off
VIDEO_SUFFIXES = frozenset({
    ".3g2", ".3gp", ".asf", ".avi", ".divx", ".f4v", ".flv", ".gif", ".m2ts", ".m4v", ".mkv", ".mov", ".mp4",
    ".mpeg", ".mpg", ".mts", ".mxf", ".ogg", ".ogv", ".ts", ".vob", ".webm", ".wmv", ".y4m",
})
# fmt: on

# Note [The number of frames is known at the end]
# A header's frame count, the number of packets and the number of frames that decode are three numbers.
# UCF101's XviD files pack B-frames and promise up to two frames more than come out; a broken packet costs
# one as well. `choose` needs the true count, which only decoding to the end gives. So one pass keeps what
# `choose` names for the packet count and for up to COUNT_SLACK fewer, and the true count picks among them;
# if it lies further off, a second pass is made. Seeking was refused: AVI's index is no guide to frames, and
# with a key frame every 300 it decodes as much. A caller who knows the count passes it, and decoding
# stops after the last chosen frame.
COUNT_SLACK = 3

ASSUMED_RATE = 25.0  # frames per second, where a file names no usable time at all

# AVColorSpace (libavutil/pixfmt.h) -> the matrix that swscale is told to use.
_MATRICES = {
    1: Colorspace.ITU709,
    4: Colorspace.FCC,
    5: Colorspace.ITU601,  # BT.470BG
    6: Colorspace.ITU601,  # SMPTE 170M
    7: Colorspace.SMPTE240M,
    9: Colorspace.BT2020,
    10: Colorspace.BT2020,  # constant luminance
}
_HD_HEIGHT = 720  # players take BT.709 from this height on where the stream does not say
# Without FULL_CHR_H_INT swscale converts through tables that truncate: white comes out as 253.
_SCALING = (
    Interpolation.BILINEAR
    | Interpolation.FULL_CHR_H_INT
    | Interpolation.ACCURATE_RND
    | Interpolation.BITEXACT
)


@dataclass(frozen=True, slots=True)
class VideoInfo:
    """What a video file holds; width and height as shown (pixels taken as square), frames as packets."""

    path: Path
    codec: str
    width: int
    height: int
    frames: int
    seconds: float
    rate: float | None  # frames per second as the packets' times give it; None: the file names no time
    rotation: int  # degrees that the stored picture is turned counter-clockwise to be shown


@dataclass(frozen=True, slots=True)
class Clip:
    """Chosen frames of one video: uint8 (T, H, W, 3), which they are, and how many the video has."""

    frames: Frames
    indices: tuple[int, ...]
    pts_seconds: tuple[float, ...]
    frame_count: int


def probe(path: Path) -> VideoInfo:
    """Tells what a file holds from its packets and its first frame.

    Raises VideoError, `<path>: <reason>`, where no frame can be read.
    """
    first: av.VideoFrame | None = None
    times: list[int] = []
    packets = 0
    with _opened(path, threads=1) as (container, stream):
        for packet in _packets(path, container, stream):
            if packet is not None and _is_shown(packet):
                packets += 1
                if (time := packet.pts if packet.pts is not None else packet.dts) is not None:
                    times.append(time)
            if first is None:
                first = next(iter(_decoded(stream, packet)), None)
        if first is None:
            raise _no_frame(path)
        rate = float(stream.average_rate) if stream.average_rate else None
        if len(times) > 1 and stream.time_base is not None and (span := max(times) - min(times)) > 0:
            rate = (len(times) - 1) / float(span * stream.time_base)
        rotation = _quarter_turns(first) * 90
        width, height = first.width, first.height
        codec = stream.codec_context.codec.canonical_name
    if rotation % 180:
        width, height = height, width
    seconds = packets / (rate or ASSUMED_RATE)
    return VideoInfo(path, codec, width, height, packets, seconds, rate, rotation)


def decode_first(path: Path) -> None:
    """Decodes the first frame and reads no further, which tells a video from what is none.

    Raises VideoError, `<path>: <reason>`, where no frame can be read.
    """
    with _opened(path, threads=1) as (container, stream):
        if next(iter(_all_frames(path, container, stream)), None) is None:
            raise _no_frame(path)


def read_clip(
    path: Path,
    choose: Callable[[int], Sequence[int]],
    *,
    short_side: int | None = None,
    frame_count: int | None = None,
    threads: int = 1,
) -> Clip:
    """Decodes a video in order and converts to RGB only the frames that `choose(frame_count)` names.

    `choose` is a pure function from the number of frames to indices in ascending order (repeats allowed).
    Frames wider and higher than `short_side` are scaled down to it, the long side in proportion. A packet
    that does not decode is left out. `frame_count`, where it is known from an earlier read, saves the rest
    of the file. See Note [The number of frames is known at the end].

    Raises VideoError, `<path>: <reason>`, where no frame can be read.
    """
    for _ in range(2):
        counts = [frame_count] if frame_count is not None else _likely_counts(path)
        wanted = {index for count in counts for index in choose(count)}
        stop = max(wanted) + 1 if frame_count is not None else None
        with _opened(path, threads=threads) as (container, stream):
            kept = _KeptFrames(short_side)
            seen = 0
            for frame in islice(_all_frames(path, container, stream), stop):
                kept.fix_shape(frame)
                if seen in wanted:
                    kept.keep(seen, frame)
                seen += 1
            if seen == 0:
                raise _no_frame(path)
            whole = counts[0] if seen == stop else seen
            indices = tuple(choose(whole))
            if kept.has(indices):
                return Clip(kept.rgb(indices), indices, kept.seconds(indices, stream.average_rate), whole)
        frame_count = whole
    raise VideoError(f"{path}: one reading gives more frames than the next. Is the file still being written?")


def count_frames(path: Path) -> int:
    """Counts the frames that decode, by decoding them all."""
    with _opened(path, threads=1) as (container, stream):
        count = sum(1 for _ in _all_frames(path, container, stream))
    if count == 0:
        raise _no_frame(path)
    return count


def promised_frames(path: Path) -> int:
    """Counts the frames that a file should give: packets, or what its header says if that is more.

    Frames that an edit list hides are not among them. Raises VideoError.
    """
    with _opened(path, threads=1) as (container, stream):
        packets = [p for p in _packets(path, container, stream) if p is not None and p.size > 0]
        hidden = sum(packet.is_discard for packet in packets)
        return max(stream.frames, len(packets)) - hidden


def write_video(
    path: Path,
    frames: Frames,
    *,
    rate: int = 25,
    codec: str = "mpeg4",
    quantiser: int = 3,
    pixel_format: str = "yuv420p",
    options: Mapping[str, str] | None = None,
) -> None:
    """Encodes RGB frames, uint8 (T, H, W, 3), to a file that is complete or absent.

    The container follows the suffix. `quantiser` is MPEG-4's, 1 (best) to 31; other codecs take their
    quality from `options`, FFmpeg's own. The same frames give the same bytes with the same FFmpeg.

    Raises RunError where the file cannot be written.
    """
    if frames.ndim != 4 or frames.shape[3] != 3 or frames.dtype != np.uint8 or not frames.size:
        raise ValueError(f"frames must be uint8 (T, H, W, 3), not {frames.dtype} {frames.shape}")
    height, width = frames.shape[1:3]
    matrix = Colorspace.ITU601 if height < _HD_HEIGHT else Colorspace.ITU709
    settings = {"flags": "+bitexact"}
    if codec == "mpeg4":
        settings |= {"qmin": str(quantiser), "qmax": str(quantiser)}  # PyAV cannot set a frame's quality
    settings |= options or {}
    unfinished = path.with_name(f".{path.stem}.{os.getpid()}.part{path.suffix}")
    reformatter = VideoReformatter()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with av.open(_url(unfinished), "w", container_options={"fflags": "+bitexact"}) as container:
            stream = container.add_stream(codec, rate=rate, options=settings)
            assert isinstance(stream, VideoStream), f"{codec} is no video codec"
            stream.width, stream.height, stream.pix_fmt = width, height, pixel_format
            stream.codec_context.thread_count = 1  # threads split a picture, and so change the bytes
            for index, pixels in enumerate(frames):
                rgb = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
                frame = reformatter.reformat(
                    rgb, format=pixel_format, dst_colorspace=matrix, interpolation=_SCALING, threads=1
                )
                frame.pts = index
                container.mux(stream.encode(frame))
            container.mux(stream.encode(None))
        unfinished.replace(path)
    except (OSError, av.FFmpegError) as error:
        raise RunError(f"{path}: the video could not be written ({error}).") from error
    finally:
        unfinished.unlink(missing_ok=True)


@contextmanager
def _opened(path: Path, *, threads: int) -> Iterator[tuple[InputContainer, VideoStream]]:
    """One container, one video stream; whatever FFmpeg raises inside becomes a VideoError."""
    try:
        size = path.stat().st_size
    except OSError as error:
        reason = (
            "no such file" if isinstance(error, FileNotFoundError) else f"cannot be read ({error.strerror})"
        )
        raise VideoError(f"{path}: {reason}.") from error
    if path.is_dir():
        raise VideoError(f"{path}: is a folder, not a video.")
    if size == 0:
        raise VideoError(f"{path}: the file is empty (0 bytes). Was a copy or download broken off?")
    try:
        # A playlist under a video's name must not make FFmpeg open the network.
        with av.open(
            _url(path), metadata_errors="ignore", options={"protocol_whitelist": "file"}
        ) as container:
            stream = _video_stream(path, container)
            stream.codec_context.thread_count = threads
            if threads > 1:
                stream.thread_type = "AUTO"
            yield container, stream
    except PermissionError as error:
        raise VideoError(f"{path}: may not be read (permission denied).") from error
    except av.FFmpegError as error:
        raise VideoError(f"{path}: not a video that FFmpeg can read ({error.strerror}).") from error


def _url(path: Path) -> str:
    """The path as FFmpeg's file protocol; without it `a:b.avi` would be read as protocol `a`."""
    return f"file:{path}"


def _video_stream(path: Path, container: InputContainer) -> VideoStream:
    if container.format.name == "tty":  # FFmpeg draws any .txt as terminal art
        raise VideoError(f"{path}: not a video but a text file.")
    # A song's cover is a video stream of one picture to FFmpeg.
    streams = [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]
    if not streams:
        kinds = sorted(
            {"a picture" if stream.type == "video" else stream.type for stream in container.streams}
        )
        raise VideoError(
            f"{path}: no video in this file, only {' and '.join(kinds) or 'an empty container'}."
        )
    stream = streams[0]
    if stream.codec_context is None:
        raise VideoError(f"{path}: this build of FFmpeg has no decoder for its video stream.")
    return stream


def _packets(
    path: Path, container: InputContainer, stream: VideoStream
) -> Iterator[av.Packet[VideoStream] | None]:
    """Packets of the stream, then None or an empty one to flush the decoder, even if the file breaks off."""
    try:
        for packet in container.demux(stream):
            # Decoded as it is, an encrypted picture may come out as noise and no error.
            if packet.has_sidedata("encryption_info"):
                raise VideoError(f"{path}: the video is encrypted (Common Encryption) and cannot be decoded.")
            yield packet
    except av.FFmpegError:
        yield None


def _decoded(stream: VideoStream, packet: av.Packet[VideoStream] | None) -> list[av.VideoFrame]:
    """Frames that this packet completes; none where it does not decode."""
    with suppress(av.FFmpegError):
        return stream.decode(packet)
    return []


def _all_frames(path: Path, container: InputContainer, stream: VideoStream) -> Iterator[av.VideoFrame]:
    """Every frame that decodes, in the order of presentation, which is the decoder's order of output."""
    for packet in _packets(path, container, stream):
        yield from _decoded(stream, packet)


def _likely_counts(path: Path) -> list[int]:
    """The number of packets and a few fewer. See Note [The number of frames is known at the end]."""
    packets = _count_packets(path)
    return list(range(packets, max(packets - COUNT_SLACK - 1, 0), -1))


def _count_packets(path: Path) -> int:
    with _opened(path, threads=1) as (container, stream):
        return sum(1 for packet in _packets(path, container, stream) if _is_shown(packet))


def _is_shown(packet: av.Packet[VideoStream] | None) -> bool:
    """Whether a packet promises a frame: not the flush at the end, nor what an edit list cuts away."""
    return packet is not None and packet.size > 0 and not packet.is_discard


def _no_frame(path: Path) -> VideoError:
    packets = _count_packets(path)
    return VideoError(
        f"{path}: 0 frames decoded out of {packets} packets. The file may be truncated, damaged or encrypted."
    )


def _quarter_turns(frame: av.VideoFrame) -> int:
    """Counter-clockwise quarter turns, 0 to 3, from the stored picture to the shown one."""
    return round(frame.rotation / 90) % 4


class _KeptFrames:
    """Keeps chosen frames as they were decoded, and turns those that are wanted into RGB of one shape."""

    def __init__(self, short_side: int | None) -> None:
        self._short_side = short_side
        self._shape: tuple[int, int] | None = None
        self._turns = 0
        self._frames: dict[int, av.VideoFrame] = {}
        self._reformatter = VideoReformatter()

    def fix_shape(self, frame: av.VideoFrame) -> None:
        """The video's first frame decides the shape of all; a stream may change its size under way."""
        if self._shape is None:
            short = min(frame.width, frame.height)
            target = short if self._short_side is None else min(short, self._short_side)
            self._shape = (round(frame.width * target / short), round(frame.height * target / short))
            self._turns = _quarter_turns(frame)

    def keep(self, index: int, frame: av.VideoFrame) -> None:
        assert self._shape is not None, "fix_shape comes first"
        width, height = self._shape
        # Where scaling takes most of the picture away, what it leaves is kept: raw 4K frames fill the memory.
        if 8 * width * height < frame.width * frame.height:
            frame = self._convert(frame)
        self._frames[index] = frame

    def has(self, indices: Sequence[int]) -> bool:
        return self._frames.keys() >= set(indices)

    def rgb(self, indices: Sequence[int]) -> Frames:
        """Pictures, uint8 (T, H, W, 3), turned as the file says."""
        pictures: dict[int, Frames] = {}
        for index in indices:
            if index not in pictures:
                pixels = self._convert(self._frames[index]).to_ndarray().astype(np.uint8, copy=False)
                pictures[index] = np.rot90(pixels, self._turns)
        return np.stack([pictures[index] for index in indices])

    def seconds(self, indices: Sequence[int], rate: Fraction | None) -> tuple[float, ...]:
        """Presentation times; from the rate where they are missing or, with packed B-frames, out of order."""
        distinct = list(dict.fromkeys(indices))
        times = [self._frames[index].time for index in distinct]
        if None in times or any(earlier >= later for earlier, later in pairwise(times)):
            times = [index / float(rate or ASSUMED_RATE) for index in distinct]
        at = dict(zip(distinct, times, strict=True))
        return tuple(at[index] for index in indices)

    def _convert(self, frame: av.VideoFrame) -> av.VideoFrame:
        assert self._shape is not None, "fix_shape comes first"
        width, height = self._shape
        fallback = Colorspace.ITU601 if frame.height < _HD_HEIGHT else Colorspace.ITU709
        return self._reformatter.reformat(
            frame,
            width=width,
            height=height,
            format="rgb24",
            src_colorspace=_MATRICES.get(frame.colorspace, fallback),
            interpolation=_SCALING,
            threads=1,
        )
