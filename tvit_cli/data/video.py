"""Video decoding: probing, selected frames of a clip, and streaming of all frames.

Every error of FFmpeg and PyAV becomes a VideoError that names the file. Letters: T frames, H W pixels.
"""

from __future__ import annotations

import math
import stat
import time
from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from fractions import Fraction
from functools import partial
from itertools import islice, pairwise
from pathlib import Path
from typing import IO, Any, Generic, NamedTuple, TypeAlias, TypeVar

import av
import numpy as np
import numpy.typing as npt
from av.codec.context import Flags
from av.container import InputContainer
from av.video.plane import VideoPlane
from av.video.reformatter import ColorRange, Colorspace, VideoReformatter
from av.video.stream import VideoStream

from tvit_cli.errors import TvitError, VideoError, size_text
from tvit_cli.files import FrameArray, Location, Source
from tvit_cli.portable.reading import (
    ASSUMED_RATE,
    MOST_PIXELS,
    PLANE_SCALING,
    SCALING,
    Times,
    default_step,
    find_video_stream,
    matrix_of,
    orientation_of,
    size_fault,
    to_times,
    with_ends,
    with_starts,
)

Frames = npt.NDArray[np.uint8]
Packet: TypeAlias = "av.Packet[VideoStream] | None"  # None flushes the decoder
F = TypeVar("F")

# Protocols that a URL may lead to, such as by a playlist: the network, never local files.
_NETWORK = "http,https,httpproxy,tls,tcp,udp,rtp,srtp,rtsp,rtmp,rtmps,rtmpt,srt,ftp,sftp,crypto,data"
URL_TIMEOUT = 30.0  # seconds without an answer
URL_SECONDS = 1800.0  # of waiting for one URL
LIVE_TIMEOUT = 10.0  # seconds without data, after which a live source counts as cut
URL_BYTES = 1 << 30  # of a URL whose server states no larger size

_LOST = "Try again, or download the video first."
_ENDLESS = "Is it a stream without an end? Add --window 2s --follow."

# On damaged files PyAV itself raises IndexError (a late stream), UnicodeDecodeError (names) and OverflowError.
DAMAGED = (av.FFmpegError, ArithmeticError, LookupError, ValueError)

# Note [Frame count]
# Fewer frames may decode than there are packets: up to two in UCF101's XviD files with packed B-frames, and one for
# each broken packet. `choose` needs the true count or times, which only decoding to the end gives. So one pass
# keeps the frames that `choose` selects for the packets' count or times and for up to COUNT_SLACK fewer; if these
# are further off, a second pass is made. Packets are counted first and kept in memory; those of a larger file are
# read twice. Seeking was rejected: AVI's index is unreliable for frames, and with a key frame every 300 it decodes
# as much.
#
# Later readings of the video decode only the packets that the wanted frames depend on (Order). Its index is that of
# the first reading, whose frames named their packets: no time stamp and no seeking of a demuxer is trusted.
COUNT_SLACK = 3
_DROPPABLE = (
    "h264",
    "mpeg4",
)  # codecs whose skip_frame=NONREF leaves out only frames that no other one refers to
_SEEKABLE = (
    "h264",
    "hevc",
    "vp8",
    "vp9",
)  # codecs whose key frames, in H.264 IDR, make earlier packets needless
_SETS = {"h264": (7, 8), "hevc": (32, 33, 34)}  # types of NAL units with parameters of later pictures
_PACKET_BYTES = 64 << 20  # size of the largest file whose packets are kept


@dataclass(frozen=True, slots=True)
class VideoInfo:
    """Properties of a video; width and height as shown (pixels taken as square), frames as packets."""

    path: Path
    codec: str
    width: int
    height: int
    frames: int
    seconds: float
    rate: float | None  # frames per second by the packets' times; None: the file has no times
    rotation: int  # degrees counter-clockwise from the stored to the shown frame
    mirrored: bool  # left to right, before the rotation
    note: str  # on a display matrix that is not applied as it is
    promised: int  # frames by the packets, or by the header if that is more; none that an edit list hides


@dataclass(frozen=True, slots=True)
class ByTime:
    """A choice of frames by their times, for `read_frames`, instead of by their number."""

    choose: Callable[[Times], Sequence[int]]


