"""Charts as drawings: curves over epochs or steps, with axes whose numbers are round."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tvit_cli.report.drawing import Dot, Drawing, Line, Point, Role, Shape, Text, text_width

WIDTH, HEIGHT = 420.0, 270.0
LEFT, RIGHT, TOP, BOTTOM = 60.0, 16.0, 66.0, 38.0  # between the sheet's edge and the axes
TITLE_SIZE, LABEL_SIZE = 15.0, 12.5
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
    top = TOP if len(kept) > 1 or mark else TOP - 24  # without a legend's row

    def place(x: float, y: float) -> Point:
        across = (x - first) / (last - first)
        up = (y - low) / (high - low)
        return LEFT + across * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - up * (HEIGHT - top - BOTTOM)

    shapes: list[Shape] = [Text((4, 20), title, size=TITLE_SIZE, bold=True)]
    shapes += _legend([curve for curve, _ in kept]) if len(kept) > 1 else []
    for y in y_ticks:
        end, start = place(last, y)[1], LEFT
        shapes += [
            Line([(start, end), (WIDTH - RIGHT, end)], "grid"),
            Text((LEFT - 7, end + 4), show(y), "dim", LABEL_SIZE, "end"),
        ]
    for x in x_ticks:
        if first <= x <= last:
            shapes.append(
                Text((place(x, low)[0], HEIGHT - BOTTOM + 17), f"{x:g}", "dim", LABEL_SIZE, "middle")
            )
    middle = (LEFT + WIDTH - RIGHT) / 2
    shapes.append(Text((middle, HEIGHT - 5), x_name, "dim", LABEL_SIZE, "middle"))
    if mark is not None and first <= mark[0] <= last:
        shapes += _mark(place(mark[0], high), mark[1])
    for curve, runs in sorted(kept, key=lambda pair: not pair[0].faint):
        shapes += _curve(curve, runs, place, x_name, show)
    return Drawing(title, WIDTH, HEIGHT, shapes)


def ticks(low: float, high: float, most: int, *, whole: bool = False) -> list[float]:
    """Round numbers, at most `most` and one, from at or below `low` to at or above `high`: steps of 1, 2 or 5.

    ticks(0, 0.83, 5) -> 0, 0.2, 0.4, 0.6, 0.8, 1. With `whole`, steps are whole numbers.
    """
    if high <= low:
        high = low + (abs(low) or 1.0)
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * m for m in (1, 2, 5, 10) if power * m >= rough * (1 - 1e-9))
    step = max(1.0, step) if whole else step
    start = math.floor(low / step + 1e-9)
    end = math.ceil(high / step - 1e-9)
    return [round(n * step, 12) for n in range(start, end + 1)]


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


def _legend(curves: Sequence[Curve]) -> list[Shape]:
    shapes: list[Shape] = []
    x = 5.0
    for curve in curves:
        shapes += [
            Line([(x, 38), (x + 14, 38)], curve.role, 1.2 if curve.faint else 3, opacity=_strength(curve)),
            Text((x + 20, 42), curve.name, "dim", LABEL_SIZE),
        ]
        x += 36 + text_width(curve.name, LABEL_SIZE)
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
    place: Callable[[float, float], Point],
    x_name: str,
    show: Callable[[float], str],
) -> list[Shape]:
    width = 1.2 if curve.faint else 2.2
    lines: list[Shape] = [
        Line([place(x, y) for x, y in run], curve.role, width, opacity=_strength(curve))
        for run in runs
        if len(run) > 1
    ]
    points = [point for run in runs for point in run]
    if curve.faint and lines:
        return lines
    radius = 2.6 if len(points) <= MOST_DOTS else 1.1
    return lines + [
        Dot(place(x, y), radius, curve.role, f"{x_name} {x:g}: {curve.name} {show(y)}") for x, y in points
    ]


def _strength(curve: Curve) -> float:
    return 0.55 if curve.faint else 1.0
