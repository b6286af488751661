"""Charts: curves, rows with intervals, reliability diagrams, confusion matrices."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from tvit_cli.errors import natural_key, plural
from tvit_cli.report.drawing import (
    HEIGHT,
    LABEL_SIZE,
    TITLE_SIZE,
    TOP,
    WIDTH,
    Axes,
    Box,
    Dot,
    Drawing,
    Line,
    Point,
    Role,
    Shape,
    Text,
    text_width,
    ticks,
)
from tvit_cli.report.html import percent
from tvit_cli.results import Bin, Counts

MOST_POINTS = 400  # of a curve; more are not visible
MOST_DOTS = 60  # of a curve; more overlap


@dataclass(frozen=True)
class Curve:
    """Named points from left to right, with a gap where y is None or not finite.

    A faint curve is thin, below the others and without hover values.
    """

    name: str
    points: Sequence[tuple[float, float | None]]
    role: Role
    faint: bool = False


def curves_chart(
    title: str,
    curves: Sequence[Curve],
    *,
    x_name: str,
    show: Callable[[float], str],
    y_range: tuple[float, float] | None = None,
    mark: tuple[float, str] | None = None,
) -> Drawing | None:
    """Curves on common axes that start at x = 0; None without a point right of it.

    `show` formats a value of y; `y_range` is the least range of y (default: includes 0); `mark` is (x, name) of a
    vertical line.
    """
    kept = [(curve, runs) for curve in curves if (runs := thinned(curve.points))]
    xs, ys = ([point[axis] for _, runs in kept for run in runs for point in run] for axis in (0, 1))
    if not any(x > 0 for x in xs):
        return None
    least, most = y_range or (0.0, ys[0])
    y_ticks = ticks(min(least, *ys), max(most, *ys), 5)
    low, high = min(y_ticks[0], *ys), max(y_ticks[-1], *ys)
    first, last = min(0.0, *xs), max(xs)
    top = TOP if len(kept) > 1 or mark else TOP - 24  # without the row of a legend
    axes = Axes((first, last), (low, high), top)
    shapes = axes.shapes(title, x_name, ticks(0, max(xs), 8, whole=True), y_ticks, show)
    if len(kept) > 1:
        shapes += legend([(c.name, c.role) for c, _ in kept], [c.name for c, _ in kept if c.faint])
    if mark is not None and first <= mark[0] <= last:
        x, y = axes.position(mark[0], high)
        half = text_width(mark[1], LABEL_SIZE) / 2
        shapes.append(Line([(x, y), axes.position(mark[0], low)], "dim", dashed=True))
        shapes.append(Text((min(x, WIDTH - half), y - 5), mark[1], "dim", LABEL_SIZE, "middle"))
    for curve, runs in sorted(kept, key=lambda pair: not pair[0].faint):
        width, opacity = (1.2, 0.55) if curve.faint else (2.2, 1.0)
        for run in runs:
            if len(run) > 1:
                positions = [axes.position(x, y) for x, y in run]
                shapes.append(Line(positions, curve.role, width, opacity=opacity))
        if not curve.faint or all(len(run) == 1 for run in runs):
            radius = 2.6 if sum(map(len, runs)) <= MOST_DOTS else 1.1
            shapes += [
                Dot(axes.position(x, y), radius, curve.role, f"{x_name} {x:g}: {curve.name} {show(y)}")
                for run in runs
                for x, y in run
            ]
    return Drawing(title, WIDTH, HEIGHT, shapes)


def thinned(points: Sequence[tuple[float, float | None]]) -> list[list[Point]]:
    """Unbroken runs of a curve; long ones reduced to their ends and the extremes of equal parts.

    Extremes stay visible; a mean would hide them.
    """
    runs: list[list[Point]] = [[]]
    for x, y in points:
        if y is None or not math.isfinite(y):
            runs.append([])
        else:
            runs[-1].append((x, y))
    runs = [run for run in runs if run]
    total = sum(map(len, runs))
    if total <= MOST_POINTS:
        return runs
    size, found = math.ceil(2 * total / MOST_POINTS), []
    for run in runs:
        parts = [run[i : i + size] for i in range(0, len(run), size)]
        extremes = {pick(part, key=lambda point: point[1]) for part in parts for pick in (min, max)}
        found.append(sorted({run[0], run[-1]} | extremes))
    return found


def legend(entries: Sequence[tuple[str, Role]], faint: Sequence[str] = ()) -> list[Shape]:
    """A row of (name, colour) below the title; `faint` names have thin lines."""
    shapes: list[Shape] = []
    x = 5.0
    for name, role in entries:
        width, opacity = (1.2, 0.55) if name in faint else (3, 1.0)
        shapes.append(Line([(x, 38), (x + 14, 38)], role, width, opacity=opacity))
        shapes.append(Text((x + 20, 42), name, "dim", LABEL_SIZE))
        x += 36 + text_width(name, LABEL_SIZE)
    return shapes


@dataclass(frozen=True)
class Row:
    """A name, its values as (value, colour, hover text), the ends of its line, and a remark behind it."""

    name: str
    values: Sequence[tuple[float, Role, str]]
    ends: tuple[float, float]
    remark: str


def rows_chart(
    title: str, rows: Sequence[Row], *, names: Sequence[tuple[str, Role]] = (), mark: float | None = None
) -> Drawing:
    """Rows on a common axis in percent; `names` is the legend, `mark` the value of a vertical line."""
    left = 18 + max(text_width(row.name, LABEL_SIZE) for row in rows)
    top, height = 60.0 if names else 38.0, 24.0
    bottom = top + height * len(rows)

    def x(value: float) -> float:
        return left + 420 * value

    shapes: list[Shape] = [Text((4, 20), title, size=TITLE_SIZE, bold=True), *legend(names)]
    for fifth in FIFTHS:
        shapes.append(Line([(x(fifth), top), (x(fifth), bottom)], "grid"))
        shapes.append(Text((x(fifth), bottom + 18), percent(fifth), "dim", LABEL_SIZE, "middle"))
    if mark is not None:
        shapes.append(Line([(x(mark), top), (x(mark), bottom)], "dim", 1.4, dashed=True))
    for number, row in enumerate(rows):
        y = top + height * (number + 0.5)
        shapes += [
            Text((left - 10, y + 4), row.name, "ink", LABEL_SIZE, "end"),
            Line([(x(end), y) for end in row.ends], "dim", 3, opacity=0.5),
            *(Dot((x(value), y), 5, role, f"{row.name}, {words}") for value, role, words in row.values),
            Text((x(1) + 18, y + 4), row.remark, "dim", LABEL_SIZE),
        ]
    remarks = max(text_width(row.remark, LABEL_SIZE) for row in rows)
    width = max(x(1) + 26 + remarks, sum(36 + text_width(name, LABEL_SIZE) for name, _ in names))
    return Drawing(title, width, bottom + 28, shapes)


FIFTHS = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)


def reliability_chart(bins: Sequence[Bin]) -> Drawing:
    """Reliability diagram: a bar to the accuracy of each bin, and its gap to the mean confidence."""
    axes = Axes((0, 1), (0, 1))
    shapes = axes.shapes("Reliability", "confidence, %", FIFTHS, FIFTHS, percent, _hundredths)
    shapes += legend([("accuracy", "one"), ("overconfident", "bad"), ("underconfident", "three")])
    for b in bins:
        confidence, accuracy = percent(b.confidence), percent(b.accuracy)
        text = f"{plural(b.videos, 'video')}: confidence {confidence}, accuracy {accuracy}"
        low, high = sorted((b.accuracy, b.confidence))
        role: Role = "bad" if b.confidence > b.accuracy else "three"
        shapes.append(_bar(axes, b, (0, low), "one", text))
        shapes.append(_bar(axes, b, (low, high), role, text, opacity=0.75))
    shapes.append(Line([axes.position(0, 0), axes.position(1, 1)], "dim", 1.4, dashed=True))
    shapes += [Dot(axes.position(b.confidence, b.accuracy), 2.6, "ink") for b in bins]
    return Drawing("Reliability: accuracy of predictions by their confidence", WIDTH, HEIGHT, shapes)


def confidence_chart(bins: Sequence[Bin]) -> Drawing:
    """Histogram of confidence, correct predictions below wrong ones."""
    y_ticks = ticks(0, max(b.videos for b in bins), 5, whole=True)
    axes = Axes((0, 1), (0, y_ticks[-1]))
    count = "{:g}".format
    shapes = axes.shapes("Confidence histogram", "confidence, %", FIFTHS, y_ticks, count, _hundredths)
    shapes += legend([("correct", "good"), ("wrong", "bad")])
    for b in bins:
        right = round(b.accuracy * b.videos)
        text = f"{percent(b.low)} to {percent(b.high)}: {right} correct, {b.videos - right} wrong"
        shapes.append(_bar(axes, b, (0, right), "good", text))
        shapes.append(_bar(axes, b, (right, b.videos), "bad", text))
    title = "Confidence histogram: correct and wrong predictions by their confidence"
    return Drawing(title, WIDTH, HEIGHT, shapes)


def coverage_chart(answers: Sequence[tuple[float, bool]]) -> Drawing | None:
    """Accuracy on the most confident share of the videos, from (confidence, correct) of each."""
    right, points = 0, []
    for number, (_, is_right) in enumerate(sorted(answers, key=lambda answer: -answer[0]), 1):
        right += is_right
        points.append((100 * number / len(answers), right / number))
    curve, x_name = Curve("top-1", points, "one"), "% of videos, most confident first"
    return curves_chart("Accuracy by coverage", [curve], x_name=x_name, show=percent, y_range=(0, 1))


def _hundredths(value: float) -> str:
    return f"{100 * value:g}"


def _bar(axes: Axes, b: Bin, ends: tuple[float, float], role: Role, title: str, opacity: float = 0.9) -> Box:
    inset = 0.06 * (b.high - b.low)  # a gap between neighbours
    left, top = axes.position(b.low + inset, ends[1])
    right, bottom = axes.position(b.high - inset, ends[0])
    return Box((left, top), right - left, bottom - top, role, opacity, title)


MOST_CLASSES = 120  # of a drawing; of more, those with the most mistakes are shown
LONGEST_NAME = 26  # letters


def shown_classes(labels: Sequence[str], counts: Counts) -> list[str]:
    """Classes of a confusion matrix in natural order: all that occur, or those with the most mistakes."""
    mistakes: Counter[str] = Counter()
    for (true, predicted), videos in counts.items():
        mistakes.update({true: 0, predicted: 0} if true == predicted else {true: videos, predicted: videos})
    found = [label for label in labels if label in mistakes]
    kept = set(sorted(found, key=lambda label: -mistakes[label])[:MOST_CLASSES])
    return sorted(kept, key=natural_key)


def row_totals(counts: Counts) -> Counter[str]:
    """Predictions for the videos of each true class."""
    totals: Counter[str] = Counter()
    for (true, _), videos in counts.items():
        totals[true] += videos
    return totals


def strength(share: float) -> float:
    """Opacity of a cell with a share of its row."""
    return round(0.18 + 0.82 * math.pow(share, 0.7), 2)


def cell_title(true: str, predicted: str, videos: int, total: int) -> str:
    """Hover text of a cell."""
    return f"{true}: {videos} of {total} {'correct' if true == predicted else f'predicted {predicted}'}"


def confusion_chart(labels: Sequence[str], counts: Counts) -> Drawing:
    """Confusion matrix: true classes in rows, predictions in columns; opacity is the share of the row.

    Of `labels`, `shown_classes` are drawn; a row's share is of all its predictions, hidden columns included.
    """
    labels = shown_classes(labels, counts)
    cell = min(64.0, max(9.0, min(900, 300 + 12 * len(labels)) / len(labels)))
    size = min(13.0, max(7.5, cell * 0.8))
    names = {label: short_name(label) for label in labels}
    margin = 34 + max(text_width(name, size) for name in names.values())
    side = cell * len(labels)
    totals = row_totals(counts)
    is_numbered = cell >= 17
    shapes: list[Shape] = [
        Text((14, margin + side / 2), "true class", "dim", 12, "middle", turned=True),
        Text((margin + side / 2, 13), "predicted class", "dim", 12, "middle"),
        Box((margin, margin), side, side, "grid", 0.35),
    ]
    for n in range(1, len(labels) if is_numbered else 1):
        at = margin + n * cell
        shapes.append(Line([(margin, at), (margin + side, at)], "paper", 1.5))
        shapes.append(Line([(at, margin), (at, margin + side)], "paper", 1.5))
    inset = 1.0 if is_numbered else 0.25
    inner = cell - 2 * inset
    for row, true in enumerate(labels):
        y = margin + row * cell
        base = y + cell / 2 + 0.36 * size
        shapes.append(Text((margin - 7, base), names[true], "ink", size, "end"))
        shapes.append(Text((base, margin - 7), names[true], "ink", size, turned=True))
        for column, predicted in enumerate(labels):
            if not (videos := counts.get((true, predicted), 0)):
                continue
            opacity = strength(videos / totals[true])
            x = margin + column * cell
            role: Role = "one" if row == column else "bad"
            text = cell_title(true, predicted, videos, totals[true])
            shapes.append(Box((x + inset, y + inset), inner, inner, role, opacity, text))
            if is_numbered:
                letters: Role = "paper" if opacity >= 0.6 else "ink"
                shapes.append(Text((x + cell / 2, base), str(videos), letters, size, "middle"))
    edge = margin + side + 6
    return Drawing("Confusion matrix: true classes in rows, predictions in columns", edge, edge, shapes)


def class_chart(rows: Mapping[str, tuple[int, int]]) -> Drawing:
    """A bar for each class, the worst first: label -> (videos, correct); at most MOST_CLASSES."""
    worst = worst_first(rows)[:MOST_CLASSES]
    names = {label: short_name(label) for label, _ in worst}
    left = 14 + max(text_width(name, 12) for name in names.values())
    line, top, width, title = 19.0, 40.0, 300.0, "Top-1 by class, the worst first"
    shapes: list[Shape] = [Text((4, 20), title, size=TITLE_SIZE, bold=True)]
    for number, (label, (videos, right)) in enumerate(worst):
        y = top + number * line
        text = f"{right} of {plural(videos, 'video')} · {percent(right / videos)}"
        shapes += [
            Text((left - 8, y + 10), names[label], "ink", 12, "end"),
            Box((left, y), width, 12, "grid"),
            Box((left, y), width * right / videos, 12, "one", title=f"{label}: {right} of {videos}"),
            Text((left + width + 8, y + 10), text, "dim", 12),
        ]
    return Drawing(title, left + width + 190, top + len(worst) * line + 8, shapes)


def worst_first(rows: Mapping[str, tuple[int, int]]) -> list[tuple[str, tuple[int, int]]]:
    """Classes by rising accuracy, from label -> (videos, correct)."""
    return sorted(rows.items(), key=lambda item: (item[1][1] / item[1][0], natural_key(item[0])))


def short_name(name: str) -> str:
    """The name, or its start, an ellipsis and its end: names of a sweep differ at the end."""
    half = LONGEST_NAME // 2
    return name if len(name) <= LONGEST_NAME else f"{name[: half - 1]}…{name[-half:]}"