@dataclass(frozen=True, slots=True)
class Order:
    """The packets of an undamaged video, from decoding all of it: `read_frames` then decodes only those needed.

    `count` is the number of frames or their times, `packets` the number of each frame's packet, `keys` the packets
    at which decoding may begin.
    """

    count: int | Times
    packets: Sequence[int]
    keys: Sequence[int]
    has_droppable: bool


Choice: TypeAlias = Callable[[int], Sequence[int]] | ByTime


@dataclass(frozen=True, slots=True)
class Clip(Generic[F]):
    """Selected frames of one video, by default RGB as uint8 (T, H, W, 3)."""

    frames: F
    indices: tuple[int, ...]
    pts_seconds: tuple[float, ...]
    frame_count: int  # of the whole video
    note: str = ""  # as in VideoInfo
    times: Times | None = None  # of the whole video, if frames were chosen by time
    order: Order | None = None  # of an undamaged video whose first reading this is


@dataclass(frozen=True, slots=True)
class TimedFrame:
    """A frame shown from `start` until `end`, in seconds since the video began; `length` is the header's."""

    start: float
    end: float
    length: float | None
    picture: Callable[[], Frames]  # converts to uint8 (H, W, 3)
    note: str = ""  # on the video, as in VideoInfo


@dataclass(frozen=True, slots=True)
class Live:
    """An input without an end: its URL, device or bytes, and FFmpeg's format and options for it.

    `fault` begins the sentence on an input that cannot be opened, `advice` ends it.
    """

    source: str | IO[bytes]
    fault: str = "cannot be opened"
    advice: str = ""
    form: str | None = None
    options: Mapping[str, str] = field(default_factory=dict)


class Planes(NamedTuple):
    """A frame in JPEG's format: full-range BT.601 at 4:2:0, the sides of U and V half of Y's, rounded up."""

    y: Frames  # (H, W)
    u: Frames
    v: Frames


class KeptFrames:
    """Selected decoded frames of one video, converted on demand.

    `first` determines the size of all, since a stream may change its size. Frames wider and higher than
    `short_side` are scaled down to it, the long side in proportion. Raises VideoError for a size that is refused.
    """

    def __init__(self, path: Source, first: av.VideoFrame, short_side: int | None) -> None:
        _check_size(path, first.width, first.height)
        short = min(first.width, first.height)
        target = short if short_side is None else min(short, short_side)
        self._width, self._height = round(first.width * target / short), round(first.height * target / short)
        self.orientation = orientation_of(first)
        self._reformatter = VideoReformatter()
        self.frames: dict[int, av.VideoFrame] = {}  # by index

    def keep(self, index: int, frame: av.VideoFrame) -> None:
        """Keeps the frame of that index."""
        # Frames that are scaled down a lot are kept scaled: decoded 4K frames would fill the memory.
        if 8 * self._width * self._height < frame.width * frame.height:
            frame = self._convert(frame, "rgb24")
        self.frames[index] = frame

    def rgb(self, indices: Sequence[int]) -> Frames:
        """RGB, uint8 (T, H, W, 3), in the file's orientation."""
        pictures = {index: self.upright(self.frames[index]) for index in dict.fromkeys(indices)}
        return np.stack([pictures[index] for index in indices])

    def planes(self, indices: Sequence[int]) -> Iterator[Planes]:
        """Planes in the file's orientation; converted through RGB only if it is not upright."""
        for index in indices:
            frame = self.frames[index]
            how: dict[str, Any] = {"dst_colorspace": Colorspace.ITU601, "dst_color_range": ColorRange.JPEG}
            if self.orientation[:2] != (False, 0):  # at odd sizes, U and V cannot be moved by themselves
                frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(self.upright(frame)), format="rgb24")
                how |= {"width": frame.width, "height": frame.height}
            if matrix_of(frame) == Colorspace.ITU601:
                how["interpolation"] = PLANE_SCALING
            yield Planes(*map(_plane_pixels, self._convert(frame, "yuv420p", **how).planes))

    def seconds(self, indices: Sequence[int], rate: Fraction | None) -> tuple[float, ...]:
        """Presentation times; from the rate if they are missing or, with packed B-frames, out of order."""
        distinct = list(dict.fromkeys(indices))
        times = [self.frames[index].time for index in distinct]
        if None in times or any(earlier >= later for earlier, later in pairwise(times)):
            times = [index / float(rate or ASSUMED_RATE) for index in distinct]
        at = dict(zip(distinct, times, strict=True))
        return tuple(at[index] for index in indices)

    def upright(self, frame: av.VideoFrame) -> Frames:
        """RGB of one frame, uint8 (H, W, 3), in the file's orientation."""
        return self.orientation.apply(self._convert(frame, "rgb24").to_ndarray().astype(np.uint8, copy=False))

    def _convert(self, frame: av.VideoFrame, form: str, **how: Any) -> av.VideoFrame:
        how = {"width": self._width, "height": self._height, "interpolation": SCALING, **how}
        matrix = matrix_of(frame)
        return self._reformatter.reformat(frame, format=form, src_colorspace=matrix, threads=1, **how)


