"""A video file written frame by frame: memory does not grow with its length."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av.container import OutputContainer
from av.video.stream import VideoStream

from tvit_cli.data.pictures import Frames
from tvit_cli.errors import RunError

TICKS = 60_000  # per second; MPEG-4 takes at most 65,535, and usual rates divide this one
_CODECS = {
    "libx264": {"crf": "20", "preset": "fast"},
    "mpeg4": {"qmin": "3", "qmax": "3"},
}  # the first that is there


class VideoWriter:
    """Takes frames with their times; the first one decides the size."""

    def __init__(self, container: OutputContainer) -> None:
        self._container = container
        self._stream: VideoStream | None = None

    def write(self, picture: Frames, start: float) -> None:
        """Append a frame, uint8 (H, W, 3), shown from `start` seconds on. An odd last row or column is left out."""
        height, width = (size - size % 2 for size in picture.shape[:2])  # H.264 and MPEG-4 halve the colours
        if self._stream is None:
            name = next(codec for codec in _CODECS if codec in av.codecs_available)
            stream = self._container.add_stream(name, rate=Fraction(TICKS), options=_CODECS[name])
            assert isinstance(stream, VideoStream)
            stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
            stream.codec_context.time_base = Fraction(1, TICKS)
            self._stream = stream
        frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture[:height, :width]), format="rgb24")
        frame.pts, frame.time_base = round(start * TICKS), Fraction(1, TICKS)
        self._container.mux(self._stream.encode(frame))

    def finish(self) -> None:
        """Write what the encoder still holds."""
        if self._stream is not None:
            self._container.mux(self._stream.encode(None))


@contextmanager
def video_writer(path: Path) -> Iterator[VideoWriter]:
    """Writes a video that is complete when the block ends, or absent. Raises RunError where that fails."""
    unfinished = path.with_name(f".{path.stem}.{os.getpid()}.part{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with av.open(f"file:{unfinished}", "w") as container:
            writer = VideoWriter(container)
            yield writer
            writer.finish()
        unfinished.replace(path)
    except (OSError, av.FFmpegError) as error:
        raise RunError(f"{path}: the video could not be written ({error}).") from error
    finally:
        with suppress(OSError):  # the folder itself may be what failed
            unfinished.unlink()
