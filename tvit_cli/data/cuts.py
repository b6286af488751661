"""Where a video is cut: one picture does not go on from the last, and the next ones go on from it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace

import numpy as np

from tvit_cli.data.pictures import Frames
from tvit_cli.data.video import Played

# On held-out demo motions, whose clips all end with a cut, 1 % of the cuts lie below this ratio, and no other step
# above it (tests/bench/RESULTS.md).
RATIO = 1.5  # of a cut's difference to the largest of its neighbours'
LEAST = 4.0  # of 255: below it are a still picture and its noise
NEIGHBOURS = 2  # on either side; a flash, or every second frame repeated, is no cut
SIDE = 64  # pixels that are compared along a picture's short side


@dataclass
class Cuts:
    """Compares the pictures that are taken from a video, each with the last: two numbers of each are kept."""

    times: list[float] = field(default_factory=list)
    differences: list[float] = field(default_factory=list)
    _last: Frames | None = None
    _ended: float = 0.0

    def watch(self, played: Iterable[Played]) -> Iterator[Played]:
        """The same frames; those whose picture is asked for, once and in order, are compared."""
        for frame in played:

            def picture(frame: Played = frame) -> Frames:
                shown = frame.picture()
                self._compare(shown, frame.start, frame.end)
                return shown

            yield replace(frame, picture=picture)

    def _compare(self, shown: Frames, start: float, end: float) -> None:
        step = max(1, min(shown.shape[:2]) // SIDE)
        small = shown[::step, ::step].copy()
        if self._last is not None:
            self.times.append((self._ended + start) / 2)
            self.differences.append(float(np.abs(small.astype(np.int16) - self._last).mean()))
        self._last, self._ended = small, end

    def found(self) -> list[float]:
        """The times of the cuts in seconds, midway between the pictures that differ."""
        values = np.array(self.differences)
        padded = np.pad(values, NEIGHBOURS)
        around = np.zeros_like(values)
        for place in range(2 * NEIGHBOURS + 1):
            if place != NEIGHBOURS:
                around = np.maximum(around, padded[place : place + len(values)])
        cut = (values >= LEAST) & (values >= RATIO * around)
        return [time for time, is_cut in zip(self.times, cut, strict=True) if is_cut]
