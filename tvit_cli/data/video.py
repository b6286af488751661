"""Video files: opening, probing, decoding, and chosen frames as RGB.

Whatever FFmpeg raises while a file is open becomes a VideoError that names the file.

Letters: T frames, H W pixels.
"""

from __future__ import annotations

import stat
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Generic, TypeAlias, TypeVar

import av
from av.container import InputContainer
from av.stream import Disposition
from av.video.stream import VideoStream

from tvit_cli.data.pictures import ASSUMED_RATE, Frames, KeptFrames, quarter_turns
from tvit_cli.errors import TvitError, VideoError
from tvit_cli.files import Location

Packet: TypeAlias = "av.Packet[VideoStream] | None"  # None flushes the decoder

# What a URL may lead to: the network, never this machine's files.
_NETWORK = "http,https,httpproxy,tls,tcp,udp,rtp,srtp,rtsp,rtmp,rtmps,rtmpt,srt,ftp,sftp,crypto,data"
SECONDS_FOR_AN_ANSWER = 30.0

# Raised on damaged files by FFmpeg, and by PyAV itself: an IndexError for a stream that appears after the header
# was read, a UnicodeDecodeError for names, an OverflowError for numbers.
DAMAGED = (av.FFmpegError, ArithmeticError, LookupError, ValueError)


@contextmanager
def open_video(path: Location, *, threads: int) -> Iterator[tuple[InputContainer, VideoStream]]:
    """One container, one video stream; whatever is raised inside becomes a VideoError.

    TvitErrors and AssertionErrors pass as they are.
    """
    if isinstance(path, str):
        url, protocols, seconds = path, _NETWORK, SECONDS_FOR_AN_ANSWER
    else:
        # A playlist under a video's name must not make FFmpeg open the network.
        url, protocols, seconds = _checked(path), "file", None
    try:
        with av.open(
            url, metadata_errors="ignore", options={"protocol_whitelist": protocols}, timeout=seconds
        ) as container:
            stream = _video_stream(path, container)
            stream.codec_context.thread_count = threads
            if threads > 1:
                stream.thread_type = "AUTO"
            yield container, stream
    except (TvitError, AssertionError):
        raise
    except av.ExitError as error:
        raise VideoError(f"{path}: no answer within {SECONDS_FOR_AN_ANSWER:.0f} s.") from error
    except PermissionError as error:
        raise VideoError(f"{path}: may not be read (permission denied).") from error
    except av.FFmpegError as error:
        what = "not a video that FFmpeg can read" if isinstance(path, Path) else "cannot be fetched and read"
        raise VideoError(f"{path}: {what} ({error.strerror}).") from error
    except Exception as error:
        raise VideoError(f"{path}: cannot be read ({type(error).__name__}: {error}).") from error


def _checked(path: Path) -> str:
    """The URL of a file that can be opened and holds something."""
    try:
        facts = path.stat()
    except OSError as error:
        reason = (
            "no such file" if isinstance(error, FileNotFoundError) else f"cannot be read ({error.strerror})"
        )
        raise VideoError(f"{path}: {reason}.") from error
    if stat.S_ISDIR(facts.st_mode):
        raise VideoError(f"{path}: is a folder, not a video.")
    if not stat.S_ISREG(facts.st_mode):
        raise VideoError(f"{path}: is no file but a pipe or a device. Save the video to a file first.")
    if facts.st_size == 0:
        raise VideoError(f"{path}: the file is empty (0 bytes). Was a copy or download broken off?")
    return file_url(path)


def file_url(path: Path) -> str:
    """The path as FFmpeg's file protocol; without it `a:b.avi` would be read as protocol `a`."""
    return f"file:{path}"


def _video_stream(path: Location, container: InputContainer) -> VideoStream:
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


def demux(path: Location, container: InputContainer, stream: VideoStream) -> Iterator[Packet]:
    """Packets of the stream, then None or an empty one to flush the decoder, even if the file breaks off.

    Those of a stream that appears late are skipped; PyAV raises an IndexError for it at the end of the file.
    """
    try:
        for packet in container.demux(stream):
            # Decoded as it is, an encrypted picture may come out as noise and no error.
            if packet.has_sidedata("encryption_info"):
                raise VideoError(f"{path}: the video is encrypted (Common Encryption) and cannot be decoded.")
            yield packet
    except DAMAGED:
        yield None


