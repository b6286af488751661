"""Frame sampling and decoding with PyAV: the T frames of H x W pixels that evaluation and exports read."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from itertools import chain, islice, pairwise
from os import PathLike
from typing import Any, NamedTuple, TypeVar

import av
import numpy as np
from av.codec.context import Flags
from av.container import InputContainer
from av.stream import Disposition
from av.video.frame import VideoFrame
from av.video.reformatter import Colorspace, Interpolation, VideoReformatter
from av.video.stream import VideoStream

T = TypeVar("T")
# (epoch, video index): seeds the sampling and augmentation of a clip. A clip that is read again in one epoch gets
# the number of an epoch after the last, so that it differs from the first reading.
Key = tuple[int, int]
CENTRE = 0.5  # of a segment: the offset of evaluation
TOLERANCE = 1e-6  # seconds; times are sums of fractions
ASSUMED_RATE = 25.0  # frames per second, of files without any usable time
MOST_SHOWN = 10.0  # seconds; a longer step between time stamps is a gap, as FFmpeg's -dts_delta_threshold


def segment_indices(
    frame_count: int, n_frames: int, offsets: Sequence[float] | None = None, *, grid: int | None = None
) -> list[int]:
    """Indices of `n_frames` frames in time order, one from each of as many equal segments (TSN, Wang et al. 2016).

    `offsets` lie within the segments, each in [0, 1); None means the centres. A video shorter than the clip gives
    all its frames and repeats its last. With `grid`, only the frames of `grid_indices` count. Raises ValueError for
    counts below 1 and for offsets that do not fit.
    8 frames, 4 wanted -> segments 0-1, 2-3, 4-5, 6-7 -> centres [1, 3, 5, 7].
    3 frames, 5 wanted -> [0, 1, 2, 2, 2].
    16 frames, 2 wanted on a grid of 4 (2, 6, 10, 14) -> [6, 14].
    """
    if grid is not None:
        kept = grid_indices(frame_count, grid)
        return [kept[position] for position in segment_indices(len(kept), n_frames, offsets)]
    if frame_count < 1 or n_frames < 1:
        raise ValueError(f"{n_frames} frames cannot be chosen from {frame_count}")
    offsets = [CENTRE] * n_frames if offsets is None else offsets
    if len(offsets) != n_frames or not all(0 <= offset < 1 for offset in offsets):
        raise ValueError(f"{n_frames} offsets in [0, 1) are needed, not {list(offsets)}")
    if frame_count < n_frames:
        return [min(index, frame_count - 1) for index in range(n_frames)]
    last = [-(-end * frame_count // n_frames) - 1 for end in range(1, n_frames + 1)]  # of each segment
    # Rounding may exceed the last.
    return [min(int((n + offset) * frame_count / n_frames), last[n]) for n, offset in enumerate(offsets)]


def clip_offsets(clips: int) -> list[float]:
    """Offset within the segments of each clip of one video. 1 -> [1/2]; 2 -> [1/4, 3/4]"""
    return [(clip + CENTRE) / clips for clip in range(clips)]


def grid_indices(frame_count: int, grid: int) -> list[int]:
    """Frames in a frame store: the centres of `grid` segments, or all frames of a shorter video."""
    return segment_indices(frame_count, min(grid, frame_count))


class Times(NamedTuple):
    """The start of each frame, increasing, and the end of the last, in seconds since the first."""

    starts: Sequence[float]
    end: float


def shown_at(starts: Sequence[float], times: Sequence[float]) -> list[int]:
    """The frame shown at each time: the last that has started. Starts 0, 0.5, 1; times 0.4, 0.5, 9 -> [0, 1, 2]."""
    return [max(0, bisect_right(starts, time + TOLERANCE) - 1) for time in times]


def dense_indices(
    times: Times, n_frames: int, seconds: float, place: float = CENTRE, *, whole_steps: bool = True
) -> list[int]:
    """Indices of the frames of a clip of `seconds`: those shown every seconds / n_frames from its start.

    `place`, in [0, 1), is the share of the rest of the video that lies before the clip. With `whole_steps`, the
    start is rounded down to a multiple of the step. A video shorter than the clip is shown from its start, and its
    last frame then repeated.
    4 frames of 0.8 s in the middle of 10 s at 25 per second -> [115, 120, 125, 130].
    """
    step = seconds / n_frames
    first = place * max(0.0, times.end - seconds) / step
    if whole_steps:
        first = math.floor(first + TOLERANCE)
    return shown_at(times.starts, [(first + number) * step for number in range(n_frames)])


def with_starts(frames: Iterable[tuple[T, float | None]], default: float) -> Iterator[tuple[T, float]]:
    """Frames and their time stamps -> frames and their increasing starts, in seconds since the first.

    Where stamps are missing or decrease, as with packed B-frames, a frame lasts `default` seconds; where one jumps
    ahead and the next comes back, as long as the frame before it.
    """
    first: float | None = None
    start, step = -default, default
    for (frame, time), following in _with_next(frames):
        first = time if first is None else first
        at = start if time is None or first is None else time - first
        after = None if following is None else following[1]
        if at <= start:
            at = start + default
        elif at - start <= MOST_SHOWN:
            step = at - start
        elif after is not None and time is not None and after < time:
            at = start + step
        yield frame, at
        start = at


def with_ends(
    frames: Iterable[tuple[T, float]], default: float | None = None
) -> Iterator[tuple[T, float, float]]:
    """Frames with their start and end in seconds: a frame is shown until the next starts.

    Before a gap of more than MOST_SHOWN, and at the end, it is shown for `default` seconds; None: as long as its
    predecessor.
    """
    step = 1 / ASSUMED_RATE if default is None else default
    for (frame, start), following in _with_next(frames):
        end = start + (step if default is None else default) if following is None else following[1]
        if end - start > MOST_SHOWN:
            default = step  # the average rate counts the gap
            end = start + default
        step = end - start
        yield frame, start, end


def _with_next(items: Iterable[T]) -> Iterator[tuple[T, T | None]]:
    """Each item with its successor, None after the last."""
    return pairwise(chain(items, (None,)))  # type: ignore[arg-type]  # no pair begins with None


def default_step(stream: VideoStream) -> float:
    """Seconds that a frame without usable time stamps is shown, by the stream's rate."""
    return min(1 / float(stream.average_rate or ASSUMED_RATE), MOST_SHOWN)