def _plane_pixels(plane: VideoPlane) -> Frames:
    """A view of a plane without the padding of its rows."""
    rows = np.frombuffer(memoryview(plane), np.uint8).reshape(-1, plane.line_size)
    return rows[: plane.height, : plane.width]


@contextmanager
def open_video(path: Location, live: Live | None = None) -> Iterator[tuple[InputContainer, VideoStream]]:
    """Opens a container and its first video stream; errors in the block become VideoErrors.

    TvitErrors and AssertionErrors pass unchanged. `path` is the name in errors; it is opened where `live` is None.
    """
    url: str | IO[bytes]
    timeout: float | None
    if live is not None:
        # Bytes in a pipe name no other file or address.
        url, protocols = live.source, _NETWORK if isinstance(live.source, str) else "data"
        timeout = LIVE_TIMEOUT if isinstance(url, str) else None
    elif isinstance(path, str):
        url, protocols, timeout = path, _NETWORK, URL_TIMEOUT
    else:  # a playlist with a video's suffix must not make FFmpeg open the network
        _check_file(path)
        url, protocols, timeout = file_url(path), "file", None
    options = {"protocol_whitelist": protocols, **(live.options if live else {})}
    how: dict[str, Any] = {"metadata_errors": "ignore", "options": options}
    try:
        with _opened(url, timeout, format=live.form if live else None, **how) as container:
            stream = _video_stream(path, container)
            stream.codec_context.thread_count = 1  # parallelism is between videos
            stream.codec_context.options = {"max_pixels": str(MOST_PIXELS)}
            stream.codec_context.flags |= Flags.unaligned  # exact crop of H.264, also on the left
            _check_size(path, stream.codec_context.width, stream.codec_context.height)
            yield container, stream
    except (TvitError, AssertionError):
        raise
    except (av.ExitError, TimeoutError) as error:
        advice = live.advice if live else _LOST
        raise VideoError(f"{path}: no answer within {timeout or URL_TIMEOUT:.0f} s. {advice}") from error
    except av.FFmpegError as error:
        if live:
            raise VideoError(f"{path}: {live.fault} ({error.strerror}). {live.advice}".strip()) from error
        if kind := _unreadable_kind(path):
            raise VideoError(f"{path}: {kind}") from error
        if isinstance(error, PermissionError):
            raise VideoError(f"{path}: cannot be read (permission denied).") from error
        fault = "not a video that FFmpeg can read" if isinstance(path, Path) else "cannot be fetched and read"
        raise VideoError(f"{path}: {fault} ({error.strerror}).") from error
    except Exception as error:
        raise VideoError(f"{path}: cannot be read ({type(error).__name__}: {error}).") from error


def _opened(url: Any, timeout: float | None, **how: Any) -> InputContainer:
    """Opens a container. Raises TimeoutError for a stall, which FFmpeg often takes for damage or for the end."""
    began = time.monotonic()
    try:
        container: InputContainer = av.open(url, timeout=timeout, **how)
        if timeout is None or time.monotonic() - began < timeout:
            return container
        container.close()
    except av.FFmpegError:
        if timeout is None or time.monotonic() - began < timeout:
            raise
    raise TimeoutError


def _check_size(path: Source, width: int, height: int) -> None:
    if fault := size_fault(width, height):
        raise VideoError(f"{path}: {fault}")


