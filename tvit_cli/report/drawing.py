"""Drawings: a few shapes and axes, written as SVG or PNG.

Colours are named roles: an SVG takes them from the page's style sheet, light or dark; a PNG has one of the two.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise
from pathlib import Path
from typing import Literal

from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

Role = Literal["paper", "ink", "dim", "grid", "one", "two", "three", "good", "bad"]
Point = tuple[float, float]
Colour = tuple[int, int, int]

PALETTE: dict[Role, tuple[str, str]] = {  # light, dark; one, two and three differ for the colour-blind
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
    """A filled circle; `title` is its hover text."""

    at: Point
    radius: float
    role: Role
    title: str = ""


@dataclass(frozen=True)
class Box:
    """A filled rectangle, `at` its upper left corner; `title` is its hover text."""

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
    """Shapes on a sheet, later ones over earlier ones; `title` describes it for screen readers."""

    title: str
    width: float
    height: float
    shapes: Sequence[Shape]


def text_width(text: str, size: float) -> float:
    """Estimated width of a text: sans-serif letters average at most 0.6 of their size."""
    return 0.6 * size * len(text)


def to_svg(drawing: Drawing) -> str:
    """An <svg> of any width for a page whose style sheet has `style_sheet()`."""
    shapes = "".join(map(_element, drawing.shapes))
    return (
        f'<svg viewBox="0 0 {_n(drawing.width)} {_n(drawing.height)}" role="img" '
        f'aria-label="{escape(drawing.title)}">{shapes}</svg>'
    )


def style_sheet() -> str:
    """CSS: the palette as variables, light and dark, and the classes of shapes."""
    light, dark = ("".join(f"--{role}:{colours[n]};" for role, colours in PALETTE.items()) for n in (0, 1))
    classes = "".join(f".s-{role}{{stroke:var(--{role})}}.f-{role}{{fill:var(--{role})}}" for role in PALETTE)
    return (
        f":root{{color-scheme:light dark;{light}}}\n"
        f"@media (prefers-color-scheme:dark){{:root{{{dark}}}}}\n{classes}\n"
    )


def _element(shape: Shape) -> str:
    value = getattr(shape, "opacity", 1)
    opacity = "" if value == 1 else f' opacity="{_n(value)}"'
    if isinstance(shape, Line):
        points = " ".join(f"{_n(x)},{_n(y)}" for x, y in shape.points)
        dashes = ' stroke-dasharray="4 4"' if shape.dashed else ""
        return (
            f'<polyline class="s-{shape.role}" points="{points}" fill="none" stroke-linejoin="round" '
            f'stroke-linecap="round" stroke-width="{_n(shape.width)}"{dashes}{opacity}/>'
        )
    x, y = map(_n, shape.at)
    colour = f'class="f-{shape.role}"'
    if isinstance(shape, Text):
        weight = ' font-weight="600"' if shape.bold else ""
        turn = f' transform="rotate(-90 {x} {y})"' if shape.turned else ""
        return (
            f'<text {colour} x="{x}" y="{y}" font-size="{_n(shape.size)}" '
            f'text-anchor="{shape.anchor}"{weight}{turn}>{escape(shape.text)}</text>'
        )
    if isinstance(shape, Dot):
        tag, where = "circle", f'cx="{x}" cy="{y}" r="{_n(shape.radius)}"'
    else:
        size = f'width="{_n(shape.width)}" height="{_n(shape.height)}"{opacity}'
        tag, where = "rect", f'x="{x}" y="{y}" {size}'
    title = f"><title>{escape(shape.title)}</title></{tag}>" if shape.title else "/>"
    return f"<{tag} {colour} {where}{title}"


def _n(value: float) -> str:
    """A number with at most two decimals."""
    return f"{value:.2f}".rstrip("0").rstrip(".")


WIDTH, HEIGHT = 420.0, 270.0
LEFT, RIGHT, TOP, BOTTOM = 60.0, 16.0, 66.0, 38.0  # margins of the axes
TITLE_SIZE, LABEL_SIZE = 15.0, 12.5


@dataclass(frozen=True)
class Axes:
    """Ranges of x and y, and the space above them."""

    x: tuple[float, float]
    y: tuple[float, float]
    top: float = TOP

    def position(self, x: float, y: float) -> Point:
        """Position of a data point on the sheet."""
        across = (x - self.x[0]) / (self.x[1] - self.x[0])
        up = (y - self.y[0]) / (self.y[1] - self.y[0])
        return LEFT + across * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - up * (HEIGHT - self.top - BOTTOM)

    def shapes(
        self,
        title: str,
        x_name: str,
        x_ticks: Sequence[float],
        y_ticks: Sequence[float],
        show_y: Callable[[float], str],
        show_x: Callable[[float], str] = "{:g}".format,
    ) -> list[Shape]:
        """The title, a line for each tick of y, and the labels of both axes."""
        shapes: list[Shape] = [Text((4, 20), title, size=TITLE_SIZE, bold=True)]
        for y in y_ticks:
            height = self.position(self.x[1], y)[1]
            shapes.append(Line([(LEFT, height), (WIDTH - RIGHT, height)], "grid"))
            shapes.append(Text((LEFT - 7, height + 4), show_y(y), "dim", LABEL_SIZE, "end"))
        for x in x_ticks:
            if self.x[0] <= x <= self.x[1]:
                at = self.position(x, self.y[0])[0]
                shapes.append(Text((at, HEIGHT - BOTTOM + 17), show_x(x), "dim", LABEL_SIZE, "middle"))
        middle = (LEFT + WIDTH - RIGHT) / 2
        return [*shapes, Text((middle, HEIGHT - 5), x_name, "dim", LABEL_SIZE, "middle")]


def ticks(low: float, high: float, most: int, *, whole: bool = False) -> list[float]:
    """At most `most` + 1 round numbers that cover [low, high], in steps of 1, 2 or 5 times a power of ten.

    ticks(0, 0.83, 5) -> 0, 0.2, 0.4, 0.6, 0.8, 1. With `whole`, steps are whole numbers.
    """
    if high <= low:
        high = low + (abs(low) or 1.0)
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * m for m in (1, 2, 5, 10) if power * m >= rough * (1 - 1e-9))
    step = max(1.0, step) if whole else step
    start, end = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(n * step, 12) for n in range(start, end + 1)]


MOST_PIXELS = 40_000_000  # while drawing; larger drawings are supersampled less
SOFTWARE = "tvit"  # of the PNG's metadata


def to_png(drawing: Drawing, *, scale: int = 2, dark: bool = False) -> bytes:
    """The drawing in light or dark colours, `scale` pixels per unit."""
    pixels = drawing.width * drawing.height * scale**2
    finer = next((n for n in (3, 2) if pixels * n**2 <= MOST_PIXELS), 1)  # Pillow does not antialias
    zoom = scale * finer
    size = (round(drawing.width * zoom), round(drawing.height * zoom))
    image = Image.new("RGB", size, rgb("paper", dark=dark))
    draw = ImageDraw.Draw(image)
    for shape in drawing.shapes:
        colour = rgb(shape.role, getattr(shape, "opacity", 1.0), dark=dark)
        match shape:
            case Line():
                _line(draw, shape, zoom, colour)
            case Dot(at=at, radius=radius):
                draw.ellipse([(v + r) * zoom for r in (-radius, radius) for v in at], fill=colour)
            case Box(at=(x, y)):
                corners = [x * zoom, y * zoom, (x + shape.width) * zoom, (y + shape.height) * zoom]
                draw.rectangle(corners, fill=colour)
            case Text():
                _text(image, draw, shape, zoom, colour)
    data, info = io.BytesIO(), PngInfo()
    info.add_text("Software", SOFTWARE)
    image.reduce(finer).save(data, "PNG", pnginfo=info)
    return data.getvalue()


def is_own_png(path: Path) -> bool:
    """Whether a file is a PNG of `to_png`, by its Software entry."""
    try:
        with Image.open(path) as image:
            return image.info.get("Software") == SOFTWARE
    except (OSError, ValueError, SyntaxError):
        return False


def rgb(role: Role, opacity: float = 1.0, *, dark: bool = False) -> Colour:
    """A role's colour blended over paper."""
    over, under = (bytes.fromhex(PALETTE[name][dark][1:]) for name in (role, "paper"))
    red, green, blue = (round(a * opacity + b * (1 - opacity)) for a, b in zip(over, under, strict=True))
    return red, green, blue