def decode_packet(stream: VideoStream, packet: Packet) -> list[av.VideoFrame]:
    """Frames that this packet completes; none where it does not decode."""
    with suppress(*DAMAGED):
        return stream.decode(packet)
    return []


def decode_frames(stream: VideoStream, packets: Iterable[Packet]) -> Iterator[av.VideoFrame]:
    """Every frame that decodes, in the order of presentation, which is the decoder's order of output."""
    for packet in packets:
        yield from decode_packet(stream, packet)


def count_packets(path: Location) -> int:
    with open_video(path, threads=1) as (container, stream):
        return count_shown_frames(demux(path, container, stream))


def count_shown_frames(packets: Iterable[Packet]) -> int:
    return sum(map(is_shown_packet, packets))


def is_shown_packet(packet: Packet) -> bool:
    """Whether a packet promises a frame: not the flush at the end, nor what an edit list cuts away."""
    return packet is not None and packet.size > 0 and not packet.is_discard


def no_frame_error(path: Location) -> VideoError:
    packets = count_packets(path)
    return VideoError(
        f"{path}: 0 frames decoded out of {packets} packets. The file may be truncated, damaged or encrypted."
    )


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
# if it lies further off, a second pass is made. The packets are counted before the first is decoded, and held
# meanwhile; those of a file too large for that are read twice. Seeking was refused: AVI's index is no guide
# to frames, and with a key frame every 300 it decodes as much. A caller who knows the count passes it, and
# decoding stops after the last chosen frame.
COUNT_SLACK = 3
MOST_SHOWN = (
    10.0  # seconds; a longer step between time stamps is a gap, as FFmpeg's -dts_delta_threshold has it
)

P = TypeVar("P")
T = TypeVar("T")

_HELD_BYTES = 64 << 20  # packets of a file up to this size stay in memory between counting and decoding


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


@dataclass(frozen=True, slots=True)
class Pictures(Generic[P]):
    """A clip whose frames are what was made of them."""

    pictures: P
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
    with open_video(path, threads=1) as (container, stream):
        for packet in demux(path, container, stream):
            if packet is not None and is_shown_packet(packet):
                packets += 1
                if (time := packet.pts if packet.pts is not None else packet.dts) is not None:
                    times.append(time)
            if first is None:
                first = next(iter(decode_packet(stream, packet)), None)
        if first is None:
            raise no_frame_error(path)
        rate = float(stream.average_rate) if stream.average_rate else None
        if len(times) > 1 and stream.time_base is not None and (span := max(times) - min(times)) > 0:
            rate = (len(times) - 1) / float(span * stream.time_base)
        rotation = quarter_turns(first) * 90
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
    with open_video(path, threads=1) as (container, stream):
        if next(iter(decode_frames(stream, demux(path, container, stream))), None) is None:
            raise no_frame_error(path)


