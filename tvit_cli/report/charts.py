"""Charts: curves, rows with intervals, reliability diagrams, confusion matrices."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tvit_cli.report.drawing import (
    BOTTOM,
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
from tvit_cli.report.html import percent, plural
from tvit_cli.results import Bin, Counts

MOST_POINTS = 400  # of a curve; more would not show
MOST_DOTS = 60  # of a curve; more would run together


@dataclass(frozen=True)
class Curve:
    """Named points from left to right; where y is None or not finite, the curve has a gap.

    A faint curve is drawn thin, beneath the others and without values under the pointer.
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
    """Curves on common axes that start at x = 0, or None where no curve has a point right of it.

    `show` writes a value of y; `y_range` is the range of y to show at least (default: 0 is in it); `mark` is an
    x with its name, shown as a vertical line.
    """
    kept = [(curve, thinned(curve.points)) for curve in curves]
    kept = [(curve, runs) for curve, runs in kept if runs]
    xs = [x for _, runs in kept for run in runs for x, _ in run]
    if not any(x > 0 for x in xs):
        return None
    ys = [y for _, runs in kept for run in runs for _, y in run]
    x_ticks = ticks(0, max(xs), 8, whole=True)
    least, most = y_range or (0.0, ys[0])
    y_ticks = ticks(min(least, *ys), max(most, *ys), 5)
    low, high = min(y_ticks[0], *ys), max(y_ticks[-1], *ys)
    first, last = min(0.0, *xs), max(xs)
    axes = Axes(
        (first, last), (low, high), TOP if len(kept) > 1 or mark else TOP - 24
    )  # without a legend's row
    shapes = axes.shapes(
        title, x_name=x_name, x_ticks=x_ticks, y_ticks=y_ticks, show_x=lambda x: f"{x:g}", show_y=show
    )
    shapes += legend([(c.name, c.role, c.faint) for c, _ in kept]) if len(kept) > 1 else []
    if mark is not None and first <= mark[0] <= last:
        shapes += _mark(axes.place(mark[0], high), mark[1])
    for curve, runs in sorted(kept, key=lambda pair: not pair[0].faint):
        shapes += _curve(curve, runs, axes, x_name, show)
    return Drawing(title, WIDTH, HEIGHT, shapes)


