"""Video files written: all frames at once, or one by one so that memory does not grow with the length.

A file is complete when its writer is done, or absent.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av.container import OutputContainer
from av.video.reformatter import VideoReformatter
from av.video.stream import VideoStream

from tvit_cli.data.pictures import Frames
from tvit_cli.data.video import file_url
from tvit_cli.errors import RunError
from tvit_cli.files import atomic_write
from tvit_cli.portable.reading import SCALING, matrix_by_height

TICKS = 60_000  # per second; MPEG-4 takes at most 65,535, and usual rates divide this one
_CODECS = {
    "libx264": {"crf": "20", "preset": "fast"},
    "mpeg4": {"qmin": "3", "qmax": "3"},
}  # the first that is there
_LAST = {"flags": "+frame_duration"}  # without it the last frame lasts one tick


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
    settings = {"flags": "+bitexact"}
    if codec == "mpeg4":
        settings |= {"qmin": str(quantiser), "qmax": str(quantiser)}  # PyAV cannot set a frame's quality
    settings |= options or {}
    reformatter = VideoReformatter()
    with _complete_or_absent(path, {"fflags": "+bitexact"}) as container:
        stream = container.add_stream(codec, rate=rate, options=settings)
        assert isinstance(stream, VideoStream), f"{codec} is no video codec"
        stream.width, stream.height, stream.pix_fmt = width, height, pixel_format
        stream.codec_context.thread_count = 1  # threads split a picture, and so change the bytes
        for index, picture in enumerate(frames):
            frame = _to_encode(reformatter, picture, pixel_format)
            frame.pts = index
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


class VideoWriter:
    """Takes frames with their times; the first one decides the size."""

    def __init__(self, container: OutputContainer) -> None:
        self._container = container
        self._stream: VideoStream | None = None
        self._last = -1  # tick of the newest frame
        self._reformatter = VideoReformatter()

    def write(self, picture: Frames, start: float, end: float) -> None:
        """Append a frame, uint8 (H, W, 3), shown from `start` to `end` in seconds.

        An odd last row or column is left out.
        """
        height, width = (size - size % 2 for size in picture.shape[:2])  # H.264 and MPEG-4 halve the colours
        if self._stream is None:
            name = next(codec for codec in _CODECS if codec in av.codecs_available)
            stream = self._container.add_stream(name, rate=Fraction(TICKS), options=_CODECS[name] | _LAST)
            assert isinstance(stream, VideoStream)
            stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
            stream.codec_context.time_base = Fraction(1, TICKS)
            self._stream = stream
        frame = _to_encode(self._reformatter, picture[:height, :width], "yuv420p")
        # Frames nearer than a tick would share one, which MP4 refuses: the later one comes a tick after the other.
        frame.pts, frame.time_base = max(round(start * TICKS), self._last + 1), Fraction(1, TICKS)
        frame.duration = max(round(end * TICKS) - frame.pts, 1)
        self._last = frame.pts
        self._container.mux(self._stream.encode(frame))

    def finish(self) -> None:
        """Write what the encoder still holds."""
        if self._stream is not None:
            self._container.mux(self._stream.encode(None))


@contextmanager
def video_writer(path: Path) -> Iterator[VideoWriter]:
    """Writes a video that is complete when the block ends, or absent. Raises RunError where that fails."""
    with _complete_or_absent(path, {}) as container:
        writer = VideoWriter(container)
        yield writer
        writer.finish()


def _to_encode(reformatter: VideoReformatter, picture: Frames, pixel_format: str) -> av.VideoFrame:
    """RGB, uint8 (H, W, 3), in the colours that a reader takes a picture of its height to be in."""
    rgb = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
    return reformatter.reformat(
        rgb,
        format=pixel_format,
        dst_colorspace=matrix_by_height(len(picture)),
        interpolation=SCALING,
        threads=1,
    )


@contextmanager
def _complete_or_absent(path: Path, options: dict[str, str]) -> Iterator[OutputContainer]:
    """A container under another name, which is given its own when all went well. Raises RunError."""
    try:
        with (
            atomic_write(path) as beside,
            av.open(file_url(beside), "w", container_options=options) as container,
        ):
            yield container
    except (OSError, av.FFmpegError) as error:
        raise RunError(f"{path}: the video could not be written ({error}).") from error
