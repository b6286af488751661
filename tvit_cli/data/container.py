"""A video file as FFmpeg opens it: its one stream, the packets of it, the frames that decode, and what is wrong.

Whatever FFmpeg raises while a file is open becomes a VideoError that names the file.
"""

from __future__ import annotations

import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeAlias

import av
from av.container import InputContainer
from av.stream import Disposition
from av.video.stream import VideoStream

from tvit_cli.errors import TvitError, VideoError

Place: TypeAlias = Path | str  # a file, or the URL of a stream
Packet: TypeAlias = "av.Packet[VideoStream] | None"  # None flushes the decoder

# What a URL may lead to: the network, never this machine's files.
_NETWORK = "http,https,httpproxy,tls,tcp,udp,rtp,srtp,rtsp,rtmp,rtmps,rtmpt,srt,ftp,sftp,crypto,data"
SECONDS_FOR_AN_ANSWER = 30.0

# Raised on damaged files by FFmpeg, and by PyAV itself: an IndexError for a stream that appears after the header
# was read, a UnicodeDecodeError for names, an OverflowError for numbers.
DAMAGED = (av.FFmpegError, ArithmeticError, LookupError, ValueError)


@contextmanager
def opened(path: Place, *, threads: int) -> Iterator[tuple[InputContainer, VideoStream]]:
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


def _video_stream(path: Place, container: InputContainer) -> VideoStream:
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


def packets_of(path: Place, container: InputContainer, stream: VideoStream) -> Iterator[Packet]:
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


def decoded(stream: VideoStream, packet: Packet) -> list[av.VideoFrame]:
    """Frames that this packet completes; none where it does not decode."""
    with suppress(*DAMAGED):
        return stream.decode(packet)
    return []


def decoded_all(stream: VideoStream, packets: Iterable[Packet]) -> Iterator[av.VideoFrame]:
    """Every frame that decodes, in the order of presentation, which is the decoder's order of output."""
    for packet in packets:
        yield from decoded(stream, packet)


def count_packets(path: Place) -> int:
    with opened(path, threads=1) as (container, stream):
        return count_shown(packets_of(path, container, stream))


def count_shown(packets: Iterable[Packet]) -> int:
    return sum(map(is_shown, packets))


def is_shown(packet: Packet) -> bool:
    """Whether a packet promises a frame: not the flush at the end, nor what an edit list cuts away."""
    return packet is not None and packet.size > 0 and not packet.is_discard


def no_frame(path: Place) -> VideoError:
    packets = count_packets(path)
    return VideoError(
        f"{path}: 0 frames decoded out of {packets} packets. The file may be truncated, damaged or encrypted."
    )
