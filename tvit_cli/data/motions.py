"""The embedded demo data set `motions`: short clips whose class is only in the order of frames.

Note [Twins in time]
Every clip has a twin: the same pictures, played backwards, under the name of the opposite class
(`v_MoveLeft_g03_c02.avi` and `v_MoveRight_g03_c02.avi`). So no property of unordered frames - where the
object is, how it looks, how fast it gets, how often a picture occurs - can tell a class from its opposite,
and a model that does not know the order cannot beat 0.5. The encoder must not give the order away either:
every frame is a key frame at one fixed quantiser, hence coded without regard to its neighbours, and a twin
decodes to the very same pixels, reversed. Predicted frames (P, B) or a bit rate target would break this.
Nor may the sampling: 24 frames make 8 segments of 3, whose centres are the same pictures in both twins. With
16, the later frame of each 2 would be taken, and the object would be seen a little farther on its way.
"""

from __future__ import annotations

import colorsys
import json
import math
import shutil
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from tvit_cli.data.video_writer import write_video
from tvit_cli.errors import DataError

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


VERSION: Final = 1
OPPOSITES: Final = (  # played backwards, a clip of one is a clip of the other
    ("MoveRight", "MoveLeft"),
    ("MoveDown", "MoveUp"),
    ("Grow", "Shrink"),
    ("TurnClockwise", "TurnCounterclockwise"),
)
CLASSES: Final[tuple[str, ...]] = tuple(sorted(name for pair in OPPOSITES for name in pair))
GROUPS: Final = {"train": range(1, 19), "val": range(19, 22), "test": range(22, 26)}  # UCF101 has 25, too
CLIPS_PER_GROUP: Final = 8  # of each class
FRAMES: Final = 24  # an odd number for each of 8 segments: see Note [Twins in time]
RATE: Final = 12  # frames per second
QUANTISER: Final = 4  # of 1..31; hard to tell from the source
RECORD: Final = "motions.json"  # written last: a folder with it is whole
BOXES: Final = "boxes.json"

# Objects are two convex polygons each, corners in clockwise order (y points down), within a circle of about
# radius 1; the first takes the accent colour. No rotation maps one to itself, so that each turn can be seen.
SHAPES: Final = (
    (
        ((0.0, -1.0), (0.72, -0.12), (-0.72, -0.12)),
        ((-0.27, -0.3), (0.27, -0.3), (0.27, 0.95), (-0.27, 0.95)),
    ),
    (
        ((-0.6, 0.3), (0.7, 0.3), (0.7, 0.85), (-0.6, 0.85)),
        ((-0.6, -0.9), (-0.05, -0.9), (-0.05, 0.5), (-0.6, 0.5)),
    ),
    (((-0.35, -0.9), (0.8, -0.5), (-0.35, -0.05)), ((-0.6, -0.9), (-0.22, -0.9), (-0.22, 0.9), (-0.6, 0.9))),
    (
        ((-0.8, -0.85), (0.8, -0.85), (0.8, -0.3), (-0.8, -0.3)),
        ((-0.28, -0.5), (0.28, -0.5), (0.28, 0.95), (-0.28, 0.95)),
    ),
    (
        ((0.25, -0.75), (0.7, -0.3), (0.7, 0.3), (0.25, 0.75), (-0.1, 0.0)),
        ((-0.95, -0.1), (0.2, -0.55), (0.2, 0.55), (-0.95, 0.1)),
    ),
)


