"""Sliding windows of live sources, answered as they end.

Note [Windows that are dropped]
A thread decodes frames and makes windows; the model takes those that wait, as batches. A source that does not wait
(a camera) may send in bursts (HLS). A new window takes the place of the oldest one that waits if that is older than
LAG, or if MOST wait. So answers stay within some seconds of the present. For a pipe or frames in memory, the thread
waits at AHEAD windows, and none is dropped.
"""

from __future__ import annotations

import csv
import io
import math
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from datetime import datetime
from functools import partial
from pathlib import Path

import av
import numpy as np

from tvit_cli.data.video import Frames, KeptFrames, TimedFrame
from tvit_cli.engine.predict.timeline import (
    SUBTITLES,
    Window,
    frame_positions,
    score_windows,
    sliding_windows,
    subtitles,
)
from tvit_cli.engine.trained import Trained
from tvit_cli.errors import DataError
from tvit_cli.files import csv_row
from tvit_cli.portable.reading import TOLERANCE, with_ends
from tvit_cli.results import Note, Report, Segment, WindowPrediction

LAG = 5.0  # seconds
MOST, AHEAD = 32, 4  # windows


class _Waiting:
    """Windows of a thread, each with the time of day of its end; see Note [Windows that are dropped]."""

    def __init__(self, windows: Iterable[Window], drops: Callable[[], bool]) -> None:
        self._drops = drops
        self._ready: deque[tuple[Window, datetime]] = deque()
        self._dropped = 0
        self._changed = threading.Condition()
        self._is_done = self._is_closed = False
        self._error: BaseException | None = None
        # A source may block for seconds; a daemon does not keep the program from ending.
        threading.Thread(target=self._fill, args=(windows,), name="stream", daemon=True).start()

    def _fill(self, windows: Iterable[Window]) -> None:
        try:
            for window in windows:
                now = datetime.now().astimezone()
                with self._changed:
                    while not (drops := self._drops()) and len(self._ready) >= AHEAD and not self._is_closed:
                        self._changed.wait()
                    if self._is_closed:
                        return
                    oldest = self._ready[0][1] if self._ready else now
                    if drops and (len(self._ready) >= MOST or (now - oldest).total_seconds() > LAG):
                        self._ready.popleft()
                        self._dropped += 1
                    self._ready.append((window, now))
                    self._changed.notify_all()
        except BaseException as error:  # noqa: BLE001  # raised again where the windows are taken
            self._error = error
        finally:
            with self._changed:
                self._is_done = True
                self._changed.notify_all()

    def take(self, most: int) -> tuple[list[tuple[Window, datetime]], int]:
        """Waits for a window; up to `most` that are ready, and the number dropped since. Empty at the end."""
        with self._changed:
            while not self._ready and not self._is_done:
                self._changed.wait(0.5)  # on Windows, Ctrl-C does not end a wait
            if not self._ready and self._error is not None:
                raise self._error
            taken = [self._ready.popleft() for _ in range(min(most, len(self._ready)))]
            dropped, self._dropped = self._dropped, 0
            self._changed.notify_all()
        return taken, dropped

    def close(self) -> None:
        """Ends the thread at its next window."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()


def stream_windows(
    trained: Trained,
    frames: Iterable[TimedFrame],
    *,
    window: float,
    stride: float,
    batch_size: int,
    drops: Callable[[], bool],
) -> Iterator[WindowPrediction]:
    """Predictions of the windows of `make_timeline`, each as soon as its last frame is there.

    `drops` tells whether windows that the model cannot follow are dropped. Raises the errors of `frames`, and
    ModelError if the weights overflow.
    """
    card = trained.card
    windows = sliding_windows(
        frames,
        length=window,
        stride=stride,
        positions=frame_positions(card.preprocessing, window),
    )
    with closing(_Waiting(windows, drops)) as waiting:
        while (found := waiting.take(batch_size))[0]:
            ready, dropped = found
            for (shown, at), row in zip(ready, score_windows(trained, [w for w, _ in ready]), strict=True):
                best = int(row.argmax())
                end = shown.start + window
                yield WindowPrediction(
                    shown.start, end, at, card.labels[best], float(row[best]), row, dropped
                )
                dropped = 0


class StreamFiles:
    """timeline.csv, .srt and .vtt of a stream in a folder (None: nothing is written), which grow with it.

    The CSV has a row per window, at once. Successive windows of one label are one subtitle, written when the label
    changes, at a gap, and by `close`. After a row that cannot be written nothing is; `problems` then tells why, and
    a warning at once.
    """

    def __init__(self, folder: Path | None, labels: Sequence[str], report: Report) -> None:
        self.problems: tuple[str, ...] = ()
        self._folder = folder
        self._report = report
        self._run: list[WindowPrediction] = []  # the first window of a subtitle, and the last so far
        self._scores: list[float] = []
        self._cues = 0
        for suffix in SUBTITLES:
            self._write(suffix, "w", "")
        self._row("w", ["start", "end", "label", *labels, "time"])

    def add(self, found: WindowPrediction) -> None:
        """Writes the row of a window, and the subtitle that it ends."""
        scores = (f"{value:.6f}" for value in found.scores)
        times = f"{found.start:.3f}", f"{found.end:.3f}"
        self._row("a", [*times, found.label, *scores, found.time.isoformat()])
        if self._run and (found.label != self._run[-1].label or found.start > self._run[-1].end + TOLERANCE):
            self._cue(min(self._run[-1].end, found.start))
        self._run = [self._run[0] if self._run else found, found]
        self._scores.append(found.score)

    def close(self) -> None:
        """Writes the last subtitle."""
        if self._run:
            self._cue(self._run[-1].end)

    def _cue(self, end: float) -> None:
        score = sum(self._scores) / len(self._scores)
        segment = Segment(self._run[0].start, end, self._run[0].label, score)
        self._cues += 1
        for suffix in SUBTITLES:
            gap = "" if self._cues == 1 else "\n"
            self._write(suffix, "a", gap + subtitles([segment], suffix, first=self._cues))
        self._run, self._scores = [], []

    def _row(self, mode: str, row: list[str]) -> None:
        line = io.StringIO()
        csv.writer(line, lineterminator="\n").writerow(csv_row(row))
        self._write(".csv", mode, line.getvalue())

    def _write(self, suffix: str, mode: str, text: str) -> None:
        if self._folder is None or self.problems:
            return
        path = self._folder / f"timeline{suffix}"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open(mode, encoding="utf-8", newline="") as file:
                file.write(text)
        except OSError as error:
            problem = f"--output {path}: cannot be written ({error.strerror})"
            self.problems = (f"{problem}. Free some space, or name another folder.",)
            self._report(Note(self.problems[0], "warning"))


def timed_frames(frames: Iterable[tuple[Frames, float]], *, short_side: int) -> Iterator[TimedFrame]:
    """Arrays with their times as the frames of a video; larger ones are scaled to `short_side` as in evaluation.

    Raises DataError for an array that is not RGB, uint8 (H, W, 3), and for a time that does not increase.
    """
    kept: KeptFrames | None = None
    for frame, start, end in with_ends(_checked(frames)):
        kept = kept or KeptFrames("frame 0", frame, short_side)
        yield TimedFrame(start, end, None, partial(kept.upright, frame))


def _checked(frames: Iterable[tuple[Frames, float]]) -> Iterator[tuple[av.VideoFrame, float]]:
    last = -TOLERANCE
    for number, (picture, seconds) in enumerate(frames):
        array = np.asarray(picture)
        if array.dtype != np.uint8 or array.ndim != 3 or array.shape[-1] != 3 or not array.size:
            kind = f"{array.dtype} {array.shape}"
            raise DataError(f"frame {number}: {kind}. Give RGB arrays, uint8 (H, W, 3).")
        if not last < seconds < math.inf:
            after = f"not after {last:g} s" if number else "not a time from 0 on"
            raise DataError(f"frame {number}: {seconds} s is {after}. Give seconds that increase.")
        last = seconds
        # A copy: a camera may write its next frame into the same array.
        yield av.VideoFrame.from_ndarray(np.ascontiguousarray(array), format="rgb24"), seconds
