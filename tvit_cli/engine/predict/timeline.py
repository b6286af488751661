"""Timelines of long videos: sliding windows, Viterbi smoothing, segments, annotated copies.

Letters: W windows, J cells of one stride each, T frames, H W pixels, K classes.

Note [Viterbi smoothing of timelines]
A cell is one stride of the timeline. Its score is the mean over the windows that overlap it, weighted by overlap.
The labels are the path with the largest sum of log scores minus a penalty for each change of label (Viterbi's
algorithm). The penalty is `smoothing` nats times the windows per cell, as one window counts in that many cells.
A short run of a third label costs two changes; a minimum length of segments would shift the boundary instead.
Models leave a boundary uncertain by up to half a window, so a change at a shot boundary costs half the penalty.
"""

from __future__ import annotations

import csv
import math
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import groupby, islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from tvit_cli.data.augment import eval_transform
from tvit_cli.data.video import Frames, TimedFrame, iter_frames
from tvit_cli.data.video_writer import video_writer
from tvit_cli.engine.evaluate.scoring import score_locations
from tvit_cli.engine.predict.paths import output_file
from tvit_cli.engine.trained import Trained
from tvit_cli.errors import DataError, VideoError
from tvit_cli.files import Source, csv_row
from tvit_cli.portable.reading import CENTRE, segment_indices
from tvit_cli.results import Report, Segment, Span, Timeline, seconds_done, silent

Scores = NDArray[np.float64]
T = TypeVar("T")

TOLERANCE = 1e-6  # seconds; times are sums of fractions
WHOLE = float("inf")  # end of a segment of the whole video
MAX_PICTURES = 48  # of a timeline; beyond, every second one is dropped

# On held-out demo motions, whose clips all end with a cut, 1 % of the cuts lie below this ratio, and no other step
# above it (docs/benchmarks.md).
MIN_RATIO = 1.5  # of the difference at a cut to the largest of its neighbours
MIN_DIFFERENCE = 4.0  # of 255; below it are still pictures with noise
NEIGHBOURS = 2  # on either side; flashes and repeated frames are no cuts


