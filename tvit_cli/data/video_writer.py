"""Video encoding: all frames at once, or one by one in constant memory; files are complete or absent."""

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

from tvit_cli.data.video import Frames, file_url
from tvit_cli.errors import RunError
from tvit_cli.files import atomic_write
from tvit_cli.portable.reading import SCALING, matrix_by_height

TICKS = 60_000  # per second; MPEG-4 takes at most 65,535, and usual rates divide this one
# The first available one is used.
_CODECS = {"libx264": {"crf": "20", "preset": "fast"}, "mpeg4": {"qmin": "3", "qmax": "3"}}


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

    The suffix determines the container. `quantiser` is MPEG-4's, 1 (best) to 31; other codecs take their
    quality from `options`, FFmpeg's own. The same frames give the same bytes with the same FFmpeg.

    Raises RunError if the file cannot be written.
    """
    if frames.ndim != 4 or frames.shape[3] != 3 or frames.dtype != np.uint8 or not frames.size:
        raise ValueError(f"frames must be uint8 (T, H, W, 3), not {frames.dtype} {frames.shape}")
    # PyAV cannot set a frame's quality.
    quality = {"qmin": str(quantiser), "qmax": str(quantiser)} if codec == "mpeg4" else {}
    reformatter = VideoReformatter()
    with _open_output(path, {"fflags": "+bitexact"}) as container:
        how = {"flags": "+bitexact", **quality, **(options or {})}
        stream = container.add_stream(codec, rate=rate, options=how)
        assert isinstance(stream, VideoStream), f"{codec} is no video codec"
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], pixel_format
        stream.codec_context.thread_count = 1  # threads split a frame, which changes the bytes
        for index, picture in enumerate(frames):
            frame = _to_yuv(reformatter, picture, pixel_format)
            frame.pts = index
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


class VideoWriter:
    """Encodes frames with their times; the first one determines the size."""

    def __init__(self, container: OutputContainer) -> None:
        self._container = container
        self.stream: VideoStream | None = None
        self._last = -1  # tick of the newest frame
        self._reformatter = VideoReformatter()

    def write(self, picture: Frames, start: float, end: float) -> None:
        """Appends a frame, uint8 (H, W, 3), shown from `start` to `end` in seconds.

        An odd last row or column is left out; a side of one pixel is doubled, since chroma has half the size.
        """
        doubled = [2 if size == 1 else 1 for size in picture.shape[:2]]
        picture = picture.repeat(doubled[0], 0).repeat(doubled[1], 1)
        height, width = (size - size % 2 for size in picture.shape[:2])
        if self.stream is None:
            name = next(codec for codec in _CODECS if codec in av.codecs_available)
            options = _CODECS[name] | {"flags": "+frame_duration"}  # otherwise the last frame lasts one tick
            stream = self._container.add_stream(name, rate=Fraction(TICKS), options=options)
            assert isinstance(stream, VideoStream)
            stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
            stream.codec_context.time_base = Fraction(1, TICKS)
            self.stream = stream
        frame = _to_yuv(self._reformatter, picture[:height, :width], "yuv420p")
        # MP4 refuses two frames on one tick: the later one moves to the next tick.
        frame.pts, frame.time_base = max(round(start * TICKS), self._last + 1), Fraction(1, TICKS)
        frame.duration = max(round(end * TICKS) - frame.pts, 1)
        self._last = frame.pts
        self._container.mux(self.stream.encode(frame))


@contextmanager
def video_writer(path: Path) -> Iterator[VideoWriter]:
    """Writes a video that is complete when the block ends, or absent. Raises RunError."""
    with _open_output(path, {}) as container:
        writer = VideoWriter(container)
        yield writer
        if writer.stream is not None:
            container.mux(writer.stream.encode(None))


def _to_yuv(reformatter: VideoReformatter, picture: Frames, pixel_format: str) -> av.VideoFrame:
    """Converts RGB, uint8 (H, W, 3), with the colour matrix that readers assume for its height."""
    return reformatter.reformat(
        av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24"),
        format=pixel_format,
        dst_colorspace=matrix_by_height(len(picture)),
        interpolation=SCALING,
        threads=1,
    )


@contextmanager
def _open_output(path: Path, options: dict[str, str]) -> Iterator[OutputContainer]:
    try:
        with (
            atomic_write(path) as temporary,
            av.open(file_url(temporary), "w", container_options=options) as container,
        ):
            yield container
    except (OSError, av.FFmpegError) as error:
        raise RunError(f"{path}: the video could not be written ({error}).") from error