def _check_file(path: Path) -> None:
    try:
        status = path.stat()
    except FileNotFoundError as error:
        raise VideoError(f"{path}: no such file.") from error
    except OSError as error:
        raise VideoError(f"{path}: cannot be read ({error.strerror}).") from error
    if stat.S_ISDIR(status.st_mode):
        raise VideoError(f"{path}: is a folder, not a video.")
    if not stat.S_ISREG(status.st_mode):
        raise VideoError(f"{path}: is no file but a pipe or a device. Save the video to a file first.")
    if status.st_size == 0:
        raise VideoError(f"{path}: the file is empty (0 bytes). Copy or download it again.")


def file_url(path: Path) -> str:
    """The path as FFmpeg's file protocol; otherwise `a:b.avi` would be read as protocol `a`."""
    return f"file:{path}"


def _video_stream(path: Location, container: InputContainer) -> VideoStream:
    if container.format.name == "tty":  # FFmpeg renders any .txt as terminal art
        raise VideoError(f"{path}: not a video but a text file.")
    stream = find_video_stream(container)
    if stream is None:
        kinds = {"a picture" if s.type == "video" else s.type for s in container.streams}
        found = " and ".join(sorted(kinds)) or "an empty container"
        raise VideoError(f"{path}: no video in this file, only {found}.")
    if stream.codec_context is None:
        raise VideoError(f"{path}: this build of FFmpeg has no decoder for its video stream.")
    return stream


def demux(
    path: Location, container: InputContainer, stream: VideoStream, *, bounded: bool = True
) -> Iterator[Packet]:
    """Packets of the stream, then None or an empty one to flush the decoder, also if the file is truncated.

    Packets of a stream that appears late are skipped; PyAV raises an IndexError for it at the end of the file.
    A `bounded` URL is an error where it breaks off or has no end; any other one ends there.
    """
    packets: Iterator[Packet] = container.demux(stream)
    if isinstance(path, str) and bounded:
        packets = _within_bounds(path, container.size, packets)
    try:
        for packet in packets:
            # An encrypted frame may decode as noise without an error.
            if packet is not None and packet.has_sidedata("encryption_info"):
                raise VideoError(f"{path}: the video is encrypted (Common Encryption) and cannot be decoded.")
            yield packet
    except DAMAGED:
        yield None


def _within_bounds(url: str, size: int, packets: Iterator[Packet]) -> Iterator[Packet]:
    """Packets of a URL. Raises VideoError for a lost connection, and beyond the bounds in bytes and time.

    FFmpeg often takes a connection that stalls for the end of the video, so the time of each packet tells.
    """
    received, limit, waited = 0, max(URL_BYTES, size), 0.0
    while True:
        began = time.monotonic()
        packet: Packet = None
        failure: Exception | None = None
        problem = ""
        try:
            packet = next(packets, None)
        except DAMAGED as error:
            failure = error
        seconds = time.monotonic() - began
        waited += seconds
        received += 0 if packet is None else packet.size
        if seconds >= URL_TIMEOUT or isinstance(failure, av.ExitError):
            problem = f"no answer within {URL_TIMEOUT:.0f} s after {size_text(received)}. {_LOST}"
        elif isinstance(failure, OSError):
            problem = f"the connection broke off after {size_text(received)} ({failure.strerror}). {_LOST}"
        elif received > limit:
            problem = f"sends more than {size_text(limit)}. {_ENDLESS}"
        elif waited > URL_SECONDS:
            problem = f"takes more than {URL_SECONDS / 60:.0f} min to read. {_ENDLESS}"
        if problem:
            raise VideoError(f"{url}: {problem}") from failure
        if failure is not None:
            raise failure
        if packet is None:
            return
        yield packet


def _decode(
    stream: VideoStream, packets: Iterable[Packet], ignored: tuple[type[Exception], ...] = DAMAGED
) -> Iterator[av.VideoFrame]:
    """All frames that decode, in the decoder's order, which is that of presentation."""
    for packet in packets:
        frames: list[av.VideoFrame] = []
        with suppress(*ignored):
            frames = stream.decode(packet)
        yield from frames


def _is_shown(packet: Packet) -> bool:
    """Whether a packet promises a frame: neither a flush nor cut away by an edit list."""
    return packet is not None and packet.size > 0 and not packet.is_discard


def count_packets(path: Location) -> int:
    """Number of packets that promise a frame, without decoding. Raises VideoError."""
    with open_video(path) as (container, stream):
        return sum(map(_is_shown, demux(path, container, stream)))


