"""Windows that slide over a video: which frames each is made of, in memory that a window bounds."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from tvit_cli.data.pictures import Frames
from tvit_cli.data.sampling import CENTRE, segment_indices
from tvit_cli.data.video import Played

TOLERANCE = 1e-6  # seconds; times are sums of fractions


@dataclass(slots=True)
class Window:
    """A clip, uint8 (H, W, 3) by frame, of a stretch of a video that begins at `start` seconds."""

    start: float
    pictures: list[Frames] = field(default_factory=list)

    def frames(self) -> Frames:
        """uint8 (T, H, W, 3)."""
        return np.stack(self.pictures)


def frame_places(n_frames: int, grid: int | None) -> list[float]:
    """Where in a window its frames lie, as shares of it: centres of equal segments, as evaluation takes them.

    With a grid, places on the grid are chosen, as `indices_on_grid` does it. 4 frames -> 1/8, 3/8, 5/8, 7/8.
    """
    if grid is None:
        return [(segment + CENTRE) / n_frames for segment in range(n_frames)]
    return [(place + CENTRE) / grid for place in segment_indices(grid, n_frames)]


def slide(
    played: Iterable[Played], *, length: float, stride: float, places: Sequence[float]
) -> Iterator[Window]:
    """The windows of `length` seconds that begin every `stride` seconds and end within the video.

    After a gap in which no frame is shown, they begin anew with the next frame: none lies across a gap or in it.
    A window's frames are those shown at `places`, shares of its length: for a window as long as the video, at
    a constant rate, those of `segment_indices`. A frame is converted once, however many windows share it.
    """
    opened: deque[Window] = deque()
    number, begin, ended = 0, 0.0, 0.0
    for frame in played:
        if frame.start > ended + TOLERANCE:
            opened.clear()
            number, begin = 0, frame.start
        ended = frame.end
        shown: Frames | None = None
        before = len(opened)
        while before or begin + number * stride < frame.end - TOLERANCE:
            # In the order of their starts, and so of their ends: a frame may be shown for more windows than fit
            # into memory.
            if before:
                window, before = opened.popleft(), before - 1
            else:
                window, number = Window(begin + number * stride), number + 1
            while (
                len(window.pictures) < len(places)
                and window.start + places[len(window.pictures)] * length < frame.end - TOLERANCE
            ):
                shown = frame.picture() if shown is None else shown
                window.pictures.append(shown)
            if window.start + length <= frame.end + TOLERANCE:
                yield window
            else:
                opened.append(window)
