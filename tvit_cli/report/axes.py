"""A chart's sheet: title, axes with round numbers, and where a point of data lies on it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tvit_cli.report.drawing import Line, Point, Shape, Text

WIDTH, HEIGHT = 420.0, 270.0
LEFT, RIGHT, TOP, BOTTOM = 60.0, 16.0, 66.0, 38.0  # between the sheet's edge and the axes
TITLE_SIZE, LABEL_SIZE = 15.0, 12.5


@dataclass(frozen=True)
class Axes:
    """Ranges of x and y, and the space above them."""

    x: tuple[float, float]
    y: tuple[float, float]
    top: float = TOP

    def place(self, x: float, y: float) -> Point:
        """Where a point lies on the sheet."""
        across = (x - self.x[0]) / (self.x[1] - self.x[0])
        up = (y - self.y[0]) / (self.y[1] - self.y[0])
        return LEFT + across * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - up * (HEIGHT - self.top - BOTTOM)

    def shapes(
        self,
        title: str,
        *,
        x_name: str,
        x_ticks: Sequence[float],
        y_ticks: Sequence[float],
        show_x: Callable[[float], str],
        show_y: Callable[[float], str],
    ) -> list[Shape]:
        """The title, a line for each tick of y, and what is written at the axes."""
        shapes: list[Shape] = [Text((4, 20), title, size=TITLE_SIZE, bold=True)]
        for y in y_ticks:
            height = self.place(self.x[1], y)[1]
            shapes += [
                Line([(LEFT, height), (WIDTH - RIGHT, height)], "grid"),
                Text((LEFT - 7, height + 4), show_y(y), "dim", LABEL_SIZE, "end"),
            ]
        for x in x_ticks:
            if self.x[0] <= x <= self.x[1]:
                at = self.place(x, self.y[0])[0]
                shapes.append(Text((at, HEIGHT - BOTTOM + 17), show_x(x), "dim", LABEL_SIZE, "middle"))
        middle = (LEFT + WIDTH - RIGHT) / 2
        shapes.append(Text((middle, HEIGHT - 5), x_name, "dim", LABEL_SIZE, "middle"))
        return shapes


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
