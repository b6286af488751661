"""Timelines of long videos: sliding windows, Viterbi smoothing, segments, annotated copies.

Letters: W windows, J cells of one stride each, T frames, H W pixels, K classes.

Note [Viterbi smoothing of timelines]
A cell is one stride of the timeline. Its score is the mean over the windows that overlap it, weighted by overlap.
The labels are the path with the largest sum of log scores minus a penalty for each change of label (Viterbi's
algorithm). The penalty is `smoothing` nats times the windows per cell, as one window counts in that many cells.
A short run of a third label costs two changes; a minimum length of segments would shift the boundary instead.
Models leave a boundary uncertain by up to half a window, so a change at a shot boundary costs half the penalty.
The best paths to the labels of the newest cell share all but their last cells. No later window changes that part,
so a segment that ends within it is certain, and is that of the whole video's path.
"""

from __future__ import annotations

import csv
import math
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import dataclass, field, replace
from itertools import groupby, islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from tvit_cli.data.augment import eval_transform
from tvit_cli.data.clips import hold_signals
from tvit_cli.data.video import Frames, TimedFrame, iter_frames
from tvit_cli.data.video_writer import video_writer
from tvit_cli.engine.evaluate.scoring import score_locations
from tvit_cli.engine.predict.paths import output_file
from tvit_cli.engine.trained import Trained
from tvit_cli.errors import DataError, Interrupted, SettingsError, VideoError
from tvit_cli.files import Source, csv_row
from tvit_cli.portable.reading import CENTRE, TOLERANCE, segment_indices
from tvit_cli.results import Report, Segment, Span, Timeline, seconds_done, silent
from tvit_cli.settings.card import Preprocessing

Scores = NDArray[np.float64]
Choice = NDArray[np.int64]
T = TypeVar("T")

WHOLE = float("inf")  # end of a segment of the whole video
SUBTITLES = (".srt", ".vtt")
_FULL_WIDTH = "\uff1c\uff1e\uff5b\uff5d"
MAX_PICTURES = 48  # of a timeline; beyond, every second one is dropped

# On held-out demo motions, whose clips all end with a cut, 1 % of the cuts lie below this ratio, and no other step
# above it (docs/benchmarks.md).
MIN_RATIO = 1.5  # of the difference at a cut to the largest of its neighbours
MIN_DIFFERENCE = 4.0  # of 255; below it are still pictures with noise
NEIGHBOURS = 2  # on either side; flashes and repeated frames are no cuts


@dataclass
class ShotBoundaries:
    """Shot boundaries from differences of successive pictures, each found NEIGHBOURS pictures later.

    `times` are those found, in seconds, midway between the pictures that differ; none is missing up to `decided`.
    """

    times: list[float] = field(default_factory=list)
    decided: float = 0.0
    _recent: deque[tuple[float, float]] = field(
        default_factory=lambda: deque([(0.0, 0.0)] * 2 * NEIGHBOURS, 2 * NEIGHBOURS + 1)
    )  # (time, difference)
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
                    difference = float(np.abs(small.astype(np.int16) - self._last).mean())
                    self._add((self._last_end + frame.start) / 2, difference)
                self._last, self._last_end = small, frame.end
                return shown

            yield replace(frame, picture=picture)

    def finish(self) -> list[float]:
        """All times, at the end of the video."""
        for _ in range(NEIGHBOURS):
            self._add(math.inf, 0.0)
        return self.times

    def _add(self, time: float, difference: float) -> None:
        self._recent.append((time, difference))
        at, value = self._recent[NEIGHBOURS]
        around = max(other for n, (_, other) in enumerate(self._recent) if n != NEIGHBOURS)
        if value >= MIN_DIFFERENCE and value >= MIN_RATIO * around:
            self.times.append(at)
        self.decided = at  # last: another thread reads it first


@dataclass(slots=True)
class Window:
    """Frames, uint8 (H, W, 3) each, of a window that begins at `start` seconds, in the span from `origin`."""

    start: float
    origin: float
    pictures: list[Frames] = field(default_factory=list)

    def frames(self) -> Frames:  # uint8 (T, H, W, 3)
        return np.stack(self.pictures)


