"""A film strip of what a model looked at: frames, the same with relevant patches lit, each frame's share.

Letters: T frames, C channels, S the side of a frame, P patches along a frame.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image
from torch import Tensor

from tvit_cli.report.drawing import Box, Drawing, Shape, Text
from tvit_cli.report.pictures import to_pixels
from tvit_cli.report.png import to_png
from tvit_cli.settings.card import Preprocessing

SIDE, GAP, MARGIN = 112, 4, 12  # units of the drawing
HEAD, BARS, FOOT = 30, 44, 24
SCALE = 2
DIM = 0.25  # how bright a patch without relevance stays
LEAST_WIDTH = 760  # of the sheet: the verdict is a long sentence


@dataclass(frozen=True)
class Reading:
    """What is told of a clip: relevance (T, P, P) by patch, each frame's share (T,), and sentences."""

    title: str
    verdict: str
    relevance: Tensor
    frames: Sequence[float]


def relevance_png(
    clip: Tensor, preprocessing: Preprocessing, reading: Reading, *, dark: bool = False
) -> bytes:
    """The strip as a PNG; of a clip (T, C, S, S) all frames, in one row each."""
    count = len(clip)
    width = max(LEAST_WIDTH, 2 * MARGIN + count * SIDE + (count - 1) * GAP)
    height = HEAD + 2 * SIDE + GAP + BARS + FOOT + MARGIN
    shapes: list[Shape] = [Text((MARGIN, 20), reading.title, size=14, bold=True)]
    most = max(*reading.frames, 1e-12)
    bottom = HEAD + 2 * SIDE + GAP + BARS
    for number, share in enumerate(reading.frames):
        left = MARGIN + number * (SIDE + GAP)
        tall = (BARS - 18) * share / most
        shapes.append(Box((left, bottom - tall), SIDE, tall, "one"))
        shapes.append(Text((left + SIDE / 2, bottom - tall - 3), f"{share:.0%}", "dim", 11, "middle"))
    shapes.append(Text((MARGIN, height - MARGIN - 2), reading.verdict, "dim", 11.5))
    sheet = Image.open(
        io.BytesIO(to_png(Drawing(reading.title, width, height, shapes), scale=SCALE, dark=dark))
    )
    pixels = to_pixels(clip, preprocessing).permute(0, 2, 3, 1).numpy()  # (T, S, S, C)
    for number, (picture, lit) in enumerate(zip(pixels, lights(reading.relevance), strict=True)):
        left = (MARGIN + number * (SIDE + GAP)) * SCALE
        size = (SIDE * SCALE, SIDE * SCALE)
        frame = Image.fromarray(picture).resize(size, Image.Resampling.BICUBIC)
        light = np.asarray(Image.fromarray(lit).resize(size, Image.Resampling.NEAREST))
        shown = np.asarray(frame) * (DIM + (1 - DIM) * light[..., None])
        sheet.paste(frame, (left, HEAD * SCALE))
        sheet.paste(Image.fromarray(shown.astype(np.uint8)), (left, (HEAD + SIDE + GAP) * SCALE))
    data = io.BytesIO()
    sheet.save(data, "PNG", optimize=True)
    return data.getvalue()


def lights(relevance: Tensor) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    """How bright each patch is shown, (T, P, P) in [0, 1]: its relevance beside the clip's greatest."""
    positive = relevance.clamp(min=0).float()
    return (positive / positive.max().clamp(min=1e-12)).sqrt().numpy()