def thinned(points: Sequence[tuple[float, float | None]]) -> list[list[Point]]:
    """The unbroken runs of a curve, cut to their ends and the extremes of every stretch if it is long.

    Extremes are what a reader looks for, and a mean would hide them.
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
    stretch = math.ceil(2 * total / MOST_POINTS)
    return [
        sorted(
            {run[0], run[-1]}.union(
                *(
                    {min(run[i : i + stretch], key=_y), max(run[i : i + stretch], key=_y)}
                    for i in range(0, len(run), stretch)
                )
            )
        )
        for run in runs
    ]


def _y(point: Point) -> float:
    return point[1]


def legend(entries: Sequence[tuple[str, Role, bool]]) -> list[Shape]:
    """A row below the title: (name, colour, whether it is drawn faintly)."""
    shapes: list[Shape] = []
    x = 5.0
    for name, role, faint in entries:
        shapes += [
            Line([(x, 38), (x + 14, 38)], role, 1.2 if faint else 3, opacity=_strength(faint)),
            Text((x + 20, 42), name, "dim", LABEL_SIZE),
        ]
        x += 36 + text_width(name, LABEL_SIZE)
    return shapes


def _mark(top: Point, name: str) -> list[Shape]:
    x, y = top
    half = text_width(name, LABEL_SIZE) / 2
    return [
        Line([(x, y), (x, HEIGHT - BOTTOM)], "dim", dashed=True),
        Text((min(x, WIDTH - half), y - 5), name, "dim", LABEL_SIZE, "middle"),
    ]


def _curve(
    curve: Curve,
    runs: Sequence[Sequence[Point]],
    axes: Axes,
    x_name: str,
    show: Callable[[float], str],
) -> list[Shape]:
    width = 1.2 if curve.faint else 2.2
    lines: list[Shape] = [
        Line([axes.place(x, y) for x, y in run], curve.role, width, opacity=_strength(curve.faint))
        for run in runs
        if len(run) > 1
    ]
    points = [point for run in runs for point in run]
    if curve.faint and lines:
        return lines
    radius = 2.6 if len(points) <= MOST_DOTS else 1.1
    return lines + [
        Dot(axes.place(x, y), radius, curve.role, f"{x_name} {x:g}: {curve.name} {show(y)}")
        for x, y in points
    ]


def _strength(faint: bool) -> float:
    return 0.55 if faint else 1.0


ACROSS = 420.0  # from 0 to 1
ROW = 24.0


@dataclass(frozen=True)
class Row:
    """A name, its values with their colours and names, the ends of its line, and what stands behind it."""

    name: str
    values: Sequence[tuple[float, Role, str]]
    ends: tuple[float, float]
    remark: str


def rows_chart(
    title: str, rows: Sequence[Row], *, names: Sequence[tuple[str, Role]] = (), mark: float | None = None
) -> Drawing:
    """Rows on a common axis in percent; `names` is the legend, `mark` a value that all are held against."""
    left = 18 + max(text_width(row.name, LABEL_SIZE) for row in rows)
    top = 60.0 if names else 38.0
    bottom = top + ROW * len(rows)

    def x(value: float) -> float:
        return left + ACROSS * value

    shapes: list[Shape] = [Text((4, 20), title, size=TITLE_SIZE, bold=True)]
    shapes += legend([(name, role, False) for name, role in names])
    for fifth in range(6):
        shapes += [
            Line([(x(fifth / 5), top), (x(fifth / 5), bottom)], "grid"),
            Text((x(fifth / 5), bottom + 18), percent(fifth / 5), "dim", LABEL_SIZE, "middle"),
        ]
    if mark is not None:
        shapes.append(Line([(x(mark), top), (x(mark), bottom)], "dim", 1.4, dashed=True))
    for number, row in enumerate(rows):
        y = top + ROW * (number + 0.5)
        low, high = row.ends
        shapes += [
            Text((left - 10, y + 4), row.name, "ink", LABEL_SIZE, "end"),
            Line([(x(low), y), (x(high), y)], "dim", 3, opacity=0.5),
            *(Dot((x(value), y), 5, role, f"{row.name}, {words}") for value, role, words in row.values),
            Text((x(1) + 18, y + 4), row.remark, "dim", LABEL_SIZE),
        ]
    behind = max(text_width(row.remark, LABEL_SIZE) for row in rows)
    return Drawing(title, x(1) + 26 + behind, bottom + 28, shapes)


SHEET = (420.0, 270.0)
GAP = 0.12  # of a bin's width, left free between two bars
FIFTHS = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)


def reliability_chart(bins: Sequence[Bin]) -> Drawing:
    """A bar to the accuracy of each bin, and the gap between it and the mean confidence, either way."""
    axes = Axes((0, 1), (0, 1))
    title = "Reliability"
    shapes = axes.shapes(
        title, x_name="confidence, %", x_ticks=FIFTHS, y_ticks=FIFTHS, show_x=_hundredths, show_y=percent
    )
    names: list[tuple[str, Role, bool]] = [
        ("right", "one", False),
        ("too sure", "bad", False),
        ("not sure enough", "three", False),
    ]
    shapes += legend(names)
    for b in bins:
        words = f"{plural(b.videos, 'video')}: {percent(b.confidence)} sure, {percent(b.accuracy)} right"
        low, high = sorted((b.accuracy, b.confidence))
        shapes.append(_bar(axes, b, 0, low, "one", 0.9, words))
        shapes.append(_bar(axes, b, low, high, "bad" if b.confidence > b.accuracy else "three", 0.75, words))
    shapes.append(Line([axes.place(0, 0), axes.place(1, 1)], "dim", 1.4, dashed=True))
    shapes += [Dot(axes.place(b.confidence, b.accuracy), 2.6, "ink") for b in bins]
    return Drawing(f"{title}: accuracy of answers by their confidence", *SHEET, shapes)


def confidence_chart(bins: Sequence[Bin]) -> Drawing:
    """How many answers there are of each confidence, right ones below wrong ones."""
    most = max(b.videos for b in bins)
    y_ticks = ticks(0, most, 5, whole=True)
    axes = Axes((0, 1), (0, y_ticks[-1]))
    title = "How sure the answers are"
    shapes = axes.shapes(
        title,
        x_name="confidence, %",
        x_ticks=FIFTHS,
        y_ticks=y_ticks,
        show_x=_hundredths,
        show_y=lambda y: f"{y:g}",
    )
    shapes += legend([("right", "good", False), ("wrong", "bad", False)])
    for b in bins:
        right = round(b.accuracy * b.videos)
        words = f"{percent(b.low)} to {percent(b.high)}: {right} right, {b.videos - right} wrong"
        shapes.append(_bar(axes, b, 0, right, "good", 0.9, words))
        shapes.append(_bar(axes, b, right, b.videos, "bad", 0.9, words))
    return Drawing(f"{title}: right and wrong answers by their confidence", *SHEET, shapes)


def coverage_chart(answers: Sequence[tuple[float, bool]]) -> Drawing | None:
    """Accuracy if only the surest share of the videos is answered: (confidence, whether right) of each."""
    right, points = 0, []
    for number, (_, is_right) in enumerate(sorted(answers, key=lambda answer: -answer[0]), 1):
        right += is_right
        points.append((100 * number / len(answers), right / number))
    return curves_chart(
        "Accuracy of the surest answers",
        [Curve("top-1", points, "one")],
        x_name="% of the videos, the surest first",
        show=percent,
        y_range=(0, 1),
    )


def _hundredths(value: float) -> str:
    return f"{100 * value:g}"


def _bar(axes: Axes, b: Bin, low: float, high: float, role: Role, opacity: float, title: str) -> Shape:
    inset = GAP * (b.high - b.low) / 2
    left, top = axes.place(b.low + inset, high)
    right, bottom = axes.place(b.high - inset, low)
    return Box((left, top), right - left, bottom - top, role, opacity, title)


MOST_CLASSES = 120  # of a drawing; of more, those with the most mistakes are shown
ROOM = (300.0, 12.0, 900.0)  # for all cells: of no class, more for each, at most
CELLS = (9.0, 64.0)  # a cell's side, least and most
LONGEST_NAME = 26  # letters
LEAST_NUMBERED = 17.0  # a smaller cell has no room for its count
STRONG = 0.6  # a cell of this opacity or more has light letters


def shown_classes(labels: Sequence[str], counts: Counts) -> list[str]:
    """The classes that a matrix shows, in the model's order: all that occur, or those with the most mistakes."""
    mistakes = dict.fromkeys(labels, 0)
    seen = set()
    for (true, said), videos in counts.items():
        seen |= {true, said}
        if true != said:
            for label in (true, said):
                if label in mistakes:
                    mistakes[label] += videos
    found = [label for label in labels if label in seen]
    if len(found) > MOST_CLASSES:
        kept = set(sorted(found, key=lambda label: -mistakes[label])[:MOST_CLASSES])
        found = [label for label in found if label in kept]
    return found


