"""Labelled points on axes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from tvit_cli.report.drawing import (
    HEIGHT,
    LABEL_SIZE,
    LEFT,
    TOP,
    WIDTH,
    Axes,
    Dot,
    Drawing,
    Line,
    Point,
    Shape,
    Text,
    text_width,
    ticks,
)

RADIUS = 4.0
LINES_TRIED = 12  # up and down from a dot, for a place where its label covers nothing
Box = tuple[float, float, float, float]  # left, top, right, bottom


@dataclass(frozen=True)
class Labelled:
    """A point and what is written beside it."""

    name: str
    x: float
    y: float


def scatter_chart(
    title: str,
    points: Sequence[Labelled],
    *,
    x_name: str,
    show_x: Callable[[float], str],
    show_y: Callable[[float], str],
) -> Drawing:
    """A dot for each point on axes that hold them all, its name where it covers no other name or dot.

    A line leads to a name that had to go further off.
    """
    x_ticks = ticks(min(p.x for p in points), max(p.x for p in points), 6)
    y_ticks = ticks(min(p.y for p in points), max(p.y for p in points), 5)
    axes = Axes((x_ticks[0], x_ticks[-1]), (y_ticks[0], y_ticks[-1]), TOP - 24)
    shapes = axes.shapes(title, x_name=x_name, x_ticks=x_ticks, y_ticks=y_ticks, show_x=show_x, show_y=show_y)
    places = [axes.place(point.x, point.y) for point in points]
    taken: list[Box] = [(x - RADIUS, y - RADIUS, x + RADIUS, y + RADIUS) for x, y in places]
    labels: list[Shape] = []
    for point, place in zip(points, places, strict=True):
        box = next((b for b in _boxes(place, point.name) if _is_free(b, taken)), None)
        if box is None:  # crowded beyond what could be read: over another rather than not at all
            box = next(_boxes(place, point.name))
        taken.append(box)
        if (edge := _edge(box, place)) is not None:
            shapes.append(Line((place, edge), "dim", opacity=0.6))
        # Widths are estimates: the end at the dot, or the middle, is where it is said to be.
        left, _, right, bottom = box
        at, anchor = ((left + right) / 2, "middle")
        if right < place[0]:
            at, anchor = right, "end"
        elif left > place[0]:
            at, anchor = left, "start"
        labels.append(Text((at, bottom - 3), point.name, "ink", LABEL_SIZE, anchor))
    for point, place in zip(points, places, strict=True):
        shapes.append(Dot(place, RADIUS, "one", f"{point.name}: {show_y(point.y)} at {show_x(point.x)}"))
    return Drawing(title, WIDTH, HEIGHT, shapes + labels)


def _boxes(place: Point, name: str) -> Iterator[Box]:
    """Where a name may stand, best first: right of its dot, left, above and below, then further up and down."""
    x, y = place
    width, height = text_width(name, LABEL_SIZE), LABEL_SIZE + 2
    for line in range(LINES_TRIED):
        for sign in (1, -1) if line else (1,):
            middle = y + sign * line * height
            beside = 0.0 if line == 1 else RADIUS + 3
            starts = (x + beside, x - beside - width, x - width / 2)[: 3 if line else 2]
            for left in starts:
                yield left, middle - height / 2, left + width, middle + height / 2


def _edge(box: Box, place: Point) -> Point | None:
    """The middle of the side of a label's box that faces its dot; None where it stands beside it."""
    left, top, right, bottom = box
    x, y = place
    if top - LABEL_SIZE < y < bottom + LABEL_SIZE:
        return None
    return min(max(x, left), right), bottom if bottom < y else top


def _is_free(box: Box, taken: Sequence[Box]) -> bool:
    left, top, right, bottom = box
    if left < LEFT or right > WIDTH or top < TOP - 36 or bottom > HEIGHT - 30:
        return False
    return not any(left < r and right > l and top < b and bottom > t for l, t, r, b in taken)  # noqa: E741