def make_motions(
    root: Path,
    *,
    seed: int = 0,
    clips_per_group: int = CLIPS_PER_GROUP,
    frame_size: int = 64,
    frames: int = FRAMES,
    workers: int = 2,
    progress: Callable[[int, int], None] | None = None,
) -> int:
    """Makes `<root>/{train,val,test}/<Class>/v_<Class>_gNN_cNN.avi` and returns the number of clips.

    The same arguments give the same bytes, whatever `workers` is. Beside the clips lie `boxes.json` (for each
    clip, by its path under `root`, the object's box x0, y0, x1, y1 in pixels in each frame) and
    `motions.json` (version, seed, counts). `root` appears when all is written, or not at all. `progress` is
    called in this thread with the clips made and the clips to make.

    Raises DataError where `root` holds something already, RunError where a clip cannot be written.
    """
    assert frame_size >= 32 and frame_size % 2 == 0, "MPEG-4 at 4:2:0 needs even sides; objects need pixels"
    if root.exists() and (not root.is_dir() or any(root.iterdir())):
        raise DataError(
            f"{root}: there is something already, and no folder is overwritten. "
            "Delete it or name another folder."
        )
    groups = {group: subset for subset, numbers in GROUPS.items() for group in numbers}
    counts = {subset: len(numbers) * clips_per_group * len(CLASSES) for subset, numbers in GROUPS.items()}
    total = sum(counts.values())
    root.parent.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(prefix=f".{root.name}-", dir=root.parent))
    try:
        boxes: dict[str, list[list[float]]] = {}
        with ThreadPoolExecutor(max(1, workers)) as pool:
            jobs = [
                pool.submit(_make_group, beside / subset, group, seed, clips_per_group, frame_size, frames)
                for group, subset in groups.items()
            ]
            try:
                for job in as_completed(jobs):
                    boxes.update(job.result())
                    if progress is not None:
                        progress(len(boxes), total)
            finally:
                pool.shutdown(cancel_futures=True)
        record = {
            "version": VERSION,
            "seed": seed,
            "classes": CLASSES,
            "clips": counts,
            "frames": frames,
            "frame_size": frame_size,
        }
        (beside / BOXES).write_text(json.dumps(boxes, sort_keys=True), encoding="utf-8")
        (beside / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        beside.chmod(0o755)  # mkdtemp's 0o700 would hide the data set from other people of this machine
        try:
            if root.exists():
                root.rmdir()  # empty, as seen above; a rename onto it would fail on Windows
            beside.rename(root)
        except OSError:
            if not is_motions(root):
                raise
            shutil.rmtree(beside)  # another process was faster
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise
    return total


def is_motions(root: Path) -> bool:
    """Whether `root` holds a whole motions data set of this version."""
    try:
        record = json.loads((root / RECORD).read_text(encoding="utf-8"))
        return bool(record["version"] == VERSION) and all(
            len(list((root / subset).glob("*/*.avi"))) == count for subset, count in record["clips"].items()
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False  # no record, or not one of ours


def _make_group(
    folder: Path, group: int, seed: int, clips: int, frame_size: int, frames: int
) -> dict[str, list[list[float]]]:
    """Writes all clips of one group under `<folder>/<Class>` and returns their boxes."""
    shape = SHAPES[group % len(SHAPES)]
    scene = make_scene(np.random.default_rng((seed, group)), shape, kind=group % 3, size=frame_size)
    boxes = {}
    for axis, pair in enumerate(OPPOSITES):
        for clip in range(1, clips + 1):
            generator = np.random.default_rng((seed, group, axis, clip))
            path = _path(generator, pair[0], frame_size, frames)
            top, left = generator.integers(0, scene.background.shape[1] - frame_size + 1, 2)
            ground = scene.background[:, top : top + frame_size, left : left + frame_size]
            canvas, found = draw(ground, scene, path)
            pictures = as_pictures(canvas)
            for name, order in zip(pair, (slice(None), slice(None, None, -1)), strict=True):
                file = folder / name / f"v_{name}_g{group:02d}_c{clip:02d}.avi"
                file.parent.mkdir(parents=True, exist_ok=True)
                _encode(file, pictures[order])
                boxes[file.relative_to(folder.parent).as_posix()] = found[order].round(1).tolist()
    return boxes


def _path(generator: np.random.Generator, name: str, size: int, frames: int) -> ObjectPath:
    """The object's path in a clip of class `name`; only what the class names varies over time."""
    time = np.linspace(0, 1, frames)
    # Speeds up, slows down, or both. Backwards it is a speed profile of the same distribution.
    ease, lean = generator.uniform(-0.4, 0.4, 2)
    progress = time + ease / (2 * math.pi) * np.sin(2 * math.pi * time) + lean * time * (1 - time)
    swing = (progress - 0.5).astype(np.float32)  # -0.5 -> 0.5

    radius = np.full(frames, generator.uniform(0.22, 0.28) * size, np.float32)
    angle = np.full(frames, generator.uniform(0, 2 * math.pi), np.float32)
    travel = np.zeros(2, np.float32)  # x, y
    hand = 0.0  # from the pivot to the object: it turns as the hand of a clock
    if name == "MoveRight":
        travel[0] = generator.uniform(0.35, 0.5) * size
    elif name == "MoveDown":
        travel[1] = generator.uniform(0.35, 0.5) * size
    elif name == "Grow":
        radius *= generator.uniform(2.0, 2.8) ** swing
    elif name == "TurnClockwise":
        # Half way it points more or less up. From any angle, a small model learns turns several times slower.
        half = math.radians(generator.uniform(-45, 45))
        angle = (half + math.radians(generator.uniform(170, 230)) * swing).astype(np.float32)
        hand = generator.uniform(0.17, 0.22) * size
    reach = np.minimum(travel / 2 + 0.9 * radius.max() + hand, size / 2)
    middle = generator.uniform(reach, size - reach)  # so that the whole path stays in the picture
    outwards = np.stack((np.sin(angle), -np.cos(angle)), axis=1)  # where the object's top points
    centre = (middle + swing[:, None] * travel + hand * outwards).astype(np.float32)
    return ObjectPath(centre=centre, radius=radius, angle=angle)


def _encode(file: Path, pictures: Pictures) -> None:
    """MPEG-4 in AVI, each frame by itself. See Note [Twins in time]."""
    write_video(file, pictures, rate=RATE, quantiser=QUANTISER, options={"g": "1"})