def _promised_times(packets: Iterable[Packet], default: float) -> Times:
    """The times of frames by their packets: those of the decoded frames, but for damaged and unusual files."""
    stamps = [
        None if packet.pts is None or packet.time_base is None else float(packet.pts * packet.time_base)
        for packet in packets
        if packet is not None and _is_shown(packet)
    ]
    known = sorted(stamp for stamp in stamps if stamp is not None)
    return to_times([(None, stamp) for stamp in (known if len(known) == len(stamps) else stamps)], default)


def stamped(frames: Iterable[av.VideoFrame]) -> Iterator[tuple[av.VideoFrame, float | None]]:
    """Frames with their time stamps in seconds."""
    return ((frame, frame.time) for frame in frames)


def count_frames(path: Path, most: int | None = None) -> int:
    """Number of frames that decode, at least 1; reads no further than `most` of them. Raises VideoError."""
    with open_video(path) as (container, stream):
        count = sum(1 for _ in islice(_decode(stream, demux(path, container, stream)), most))
    if count == 0:
        raise _no_frame_error(path)
    return count


def _unreadable_kind(path: Location) -> str:
    """The kind of a file that FFmpeg recognises and cannot read, by its first bytes, and the next step; or ""."""
    start = b""
    if isinstance(path, Path):
        with suppress(OSError), path.open("rb") as file:
            start = file.read(21)
    if start.startswith(b"ffconcat"):
        files = "files that are missing or not in its folder"
        return (
            f"a list of videos (ffconcat) with {files}. Correct the list, or join the videos into one file."
        )
    if start[:4] == b"RIFF" and start[8:16] == b"WEBPVP8X" and start[20:] and start[20] & 2:
        return "an animated WebP, which FFmpeg cannot decode. Convert it to MP4 or GIF."
    return ""


def _no_frame_error(path: Location) -> VideoError:
    if kind := _unreadable_kind(path):
        return VideoError(f"{path}: {kind}")
    decoded = f"0 frames decoded out of {count_packets(path)} packets"
    return VideoError(f"{path}: {decoded}. The file may be truncated, damaged or encrypted.")


def probe(path: Path) -> VideoInfo:
    """Properties of a file, from its packets and its first frame.

    Raises VideoError, `<path>: <reason>`, if no frame can be read.
    """
    first: av.VideoFrame | None = None
    times: list[int] = []
    packets = hidden = 0
    with open_video(path) as (container, stream):
        for packet in demux(path, container, stream):
            hidden += packet is not None and packet.size > 0 and packet.is_discard
            if packet is not None and _is_shown(packet):
                packets += 1
                if (time := packet.dts if packet.pts is None else packet.pts) is not None:
                    times.append(time)
            if first is None:
                first = next(_decode(stream, [packet]), None)
        if first is None:
            raise _no_frame_error(path)
        _check_size(path, first.width, first.height)
        rate = float(stream.average_rate) if stream.average_rate else None
        if len(times) > 1 and stream.time_base is not None and (span := max(times) - min(times)) > 0:
            rate = (len(times) - 1) / float(span * stream.time_base)
        (mirrored, turns, note), codec = orientation_of(first), stream.codec_context.codec.canonical_name
        width, height = (first.height, first.width) if turns % 2 else (first.width, first.height)
        promised = max(stream.frames - hidden, packets)
    seconds = packets / (rate or ASSUMED_RATE)
    return VideoInfo(path, codec, width, height, packets, seconds, rate, 90 * turns, mirrored, note, promised)


def stated_seconds(path: Path) -> float:
    """Length of a video by its header, 0 if that has none. Raises VideoError."""
    with open_video(path) as (container, stream):
        if stream.duration and stream.time_base:
            return float(stream.duration * stream.time_base)
        return (container.duration or 0) / av.time_base


def decode_first(path: Path) -> None:
    """Decodes the first frame and reads no further. Raises VideoError, `<path>: <reason>`, if there is none."""
    count_frames(path, 1)


