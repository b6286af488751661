"""The frames of a video file that a model sees, decoded with PyAV. An export ships it.

Letters: T frames, H W pixels.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from itertools import islice
from os import PathLike
from typing import Any

import av
import numpy as np
from av.container import InputContainer
from av.stream import Disposition
from av.video.frame import VideoFrame
from av.video.reformatter import VideoReformatter

from .colours import SCALING, matrix_of
from .sampling import indices_on_grid, segment_indices

# Raised on damaged files by FFmpeg, and by PyAV itself: an IndexError for a stream that appears late.
_DAMAGED = (av.FFmpegError, ArithmeticError, LookupError, ValueError)


def choose_frames(frame_count: int, n_frames: int, frame_grid: int | None = None) -> list[int]:
    """The frames a model sees: the middle one of each of `n_frames` equal shares of the video."""
    if frame_grid is None:
        return segment_indices(frame_count, n_frames)
    return indices_on_grid(frame_count, n_frames, grid=frame_grid)


def read_clip(
    path: str | PathLike[str], *, n_frames: int, short_side: int, frame_grid: int | None = None
) -> np.ndarray[Any, Any]:
    """A video's clip as RGB, uint8 (T, H, W, 3), turned as the file says.

    Frames larger than `short_side` are scaled down to it, the long side in proportion. The video is decoded
    twice: only its end tells how many frames it has. Raises OSError for what is no video or not there,
    ValueError where no frame can be decoded.
    """
    count = sum(1 for _ in decoded(path))
    if not count:
        raise ValueError(f"{path}: no frame of it can be decoded")
    chosen = choose_frames(count, n_frames, frame_grid)
    reformatter = VideoReformatter()
    pictures: dict[int, np.ndarray[Any, Any]] = {}
    shape, turns = (0, 0), 0
    for index, frame in enumerate(islice(decoded(path), chosen[-1] + 1)):
        if index == 0:
            short = min(frame.width, frame.height)
            target = min(short, short_side)
            shape = (round(frame.width * target / short), round(frame.height * target / short))
            turns = round(frame.rotation / 90) % 4
        if index in chosen:
            picture = reformatter.reformat(
                frame,
                width=shape[0],
                height=shape[1],
                format="rgb24",
                src_colorspace=matrix_of(frame),
                interpolation=SCALING,
                threads=1,
            )
            pictures[index] = np.rot90(picture.to_ndarray(), turns)
    return np.stack([pictures[index] for index in chosen])


def decoded(path: str | PathLike[str]) -> Iterator[VideoFrame]:
    """Every frame that decodes, in order; packets that do not are left out."""
    with _opened(str(path)) as container:
        streams = [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]
        if not streams:
            return
        streams[0].codec_context.thread_count = 1  # with more, what is left of a damaged picture varies
        packets = container.demux(streams[0])
        while True:
            try:
                packet = next(packets, None)
            except _DAMAGED:
                packet = None  # the file breaks off
            frames: list[VideoFrame] = []
            with suppress(*_DAMAGED):
                frames = streams[0].decode(packet)
            yield from frames
            if packet is None:
                return


def _opened(path: str) -> InputContainer:
    """A URL as it is; a file, also one named `a:b.avi`, by the file protocol, and so what a playlist names."""
    try:
        if "://" in path:
            return av.open(path, metadata_errors="ignore")
        return av.open(f"file:{path}", metadata_errors="ignore", options={"protocol_whitelist": "file"})
    except av.FFmpegError as error:
        raise OSError(f"{path}: cannot be read as a video ({error.strerror})") from error
