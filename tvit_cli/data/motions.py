"""The embedded demo data set `motions`: short clips that differ from another class only in the order of frames.

Note [Reversed pairs]
Every clip has a reversed copy in the opposite class (`v_MoveLeft_g03_c02.avi` and `v_MoveRight_g03_c02.avi`).
So a model without temporal order cannot exceed an accuracy of 0.5 within a pair. The encoder must not reveal the
order either: every frame is a key frame at one fixed quantiser, so both copies decode to the same pixels; predicted
frames (P, B) or a target bit rate would break this. So would some sampling: 24 frames make 8 segments of 3, whose
centres are the same frames in both clips. Of 16 frames, the later one of each 2 would be chosen.
"""

from __future__ import annotations

import colorsys
import json
import math
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tvit_cli.data.video_writer import write_video
from tvit_cli.errors import DataError

Floats = NDArray[np.float32]
Polygon = tuple[tuple[float, float], ...]

VERSION = 1
OPPOSITES = (  # each is the other one reversed
    ("MoveRight", "MoveLeft"),
    ("MoveDown", "MoveUp"),
    ("Grow", "Shrink"),
    ("TurnClockwise", "TurnCounterclockwise"),
)
CLASSES = tuple(sorted(name for pair in OPPOSITES for name in pair))
GROUPS = {"train": range(1, 19), "val": range(19, 22), "test": range(22, 26)}  # UCF101 has 25, too
FRAMES = 24  # an odd number for each of 8 segments: see Note [Reversed pairs]
RATE = 12  # frames per second
QUANTISER = 4  # of 1..31: visually close to the source
RECORD = "motions.json"  # written last: its folder is complete


def _box(x0: float, y0: float, x1: float, y1: float) -> Polygon:
    return (x0, y0), (x1, y0), (x1, y1), (x0, y1)


# Objects: two convex polygons each, corners clockwise (y points down) within a circle of about radius 1; the first
# has the accent colour. No rotation maps an object to itself, so every turn is visible.
SHAPES: tuple[tuple[Polygon, Polygon], ...] = (
    (((0.0, -1.0), (0.72, -0.12), (-0.72, -0.12)), _box(-0.27, -0.3, 0.27, 0.95)),
    (_box(-0.6, 0.3, 0.7, 0.85), _box(-0.6, -0.9, -0.05, 0.5)),
    (((-0.35, -0.9), (0.8, -0.5), (-0.35, -0.05)), _box(-0.6, -0.9, -0.22, 0.9)),
    (_box(-0.8, -0.85, 0.8, -0.3), _box(-0.28, -0.5, 0.28, 0.95)),
    (
        ((0.25, -0.75), (0.7, -0.3), (0.7, 0.3), (0.25, 0.75), (-0.1, 0.0)),
        ((-0.95, -0.1), (0.2, -0.55), (0.2, 0.55), (-0.95, 0.1)),
    ),
)


@dataclass(frozen=True)
class Scene:
    """One group's background, wider than the frame, and object, as one recording would show."""

    background: Floats  # (3, S + margin, S + margin) in [0, 1]
    shape: tuple[Polygon, Polygon]
    accent: Floats  # (3,) in [0, 1]
    body: Floats  # (3,)


@dataclass(frozen=True)
class ObjectPath:
    """Pose of the object in each frame."""

    centre: Floats  # (N, 2) x, y in pixels
    radius: Floats  # (N,) in pixels
    angle: Floats  # (N,) in radians, clockwise