def read_clip(
    path: Source,
    choose: Choice,
    *,
    short_side: int | None = None,
    known: int | Times | Order | None = None,
    time_limit: float | None = None,
) -> Clip[Frames]:
    """Decodes a video in order and converts the frames that `choose` names to RGB.

    `choose` is a pure function from the number of frames to indices in ascending order (repeats allowed), or from
    their times (ByTime; any order). Frames wider and higher than `short_side` are scaled down to it, the long side
    in proportion. Packets that do not decode are skipped. The number or times of frames, where they are `known`,
    save decoding of the rest; an earlier clip's `order` saves more. See Note [Frame count].

    Raises VideoError, `<path>: <reason>`, if no frame can be read, or after `time_limit` seconds of decoding.
    """
    return read_frames(
        path, choose, KeptFrames.rgb, short_side=short_side, known=known, time_limit=time_limit
    )


def read_video(path: Path | str) -> tuple[Frames, float]:
    """All frames of a video as shown, RGB uint8 (T, H, W, 3), and their rate in frames per second.

    Raises VideoError, `<path>: <reason>`, if no frame can be read.
    """
    clip = read_clip(path if isinstance(path, str) and "://" in path else Path(path), range)
    seconds = clip.pts_seconds[-1] - clip.pts_seconds[0]
    return clip.frames, (len(clip.frames) - 1) / seconds if seconds > 0 else float(ASSUMED_RATE)


def read_frames(
    path: Source,
    choose: Choice,
    convert: Callable[[KeptFrames, Sequence[int]], F],
    *,
    short_side: int | None = None,
    known: int | Times | Order | None = None,
    time_limit: float | None = None,
) -> Clip[F]:
    """`read_clip` with another conversion, `convert(kept, indices)`."""
    by_time = isinstance(choose, ByTime)
    if isinstance(path, FrameArray):
        count = len(path.frames)
        times = Times([index / path.fps for index in range(count)], count / path.fps)
        indices = _chosen(choose, times if by_time else count)
        chosen = KeptFrames(path, _frame_of(path, 0), short_side)
        for index in set(indices):
            chosen.keep(index, _frame_of(path, index))
        seconds = tuple(times.starts[index] for index in indices)
        return Clip(convert(chosen, indices), indices, seconds, count, times=times)
    order = known if isinstance(known, Order) else None
    is_first = known is None
    for _ in range(2 if order is None else 3):
        with open_video(path) as (container, stream):
            kept: KeptFrames | None
            packets: Iterable[Packet]
            if isinstance(known, Order):
                indices = _chosen(choose, known.count)
                packets = _in_time(path, demux(path, container, stream), time_limit)
                kept = _read_few(path, stream, packets, known, indices, short_side)
                if kept is not None:
                    return _clip(kept, indices, convert, known.count, stream.average_rate, order)
                known = order = None
                continue
            packets = demux(path, container, stream)
            step = default_step(stream)
            guesses: list[int | Times] = [] if known is None else [known]
            if known is None:
                if container.size <= _PACKET_BYTES:  # negative if a server does not state it
                    packets = list(packets)
                    promised = _promised_times(packets, step)
                else:
                    with open_video(path) as again:
                        promised = _promised_times(demux(path, *again), step)
                count = len(promised.starts)
                counts = range(count, max(count - COUNT_SLACK - 1, 0), -1)
                guesses = [_first_of(promised, n) if by_time else n for n in counts]
            wanted = {index for guess in guesses for index in _chosen(choose, guess)}
            stop = max(wanted) + 1 if known is not None else None
            kept, starts, last = None, array("d"), 0.0
            numbered = _Numbered(stream, _in_time(path, packets, time_limit))
            decoded = numbered.frames()
            timed = with_ends(with_starts(stamped(decoded), step), step)
            for frame, start, end in islice(timed if by_time else ((f, 0.0, 0.0) for f in decoded), stop):
                kept = kept or KeptFrames(path, frame, short_side)
                if len(starts) in wanted:
                    kept.keep(len(starts), frame)
                starts.append(start)
                last = end
            if kept is None:
                raise _no_frame_error(path)
            if known is None or len(starts) != stop:
                known = Times(starts, last) if by_time else len(starts)
            if stop is None and is_first:
                order = numbered.order(known)
            indices = _chosen(choose, known)
            if kept.frames.keys() >= set(indices):
                return _clip(kept, indices, convert, known, stream.average_rate, order)
    raise VideoError(f"{path}: one reading gives more frames than the next. Is the file still being written?")