def frame_positions(card: Preprocessing, window: float) -> list[float]:
    """Positions of a clip's frames in a window of `window` seconds, as shares of its length, as in evaluation.

    They are the centres of equal segments; with a grid, positions on the grid, as in `segment_indices`. With
    `clip_seconds`, the clip is in the middle of the window. 4 frames -> 1/8, 3/8, 5/8, 7/8; 4 frames of a clip as
    long as the window -> 0, 1/4, 1/2, 3/4. Raises SettingsError for a window shorter than the clip.
    """
    n_frames = card.n_frames
    if (seconds := card.clip_seconds) is not None:
        if window < seconds - TOLERANCE:
            reason = f"the model takes clips of {seconds:g} s. Take a window of at least that"
            raise SettingsError(
                f"--window {window:g}: {reason}: --window {math.ceil(seconds * 100) / 100:g}s."
            )
        return [((window - seconds) / 2 + n * seconds / n_frames) / window for n in range(n_frames)]
    grid = card.frame_grid or n_frames
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
                window, number = Window(origin + number * stride, origin), number + 1
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


def prefetch(items: Iterable[T], *, depth: int = 2) -> Generator[T, None, None]:
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


class SegmentFinder:
    """Segments of a span that begins at `start` seconds, each as soon as no later window can change it.

    `penalty` is that of a change of label. See Note [Viterbi smoothing of timelines]. Memory grows with the part of
    the span whose segments are open, not with the span.
    """

    def __init__(
        self,
        labels: Sequence[str],
        *,
        window: float,
        stride: float,
        penalty: float,
        cuts: ShotBoundaries,
        start: float = 0.0,
    ) -> None:
        self.start, self.windows = start, 0
        self._labels, self._window, self._stride = labels, window, stride
        self._penalty, self._cuts = penalty, cuts
        self._overlapping = math.ceil(window / stride - 1e-9)  # windows over a cell
        self._scores = np.zeros((0, len(labels)))  # of the last windows
        self._cells = 0  # on the paths
        self._stays = self._roots = np.arange(len(labels))  # roots: first open label of the best path to each
        self._best = np.zeros(len(labels))  # gains of these paths
        self._open: deque[tuple[Scores, Choice]] = deque()  # cells: scores, and the label before, by label
        self._label, self._first = -1, 0  # of the open segment
        self._values: list[float] = []  # its scores

    def add(self, scores: Scores) -> list[Segment]:
        """Segments that the scores (W, K) of the next windows make certain."""
        self._scores = np.concatenate([self._scores, scores])
        self.windows += len(scores)
        known = math.floor((self._cuts.decided - self.start) / self._stride + 0.5)
        return self._extend(min(self.windows, known))

    def finish(self, end: float) -> list[Segment]:
        """The last segments of a span that ends at `end` seconds."""
        found = self._extend(cell_count(end - self.start, self._stride))
        found += self._settle(self._best.argmax(0, keepdims=True))
        return [*found, self._close(end)]

    def _extend(self, cells: int) -> list[Segment]:
        """Extends the paths to this number of cells."""
        done, stride, times = self._cells, self._stride, self._cuts.times
        if cells <= done:
            return []
        first, found = self.windows - len(self._scores), []
        smoothed = smooth(self._scores, window=self._window, stride=stride, cells=cells - first)
        cuts = times[bisect_left(times, self.start + max(0, done - 1) * stride) :]
        near = {math.floor((time - self.start) / stride + 0.5) for time in cuts}
        for row in smoothed[done - first :]:
            gains = np.log(np.maximum(row, 1e-6))  # so that no single cell outweighs all others
            if self._cells:
                changed = self._best.max() - self._penalty * (0.5 if self._cells in near else 1.0)
                came_from = np.where(changed > self._best, self._best.argmax(), self._stays)
                gains += np.maximum(changed, self._best)
                self._roots = self._roots[came_from] if self._open else self._stays
            else:
                came_from = self._stays
            self._best = gains
            self._open.append((row, came_from))
            self._cells += 1
            if (self._roots == self._roots[0]).all():
                found += self._settle(self._stays)
        self._scores = self._scores[max(0, cells - self._overlapping + 1 - first) :]
        return found

    def _settle(self, ends: Choice) -> list[Segment]:
        """Closes the open cells on which all paths to the labels `ends` of the last cell agree."""
        paths = [ends] * bool(self._open)
        for _, came_from in reversed(list(self._open)[1:]):
            paths.append(came_from[paths[-1]])
        found = []
        while paths and (paths[-1] == paths[-1][0]).all():
            label = int(paths.pop()[0])
            row, _ = self._open.popleft()
            cell = self._cells - len(self._open) - 1
            if label != self._label:
                if self._values:
                    found.append(self._close(self.start + cell * self._stride))
                self._label, self._first = label, cell
            self._values.append(row[label])
        self._roots = paths[-1] if paths else self._stays
        return found

    def _close(self, end: float) -> Segment:
        """The open segment, which ends at `end` seconds."""
        score, self._values = float(np.mean(self._values)), []
        return Segment(self.start + self._first * self._stride, end, self._labels[self._label], score)


