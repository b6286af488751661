"""A timeline as a picture: frames along the top, then each label's scores and segments on a lane of its own."""

from __future__ import annotations

import io
from collections import defaultdict

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from tvit_cli.report.axes import ticks
from tvit_cli.report.drawing import Box, Drawing, Line, Shape, Text, text_width
from tvit_cli.report.png import Colours, to_png
from tvit_cli.report.segments import Timeline

WIDTH, SCALE = 1000.0, 2
STRIP, LANE, GAP = 72.0, 22.0, 6.0  # heights
RIGHT, BOTTOM = 24.0, 26.0
LABEL_SIZE = 12.0
MOST_LANES = 10  # labels with the most time; the rest are not drawn
MOST_COLUMNS = 400  # of a lane; more would not show


def timeline_png(timeline: Timeline, *, dark: bool = False) -> bytes:
    """The picture, 2000 pixels wide: how dark a lane is, is the label's smoothed score; bars are segments."""
    left = 16 + max(text_width(label, LABEL_SIZE) for label in lanes(timeline))
    image = Image.open(io.BytesIO(to_png(timeline_drawing(timeline, left=left), scale=SCALE, dark=dark)))
    size = (round(STRIP * SCALE), round((WIDTH - left - RIGHT) * SCALE))
    strip = _film(timeline, *size, ground=Colours(dark).of("grid"))
    image.paste(Image.fromarray(strip), (round(left * SCALE), round(GAP * SCALE)))
    data = io.BytesIO()
    image.save(data, "PNG", optimize=True)
    return data.getvalue()


def lanes(timeline: Timeline) -> list[str]:
    """The labels that get a lane, in the order in which they first appear."""
    time: defaultdict[str, float] = defaultdict(float)
    for segment in timeline.segments:
        time[segment.label] += segment.end - segment.start
    kept = sorted(time, key=lambda label: -time[label])[:MOST_LANES]
    return [label for label in time if label in kept]


def timeline_drawing(timeline: Timeline, *, left: float) -> Drawing:
    """The lanes and the axis; the frames' strip is left free."""
    shown = lanes(timeline)
    height = STRIP + 2 * GAP + LANE * len(shown) + BOTTOM
    across = (WIDTH - left - RIGHT) / timeline.seconds
    bottom = height - BOTTOM
    shapes: list[Shape] = []
    for time in ticks(0, timeline.seconds, 10):
        if time <= timeline.seconds:
            x = left + time * across
            shapes.append(Line([(x, STRIP + 2 * GAP), (x, bottom)], "grid"))
            shapes.append(Text((x, bottom + 16), clock(time), "dim", LABEL_SIZE, "middle"))
    for number, label in enumerate(shown):
        top = STRIP + 2 * GAP + number * LANE
        shapes.append(Text((left - 8, top + 15), label, "ink", LABEL_SIZE, "end"))
        column = timeline.labels.index(label)
        first = 0
        for part in timeline.parts():
            values = _columns(timeline.smoothed[first : first + part.cells, column], len(timeline.smoothed))
            first += part.cells
            begin, width = left + part.start * across, (part.end - part.start) * across / len(values)
            shapes += [
                Box((begin + place * width, top + 3), width, LANE - 10, "one", opacity=0.45 * float(value))
                for place, value in enumerate(values)
                if value >= 0.01
            ]
        shapes += [
            Box(
                (left + segment.start * across, top + LANE - 7),
                max(1.0, (segment.end - segment.start) * across - 1),
                4,
                "one",
                title=f"{label} {clock(segment.start)} to {clock(segment.end)}",
            )
            for segment in timeline.segments
            if segment.label == label
        ]
    return Drawing(f"What happens when in {timeline.video}", WIDTH, height, shapes)


def clock(seconds: float) -> str:
    """A time as people read it. 7.5 -> 0:07.5, 3671 -> 1:01:11"""
    tenths = round(seconds * 10)
    whole, tenth = divmod(tenths, 10)
    minutes, rest = divmod(whole, 60)
    hours, minutes = divmod(minutes, 60)
    text = f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
    return f"{text}.{tenth}" if tenth else text


def _columns(values: NDArray[np.float64], cells: int) -> NDArray[np.float64]:
    """Means of neighbouring values, at most MOST_COLUMNS of `cells` values; all but the last of as many."""
    group = -(-cells // MOST_COLUMNS)
    starts = np.arange(0, len(values), group)
    sums = np.add.reduceat(values, starts)
    counts = np.minimum(starts + group, len(values)) - starts
    return np.asarray(sums / counts)


def _film(timeline: Timeline, height: int, width: int, *, ground: tuple[int, int, int]) -> NDArray[np.uint8]:
    """Frames side by side, each the one nearest in time to where it stands: (height, width, 3)."""
    strip = np.full((height, width, 3), ground, np.uint8)
    if not timeline.pictures:
        return strip
    rows, columns = timeline.pictures[0][1].shape[:2]
    wide = max(1, round(height * columns / rows))
    count = max(1, width // wide)
    times = np.array([time for time, _ in timeline.pictures])
    for place in range(count):
        begin, end = place * width // count, (place + 1) * width // count
        middle = (begin + end) / 2 / width * timeline.seconds
        picture = Image.fromarray(
            np.ascontiguousarray(timeline.pictures[int(np.abs(times - middle).argmin())][1])
        )
        scaled = np.asarray(picture.resize((wide, height), Image.Resampling.BILINEAR))
        cut = min(wide, end - begin - 2)
        at = (wide - cut) // 2
        strip[:, begin : begin + cut] = scaled[:, at : at + cut]
    return strip
