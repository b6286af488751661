"""What happens when in a long video: a window slides over it, and its scores are merged to segments."""

from __future__ import annotations

import csv
import math
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tvit_cli.data.container import Place
from tvit_cli.data.cuts import Cuts
from tvit_cli.data.pictures import Frames
from tvit_cli.data.transforms import eval_transform
from tvit_cli.data.video import Played, play
from tvit_cli.data.whole import whole_file
from tvit_cli.data.windows import TOLERANCE, Window, frame_places, slide
from tvit_cli.engine.ahead import ahead
from tvit_cli.engine.places import named
from tvit_cli.engine.scoring import score
from tvit_cli.engine.trained import Trained
from tvit_cli.errors import RunError, VideoError
from tvit_cli.report.segments import Scores, Segment, Stretch, Timeline, find_segments, smooth

TIMELINE_FILE, PICTURE_FILE = "timeline.csv", "timeline.png"
MOST_PICTURES = 48  # of one timeline; when there are more, every second is dropped


@torch.inference_mode()
def make_timeline(
    trained: Trained,
    place: Place,
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
    clock, cuts, album = _Clock(), Cuts(), _Album()
    windows = slide(
        cuts.watch(clock.watch(play(place, short_side=preprocessing.scale_to))),
        length=window,
        stride=stride,
        places=frame_places(preprocessing.n_frames, preprocessing.frame_grid),
    )
    rows: list[Tensor] = []
    starts: list[float] = []
    for batch in ahead(_batches(windows, batch_size)):
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
    from tvit_cli.report.timeline import timeline_png

    picture = timeline_png(timeline)
    try:
        with (
            whole_file(folder / PICTURE_FILE) as drawn,
            whole_file(folder / TIMELINE_FILE) as table,
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


def _whole(trained: Trained, place: Place) -> Scores:
    """The scores of a video as one clip, (1, K)."""
    labels = trained.card.labels
    found = score(
        trained.model,
        [named(place, labels[0])],
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

    def watch(self, played: Iterable[Played]) -> Iterator[Played]:
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
