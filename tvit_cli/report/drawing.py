"""A drawing: a few kinds of shapes in a coordinate system of their own, written as SVG.

Colours are roles, not values: in a page they follow the reader's light or dark, in a PNG (report/png.py) they
are those of the light one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Literal

Role = Literal["paper", "ink", "dim", "grid", "one", "two", "three", "good", "bad"]
Point = tuple[float, float]

PALETTE: dict[Role, tuple[str, str]] = {  # light, dark; one, two and three stay apart for the colour-blind
    "paper": ("#ffffff", "#16181d"),
    "ink": ("#1d2230", "#e6e8ee"),
    "dim": ("#636b7c", "#9aa2b3"),
    "grid": ("#e3e6ec", "#2b2f3a"),
    "one": ("#2563c9", "#6ea8fe"),
    "two": ("#d2660a", "#ffa94d"),
    "three": ("#158a6e", "#4fd1b0"),
    "good": ("#1a7f4b", "#4cc38a"),
    "bad": ("#c2323b", "#ff7b84"),
}


@dataclass(frozen=True)
class Line:
    """A line through points."""

    points: Sequence[Point]
    role: Role
    width: float = 1.0
    dashed: bool = False
    opacity: float = 1.0


@dataclass(frozen=True)
class Dot:
    """A filled circle; `title` shows under the pointer."""

    at: Point
    radius: float
    role: Role
    title: str = ""


@dataclass(frozen=True)
class Box:
    """A filled rectangle, `at` its upper left corner; `title` shows under the pointer."""

    at: Point
    width: float
    height: float
    role: Role
    opacity: float = 1.0
    title: str = ""


@dataclass(frozen=True)
class Text:
    """One line of text, `at` its baseline; turned, it reads upwards."""

    at: Point
    text: str
    role: Role = "ink"
    size: float = 12.0
    anchor: Literal["start", "middle", "end"] = "start"
    bold: bool = False
    turned: bool = False


Shape = Line | Dot | Box | Text


@dataclass(frozen=True)
class Drawing:
    """Shapes on a sheet, later ones over earlier ones; `title` says in words what is shown."""

    title: str
    width: float
    height: float
    shapes: Sequence[Shape]


def text_width(text: str, size: float) -> float:
    """About how wide a text is: sans-serif letters are 0.6 of their size wide at most, on average."""
    return 0.6 * size * len(text)


def to_svg(drawing: Drawing) -> str:
    """An <svg> for a page whose style sheet has `style_sheet()`; it takes the width that it is given."""
    shapes = "".join(map(_element, drawing.shapes))
    return (
        f'<svg viewBox="0 0 {_n(drawing.width)} {_n(drawing.height)}" role="img" '
        f'aria-label="{escape(drawing.title)}">{shapes}</svg>'
    )


def style_sheet() -> str:
    """CSS: the palette as variables, light or dark, and the classes that shapes take their colours from."""

    def variables(which: int) -> str:
        return "".join(f"--{role}:{colours[which]};" for role, colours in PALETTE.items())

    classes = "".join(f".s-{role}{{stroke:var(--{role})}}.f-{role}{{fill:var(--{role})}}" for role in PALETTE)
    return (
        f":root{{color-scheme:light dark;{variables(0)}}}\n"
        f"@media (prefers-color-scheme:dark){{:root{{{variables(1)}}}}}\n{classes}\n"
    )


def _element(shape: Shape) -> str:
    match shape:
        case Line():
            points = " ".join(f"{_n(x)},{_n(y)}" for x, y in shape.points)
            dashes = ' stroke-dasharray="4 4"' if shape.dashed else ""
            return (
                f'<polyline class="s-{shape.role}" points="{points}" fill="none" stroke-linejoin="round" '
                f'stroke-linecap="round" stroke-width="{_n(shape.width)}"{dashes}{_opacity(shape.opacity)}/>'
            )
        case Dot():
            x, y = shape.at
            start = f'<circle class="f-{shape.role}" cx="{_n(x)}" cy="{_n(y)}" r="{_n(shape.radius)}"'
            return _titled(start, "circle", shape.title)
        case Box():
            x, y = shape.at
            start = (
                f'<rect class="f-{shape.role}" x="{_n(x)}" y="{_n(y)}" width="{_n(shape.width)}" '
                f'height="{_n(shape.height)}"{_opacity(shape.opacity)}'
            )
            return _titled(start, "rect", shape.title)
        case Text():
            x, y = shape.at
            weight = ' font-weight="600"' if shape.bold else ""
            turn = f' transform="rotate(-90 {_n(x)} {_n(y)})"' if shape.turned else ""
            return (
                f'<text class="f-{shape.role}" x="{_n(x)}" y="{_n(y)}" font-size="{_n(shape.size)}" '
                f'text-anchor="{shape.anchor}"{weight}{turn}>{escape(shape.text)}</text>'
            )


def _titled(start: str, name: str, title: str) -> str:
    return f"{start}><title>{escape(title)}</title></{name}>" if title else f"{start}/>"


def _opacity(value: float) -> str:
    return "" if value == 1 else f' opacity="{_n(value)}"'


def _n(value: float) -> str:
    """A number of at most two decimals."""
    return f"{value:.2f}".rstrip("0").rstrip(".")
