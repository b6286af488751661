"""Timelines of long videos: sliding windows, smoothed scores, segments, annotated copies."""

from __future__ import annotations

import csv
import math
import queue
import threading
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from tvit_cli.data.augment import eval_transform
from tvit_cli.data.video import Frames, TimedFrame, iter_frames
from tvit_cli.data.video_writer import video_writer
from tvit_cli.engine.evaluate.scoring import score
from tvit_cli.engine.predict.paths import as_video
from tvit_cli.engine.trained import Trained
from tvit_cli.errors import DataError, RunError, VideoError
from tvit_cli.files import Location, atomic_write
from tvit_cli.portable.reading import CENTRE, segment_indices
from tvit_cli.report.film import draw_caption
from tvit_cli.report.segments import Scores, find_segments, smooth
from tvit_cli.results import Report, Segment, Stretch, Timeline, seconds_done, silent

# On held-out demo motions, whose clips all end with a cut, 1 % of the cuts lie below this ratio, and no other step
# above it (docs/benchmarks.md).
RATIO = 1.5  # of a cut's difference to the largest of its neighbours'
LEAST = 4.0  # of 255: below it are a still picture and its noise
NEIGHBOURS = 2  # on either side; a flash, or every second frame repeated, is no cut
SIDE = 64  # pixels that are compared along a picture's short side


@dataclass
class ShotBoundaries:
    """Compares the pictures that are taken from a video, each with the last: two numbers of each are kept."""

    times: list[float] = field(default_factory=list)
    differences: list[float] = field(default_factory=list)
    _last: Frames | None = None
    _ended: float = 0.0

    def watch(self, played: Iterable[TimedFrame]) -> Iterator[TimedFrame]:
        """The same frames; those whose picture is asked for, once and in order, are compared."""
        for frame in played:

            def picture(frame: TimedFrame = frame) -> Frames:
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


TOLERANCE = 1e-6  # seconds; times are sums of fractions


@dataclass(slots=True)
class Window:
    """A clip, uint8 (H, W, 3) by frame, of a stretch of a video that begins at `start` seconds."""

    start: float
    pictures: list[Frames] = field(default_factory=list)

    def frames(self) -> Frames:
        """uint8 (T, H, W, 3)."""
        return np.stack(self.pictures)


def frame_positions(n_frames: int, grid: int | None) -> list[float]:
    """Where in a window its frames lie, as shares of it: centres of equal segments, as evaluation takes them.

    With a grid, places on the grid are chosen, as `indices_on_grid` does it. 4 frames -> 1/8, 3/8, 5/8, 7/8.
    """
    if grid is None:
        return [(segment + CENTRE) / n_frames for segment in range(n_frames)]
    return [(place + CENTRE) / grid for place in segment_indices(grid, n_frames)]


