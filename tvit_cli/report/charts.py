"""Charts as drawings: curves over epochs or steps, with axes whose numbers are round."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tvit_cli.report.axes import BOTTOM, HEIGHT, LABEL_SIZE, TOP, WIDTH, Axes, ticks
from tvit_cli.report.drawing import Dot, Drawing, Line, Point, Role, Shape, Text, text_width

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
