"""Video files: what a file holds, and chosen frames of it as RGB.

Letters: T frames, H W pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Generic, TypeVar

import av

from tvit_cli.data.container import (
    Packet,
    Place,
    count_packets,
    count_shown,
    decoded,
    decoded_all,
    is_shown,
    no_frame,
    opened,
    packets_of,
)
from tvit_cli.data.pictures import ASSUMED_RATE, Frames, KeptFrames, quarter_turns
from tvit_cli.errors import VideoError

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
    with opened(path, threads=1) as (container, stream):
        for packet in packets_of(path, container, stream):
            if packet is not None and is_shown(packet):
                packets += 1
                if (time := packet.pts if packet.pts is not None else packet.dts) is not None:
                    times.append(time)
            if first is None:
                first = next(iter(decoded(stream, packet)), None)
        if first is None:
            raise no_frame(path)
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
    with opened(path, threads=1) as (container, stream):
        if next(iter(decoded_all(stream, packets_of(path, container, stream))), None) is None:
            raise no_frame(path)


def read_clip(
    path: Place,
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
    path: Place,
    choose: Callable[[int], Sequence[int]],
    make: Callable[[KeptFrames, Sequence[int]], P],
    *,
    short_side: int | None = None,
    frame_count: int | None = None,
    threads: int = 1,
) -> Pictures[P]:
    """`read_clip`, but what is made of the frames that were kept is for `make(kept, indices)` to say."""
    for _ in range(2):
        with opened(path, threads=threads) as (container, stream):
            packets: Iterable[Packet] = packets_of(path, container, stream)
            if frame_count is not None:
                counts = [frame_count]
            elif container.size <= _HELD_BYTES:  # negative where a server does not say
                packets = list(packets)
                counts = _likely_counts(count_shown(packets))
            else:
                counts = _likely_counts(count_packets(path))
            wanted = {index for count in counts for index in choose(count)}
            stop = max(wanted) + 1 if frame_count is not None else None
            kept, seen = None, 0
            for frame in islice(decoded_all(stream, packets), stop):
                if kept is None:
                    kept = KeptFrames(frame, short_side)
                if seen in wanted:
                    kept.keep(seen, frame)
                seen += 1
            if kept is None:
                raise no_frame(path)
            whole = counts[0] if seen == stop else seen
            indices = tuple(choose(whole))
            if kept.has(indices):
                seconds = kept.seconds(indices, stream.average_rate)
                return Pictures(make(kept, indices), indices, seconds, whole)
        frame_count = whole
    raise VideoError(f"{path}: one reading gives more frames than the next. Is the file still being written?")


@dataclass(frozen=True, slots=True)
class Played:
    """A frame that is shown from `start` until `end`, in seconds since the video began.

    `length` is how long the whole video is, where its header tells.
    """

    start: float
    end: float
    length: float | None
    picture: Callable[[], Frames]  # uint8 (H, W, 3); converted when it is called


def play(path: Place, *, short_side: int | None = None, threads: int = 1) -> Iterator[Played]:
    """Decodes a video once, in order, and hands over every frame with the time that it is shown.

    A frame is shown until the next one, unless that takes more than MOST_SHOWN: then there is a gap, before which
    it lasts as long as the frame before it. Where times are missing or go back, as with packed B-frames, a frame
    lasts as long as the rate says; where one jumps ahead and the next comes back, as long as the frame before it.
    Two frames are held, so that memory does not grow with the video.

    Raises VideoError, `<path>: <reason>`, where no frame can be read.
    """
    with opened(path, threads=threads) as (container, stream):
        lasts = min(1 / float(stream.average_rate or ASSUMED_RATE), MOST_SHOWN)
        length = None if container.duration is None else container.duration / av.time_base
        step = lasts
        kept: KeptFrames | None = None
        frames = _with_starts(decoded_all(stream, packets_of(path, container, stream)), lasts)
        for (frame, start), following in _with_next(frames):
            kept = kept or KeptFrames(frame, short_side)
            end = start + lasts if following is None else following[1]
            if end - start > MOST_SHOWN:
                lasts = step  # the average rate counts the gap
                end = start + lasts
            step = end - start
            yield Played(start, end, length, partial(kept.upright, frame))
        if kept is None:
            raise no_frame(path)


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
    with opened(path, threads=1) as (container, stream):
        count = sum(1 for _ in decoded_all(stream, packets_of(path, container, stream)))
    if count == 0:
        raise no_frame(path)
    return count


def promised_frames(path: Path) -> int:
    """Counts the frames that a file should give: packets, or what its header says if that is more.

    Frames that an edit list hides are not among them. Raises VideoError.
    """
    with opened(path, threads=1) as (container, stream):
        packets = [p for p in packets_of(path, container, stream) if p is not None and p.size > 0]
        hidden = sum(packet.is_discard for packet in packets)
        return max(stream.frames, len(packets)) - hidden


def _likely_counts(packets: int) -> list[int]:
    """The number of packets and a few fewer. See Note [The number of frames is known at the end]."""
    return list(range(packets, max(packets - COUNT_SLACK - 1, 0), -1))