def cell_count(seconds: float, stride: float) -> int:
    """Number of cells of a span of `seconds`."""
    return max(1, math.ceil((seconds - TOLERANCE) / stride))


@torch.inference_mode()
def score_windows(trained: Trained, windows: Sequence[Window]) -> Scores:
    """Class scores (W, K) of windows, in one forward pass. Raises ModelError if the weights overflow."""
    clips = [torch.from_numpy(w.frames()).permute(0, 3, 1, 2) for w in windows]
    frames = eval_transform(clips, preprocessing=trained.card.preprocessing, device=trained.device)
    with trained.autocast():
        logits = trained.model(frames)
    trained.check_scores(logits)
    return np.asarray(logits.cpu().double().softmax(1).numpy())


def make_timeline(
    trained: Trained,
    location: Source,
    *,
    window: float,
    stride: float,
    smoothing: float,
    batch_size: int,
    progress: Callable[[float, float | None], None] | None = None,
    found: Callable[[Segment], None] | None = None,
    stops: list[BaseException] | None = None,
) -> Timeline:
    """Scores a window every `stride` seconds while the video is decoded, once, ahead of the model.

    `found` gets each segment when no later window can change it. With `stops`, the exception of a stop signal is
    appended to it, and the timeline ends with the last window.

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
        positions=frame_positions(preprocessing, window),
    )
    rows: list[Scores] = []
    finders: list[SegmentFinder] = []  # of each span
    segments: list[Segment] = []
    pictures: list[tuple[float, Frames]] = []
    every = 1  # windows per picture: the video's length is unknown, so pictures are thinned out as they come
    number, end = 0, 0.0

    def add(certain: Iterable[Segment]) -> None:
        for segment in certain:
            segments.append(segment)
            if found is not None:
                found(segment)

    try:
        work = prefetch(iter(lambda: list(islice(windows, batch_size)), []))
        with closing(work) as batches, closing(clock):
            for batch in batches:
                scores = score_windows(trained, batch)
                with hold_signals():
                    rows.append(scores)
                    for w in batch:
                        if number % every == 0:
                            pictures.append((w.start + window / 2, w.pictures[len(w.pictures) // 2]))
                            if len(pictures) > MAX_PICTURES:
                                pictures, every = pictures[::2], 2 * every
                        number += 1
                    end = batch[-1].start + window
                    for origin, run in groupby(
                        zip(batch, scores, strict=True), key=lambda pair: pair[0].origin
                    ):
                        if not finders or finders[-1].start != origin:
                            if finders:
                                add(finders[-1].finish(dict(clock.spans)[finders[-1].start]))
                            penalty = smoothing * max(1.0, window / stride)
                            finders.append(
                                SegmentFinder(
                                    labels,
                                    window=window,
                                    stride=stride,
                                    penalty=penalty,
                                    cuts=cuts,
                                    start=origin,
                                )
                            )
                        add(finders[-1].add(np.stack([row for _, row in run])))
                    if progress is not None:
                        progress(end, clock.length)
    except (KeyboardInterrupt, Interrupted) as stop:
        if stops is None or not rows:
            raise
        stops.append(stop)
    cuts.finish()
    spans: list[Span] = []
    if rows:
        scores = np.concatenate(rows)
        ends = dict(clock.spans)
        if stops:
            clock.now = ends[finders[-1].start] = end
        add(finders[-1].finish(ends[finders[-1].start]))
        cells: list[Scores] = []
        first = 0
        for finder in finders:
            start, last = finder.start, first + finder.windows
            count = cell_count(ends[start] - start, stride)
            spans.append(Span(start, ends[start], finder.windows, count))
            cells.append(smooth(scores[first:last], window=window, stride=stride, cells=count))
            first = last
        smoothed = np.concatenate(cells)
    else:
        window = stride = clock.now
        only = score_locations(trained, [location])
        if only.errors:
            raise VideoError(f"{location}: {only.errors[0]}")
        scores = smoothed = np.asarray(only.logits.double().softmax(1).numpy())
        best = int(scores[0].argmax())
        add(Segment(*ends, labels[best], float(scores[0, best])) for ends in clock.spans)
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
    _is_over: bool = False

    def close(self) -> None:
        """Ends the frames, which another thread decodes."""
        self._is_over = True

    def watch(self, frames: Iterable[TimedFrame]) -> Iterator[TimedFrame]:
        for frame in frames:
            if self._is_over:
                return
            start = frame.start
            if self.spans and start <= self.now + TOLERANCE:
                start, _ = self.spans.pop()
            self.spans.append((start, frame.end))
            self.now, self.length, self.note = frame.end, frame.length, frame.note
            yield frame


def write_timeline(path: Path, timeline: Timeline) -> None:
    """Writes one subtitle file, or to a folder timeline.csv (scores of each window), .png, .srt and .vtt.

    Raises RunError; older files then stay.
    """
    if path.suffix.lower() in SUBTITLES:
        with output_file("--output", path) as written:
            written.write_text(subtitles(timeline.segments, path.suffix.lower()), encoding="utf-8")
        return
    from tvit_cli.report.film import timeline_png  # imports PIL

    picture = timeline_png(timeline)
    with ExitStack() as files:
        image, table, *texts = (
            files.enter_context(output_file("--output", path / f"timeline{suffix}"))
            for suffix in (".png", ".csv", *SUBTITLES)
        )
        image.write_bytes(picture)
        for suffix, text in zip(SUBTITLES, texts, strict=True):
            text.write_text(subtitles(timeline.segments, suffix), encoding="utf-8")
        with table.open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(csv_row(["start", "end", "label", *timeline.labels]))
            for start, row in zip(timeline.starts(), timeline.scores, strict=True):
                times = (f"{time:.3f}" for time in (start, start + timeline.window))
                best = timeline.labels[int(row.argmax())]
                writer.writerow(csv_row([*times, best, *(f"{value:.6f}" for value in row)]))


def subtitles(segments: Iterable[Segment], suffix: str, *, first: int = 1) -> str:
    """A cue of label and score per segment, as WebVTT (https://www.w3.org/TR/webvtt1/) or SubRip (.srt).

    `first` is the number of the first cue; WebVTT's header comes before number 1.
    """
    is_vtt = suffix == ".vtt"
    # SubRip has no escapes for its markup, so letters of full width stand for it.
    markup: dict[str, str | int | None] = (
        {"&": "&amp;", "<": "&lt;", ">": "&gt;"} if is_vtt else dict(zip("<>{}", _FULL_WIDTH, strict=True))
    )
    cues = ["WEBVTT\n"] if is_vtt and first == 1 else []
    for number, s in enumerate(segments, first):
        start, end = (
            "{:02}:{:02}:{:02}{}{:03}".format(
                ms // 3_600_000, ms // 60_000 % 60, ms // 1000 % 60, "." if is_vtt else ",", ms % 1000
            )
            for ms in (round(s.start * 1000), max(round(s.end * 1000), round(s.start * 1000) + 1))
        )
        label = " ".join(s.label.split()).translate(str.maketrans(markup))
        cues.append(f"{number}\n{start} --> {end}\n{label} {s.score:.2f}\n")
    return "\n".join(cues)


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