def read_clip(
    path: Location,
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
    read = read_pictures(
        path, choose, KeptFrames.rgb, short_side=short_side, frame_count=frame_count, threads=threads
    )
    return Clip(read.pictures, read.indices, read.pts_seconds, read.frame_count)


def read_pictures(
    path: Location,
    choose: Callable[[int], Sequence[int]],
    make: Callable[[KeptFrames, Sequence[int]], P],
    *,
    short_side: int | None = None,
    frame_count: int | None = None,
    threads: int = 1,
) -> Pictures[P]:
    """`read_clip`, but what is made of the frames that were kept is for `make(kept, indices)` to say."""
    for _ in range(2):
        with open_video(path, threads=threads) as (container, stream):
            packets: Iterable[Packet] = demux(path, container, stream)
            if frame_count is not None:
                counts = [frame_count]
            elif container.size <= _HELD_BYTES:  # negative where a server does not say
                packets = list(packets)
                counts = _likely_counts(count_shown_frames(packets))
            else:
                counts = _likely_counts(count_packets(path))
            wanted = {index for count in counts for index in choose(count)}
            stop = max(wanted) + 1 if frame_count is not None else None
            kept, seen = None, 0
            for frame in islice(decode_frames(stream, packets), stop):
                if kept is None:
                    kept = KeptFrames(frame, short_side)
                if seen in wanted:
                    kept.keep(seen, frame)
                seen += 1
            if kept is None:
                raise no_frame_error(path)
            whole = counts[0] if seen == stop else seen
            indices = tuple(choose(whole))
            if kept.has(indices):
                seconds = kept.seconds(indices, stream.average_rate)
                return Pictures(make(kept, indices), indices, seconds, whole)
        frame_count = whole
    raise VideoError(f"{path}: one reading gives more frames than the next. Is the file still being written?")


@dataclass(frozen=True, slots=True)
class TimedFrame:
    """A frame that is shown from `start` until `end`, in seconds since the video began.

    `length` is how long the whole video is, where its header tells.
    """

    start: float
    end: float
    length: float | None
    picture: Callable[[], Frames]  # uint8 (H, W, 3); converted when it is called


def iter_frames(path: Location, *, short_side: int | None = None, threads: int = 1) -> Iterator[TimedFrame]:
    """Decodes a video once, in order, and hands over every frame with the time that it is shown.

    A frame is shown until the next one, unless that takes more than MOST_SHOWN: then there is a gap, before which
    it lasts as long as the frame before it. Where times are missing or go back, as with packed B-frames, a frame
    lasts as long as the rate says; where one jumps ahead and the next comes back, as long as the frame before it.
    Two frames are held, so that memory does not grow with the video.

    Raises VideoError, `<path>: <reason>`, where no frame can be read.
    """
    with open_video(path, threads=threads) as (container, stream):
        lasts = min(1 / float(stream.average_rate or ASSUMED_RATE), MOST_SHOWN)
        length = None if container.duration is None else container.duration / av.time_base
        step = lasts
        kept: KeptFrames | None = None
        frames = _with_starts(decode_frames(stream, demux(path, container, stream)), lasts)
        for (frame, start), following in _with_next(frames):
            kept = kept or KeptFrames(frame, short_side)
            end = start + lasts if following is None else following[1]
            if end - start > MOST_SHOWN:
                lasts = step  # the average rate counts the gap
                end = start + lasts
            step = end - start
            yield TimedFrame(start, end, length, partial(kept.upright, frame))
        if kept is None:
            raise no_frame_error(path)


def _with_starts(frames: Iterable[av.VideoFrame], lasts: float) -> Iterator[tuple[av.VideoFrame, float]]:
    """Frames with the seconds at which they are first shown, which always increase. See `play`."""
    first: float | None = None
    start, step = -lasts, lasts
    for frame, following in _with_next(frames):
        first = frame.time if first is None else first
        at = start if frame.time is None or first is None else frame.time - first
        after = None if following is None else following.time
        if at <= start:
            at = start + lasts
        elif at - start > MOST_SHOWN:
            if after is not None and after < frame.time:
                at = start + step
        else:
            step = at - start
        yield frame, at
        start = at


def _with_next(items: Iterable[T]) -> Iterator[tuple[T, T | None]]:
    """Each item with the one after it, None after the last."""
    held: list[T] = []
    for item in items:
        if held:
            yield held.pop(), item
        held.append(item)
    for item in held:
        yield item, None


def count_frames(path: Path) -> int:
    """Counts the frames that decode, by decoding them all."""
    with open_video(path, threads=1) as (container, stream):
        count = sum(1 for _ in decode_frames(stream, demux(path, container, stream)))
    if count == 0:
        raise no_frame_error(path)
    return count


def expected_frame_count(path: Path) -> int:
    """Counts the frames that a file should give: packets, or what its header says if that is more.

    Frames that an edit list hides are not among them. Raises VideoError.
    """
    with open_video(path, threads=1) as (container, stream):
        packets = [p for p in demux(path, container, stream) if p is not None and p.size > 0]
        hidden = sum(packet.is_discard for packet in packets)
        return max(stream.frames, len(packets)) - hidden


def _likely_counts(packets: int) -> list[int]:
    """The number of packets and a few fewer. See Note [The number of frames is known at the end]."""
    return list(range(packets, max(packets - COUNT_SLACK - 1, 0), -1))