def _line(draw: ImageDraw.ImageDraw, line: Line, zoom: float, colour: Colour) -> None:
    points = [(x * zoom, y * zoom) for x, y in line.points]
    width = max(1, round(line.width * zoom))
    if not line.dashed:
        draw.line(points, fill=colour, width=width, joint="curve")
        for x, y in (points[0], points[-1]):  # round ends
            draw.ellipse([x - width / 2, y - width / 2, x + width / 2, y + width / 2], fill=colour)
        return
    for (x0, y0), (x1, y1) in pairwise(points):
        whole, dash = math.hypot(x1 - x0, y1 - y0), 4 * zoom
        for number in range(0, math.ceil(whole / dash), 2):
            ends = (number * dash / whole, min(1.0, (number + 1) * dash / whole))
            part = [(x0 + (x1 - x0) * t, y0 + (y1 - y0) * t) for t in ends]
            draw.line(part, fill=colour, width=width, joint="curve")


def _text(image: Image.Image, draw: ImageDraw.ImageDraw, text: Text, zoom: float, colour: Colour) -> None:
    font = ImageFont.load_default(text.size * zoom)
    anchor = {"start": "ls", "middle": "ms", "end": "rs"}[text.anchor]
    x, y = text.at[0] * zoom, text.at[1] * zoom
    if not text.turned:
        stroke = round(text.size * zoom / 60) if text.bold else 0  # Pillow's font has one weight
        draw.text((x, y), text.text, colour, font, anchor, stroke_width=stroke, stroke_fill=colour)
        return
    left, top, right, bottom = (round(v) for v in draw.textbbox((0, 0), text.text, font=font, anchor=anchor))
    mask = Image.new("L", (max(1, right - left + 2), max(1, bottom - top + 2)))
    ImageDraw.Draw(mask).text((1 - left, 1 - top), text.text, fill=255, font=font, anchor=anchor)
    corner = (round(x) + top - 1, round(y) - right - 1)  # right of the baseline's start becomes above it
    image.paste(colour, corner, mask.transpose(Image.Transpose.ROTATE_90))
