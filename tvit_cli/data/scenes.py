"""Drawn scenes: an object of two polygons that moves over a soft texture, frame by frame."""

from __future__ import annotations

import colorsys
import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Pictures = NDArray[np.uint8]
Polygon = tuple[tuple[float, float], ...]  # corners in clockwise order, y down, within a circle of radius 1
Shape = tuple[Polygon, ...]  # two of them, convex; the first takes the accent colour


@dataclass(frozen=True)
class Scene:
    """What one group shares, as one recording would: a background wider than the frame, and an object."""

    background: Floats  # (3, S + margin, S + margin) in [0, 1]
    shape: Shape
    accent: Floats  # (3,) in [0, 1]
    body: Floats  # (3,)


@dataclass(frozen=True)
class ObjectPath:
    """Where the object is in each frame: pixels, pixels, radians, clockwise as seen."""

    centre: Floats  # (N, 2) x, y
    radius: Floats  # (N,)
    angle: Floats  # (N,)


def make_scene(generator: np.random.Generator, shape: Shape, *, kind: int, size: int) -> Scene:
    """A soft two-tone texture and an object in two saturated colours, one dark, one light."""
    side = size + size // 2  # each clip looks at its own part
    hue = generator.random()
    rows, columns = np.mgrid[0:side, 0:side] / size
    turn = generator.uniform(0, math.pi)
    along = rows * math.sin(turn) + columns * math.cos(turn)
    across = columns * math.sin(turn) - rows * math.cos(turn)
    waves = 2 * math.pi * generator.uniform(2, 4)
    pattern = (
        np.sin(waves * along),  # stripes
        np.sin(waves * along) * np.sin(waves * across),  # spots
        np.sin(waves * along + 2 * np.sin(waves / 3 * across)),  # ripples
    )[kind]
    mix = 0.5 + 0.14 * pattern + 0.45 * _noise(generator, side, 4) + 0.25 * _noise(generator, side, 13)
    tones = [
        colorsys.hsv_to_rgb((hue + shift) % 1, generator.uniform(0.15, 0.4), value)
        for shift, value in (
            (0.0, generator.uniform(0.3, 0.45)),
            (generator.uniform(-0.1, 0.1), generator.uniform(0.6, 0.75)),
        )
    ]
    background = tones[0] + np.clip(mix, 0, 1)[..., None] * np.subtract(tones[1], tones[0])
    # Blue to red is dark, orange to cyan is light: which end is which can be seen whatever the hues are.
    body = colorsys.hsv_to_rgb(generator.uniform(0.6, 1.0), 0.9, 0.8)
    accent = colorsys.hsv_to_rgb(generator.uniform(0.1, 0.5), 0.85, 1.0)
    return Scene(
        background=np.ascontiguousarray(background.transpose(2, 0, 1), np.float32),
        shape=shape,
        accent=np.array(accent, np.float32),
        body=np.array(body, np.float32),
    )


def _noise(generator: np.random.Generator, side: int, cells: int) -> NDArray[np.float64]:
    """Value noise in [-0.5, 0.5], (side, side): a coarse random grid, smoothly interpolated."""
    place = np.linspace(0, cells, side, endpoint=False)
    left = place.astype(int)
    share = place - left
    share = share * share * (3 - 2 * share)  # smoothstep
    weights = np.zeros((side, cells + 1))
    weights[np.arange(side), left] = 1 - share
    weights[np.arange(side), left + 1] = share
    mixed: NDArray[np.float64] = weights @ generator.uniform(-0.5, 0.5, (cells + 1, cells + 1)) @ weights.T
    return mixed


def draw(ground: Floats, scene: Scene, path: ObjectPath) -> tuple[Floats, NDArray[np.float64]]:
    """The scene's object, with anti-aliased edges and a shade, on a ground of (3, S, S) or one for each frame.

    The canvas is (N, 3, S, S) in [0, 1], boxes are (N, 4) in pixels.
    """
    size = ground.shape[-1]
    rim = size / 50  # a light edge, so that the object stands out from any ground
    parts = [_distance(polygon, path, size) for polygon in scene.shape]
    whole = np.minimum(*parts)

    down, right = round(size / 26), round(size / 32)  # where the shade falls: the light is above, left
    shade = np.pad(whole, ((0, 0), (down, 0), (right, 0)), mode="edge")[:, :size, :size]
    canvas = ground * (1 - 0.4 * np.clip(0.5 - (shade - rim) / (3 * rim), 0, 1)[:, None])  # (N, 3, S, S)
    step = np.empty_like(canvas)
    for distance, colour in (
        (whole - rim, np.full(3, 0.97, np.float32)),
        (parts[1], scene.body),
        (parts[0], scene.accent),
    ):
        np.subtract(colour[:, None, None], canvas, out=step)
        step *= np.clip(0.5 - distance, 0, 1)[:, None]
        canvas += step

    corners = np.concatenate([np.array(polygon) for polygon in scene.shape])  # (K, 2)
    cos, sin = np.cos(path.angle)[:, None], np.sin(path.angle)[:, None]
    x, y = corners.T
    turned = np.stack((cos * x - sin * y, sin * x + cos * y), axis=-1)
    seen = path.centre[:, None] + path.radius[:, None, None] * turned  # (N, K, 2)
    boxes = np.concatenate((seen.min(1) - rim, seen.max(1) + rim), axis=1).clip(0, size)
    return canvas, boxes


def as_pictures(canvas: Floats) -> Pictures:
    """uint8 (N, S, S, 3) of a canvas, which is used up."""
    canvas *= 255
    return np.rint(canvas, out=canvas).astype(np.uint8).transpose(0, 2, 3, 1)


def _distance(polygon: Polygon, path: ObjectPath, size: int) -> Floats:
    """Signed distance in pixels to a convex polygon, negative inside, (N, S, S).

    A convex polygon is where no edge has the point on its outer side: the largest of the distances to its
    edges' lines. Outside, near a corner, that is less than the true distance, which sharpens the rim there.
    """
    pixel = np.arange(size, dtype=np.float32) + 0.5
    cos, sin = np.cos(path.angle), np.sin(path.angle)
    farthest = np.full((len(path.angle), size, size), -np.inf, np.float32)
    for (x0, y0), (x1, y1) in zip(polygon, polygon[1:] + polygon[:1], strict=True):
        length = math.hypot(x1 - x0, y1 - y0)
        nx, ny = (y1 - y0) / length, (x0 - x1) / length  # outwards for clockwise corners, y down
        across, down = cos * nx - sin * ny, sin * nx + cos * ny  # (N,) the normal, turned with the object
        offset = across * path.centre[:, 0] + down * path.centre[:, 1] + path.radius * (nx * x0 + ny * y0)
        column = across[:, None] * pixel - offset[:, None]  # (N, S) over x
        row = down[:, None] * pixel  # (N, S) over y
        np.maximum(farthest, column[:, None, :] + row[:, :, None], out=farthest)
    return farthest