def _clip(
    kept: KeptFrames,
    indices: tuple[int, ...],
    convert: Callable[[KeptFrames, Sequence[int]], F],
    known: int | Times,
    rate: Fraction | None,
    order: Order | None,
) -> Clip[F]:
    count, times = (known, None) if isinstance(known, int) else (len(known.starts), known)
    seconds = kept.seconds(indices, rate) if times is None else tuple(times.starts[i] for i in indices)
    return Clip(convert(kept, indices), indices, seconds, count, kept.orientation.note, times, order)


def _in_time(path: Source, packets: Iterable[Packet], seconds: float | None) -> Iterator[Packet]:
    """The packets. Raises VideoError where they take longer than so many seconds."""
    limit = math.inf if seconds is None else time.monotonic() + seconds
    for packet in packets:
        yield packet
        if time.monotonic() > limit:
            fault = f"decoding takes more than {seconds:g} s (--time-limit)"
            advice = "Raise the limit, label parts with --window, or encode the video smaller."
            raise VideoError(f"{path}: {fault}. {advice}")


class _Numbered:
    """Decoding of all packets, whose frames name their packet, as an Order needs it."""

    def __init__(self, stream: VideoStream, packets: Iterable[Packet]) -> None:
        self._stream, self._packets = stream, packets
        self._of_frames, self._keys = array("i"), array("i")
        self._shown = 0  # packets that promise a frame
        self._first: tuple[Any, ...] = ()
        self._is_regular = True  # every frame names a packet, and nothing changes its form

    def frames(self) -> Iterator[av.VideoFrame]:
        """As `_decode`."""
        codec, extra = self._stream.codec_context.name, self._stream.codec_context.extradata or b""
        entries, first_sets = set(), b""
        for number, packet in enumerate(_number(self._stream, self._packets)):
            if packet is not None and _is_shown(packet):
                self._shown += 1
                is_entry, sets = _entry(packet, codec, extra)
                first_sets = sets if self._shown == 1 else first_sets
                is_same = sets in (b"", first_sets) and not packet.has_sidedata("new_extradata")
                self._is_regular &= is_same and not packet.is_corrupt
                if is_entry and sets == first_sets:
                    entries.add(number)
            for frame in _decode(self._stream, [packet]):
                form = frame.width, frame.height, frame.interlaced_frame, frame.format.name
                self._first = self._first or (*form, orientation_of(frame))
                of_packet = _packet_of(frame)
                self._is_regular &= of_packet >= 0 and form == self._first[:4] and not frame.is_corrupt
                if frame.key_frame:
                    self._is_regular &= orientation_of(frame) == self._first[4]
                    if of_packet in entries:
                        self._keys.append(of_packet)
                self._of_frames.append(of_packet)
                yield frame

    def order(self, count: int | Times) -> Order | None:
        """The order after all frames; None where it would save nothing or packets and frames differ in number."""
        packets, codec = self._of_frames, self._stream.codec_context.name
        has_droppable = codec in _DROPPABLE and not self._first[2]
        if not self._is_regular or not len(set(packets)) == len(packets) == self._shown:
            return None
        # x264 before build 151 is decoded in its own way at 4:4:4, and only the first packet names the build.
        keys = () if codec == "h264" and "444" in self._first[3] else self._keys
        return Order(count, packets, keys, has_droppable) if has_droppable or keys else None


def _number(stream: VideoStream, packets: Iterable[Packet]) -> Iterator[Packet]:
    """The packets, each with its number in `opaque`, which the decoder hands on to its frame."""
    stream.codec_context.flags |= Flags.copy_opaque
    for number, packet in enumerate(packets):
        if packet is not None:
            packet.opaque = (number,)  # a new object: PyAV knows it by its address
        yield packet


def _packet_of(frame: av.VideoFrame) -> int:
    """The number of a frame's packet, -1 if the decoder does not tell it."""
    return frame.opaque[0] if isinstance(frame.opaque, tuple) else -1