def to_times(frames: Iterable[tuple[Any, float | None]], default: float) -> Times:
    """The times of frames by their time stamps."""
    shown = [(start, end) for _, start, end in with_ends(with_starts(frames, default), default)]
    return Times([start for start, _ in shown], shown[-1][1] if shown else 0.0)


# Between YUV formats of one matrix. To RGB, without FULL_CHR_H_INT, swscale uses truncating tables: white is 253.
PLANE_SCALING = Interpolation.BILINEAR | Interpolation.BITEXACT
SCALING = PLANE_SCALING | Interpolation.FULL_CHR_H_INT | Interpolation.ACCURATE_RND

_MATRICES = {  # AVColorSpace (libavutil/pixfmt.h) -> matrix for swscale
    1: Colorspace.ITU709,
    4: Colorspace.FCC,
    **dict.fromkeys((5, 6), Colorspace.ITU601),  # BT.470BG, SMPTE 170M
    7: Colorspace.SMPTE240M,
    **dict.fromkeys((9, 10), Colorspace.BT2020),  # 10 with constant luminance
}

MOST_PIXELS = 1 << 26  # of a decoded frame: 8192 x 8192
MOST_RATIO = 32  # of its long side to its short one, which scaling keeps: 16 frames at 224 pixels are 77 MB

# Raised on damaged files by FFmpeg and by PyAV itself: an IndexError for a stream that appears late.
_DAMAGED = (av.FFmpegError, ArithmeticError, LookupError, ValueError)


def matrix_of(frame: VideoFrame) -> Colorspace:
    """The colour matrix that a frame names, else the one for its height."""
    return _MATRICES.get(frame.colorspace, matrix_by_height(frame.height))


def matrix_by_height(height: int) -> Colorspace:
    """The colour matrix of a picture that names none: players take BT.709 from 720 lines on."""
    return Colorspace.ITU601 if height < 720 else Colorspace.ITU709


def size_fault(width: int, height: int) -> str:
    """The reason why frames of this size are refused, and the next step; "" for sizes that are read."""
    short, long = sorted((width, height))
    frames = f"frames of {width}x{height} pixels"
    if width * height > MOST_PIXELS:
        return f"{frames}; at most {MOST_PIXELS:,} pixels are read. Scale the video down."
    if 0 < short * MOST_RATIO < long:  # 0: the container does not state it
        return f"{frames}; the long side may be at most {MOST_RATIO} times the short one. Crop the video."
    return ""