def sliding_windows(
    played: Iterable[TimedFrame], *, length: float, stride: float, places: Sequence[float]
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


T = TypeVar("T")
_SECONDS = 0.1  # between two looks at whether anybody still wants the rest


def prefetch(items: Iterable[T], *, depth: int = 2) -> Iterator[T]:
    """The same items, made by a thread that is at most `depth` of them ahead.

    Whatever making them raises, is raised here. The thread ends with the last item, or when the caller stops.
    """
    made: queue.Queue[tuple[T | None, BaseException | None, bool]] = queue.Queue(depth)
    stopped = threading.Event()

    def put(entry: tuple[T | None, BaseException | None, bool]) -> bool:
        while not stopped.is_set():
            try:
                made.put(entry, timeout=_SECONDS)
            except queue.Full:
                continue
            return True
        return False

    def make() -> None:
        try:
            for item in items:
                if not put((item, None, False)):
                    return
        except BaseException as error:  # noqa: BLE001  # raised again in the caller's thread
            put((None, error, True))
        else:
            put((None, None, True))

    thread = threading.Thread(target=make, daemon=True)
    thread.start()
    try:
        while True:
            item, error, is_last = made.get()
            if error is not None:
                raise error
            if is_last:
                return
            yield item  # type: ignore[misc]  # T itself may be an optional type
    finally:
        stopped.set()
        thread.join()


WHOLE = float("inf")  # the end of a segment that is the whole video


def annotate(path: Path, place: Location, segments: Sequence[Segment], report: Report = silent) -> None:
    """Write the video, without its sound, each frame captioned with the segment that it lies in.

    Frames keep their times and size (an odd last row or column is left out), turned as they are shown; one is in
    memory at a time. Raises VideoError, DataError where the video would replace itself, RunError where it cannot
    be written.
    """
    if isinstance(place, Path) and path.exists() and path.samefile(place):
        raise DataError(f"--annotate {path}: is the video itself. Name another file.")
    with video_writer(path) as writer:
        number = 0
        for frame in iter_frames(place):
            while number < len(segments) - 1 and frame.start >= segments[number].end - 1e-6:
                number += 1
            segment = segments[number]
            picture = frame.picture()
            if segment.start - 1e-6 <= frame.start < segment.end:  # else it lies by itself between two gaps
                picture = draw_caption(picture, f"{segment.label}  {segment.score:.2f}")
            writer.write(picture, frame.start, frame.end)
            if round(frame.end) > round(frame.start):
                report(seconds_done("seconds written", frame.end, frame.length))


TIMELINE_FILE, PICTURE_FILE = "timeline.csv", "timeline.png"
MOST_PICTURES = 48  # of one timeline; when there are more, every second is dropped


@torch.inference_mode()
def make_timeline(
    trained: Trained,
    place: Location,
    *,
    window: float,
    stride: float,
    smoothing: float,
    batch_size: int,
    progress: Callable[[float, float | None], None] | None = None,
) -> Timeline:
    """Score a window every `stride` seconds while the video is decoded, once, ahead of the model.

    A video shorter than one window is one clip, as `predict` scores it. Windows and segments leave out gaps in
    which no frame is shown (see `play`), and stretches between gaps that are shorter than a window.

    Raises VideoError.
    """
    preprocessing = trained.card.preprocessing
    clock, cuts, album = _Clock(), ShotBoundaries(), _Album()
    windows = sliding_windows(
        cuts.watch(clock.watch(iter_frames(place, short_side=preprocessing.scale_to))),
        length=window,
        stride=stride,
        places=frame_positions(preprocessing.n_frames, preprocessing.frame_grid),
    )
    rows: list[Tensor] = []
    starts: list[float] = []
    for batch in prefetch(_batches(windows, batch_size)):
        clips = [torch.from_numpy(w.frames()).permute(0, 3, 1, 2) for w in batch]
        frames = eval_transform(clips, preprocessing=preprocessing, device=trained.device)
        with trained.autocast():
            logits = trained.model(frames)
        rows.append(logits.cpu().double().softmax(1))
        for w in batch:
            starts.append(w.start)
            album.offer(w, window)
        if progress is not None:
            progress(batch[-1].start + window, clock.length)
    seconds = clock.now
    if rows:
        scores = torch.cat(rows).numpy()
        parts = _parts(clock.stretches, starts, stride)
        smoothed, segments = _segments(
            scores,
            parts,
            trained.card.labels,
            window=window,
            stride=stride,
            smoothing=smoothing,
            cuts=cuts.found(),
        )
    else:
        window = stride = seconds
        scores = smoothed = _whole(trained, place)
        parts = ()
        best = int(scores[0].argmax())
        label, value = trained.card.labels[best], float(scores[0, best])
        segments = tuple(Segment(start, end, label, value) for start, end in clock.stretches)
    return Timeline(
        video=str(place),
        labels=trained.card.labels,
        seconds=seconds,
        window=window,
        stride=stride,
        scores=scores,
        smoothed=smoothed,
        segments=segments,
        pictures=tuple(album.pictures),
        stretches=parts,
    )


def _parts(
    stretches: Sequence[tuple[float, float]], starts: Sequence[float], stride: float
) -> tuple[Stretch, ...]:
    """The stretches in which windows begin, at `starts` in ascending order."""
    parts = []
    for start, end in stretches:
        windows = bisect_left(starts, end) - bisect_left(starts, start - TOLERANCE)
        if windows:
            cells = max(1, math.ceil((end - start - TOLERANCE) / stride))
            parts.append(Stretch(start, end, windows, cells))
    return tuple(parts)


def _segments(
    scores: Scores,
    parts: Sequence[Stretch],
    labels: Sequence[str],
    *,
    window: float,
    stride: float,
    smoothing: float,
    cuts: Sequence[float],
) -> tuple[Scores, tuple[Segment, ...]]:
    """Smoothed scores (J, K) and segments, of each stretch by itself."""
    smoothed: list[Scores] = []
    segments: list[Segment] = []
    first = 0
    for part in parts:
        own = scores[first : first + part.windows]
        first += part.windows
        smoothed.append(smooth(own, window=window, stride=stride, cells=part.cells))
        segments += find_segments(
            smoothed[-1],
            labels,
            stride=stride,
            seconds=part.end,
            price=smoothing * max(1.0, window / stride),
            cuts=cuts,
            begin=part.start,
        )
    return np.concatenate(smoothed), tuple(segments)


def write_timeline(folder: Path, timeline: Timeline) -> None:
    """Write timeline.csv, a row per window with the scores of all classes, and timeline.png.

    Raises RunError where they cannot be written; then the folder's older ones stay.
    """
    from tvit_cli.report.film import timeline_png

    picture = timeline_png(timeline)
    try:
        with (
            atomic_write(folder / PICTURE_FILE) as drawn,
            atomic_write(folder / TIMELINE_FILE) as table,
        ):
            drawn.write_bytes(picture)
            _write_table(table, timeline)
    except OSError as error:
        raise RunError(f"--output {folder}: cannot be written ({error.strerror}).") from error


def _write_table(path: Path, timeline: Timeline) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["start", "end", "label", *timeline.labels])
        for start, row in zip(timeline.starts(), timeline.scores, strict=True):
            best = timeline.labels[int(row.argmax())]
            times = (f"{t:.3f}" for t in (start, start + timeline.window))
            writer.writerow([*times, best, *(f"{value:.6f}" for value in row)])


