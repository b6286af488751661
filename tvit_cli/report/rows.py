"""A drawing with a row for each name: values between 0 and 1 as dots, and a line that joins or surrounds them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tvit_cli.report.axes import LABEL_SIZE, TITLE_SIZE
from tvit_cli.report.charts import legend
from tvit_cli.report.drawing import Dot, Drawing, Line, Role, Shape, Text, text_width
from tvit_cli.report.words import percent

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
