"""Frames of clips as images: film strips, captions, explanations, timelines.

Letters: T frames, C channels, S the side of a frame, P patches along a frame.
"""

from __future__ import annotations

import base64
import io
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import numpy as np
import simplejpeg
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.nn import functional as F

from tvit_cli.report.drawing import Box, Drawing, Line, Shape, Text, rgb, text_width, ticks, to_png
from tvit_cli.results import Timeline
from tvit_cli.settings.card import Preprocessing

Picture = NDArray[np.uint8]
FRAME_MS = 150  # of a loop: 8 frames last 1.2 s


def draw_caption(picture: Picture, text: str) -> Picture:
    """The picture, uint8 (H, W, 3), with a line of text; long lines are drawn smaller."""
    height, width = picture.shape[:2]
    letters = caption_mask(text, height, width)  # (h, w) in [0, 1]
    rows, columns = letters.shape
    out = picture.copy()
    corner = out[height - rows :, :columns].astype(np.float32) * 0.35  # a darker background
    out[height - rows :, :columns] = corner + letters[..., None] * (255 - corner)
    return out


@lru_cache(maxsize=64)
def caption_mask(text: str, height: int, width: int) -> NDArray[np.float32]:
    """Coverage of each pixel by the letters, with a margin around them; no larger than the picture."""
    size = max(10, height // 18)
    while True:
        font = ImageFont.load_default(size)
        margin = max(2, round(size / 3))
        left, top, right, bottom = ImageDraw.Draw(Image.new("L", (1, 1))).textbbox((0, 0), text, font=font)
        wide, tall = round(right - left) + 2 * margin, round(bottom - top) + 2 * margin
        if wide <= width or size <= 4:
            break
        size -= 1
    mask = Image.new("L", (min(wide, width), min(tall, height)))
    ImageDraw.Draw(mask).text((margin - left, margin - top), text, fill=255, font=font)
    return np.asarray(mask, np.float32) / np.float32(255)


@dataclass
class Samples:
    """The first six training clips of a run, each with a caption and its file, on the CPU."""

    clips: list[tuple[Tensor, str, Path]] = field(default_factory=list)  # (T, C, S, S) float32, normalised

    @property
    def are_wanted(self) -> bool:
        """Whether there are too few yet."""
        return len(self.clips) < 6

    def offer(self, clip: Tensor, caption: str, path: Path) -> None:
        """Keeps a copy of a clip (T, C, S, S) if more are wanted."""
        if self.are_wanted:
            self.clips.append((clip.detach().to("cpu", torch.float32, copy=True), caption, path))


def film_strip(clip: Tensor, preprocessing: Preprocessing) -> str:
    """A normalised clip (T, C, S, S) as a row of at most 16 frames of 128 pixels: a JPEG in a data URI."""
    pixels = to_pixels(spread(clip, 16), preprocessing)
    side = min(128, pixels.shape[-1])
    if side < pixels.shape[-1]:
        pixels = F.interpolate(pixels, size=(side, side), mode="bilinear", antialias=True)
    gap = torch.full((len(pixels), 3, side, 2), 128, dtype=torch.uint8)
    row = torch.cat([pixels, gap], dim=3).permute(2, 0, 3, 1)  # (S, T, S + 2, C)
    picture = row.reshape(side, -1, 3)[:, :-2].contiguous().numpy()
    return _data_uri("jpeg", simplejpeg.encode_jpeg(picture, quality=75, colorspace="RGB"))


def clip_pictures(clip: Tensor, preprocessing: Preprocessing) -> dict[str, str]:
    """A normalised clip (T, C, S, S) as data URIs: `uri`, a row of frames, and `loop`, a looped animation."""
    return {"uri": film_strip(clip, preprocessing), "loop": clip_loop(clip, preprocessing)}


def clip_loop(clip: Tensor, preprocessing: Preprocessing) -> str:
    """A normalised clip (T, C, S, S) as a loop of at most 16 frames of 128 pixels: a WebP in a data URI."""
    side = min(128, clip.shape[-1])
    frames = to_pixels(spread(clip, 16), preprocessing).permute(0, 2, 3, 1).numpy()  # (T, S, S, C)
    first, *rest = (Image.fromarray(frame).resize((side, side)) for frame in frames)
    data = io.BytesIO()
    first.save(data, "WEBP", save_all=True, append_images=rest, duration=FRAME_MS, loop=0, quality=60)
    return _data_uri("webp", data.getvalue())


def _data_uri(kind: str, data: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode('ascii')}"


def to_pixels(clip: Tensor, preprocessing: Preprocessing) -> Tensor:
    """The inverse of normalisation: float (..., C, S, S) -> uint8 of the same shape."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (preprocessing.mean, preprocessing.std))
    return ((clip.float().cpu() * std + mean) * 255).round().clamp(0, 255).to(torch.uint8)


def spread(clip: Tensor, most: int) -> Tensor:
    """At most `most` evenly spaced frames of a clip (T, ...), the first and the last included."""
    if len(clip) <= most:
        return clip
    return clip[torch.linspace(0, len(clip) - 1, most).round().long()]


SCALE = 2  # pixels per unit of the PNGs below


def _sheet(drawing: Drawing, dark: bool) -> Image.Image:
    return Image.open(io.BytesIO(to_png(drawing, scale=SCALE, dark=dark)))


def _png(image: Image.Image) -> bytes:
    data = io.BytesIO()
    image.save(data, "PNG", optimize=True)
    return data.getvalue()


SIDE, FRAME_GAP, MARGIN = 112, 4, 12  # units of the drawing
HEAD, BARS, FOOT, LINE = 30, 44, 24, 16


@dataclass(frozen=True)
class ExplanationStrip:
    """Relevance (T, P, P) of the patches of a clip, each frame's share (T,), a title and a verdict.

    The verdict has a line for each part before a semicolon.
    """

    title: str
    verdict: str
    relevance: Tensor
    frames: Sequence[float]


def relevance_png(
    clip: Tensor, preprocessing: Preprocessing, explanation: ExplanationStrip, *, dark: bool = False
) -> bytes:
    """PNG of all frames of a clip (T, C, S, S), and below them the relevance of their patches."""
    count = len(clip)
    width = max(760, 2 * MARGIN + count * SIDE + (count - 1) * FRAME_GAP)  # the verdict has long lines
    bottom = HEAD + 2 * SIDE + FRAME_GAP + BARS
    verdict = explanation.verdict.split("; ")
    height = bottom + FOOT + MARGIN + LINE * (len(verdict) - 1)
    lefts = [MARGIN + number * (SIDE + FRAME_GAP) for number in range(count)]
    shapes: list[Shape] = [Text((MARGIN, 20), explanation.title, size=14, bold=True)]
    most = max(*explanation.frames, 1e-12)
    for left, share in zip(lefts, explanation.frames, strict=True):
        tall = (BARS - 18) * share / most
        shapes.append(Box((left, bottom - tall), SIDE, tall, "one"))
        shapes.append(Text((left + SIDE / 2, bottom - tall - 3), f"{share:.0%}", "dim", 11, "middle"))
    for number, line in enumerate(reversed(verdict)):
        shapes.append(Text((MARGIN, height - MARGIN - 2 - LINE * number), line, "dim", 11.5))
    sheet = _sheet(Drawing(explanation.title, width, height, shapes), dark)
    pixels = to_pixels(clip, preprocessing).permute(0, 2, 3, 1).numpy()  # (T, S, S, C)
    size = (SIDE * SCALE, SIDE * SCALE)
    for left, picture, brightness in zip(lefts, pixels, patch_brightness(explanation.relevance), strict=True):
        frame = Image.fromarray(picture).resize(size, Image.Resampling.BICUBIC)
        light = np.asarray(Image.fromarray(brightness).resize(size, Image.Resampling.NEAREST))
        shown = np.asarray(frame) * (0.25 + 0.75 * light[..., None])
        sheet.paste(frame, (left * SCALE, HEAD * SCALE))
        below = (left * SCALE, (HEAD + SIDE + FRAME_GAP) * SCALE)
        sheet.paste(Image.fromarray(shown.astype(np.uint8)), below)
    return _png(sheet)


def patch_brightness(relevance: Tensor) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    """Brightness of each patch (T, P, P) in [0, 1]: the root of its relevance over the clip's greatest."""
    positive = relevance.clamp(min=0).float()
    return (positive / positive.max().clamp(min=1e-12)).sqrt().numpy()


WIDTH = 1000.0
STRIP, LANE, GAP = 72.0, 22.0, 6.0  # heights
RIGHT, BOTTOM = 24.0, 26.0
LABEL_SIZE = 12.0


def timeline_png(timeline: Timeline, *, dark: bool = False) -> bytes:
    """PNG of a timeline, 2000 pixels wide: opacity in a lane is the label's smoothed score, bars are segments.

    The 10 labels with the most time have lanes.
    """
    time: defaultdict[str, float] = defaultdict(float)
    for segment in timeline.segments:
        time[segment.label] += segment.end - segment.start
    kept = sorted(time, key=lambda label: -time[label])[:10]
    lanes = [label for label in time if label in kept]  # in the order of their first segments
    left = 16 + max(text_width(label, LABEL_SIZE) for label in lanes)
    image = _sheet(_timeline_drawing(timeline, lanes, left), dark)
    size = (round(STRIP * SCALE), round((WIDTH - left - RIGHT) * SCALE))
    strip = _film(timeline, *size, background=rgb("grid", dark=dark))
    image.paste(Image.fromarray(strip), (round(left * SCALE), round(GAP * SCALE)))
    return _png(image)


def _timeline_drawing(timeline: Timeline, lanes: Sequence[str], left: float) -> Drawing:
    """The lanes and the axis, with space for the strip of frames."""
    height = STRIP + 2 * GAP + LANE * len(lanes) + BOTTOM
    across = (WIDTH - left - RIGHT) / timeline.seconds
    bottom = height - BOTTOM
    shapes: list[Shape] = []
    for time in ticks(0, timeline.seconds, 10):
        if time <= timeline.seconds:
            x = left + time * across
            shapes.append(Line([(x, STRIP + 2 * GAP), (x, bottom)], "grid"))
            shapes.append(Text((x, bottom + 16), clock(time), "dim", LABEL_SIZE, "middle"))
    for number, label in enumerate(lanes):
        top = STRIP + 2 * GAP + number * LANE
        shapes.append(Text((left - 8, top + 15), label, "ink", LABEL_SIZE, "end"))
        scores = timeline.smoothed[:, timeline.labels.index(label)]
        first = 0
        for span in timeline.parts():
            values = _columns(scores[first : first + span.cells], len(scores))
            first += span.cells
            begin, width = left + span.start * across, (span.end - span.start) * across / len(values)
            for n, value in enumerate(values):
                if value >= 0.01:
                    corner, opacity = (begin + n * width, top + 3), 0.45 * float(value)
                    shapes.append(Box(corner, width, LANE - 10, "one", opacity))
        for segment in timeline.segments:
            if segment.label == label:
                width = max(1.0, (segment.end - segment.start) * across - 1)
                shapes.append(Box((left + segment.start * across, top + LANE - 7), width, 4, "one"))
    return Drawing(f"Timeline of {timeline.video}", WIDTH, height, shapes)


def clock(seconds: float) -> str:
    """A time in hours, minutes and seconds. 7.5 -> 0:07.5, 3671 -> 1:01:11"""
    whole, tenth = divmod(round(seconds * 10), 10)
    minutes, rest = divmod(whole, 60)
    hours, minutes = divmod(minutes, 60)
    text = f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
    return f"{text}.{tenth}" if tenth else text


def _columns(values: NDArray[np.float64], cells: int) -> NDArray[np.float64]:
    """Means over groups of neighbours, whose size reduces `cells` values to at most 400: more are not visible."""
    group = -(-cells // 400)
    starts = np.arange(0, len(values), group)
    counts = np.minimum(starts + group, len(values)) - starts
    return np.asarray(np.add.reduceat(values, starts) / counts)


def _film(timeline: Timeline, height: int, width: int, *, background: tuple[int, int, int]) -> Picture:
    """Frames side by side, each the nearest in time to its position: (height, width, 3)."""
    strip = np.full((height, width, 3), background, np.uint8)
    if not timeline.pictures:
        return strip
    rows, columns = timeline.pictures[0][1].shape[:2]
    wide = max(1, round(height * columns / rows))
    count = max(1, width // wide)
    times = np.array([time for time, _ in timeline.pictures])
    for number in range(count):
        begin, end = number * width // count, (number + 1) * width // count
        middle = (begin + end) / 2 / width * timeline.seconds
        nearest = np.ascontiguousarray(timeline.pictures[int(np.abs(times - middle).argmin())][1])
        scaled = np.asarray(Image.fromarray(nearest).resize((wide, height), Image.Resampling.BILINEAR))
        cut = min(wide, end - begin - 2)
        at = (wide - cut) // 2
        strip[:, begin : begin + cut] = scaled[:, at : at + cut]
    return strip