@dataclass
class ShotBoundaries:
    """Shot boundaries from differences of successive pictures; two numbers are kept of each."""

    times: list[float] = field(default_factory=list)
    differences: list[float] = field(default_factory=list)
    _last: Frames | None = None
    _last_end: float = 0.0

    def watch(self, frames: Iterable[TimedFrame]) -> Iterator[TimedFrame]:
        """The same frames; their pictures are compared as they are converted, once and in order."""
        for frame in frames:

            def picture(frame: TimedFrame = frame) -> Frames:
                shown = frame.picture()
                step = max(1, min(shown.shape[:2]) // 64)  # compares about 64 pixels along the short side
                small = shown[::step, ::step].copy()
                if self._last is not None:
                    self.times.append((self._last_end + frame.start) / 2)
                    self.differences.append(float(np.abs(small.astype(np.int16) - self._last).mean()))
                self._last, self._last_end = small, frame.end
                return shown

            yield replace(frame, picture=picture)

    def found(self) -> list[float]:
        """Times of the shot boundaries in seconds, midway between the pictures that differ."""
        if not self.differences:
            return []
        values = np.array(self.differences)
        windows = np.lib.stride_tricks.sliding_window_view(np.pad(values, NEIGHBOURS), 2 * NEIGHBOURS + 1)
        around = np.delete(windows, NEIGHBOURS, axis=1).max(1)
        is_cut = (values >= MIN_DIFFERENCE) & (values >= MIN_RATIO * around)
        return [self.times[index] for index in np.flatnonzero(is_cut)]


@dataclass(slots=True)
class Window:
    """Frames, uint8 (H, W, 3) each, of a window that begins at `start` seconds."""

    start: float
    pictures: list[Frames] = field(default_factory=list)

    def frames(self) -> Frames:  # uint8 (T, H, W, 3)
        return np.stack(self.pictures)


def frame_positions(n_frames: int, grid: int | None) -> list[float]:
    """Positions of the frames in a window, as shares of its length: centres of equal segments, as in evaluation.

    With a grid, positions on the grid, as in `segment_indices`. 4 frames -> 1/8, 3/8, 5/8, 7/8.
    """
    grid = grid or n_frames
    return [(position + CENTRE) / grid for position in segment_indices(grid, n_frames)]


def sliding_windows(
    frames: Iterable[TimedFrame], *, length: float, stride: float, positions: Sequence[float]
) -> Iterator[Window]:
    """Windows of `length` seconds that begin every `stride` seconds and end within the video.

    After a gap without a frame, they start again at the next frame; none overlaps a gap. The frames of a window are
    those shown at `positions`, shares of its length: for a window as long as a video of constant rate, those of
    `segment_indices`. A frame is converted once for all windows.
    """
    opened: deque[Window] = deque()
    number, origin, last_end = 0, 0.0, 0.0
    for frame in frames:
        if frame.start > last_end + TOLERANCE:
            opened.clear()
            number, origin = 0, frame.start
        last_end = frame.end
        shown: Frames | None = None
        before = len(opened)
        while before or origin + number * stride < frame.end - TOLERANCE:
            # In the order of their starts and ends: a frame may last for more windows than fit into memory.
            if before:
                window, before = opened.popleft(), before - 1
            else:
                window, number = Window(origin + number * stride), number + 1
            while (
                len(window.pictures) < len(positions)
                and window.start + positions[len(window.pictures)] * length < frame.end - TOLERANCE
            ):
                shown = frame.picture() if shown is None else shown
                window.pictures.append(shown)
            if window.start + length <= frame.end + TOLERANCE:
                yield window
            else:
                opened.append(window)


def prefetch(items: Iterable[T], *, depth: int = 2) -> Iterator[T]:
    """The items and exceptions of a thread at most `depth` items ahead, which ends when the generator is closed."""
    iterator, end = iter(items), object()
    with ThreadPoolExecutor(1) as pool:
        pending: deque[Any] = deque(pool.submit(next, iterator, end) for _ in range(depth))
        try:
            while (item := pending.popleft().result()) is not end:
                pending.append(pool.submit(next, iterator, end))
                yield item
        finally:
            for future in pending:
                future.cancel()


def smooth(scores: Scores, *, window: float, stride: float, cells: int) -> Scores:
    """Mean scores of the windows over each cell, (W, K) -> (J, K). See Note [Viterbi smoothing of timelines].

    Window w covers [w * stride, w * stride + window). Cells after the last window take its scores.
    """
    total = np.zeros((cells, scores.shape[1]))
    weight = np.zeros((cells, 1))
    for offset in range(min(cells, math.ceil(window / stride - 1e-9))):
        overlap = min(stride, window - offset * stride)
        count = min(len(scores), cells - offset)
        total[offset : offset + count] += overlap * scores[:count]
        weight[offset : offset + count] += overlap
    covered = int((weight > 0).sum())
    total[:covered] /= weight[:covered]
    total[covered:] = scores[-1]
    return total


def transition_penalties(penalty: float, *, cells: int, stride: float, cuts: Sequence[float]) -> Scores:
    """Penalty (J,) of a change of label at the start of each cell, lower at the nearest to each shot boundary."""
    penalties = np.full(cells, penalty)
    nearest = [math.floor(time / stride + 0.5) for time in cuts]
    penalties[[cell for cell in nearest if cell < cells]] = 0.5 * penalty
    return penalties


def viterbi_path(scores: Scores, *, penalties: Scores) -> list[int]:
    """Labels (J,) with the largest sum of log scores (J, K) minus the penalties (J,) of label changes."""
    gains = np.log(np.maximum(scores, 1e-6))  # so that no single cell outweighs all others
    best = gains[0]
    came_from = np.empty(scores.shape, np.int64)
    stays = np.arange(scores.shape[1])
    for cell in range(1, len(gains)):
        changed = best.max() - penalties[cell]
        came_from[cell] = np.where(changed > best, best.argmax(), stays)
        best = np.where(changed > best, changed, best) + gains[cell]
    path = [int(best.argmax())]
    for cell in range(len(gains) - 1, 0, -1):
        path.append(int(came_from[cell, path[-1]]))
    return path[::-1]


def find_segments(
    smoothed: Scores,
    labels: Sequence[str],
    *,
    stride: float,
    penalty: float,
    end: float,
    start: float = 0.0,
    cuts: Sequence[float] = (),
) -> tuple[Segment, ...]:
    """Segments of one label each from the smoothed scores (J, K) of a span from `start` to `end` seconds.

    `penalty` is that of a change of label, `cuts` are times in seconds. See Note [Viterbi smoothing of timelines].
    """
    inside = [cut - start for cut in cuts if start <= cut < end]
    penalties = transition_penalties(penalty, cells=len(smoothed), stride=stride, cuts=inside)
    segments = []
    first = 0
    for label, run in groupby(viterbi_path(smoothed, penalties=penalties)):
        last = first + len(list(run))
        until = end if last == len(smoothed) else start + last * stride
        score = float(smoothed[first:last, label].mean())
        segments.append(Segment(start + first * stride, until, labels[label], score))
        first = last
    return tuple(segments)


@torch.inference_mode()
def make_timeline(
    trained: Trained,
    location: Source,
    *,
    window: float,
    stride: float,
    smoothing: float,
    batch_size: int,
    progress: Callable[[float, float | None], None] | None = None,
) -> Timeline:
    """Scores a window every `stride` seconds while the video is decoded, once, ahead of the model.

    A video shorter than one window is one clip, as in `predict`. Windows and segments leave out gaps without a
    frame (see `iter_frames`), and spans between gaps that are shorter than a window. Raises VideoError, and
    ModelError if the weights overflow.
    """
    preprocessing, labels = trained.card.preprocessing, trained.card.labels
    clock, cuts = _Clock(), ShotBoundaries()
    windows = sliding_windows(
        cuts.watch(clock.watch(iter_frames(location, short_side=preprocessing.scale_to))),
        length=window,
        stride=stride,
        positions=frame_positions(preprocessing.n_frames, preprocessing.frame_grid),
    )
    rows: list[Scores] = []
    starts: list[float] = []
    pictures: list[tuple[float, Frames]] = []
    every = 1  # windows per picture: the video's length is unknown, so pictures are thinned out as they come
    for batch in prefetch(iter(lambda: list(islice(windows, batch_size)), [])):
        clips = [torch.from_numpy(w.frames()).permute(0, 3, 1, 2) for w in batch]
        frames = eval_transform(clips, preprocessing=preprocessing, device=trained.device)
        with trained.autocast():
            logits = trained.model(frames)
        trained.check_scores(logits)
        rows.append(logits.cpu().double().softmax(1).numpy())
        for w in batch:
            if len(starts) % every == 0:
                pictures.append((w.start + window / 2, w.pictures[len(w.pictures) // 2]))
                if len(pictures) > MAX_PICTURES:
                    pictures, every = pictures[::2], 2 * every
            starts.append(w.start)
        if progress is not None:
            progress(batch[-1].start + window, clock.length)
    spans: list[Span] = []
    segments: list[Segment] = []
    if rows:
        scores = np.concatenate(rows)
        cells: list[Scores] = []
        penalty = smoothing * max(1.0, window / stride)
        for start, end in clock.spans:
            first, last = bisect_left(starts, start - TOLERANCE), bisect_left(starts, end)
            if first == last:
                continue
            count = max(1, math.ceil((end - start - TOLERANCE) / stride))
            spans.append(Span(start, end, last - first, count))
            cells.append(smooth(scores[first:last], window=window, stride=stride, cells=count))
            segments += find_segments(
                cells[-1], labels, stride=stride, penalty=penalty, end=end, start=start, cuts=cuts.found()
            )
        smoothed = np.concatenate(cells)
    else:
        window = stride = clock.now
        found = score_locations(trained, [location])
        if found.errors:
            raise VideoError(f"{location}: {found.errors[0]}")
        scores = smoothed = np.asarray(found.logits.double().softmax(1).numpy())
        best = int(scores[0].argmax())
        segments = [Segment(*ends, labels[best], float(scores[0, best])) for ends in clock.spans]
    return Timeline(
        video=str(location),
        labels=labels,
        seconds=clock.now,
        window=window,
        stride=stride,
        scores=scores,
        smoothed=smoothed,
        segments=tuple(segments),
        pictures=tuple(pictures),
        spans=tuple(spans),
        note=clock.note,
    )


@dataclass
class _Clock:
    now: float = 0.0  # seconds decoded so far
    length: float | None = None
    spans: list[tuple[float, float]] = field(default_factory=list)  # without gaps between frames
    note: str = ""

    def watch(self, frames: Iterable[TimedFrame]) -> Iterator[TimedFrame]:
        for frame in frames:
            start = frame.start
            if self.spans and start <= self.now + TOLERANCE:
                start, _ = self.spans.pop()
            self.spans.append((start, frame.end))
            self.now, self.length, self.note = frame.end, frame.length, frame.note
            yield frame


def write_timeline(folder: Path, timeline: Timeline) -> None:
    """Writes timeline.csv (scores of each window) and timeline.png. Raises RunError; older files then stay."""
    from tvit_cli.report.film import timeline_png  # imports PIL

    picture = timeline_png(timeline)
    table, image = folder / "timeline.csv", folder / "timeline.png"
    with output_file("--output", image) as drawn, output_file("--output", table) as written:
        drawn.write_bytes(picture)
        with written.open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(csv_row(["start", "end", "label", *timeline.labels]))
            for start, row in zip(timeline.starts(), timeline.scores, strict=True):
                times = (f"{time:.3f}" for time in (start, start + timeline.window))
                best = timeline.labels[int(row.argmax())]
                writer.writerow(csv_row([*times, best, *(f"{value:.6f}" for value in row)]))


def annotate(path: Path, location: Source, segments: Sequence[Segment], report: Report = silent) -> None:
    """Writes a copy of the video, without sound, with the segment's label as a caption in each frame.

    Frames keep their times and size (without an odd last row or column), in display rotation; one is in memory at
    a time. Raises VideoError, DataError where the output is the video itself, RunError where it cannot be written.
    """
    from tvit_cli.report.film import draw_caption  # imports PIL

    if isinstance(location, Path) and path.exists() and path.samefile(location):
        raise DataError(f"--annotate {path}: is the video itself. Name another file.")
    with video_writer(path) as writer:
        remaining = deque(segments)
        for frame in iter_frames(location):
            while len(remaining) > 1 and frame.start >= remaining[0].end - TOLERANCE:
                remaining.popleft()
            segment = remaining[0]
            picture = frame.picture()
            if segment.start - TOLERANCE <= frame.start < segment.end:  # else it lies between two gaps
                picture = draw_caption(picture, f"{segment.label}  {segment.score:.2f}")
            writer.write(picture, frame.start, frame.end)
            if round(frame.end) > round(frame.start):
                report(seconds_done("seconds written", frame.end, frame.length))