def _whole(trained: Trained, place: Location) -> Scores:
    """The scores of a video as one clip, (1, K)."""
    labels = trained.card.labels
    found = score(
        trained.model,
        [as_video(place, labels[0])],
        labels,
        trained.card.preprocessing,
        device=trained.device,
        batch_size=1,
        workers=0,
        autocast=trained.autocast,
    )
    if found.errors:
        raise VideoError(f"{place}: {found.errors[0]}")
    return np.asarray(found.logits.double().softmax(1).numpy())


def _batches(windows: Iterator[Window], size: int) -> Iterator[list[Window]]:
    while batch := list(islice(windows, size)):
        yield batch


@dataclass
class _Clock:
    """How far a video has been played, and its stretches without gaps between frames."""

    now: float = 0.0
    length: float | None = None
    stretches: list[tuple[float, float]] = field(default_factory=list)

    def watch(self, played: Iterable[TimedFrame]) -> Iterator[TimedFrame]:
        for frame in played:
            start = frame.start
            if self.stretches and start <= self.now + TOLERANCE:
                start, _ = self.stretches.pop()
            self.stretches.append((start, frame.end))
            self.now, self.length = frame.end, frame.length
            yield frame


@dataclass
class _Album:
    """Evenly spaced pictures of a video whose length is not known before its end."""

    pictures: list[tuple[float, Frames]] = field(default_factory=list)
    every: int = 1
    offered: int = 0

    def offer(self, window: Window, length: float) -> None:
        if self.offered % self.every == 0:
            middle = window.pictures[len(window.pictures) // 2]
            self.pictures.append((window.start + length / 2, middle))
            if len(self.pictures) > MOST_PICTURES:
                self.pictures = self.pictures[::2]
                self.every *= 2
        self.offered += 1
