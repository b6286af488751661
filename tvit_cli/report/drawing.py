"""Drawings: a few shapes and axes, written as SVG or PNG.

Colours are roles, not values: in a page they follow the reader's light or dark, in a PNG (report/png.py) they
are those of the light one.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise
from pathlib import Path
from typing import Literal

from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

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


FINER = 3  # drawn this many times as large and scaled down, since Pillow draws hard edges
MOST_PIXELS = 40_000_000  # while it is drawn; a larger drawing is drawn less fine
DASH = 4.0
SOFTWARE = "tvit"  # of the PNG's metadata


def to_png(drawing: Drawing, *, scale: int = 2, dark: bool = False) -> bytes:
    """The drawing in its light or its dark colours, `scale` pixels per unit."""
    pixels = drawing.width * drawing.height * scale**2
    finer = next((n for n in range(FINER, 1, -1) if pixels * n**2 <= MOST_PIXELS), 1)
    zoom = scale * finer
    colours = Colours(dark)
    size = (round(drawing.width * zoom), round(drawing.height * zoom))
    image = Image.new("RGB", size, colours.of("paper"))
    draw = ImageDraw.Draw(image)
    for shape in drawing.shapes:
        match shape:
            case Line():
                _line(draw, shape, zoom, colours)
            case Dot():
                x, y = shape.at
                draw.ellipse(
                    [(v + r) * zoom for r in (-shape.radius, shape.radius) for v in (x, y)],
                    fill=colours.of(shape.role),
                )
            case Box():
                x, y = shape.at
                corners = [x * zoom, y * zoom, (x + shape.width) * zoom, (y + shape.height) * zoom]
                draw.rectangle(corners, fill=colours.of(shape.role, shape.opacity))
            case Text():
                _text(image, draw, shape, zoom, colours)
    data = io.BytesIO()
    info = PngInfo()
    info.add_text("Software", SOFTWARE)
    image.reduce(finer).save(data, "PNG", pnginfo=info)
    return data.getvalue()


def is_own_png(path: Path) -> bool:
    """Whether a file is a PNG that `to_png` made, by its Software entry."""
    try:
        with Image.open(path) as image:
            return image.info.get("Software") == SOFTWARE
    except (OSError, ValueError, SyntaxError):
        return False


@dataclass(frozen=True)
class Colours:
    """The light or the dark half of the palette."""

    dark: bool

    def of(self, role: Role, opacity: float = 1.0) -> tuple[int, int, int]:
        """A role's colour, as it looks on paper at an opacity."""
        over, under = (_rgb(PALETTE[name][self.dark]) for name in (role, "paper"))
        red, green, blue = (round(a * opacity + b * (1 - opacity)) for a, b in zip(over, under, strict=True))
        return red, green, blue


def _line(draw: ImageDraw.ImageDraw, line: Line, zoom: float, colours: Colours) -> None:
    points = [(x * zoom, y * zoom) for x, y in line.points]
    colour = colours.of(line.role, line.opacity)
    width = max(1, round(line.width * zoom))
    for part in _dashes(points, DASH * zoom) if line.dashed else [points]:
        draw.line(part, fill=colour, width=width, joint="curve")
    if not line.dashed:
        for x, y in (points[0], points[-1]):  # round ends
            draw.ellipse([x - width / 2, y - width / 2, x + width / 2, y + width / 2], fill=colour)


def _dashes(points: Sequence[Point], length: float) -> Iterator[list[Point]]:
    """Every second stretch of each straight piece."""
    for (x0, y0), (x1, y1) in pairwise(points):
        whole = math.hypot(x1 - x0, y1 - y0)
        for number in range(0, math.ceil(whole / length), 2):
            a, b = number * length / whole, min(1.0, (number + 1) * length / whole)
            yield [(x0 + (x1 - x0) * t, y0 + (y1 - y0) * t) for t in (a, b)]


def _text(image: Image.Image, draw: ImageDraw.ImageDraw, text: Text, zoom: float, colours: Colours) -> None:
    font = ImageFont.load_default(text.size * zoom)
    stroke = round(text.size * zoom / 60) if text.bold else 0  # the font that Pillow brings has one weight
    anchor = {"start": "ls", "middle": "ms", "end": "rs"}[text.anchor]
    colour = colours.of(text.role)
    x, y = text.at[0] * zoom, text.at[1] * zoom
    if not text.turned:
        draw.text(
            (x, y), text.text, fill=colour, font=font, anchor=anchor, stroke_width=stroke, stroke_fill=colour
        )
        return
    left, top, right, bottom = (round(v) for v in draw.textbbox((0, 0), text.text, font=font, anchor=anchor))
    mask = Image.new("L", (max(1, right - left + 2), max(1, bottom - top + 2)))
    ImageDraw.Draw(mask).text((1 - left, 1 - top), text.text, fill=255, font=font, anchor=anchor)
    corner = (round(x) + top - 1, round(y) - right - 1)  # what was right of the baseline's start is above it
    image.paste(colour, corner, mask.transpose(Image.Transpose.ROTATE_90))


def _rgb(colour: str) -> tuple[int, int, int]:
    return int(colour[1:3], 16), int(colour[3:5], 16), int(colour[5:7], 16)