def _entry(packet: av.Packet[VideoStream], codec: str, extra: bytes) -> tuple[bool, bytes]:
    """Whether decoding may begin at a packet that gives a key frame, and the packet's parameter sets.

    Sources: ITU-T H.264 and H.265, 7.3.1; `extra` is the stream's extradata, avcC or hvcC in MP4 and Matroska.
    """
    if codec not in _SETS:
        return packet.is_keyframe and codec in _SEEKABLE, b""
    data, is_h264, units, at = bytes(packet), codec == "h264", [], 0
    if extra[:1] == b"\x01" and (size := extra[4:5] if is_h264 else extra[21:22]):
        wide = (size[0] & 3) + 1
        while at + wide < len(data):
            end = at + wide + int.from_bytes(data[at : at + wide], "big")
            units.append(data[at + wide : end])
            at = end
    else:
        units = [unit.rstrip(b"\0") for unit in data.split(b"\0\0\1")[1:]]
    kinds = [(unit[0] & 31 if is_h264 else unit[0] >> 1 & 63, unit) for unit in units if unit]
    is_entry = packet.is_keyframe and (not is_h264 or any(kind == 5 for kind, _ in kinds))
    return is_entry, b"".join(unit for kind, unit in kinds if kind in _SETS[codec])


def _read_few(
    path: Location,
    stream: VideoStream,
    packets: Iterable[Packet],
    order: Order,
    indices: Sequence[int],
    short_side: int | None,
) -> KeptFrames | None:
    """The frames of the indices, decoded from as few packets as they need; None if one does not come.

    From a key frame on that is shown no later than a frame, all packets are decoded until that frame is there.
    """
    keys, index_of = order.keys, {packet: index for index, packet in enumerate(order.packets)}
    starts = {}  # by the index of a missing frame
    for index in set(indices):
        earlier = keys[: bisect_right(keys, order.packets[index])]
        starts[index] = next((key for key in reversed(earlier) if index_of[key] <= index), 0)
    begins, context, kept = set(starts.values()), stream.codec_context, None
    context.options = {**context.options, "err_detect": "explode"}  # concealment may need the other packets
    is_decoding = False
    for number, packet in enumerate(_number(stream, packets)):
        if not is_decoding and number in begins:
            context.flush_buffers()
        is_decoding = any(start <= number for start in starts.values())
        if not is_decoding:
            continue
        if order.has_droppable:
            context.skip_frame = "DEFAULT" if index_of.get(number) in starts else "NONREF"
        try:
            frames = list(_decode(stream, [packet], ()))
        except DAMAGED:
            return None
        for frame in frames:
            kept = kept or KeptFrames(path, frame, short_side)
            if starts.pop(index_of.get(_packet_of(frame), -1), None) is not None:
                kept.keep(index_of[_packet_of(frame)], frame)
        if not starts:
            return kept
    return None


def _chosen(choose: Choice, seen: int | Times) -> tuple[int, ...]:
    if isinstance(choose, ByTime):
        assert isinstance(seen, Times)
        return tuple(choose.choose(seen))
    assert isinstance(seen, int)
    return tuple(choose(seen))


def _first_of(times: Times, count: int) -> Times:
    """The times of the first `count` frames."""
    return Times(times.starts[:count], [*times.starts, times.end][count])


def _frame_of(array: FrameArray, index: int) -> av.VideoFrame:
    return av.VideoFrame.from_ndarray(np.ascontiguousarray(array.frames[index]), format="rgb24")


def iter_frames(
    path: Source, *, short_side: int | None = None, live: Live | None = None
) -> Iterator[TimedFrame]:
    """Decodes a video once, in order, and yields every frame with its time.

    Times are those of `with_starts` and `with_ends`. Memory does not grow with the video.

    With `live`, that is read under the name `path`, and it ends where it is cut.

    Raises VideoError, `<path>: <reason>`, if no frame can be read.
    """
    if isinstance(path, FrameArray):
        converter, count, fps = KeptFrames(path, _frame_of(path, 0), short_side), len(path.frames), path.fps
        for index in range(count):

            def picture(index: int = index) -> Frames:
                return converter.upright(_frame_of(path, index))

            yield TimedFrame(index / fps, (index + 1) / fps, count / fps, picture)
        return
    with open_video(path, live) as (container, stream):
        default = default_step(stream)
        length = None if container.duration is None else container.duration / av.time_base
        kept: KeptFrames | None = None
        frames = stamped(_decode(stream, demux(path, container, stream, bounded=live is None)))
        for frame, start, end in with_ends(with_starts(frames, default), None if live else default):
            kept = kept or KeptFrames(path, frame, short_side)
            yield TimedFrame(start, end, length, partial(kept.upright, frame), kept.orientation.note)
        if kept is None and live:
            raise VideoError(f"{path}: ended before a frame could be decoded. {live.advice}".strip())
        if kept is None:
            raise _no_frame_error(path)
