"""Decoded frames of one video made into pictures of one shape: RGB, or the planes that a JPEG is made of.

Letters: T frames, H W pixels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from fractions import Fraction
from itertools import pairwise
from typing import NamedTuple

import av
import numpy as np
import numpy.typing as npt
from av.video.plane import VideoPlane
from av.video.reformatter import ColorRange, Colorspace, VideoReformatter

from tvit_cli.portable.reading import PLANE_SCALING, SCALING, matrix_of

Frames = npt.NDArray[np.uint8]

ASSUMED_RATE = 25.0  # frames per second, where a file names no usable time at all


class Planes(NamedTuple):
    """A picture in JPEG's own colours: full-range BT.601 at 4:2:0, sides of U and V half of Y's, rounded up."""

    y: Frames  # (H, W)
    u: Frames
    v: Frames


def quarter_turns(frame: av.VideoFrame) -> int:
    """Counter-clockwise quarter turns, 0 to 3, from the stored picture to the shown one."""
    return round(frame.rotation / 90) % 4


class KeptFrames:
    """Frames of one video as they were decoded; those that are wanted become pictures.

    `first` decides the shape of all, as a stream may change its size under way. Frames wider and higher than
    `short_side` are scaled down to it, the long side in proportion.
    """

    def __init__(self, first: av.VideoFrame, short_side: int | None) -> None:
        short = min(first.width, first.height)
        target = short if short_side is None else min(short, short_side)
        self._shape = (round(first.width * target / short), round(first.height * target / short))
        self._turns = quarter_turns(first)
        self._frames: dict[int, av.VideoFrame] = {}
        self._reformatter = VideoReformatter()

    def keep(self, index: int, frame: av.VideoFrame) -> None:
        """Keeps the frame of that index."""
        width, height = self._shape
        # Where scaling takes most of the picture away, what it leaves is kept: raw 4K frames fill the memory.
        if 8 * width * height < frame.width * frame.height:
            frame = self._to_rgb(frame)
        self._frames[index] = frame

    def has(self, indices: Sequence[int]) -> bool:
        """Whether all of these were kept."""
        return self._frames.keys() >= set(indices)

    def rgb(self, indices: Sequence[int]) -> Frames:
        """Pictures, uint8 (T, H, W, 3), turned as the file says."""
        pictures = {index: self.upright(self._frames[index]) for index in dict.fromkeys(indices)}
        return np.stack([pictures[index] for index in indices])

    def planes(self, indices: Sequence[int]) -> Iterator[Planes]:
        """Pictures turned as the file says, one after the other; never RGB on the way, unless turned."""
        for index in indices:
            frame, (width, height) = self._frames[index], self._shape
            if self._turns:  # at odd sizes, planes of half the size cannot be turned by themselves
                upright = np.ascontiguousarray(self.upright(frame))
                frame, (height, width) = (
                    av.VideoFrame.from_ndarray(upright, format="rgb24"),
                    upright.shape[:2],
                )
            matrix = matrix_of(frame)
            converted = self._reformatter.reformat(
                frame,
                width=width,
                height=height,
                format="yuv420p",
                src_colorspace=matrix,
                dst_colorspace=Colorspace.ITU601,
                dst_color_range=ColorRange.JPEG,
                interpolation=PLANE_SCALING if matrix == Colorspace.ITU601 else SCALING,
                threads=1,
            )
            yield Planes(*map(_plane_pixels, converted.planes))

    def seconds(self, indices: Sequence[int], rate: Fraction | None) -> tuple[float, ...]:
        """Presentation times; from the rate where they are missing or, with packed B-frames, out of order."""
        distinct = list(dict.fromkeys(indices))
        times = [self._frames[index].time for index in distinct]
        if None in times or any(earlier >= later for earlier, later in pairwise(times)):
            times = [index / float(rate or ASSUMED_RATE) for index in distinct]
        at = dict(zip(distinct, times, strict=True))
        return tuple(at[index] for index in indices)

    def upright(self, frame: av.VideoFrame) -> Frames:
        """One frame, uint8 (H, W, 3), turned as the file says."""
        return np.rot90(self._to_rgb(frame).to_ndarray().astype(np.uint8, copy=False), self._turns)

    def _to_rgb(self, frame: av.VideoFrame) -> av.VideoFrame:
        width, height = self._shape
        return self._reformatter.reformat(
            frame,
            width=width,
            height=height,
            format="rgb24",
            src_colorspace=matrix_of(frame),
            interpolation=SCALING,
            threads=1,
        )


def _plane_pixels(plane: VideoPlane) -> Frames:
    """A view of a plane without what pads its rows."""
    rows = np.frombuffer(memoryview(plane), np.uint8).reshape(-1, plane.line_size)
    return rows[: plane.height, : plane.width]