class Orientation(NamedTuple):
    """Steps from the stored to the shown frame; `note` says where a display matrix asks for others."""

    mirrored: bool = False  # left to right, before the turns
    turns: int = 0  # counter-clockwise quarter turns, 0 to 3
    note: str = ""

    def apply(self, pixels: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """Pixels (H, W, 3) as shown, a view."""
        return np.rot90(pixels[:, ::-1] if self.mirrored else pixels, self.turns)


def orientation_of(frame: VideoFrame) -> Orientation:
    """The orientation by a frame's display matrix, in quarter turns; upright without one.

    A pixel (x, y), y downwards, is shown at (a x + c y, b x + d y): libavutil/display.h, whose angle this is.
    """
    a, b, c, d = _display_matrix(frame)
    across, down = math.hypot(a, c), math.hypot(b, d)
    if not across or not down:
        return Orientation(note="its display matrix is no rotation, so it is shown as stored")
    mirrored = a * d < b * c
    sign = -1 if mirrored else 1
    degrees = int(-math.degrees(math.atan2(sign * b / down, sign * a / across)))
    turns = round(degrees / 90)
    note = ""
    if abs(degrees - 90 * turns) > 1:
        note = f"its display matrix turns it by {abs(degrees)}°; {abs(90 * turns)}° are applied"
    return Orientation(mirrored, turns % 4, note)


def _display_matrix(frame: VideoFrame) -> tuple[float, float, float, float]:
    try:
        side_data: Any = frame.side_data
        stored = side_data.get("DISPLAYMATRIX")
    except ValueError:  # PyAV does not know the type of another entry; it still knows the angle
        if abs(frame.rotation) > 180:  # NaN as an integer
            return 0.0, 0.0, 0.0, 0.0
        angle = math.radians(frame.rotation)
        return math.cos(angle), -math.sin(angle), math.sin(angle), math.cos(angle)
    if stored is None:
        return 1.0, 0.0, 0.0, 1.0
    a, b, _, c, d = np.frombuffer(bytes(stored), np.int32, 5).tolist()
    return a, b, c, d


def read_clip(
    path: str | PathLike[str],
    *,
    n_frames: int,
    short_side: int,
    frame_grid: int | None = None,
    clip_seconds: float | None = None,
) -> np.ndarray[Any, Any]:
    """A video's clip as RGB, uint8 (T, H, W, 3), in the file's orientation.

    Frames are those of `segment_indices`, with `clip_seconds` those of `dense_indices`. Frames larger than
    `short_side` are scaled down to it in proportion. The video is decoded twice: the frame count is exact only
    after a whole pass. Raises OSError for a missing file or one that is no video, ValueError where no frame can be
    decoded, or for a size that `size_fault` refuses.
    """
    with _open(str(path)) as container:
        stream = find_video_stream(container)
        step = 0.0 if stream is None else default_step(stream)
    times = to_times(((None, frame.time) for frame in decoded(path)), step)
    if not times.starts:
        raise ValueError(f"{path}: no frame of it can be decoded")
    if clip_seconds is None:
        chosen = segment_indices(len(times.starts), n_frames, grid=frame_grid)
    else:
        chosen = dense_indices(times, n_frames, clip_seconds)
    reformatter = VideoReformatter()
    pictures: dict[int, np.ndarray[Any, Any]] = {}
    width, height, orientation = 0, 0, Orientation()
    for index, frame in enumerate(islice(decoded(path), chosen[-1] + 1)):
        if index == 0:
            _check_size(path, frame.width, frame.height)
            short = min(frame.width, frame.height)
            target = min(short, short_side)
            width, height = round(frame.width * target / short), round(frame.height * target / short)
            orientation = orientation_of(frame)
        if index in chosen:
            picture = reformatter.reformat(
                frame, width, height, "rgb24", matrix_of(frame), interpolation=SCALING, threads=1
            )
            pictures[index] = orientation.apply(picture.to_ndarray())
    return np.stack([pictures[index] for index in chosen])


def decoded(path: str | PathLike[str]) -> Iterator[VideoFrame]:
    """Every frame that decodes, in order; packets that do not decode are skipped."""
    with _open(str(path)) as container:
        stream = find_video_stream(container)
        if stream is None:
            return
        context = stream.codec_context
        context.thread_count = 1  # with more, the remains of a damaged picture vary
        context.options = {"max_pixels": str(MOST_PIXELS)}
        context.flags |= Flags.unaligned  # exact crop of H.264, also on the left
        _check_size(path, context.width, context.height)
        packets = container.demux(stream)
        while True:
            packet = None
            with suppress(*_DAMAGED):  # the file is truncated
                packet = next(packets, None)
            frames: list[VideoFrame] = []
            with suppress(*_DAMAGED):
                frames = stream.decode(packet)
            yield from frames
            if packet is None:
                return


def find_video_stream(container: InputContainer) -> VideoStream | None:
    """The first video stream that is no still picture, as which FFmpeg reads a song's cover; None without one."""
    return next((s for s in container.streams.video if not s.disposition & Disposition.attached_pic), None)


def _check_size(path: str | PathLike[str], width: int, height: int) -> None:
    if fault := size_fault(width, height):
        raise ValueError(f"{path}: {fault}")


def _open(path: str) -> InputContainer:
    """Opens a URL as it is; a file (also `a:b.avi`), and all that a playlist names, by the file protocol alone."""
    try:
        if "://" in path:
            return av.open(path, metadata_errors="ignore")
        return av.open(f"file:{path}", metadata_errors="ignore", options={"protocol_whitelist": "file"})
    except av.FFmpegError as error:
        raise OSError(f"{path}: cannot be read as a video ({error.strerror})") from error