def make_motions(
    root: str | Path,
    *,
    seed: int = 0,
    clips_per_group: int = 8,
    frame_size: int = 64,
    frames: int = FRAMES,
    workers: int = 2,
    progress: Callable[[int, int], None] | None = None,
) -> int:
    """Makes `<root>/{train,val,test}/<Class>/v_<Class>_gNN_cNN.avi` and returns the number of clips.

    The same arguments give the same bytes with any number of `workers`. `boxes.json` has the object's box x0, y0,
    x1, y1 in pixels for each frame of each clip, by its path under `root`; `motions.json` has version, seed and
    counts. `root` appears complete or not at all. `progress` gets the clips done and in all, in this thread.

    Raises DataError if `root` exists and is not empty, or for a `frame_size` that is odd or below 32; RunError if a
    clip cannot be written.
    """
    root = Path(root)
    if frame_size < 32 or frame_size % 2:  # MPEG-4 at 4:2:0 needs even sides; objects need pixels
        raise DataError(f"frame_size: {frame_size}: it should be even, and at least 32.")
    if root.exists() and (not root.is_dir() or any(root.iterdir())):
        raise DataError(f"{root}: exists and is not empty. Delete it or name another folder.")
    groups = {group: subset for subset, numbers in GROUPS.items() for group in numbers}
    counts = {subset: len(numbers) * clips_per_group * len(CLASSES) for subset, numbers in GROUPS.items()}
    total = sum(counts.values())
    root.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{root.name}-"
    with tempfile.TemporaryDirectory(prefix=prefix, dir=root.parent, ignore_cleanup_errors=True) as folder:
        temporary = Path(folder)
        boxes: dict[str, list[list[float]]] = {}
        pool = ThreadPoolExecutor(max(1, workers))
        try:
            jobs = [
                pool.submit(_make_group, temporary / subset, group, seed, clips_per_group, frame_size, frames)
                for group, subset in groups.items()
            ]
            for job in as_completed(jobs):
                boxes.update(job.result())
                if progress is not None:
                    progress(len(boxes), total)
        finally:
            pool.shutdown(cancel_futures=True)
        record = {"version": VERSION, "seed": seed, "classes": CLASSES, "clips": counts}
        record |= {"frames": frames, "frame_size": frame_size}
        (temporary / "boxes.json").write_text(json.dumps(boxes, sort_keys=True), encoding="utf-8")
        (temporary / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        temporary.chmod(0o755)  # temporary folders are private to the user
        try:
            if root.exists():
                root.rmdir()  # empty; a rename onto it would fail on Windows
            temporary.rename(root)
        except OSError:
            if not is_motions(root):  # else another process was faster
                raise
    return total


def is_motions(root: Path) -> bool:
    """Whether `root` is a complete motions data set of this version."""
    try:
        record = json.loads((root / RECORD).read_text(encoding="utf-8"))
        return bool(record["version"] == VERSION) and all(
            len(list((root / subset).glob("*/*.avi"))) == count for subset, count in record["clips"].items()
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return False  # no record, or another program's


def _make_group(
    folder: Path, group: int, seed: int, clips: int, frame_size: int, frames: int
) -> dict[str, list[list[float]]]:
    """Writes all clips of one group under `<folder>/<Class>` and returns their boxes."""
    scene = _make_scene(np.random.default_rng((seed, group)), group, frame_size)
    boxes = {}
    for axis, pair in enumerate(OPPOSITES):
        for clip in range(1, clips + 1):
            generator = np.random.default_rng((seed, group, axis, clip))
            path = _path(generator, pair[0], frame_size, frames)
            top, left = generator.integers(0, scene.background.shape[1] - frame_size + 1, 2)
            ground = scene.background[:, top : top + frame_size, left : left + frame_size]
            canvas, found = _draw(ground, scene, path)
            canvas *= 255
            pictures = np.rint(canvas, out=canvas).astype(np.uint8).transpose(0, 2, 3, 1)  # (N, S, S, 3)
            for name, order in zip(pair, (slice(None), slice(None, None, -1)), strict=True):
                file = folder / name / f"v_{name}_g{group:02d}_c{clip:02d}.avi"
                file.parent.mkdir(parents=True, exist_ok=True)
                # Every frame is a key frame: see Note [Reversed pairs].
                write_video(file, pictures[order], rate=RATE, quantiser=QUANTISER, options={"g": "1"})
                boxes[file.relative_to(folder.parent).as_posix()] = found[order].round(1).tolist()
    return boxes


def _path(generator: np.random.Generator, name: str, size: int, frames: int) -> ObjectPath:
    """A random path of class `name`; nothing else varies over time."""
    time = np.linspace(0, 1, frames)
    # Speeds up, slows down, or both. Reversed, the distribution is the same.
    ease, skew = generator.uniform(-0.4, 0.4, 2)
    progress = time + ease / (2 * math.pi) * np.sin(2 * math.pi * time) + skew * time * (1 - time)
    swing = (progress - 0.5).astype(np.float32)  # -0.5 -> 0.5

    radius = np.full(frames, generator.uniform(0.22, 0.28) * size, np.float32)
    angle = np.full(frames, generator.uniform(0, 2 * math.pi), np.float32)
    travel = np.zeros(2, np.float32)  # x, y
    arm = 0.0  # distance from the pivot to the object
    if name in ("MoveRight", "MoveDown"):
        travel[int(name == "MoveDown")] = generator.uniform(0.35, 0.5) * size
    elif name == "Grow":
        radius *= generator.uniform(2.0, 2.8) ** swing
    elif name == "TurnClockwise":
        # It points up at half time: with any angle, a small model learns turns several times slower.
        half = math.radians(generator.uniform(-45, 45))
        angle = (half + math.radians(generator.uniform(170, 230)) * swing).astype(np.float32)
        arm = generator.uniform(0.17, 0.22) * size
    reach = np.minimum(travel / 2 + 0.9 * radius.max() + arm, size / 2)
    middle = generator.uniform(reach, size - reach)  # so that the whole path stays in the frame
    outwards = np.stack((np.sin(angle), -np.cos(angle)), axis=1)  # direction of the object's top
    centre = (middle + swing[:, None] * travel + arm * outwards).astype(np.float32)
    return ObjectPath(centre=centre, radius=radius, angle=angle)


def _make_scene(generator: np.random.Generator, group: int, size: int) -> Scene:
    """A soft two-tone texture and an object in two saturated colours, one dark, one light."""
    side = size + size // 2  # each clip shows its own crop
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
    )[group % 3]
    mix = 0.5 + 0.14 * pattern + 0.45 * _noise(generator, side, 4) + 0.25 * _noise(generator, side, 13)
    dark = generator.uniform(0.3, 0.45)
    shift, light = generator.uniform(-0.1, 0.1), generator.uniform(0.6, 0.75)
    tones = [
        colorsys.hsv_to_rgb((hue + shift) % 1, generator.uniform(0.15, 0.4), value)
        for shift, value in ((0.0, dark), (shift, light))
    ]
    background = tones[0] + np.clip(mix, 0, 1)[..., None] * np.subtract(tones[1], tones[0])
    # Blue to red is dark, orange to cyan is light: the parts differ at any hue.
    body = colorsys.hsv_to_rgb(generator.uniform(0.6, 1.0), 0.9, 0.8)
    accent = colorsys.hsv_to_rgb(generator.uniform(0.1, 0.5), 0.85, 1.0)
    return Scene(
        background=np.ascontiguousarray(background.transpose(2, 0, 1), np.float32),
        shape=SHAPES[group % len(SHAPES)],
        accent=np.array(accent, np.float32),
        body=np.array(body, np.float32),
    )


def _noise(generator: np.random.Generator, side: int, cells: int) -> NDArray[np.float64]:
    """Value noise in [-0.5, 0.5], (side, side): a coarse random grid, smoothly interpolated."""
    position = np.linspace(0, cells, side, endpoint=False)
    left = position.astype(int)
    share = position - left
    share = share * share * (3 - 2 * share)  # smoothstep
    weights = np.zeros((side, cells + 1))
    weights[np.arange(side), left] = 1 - share
    weights[np.arange(side), left + 1] = share
    mixed: NDArray[np.float64] = weights @ generator.uniform(-0.5, 0.5, (cells + 1, cells + 1)) @ weights.T
    return mixed


def _draw(ground: Floats, scene: Scene, path: ObjectPath) -> tuple[Floats, NDArray[np.float64]]:
    """Draws the anti-aliased object with a shadow on `ground` (3, S, S): canvas (N, 3, S, S), boxes (N, 4)."""
    size = ground.shape[-1]
    rim = size / 50  # a light edge that contrasts with any background
    parts = [_distance(polygon, path, size) for polygon in scene.shape]
    whole = np.minimum(*parts)

    down, right = round(size / 26), round(size / 32)  # offset of the shadow
    shadow = np.pad(whole, ((0, 0), (down, 0), (right, 0)), mode="edge")[:, :size, :size]
    canvas = ground * (1 - 0.4 * np.clip(0.5 - (shadow - rim) / (3 * rim), 0, 1)[:, None])  # (N, 3, S, S)
    step = np.empty_like(canvas)
    layers = ((whole - rim, np.full(3, 0.97, np.float32)), (parts[1], scene.body), (parts[0], scene.accent))
    for distance, colour in layers:
        np.subtract(colour[:, None, None], canvas, out=step)
        step *= np.clip(0.5 - distance, 0, 1)[:, None]
        canvas += step

    corners = np.concatenate([np.array(polygon) for polygon in scene.shape])  # (K, 2)
    cos, sin = np.cos(path.angle)[:, None], np.sin(path.angle)[:, None]
    x, y = corners.T
    turned = np.stack((cos * x - sin * y, sin * x + cos * y), axis=-1)
    corners_at = path.centre[:, None] + path.radius[:, None, None] * turned  # (N, K, 2)
    boxes = np.concatenate((corners_at.min(1) - rim, corners_at.max(1) + rim), axis=1).clip(0, size)
    return canvas, boxes


def _distance(polygon: Polygon, path: ObjectPath, size: int) -> Floats:
    """Signed distance in pixels to a convex polygon's edge lines, negative inside, (N, S, S)."""
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