def confusion_chart(labels: Sequence[str], counts: Counts) -> Drawing:
    """A row for each true class, a column for each answer; a cell is as strong as its share of the row.

    `labels` are the classes to show; a row's share is of all its answers, those in other columns included.
    """
    least, more, most = ROOM
    cell = min(CELLS[1], max(CELLS[0], min(most, least + more * len(labels)) / len(labels)))
    size = min(13.0, max(7.5, cell * 0.8))
    names = {label: _short(label) for label in labels}
    margin = 34 + max(text_width(name, size) for name in names.values())
    side = cell * len(labels)
    totals = dict.fromkeys(labels, 0)
    for (true, _), videos in counts.items():
        if true in totals:
            totals[true] += videos
    shapes: list[Shape] = [
        Text((14, margin + side / 2), "true class", "dim", 12, "middle", turned=True),
        Text((margin + side / 2, 13), "the model’s answer", "dim", 12, "middle"),
        Box((margin, margin), side, side, "grid", 0.35),
    ]
    if cell >= LEAST_NUMBERED:
        for n in range(1, len(labels)):
            at = margin + n * cell
            shapes += [
                Line([(margin, at), (margin + side, at)], "paper", 1.5),
                Line([(at, margin), (at, margin + side)], "paper", 1.5),
            ]
    inset = 1.0 if cell >= LEAST_NUMBERED else 0.25
    for row, true in enumerate(labels):
        y = margin + row * cell
        base = y + cell / 2 + 0.36 * size
        shapes.append(Text((margin - 7, base), names[true], "ink", size, "end"))
        shapes.append(
            Text(
                (margin + row * cell + cell / 2 + 0.36 * size, margin - 7),
                names[true],
                "ink",
                size,
                turned=True,
            )
        )
        for column, said in enumerate(labels):
            videos = counts.get((true, said), 0)
            if not videos:
                continue
            share = videos / totals[true]
            role: Role = "one" if row == column else "bad"
            opacity = round(0.18 + 0.82 * share**0.7, 2)
            x = margin + column * cell
            words = (
                f"{true}: {videos} of {totals[true]} taken for {said}"
                if row != column
                else f"{true}: {videos} of {totals[true]} right"
            )
            shapes.append(
                Box((x + inset, y + inset), cell - 2 * inset, cell - 2 * inset, role, opacity, words)
            )
            if cell >= LEAST_NUMBERED:
                letters: Role = "paper" if opacity >= STRONG else "ink"
                shapes.append(Text((x + cell / 2, base), str(videos), letters, size, "middle"))
    edge = margin + side + 6
    return Drawing("Confusion matrix: true classes in rows, answers in columns", edge, edge, shapes)


def class_chart(rows: Sequence[tuple[str, int, int]], *, title: str) -> Drawing:
    """A bar for each class, the worst first: (label, videos, right answers); at most MOST_CLASSES."""
    worst = sorted(rows, key=lambda row: (row[2] / row[1], row[0]))[:MOST_CLASSES]
    names = {label: _short(label) for label, _, _ in worst}
    left = 14 + max(text_width(name, 12) for name in names.values())
    line, top, width = 19.0, 40.0, 300.0
    shapes: list[Shape] = [Text((4, 20), title, size=15, bold=True)]
    for number, (label, videos, right) in enumerate(worst):
        y = top + number * line
        shapes += [
            Text((left - 8, y + 10), names[label], "ink", 12, "end"),
            Box((left, y), width, 12, "grid"),
            Box((left, y), width * right / videos, 12, "one", title=f"{label}: {right} of {videos}"),
            Text(
                (left + width + 8, y + 10),
                f"{right} of {plural(videos, 'video')} · {percent(right / videos)}",
                "dim",
                12,
            ),
        ]
    return Drawing(title, left + width + 190, top + len(worst) * line + 8, shapes)


def _short(label: str) -> str:
    return label if len(label) <= LONGEST_NAME else label[: LONGEST_NAME - 1] + "…"
