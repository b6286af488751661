"""What confidence is worth, drawn: sure against right, how sure the answers are, and what abstaining gains."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tvit_cli.report.axes import Axes, ticks
from tvit_cli.report.charts import Curve, curves_chart, legend
from tvit_cli.report.drawing import Box, Dot, Drawing, Line, Role, Shape
from tvit_cli.report.words import percent, plural

SHEET = (420.0, 270.0)
GAP = 0.12  # of a bin's width, left free between two bars
FIFTHS = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)


@dataclass(frozen=True)
class Bin:
    """Answers of about the same confidence: how many, how sure on average, and the share that is right."""

    low: float
    high: float
    videos: int
    confidence: float
    accuracy: float


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
