"""A drawing as a PNG."""

from __future__ import annotations

import io
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from tvit_cli.report.drawing import PALETTE, Box, Dot, Drawing, Line, Point, Role, Text

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
