"""RandAugment against plain reference operations."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from tvit_cli.data import augment as module
from tvit_cli.data.augment import OPERATIONS, Augmentation, Kind, draw_generator, randaugment

SIZE = 20
FILL = torch.tensor([10.0, 128.0, 250.0])
GEOMETRIC = ("shear_x", "shear_y", "translate_x", "translate_y", "rotate")
Frames = np.ndarray  # (T, H, W, C)


def clip(seed=0, frames=3):
    """Smooth colours of 40 to 200, so that a misplaced pixel shows and a rounded one does not."""
    rows, columns, places = np.meshgrid(np.arange(SIZE), np.arange(SIZE), np.arange(frames), indexing="ij")
    generator = np.random.default_rng(seed)
    waves = [
        np.sin(a * rows + b * columns + c * places + seed) for a, b, c in generator.uniform(0.1, 0.6, (3, 3))
    ]
    pixels = np.stack(waves, axis=-1) * 80 + 120  # (H, W, T, C)
    return torch.from_numpy(pixels.round().astype(np.uint8)).permute(2, 3, 0, 1).contiguous()


def grey(x):
    return np.rint(x @ np.array([0.299, 0.587, 0.114]))[..., None]


def towards(dull, x, level):
    return dull + (1 + 0.9 * level) * (x - dull)


def source(name, x, y, level):
    """Source positions of the pixels shown, from the top left corner."""
    if name == "rotate":
        turn, x, y = math.radians(30 * level), x - SIZE / 2, y - SIZE / 2
        return (
            math.cos(turn) * x - math.sin(turn) * y + SIZE / 2,
            math.sin(turn) * x + math.cos(turn) * y + SIZE / 2,
        )
    shift = {"shear_x": 0.3 * y, "shear_y": 0.3 * x}.get(name, 150 / 331 * SIZE) * level
    return (x + shift, y) if name.endswith("x") else (x, y + shift)


def moved(name, x, level):
    padded = np.full((len(x), 3 * SIZE, 3 * SIZE, 3), FILL.numpy())
    padded[:, SIZE : 2 * SIZE, SIZE : 2 * SIZE] = x
    out = np.empty(x.shape)
    for row in range(SIZE):
        for column in range(SIZE):
            across, down = source(name, column + 0.5, row + 0.5, level)
            left, top = math.floor(across - 0.5), math.floor(down - 0.5)
            right_share, lower_share = across - 0.5 - left, down - 0.5 - top
            square = padded[:, top + SIZE : top + SIZE + 2, left + SIZE : left + SIZE + 2]
            rows = square[:, 0] * (1 - lower_share) + square[:, 1] * lower_share
            out[:, row, column] = rows[:, 0] * (1 - right_share) + rows[:, 1] * right_share
    return out


def smoothed(x):
    out = x.copy()
    for row in range(1, SIZE - 1):
        for column in range(1, SIZE - 1):
            around = x[:, row - 1 : row + 2, column - 1 : column + 2].sum(axis=(1, 2))
            out[:, row, column] = np.rint((around + 4 * x[:, row, column]) / 13)
    return out


def equalized(x):
    out = x.copy()
    for channel in range(3):
        values, counts = np.unique(x[..., channel], return_counts=True)
        step = (counts.sum() - counts[-1]) // 255
        if step:
            below = np.concatenate([[0], counts.cumsum()[:-1]])
            table = dict(zip(values, (below + step // 2) // step, strict=True))
            out[..., channel] = np.vectorize(table.get)(x[..., channel])
    return out


REFERENCES: dict[str, Callable[[Frames, float], Frames]] = {
    "identity": lambda x, level: x,
    **{name: lambda x, level, name=name: moved(name, x, level) for name in GEOMETRIC},  # type: ignore[misc]
    "brightness": lambda x, level: towards(0.0, x, level),
    "color": lambda x, level: towards(grey(x), x, level),
    "contrast": lambda x, level: towards(np.rint(grey(x).mean()), x, level),
    "sharpness": lambda x, level: towards(smoothed(x), x, level),
    "posterize": lambda x, level: x - x % 2 ** round(4 * abs(level)),
    "solarize": lambda x, level: np.where(x < 256 - 256 * abs(level), x, 255 - x),
    "autocontrast": lambda x, level: (
        (x - x.min(axis=(0, 1, 2))) * 255 / (x.max(axis=(0, 1, 2)) - x.min(axis=(0, 1, 2)))
    ),
    "equalize": lambda x, level: equalized(x),
}


def channels_last(pixels):
    return pixels.permute(0, 2, 3, 1).numpy().astype(float)


@pytest.mark.parametrize("level", [-0.9, 0.3, 1.0])
@pytest.mark.parametrize("name", OPERATIONS)
def test_an_operation_is_what_a_plain_reference_computes(name, level):
    pixels = clip()
    before = pixels.clone()
    out = OPERATIONS[name](pixels, level, FILL)
    assert out.dtype == torch.uint8 and out.shape == pixels.shape
    assert torch.equal(pixels, before)
    expected = REFERENCES[name](channels_last(pixels), level).clip(0, 255)
    assert np.abs(channels_last(out) - expected).max() <= 0.51
    assert name == "identity" or not torch.equal(out, pixels)


@pytest.mark.parametrize("level", [-0.9, 0.3, 1.0])
@pytest.mark.parametrize("name", OPERATIONS)
def test_an_operation_is_what_pillow_computes(name, level):
    image, enhance, ops = (
        pytest.importorskip(f"PIL.{part}") for part in ("Image", "ImageEnhance", "ImageOps")
    )
    pixels = clip(1)
    frames = channels_last(pixels).astype(np.uint8)
    # frames below each other: what sees the whole clip
    picture = image.fromarray(frames.reshape(-1, SIZE, 3))
    out = channels_last(OPERATIONS[name](pixels, level, FILL))
    inside = np.ones((SIZE, SIZE), bool)
    change = {
        "identity": lambda: picture,
        "posterize": lambda: ops.posterize(picture, 8 - round(4 * abs(level))),
        "solarize": lambda: ops.solarize(picture, 256 - 256 * abs(level)),
        "autocontrast": lambda: ops.autocontrast(picture),
        "equalize": lambda: ops.equalize(picture),
    }
    if name in GEOMETRIC:
        x0, y0 = source(name, 0, 0, level)
        (x1, y1), (x2, y2) = source(name, 1, 0, level), source(name, 0, 1, level)
        matrix = (x1 - x0, x2 - x0, x0, y1 - y0, y2 - y0, y0)
        each = [
            image.fromarray(f).transform(
                (SIZE, SIZE), image.Transform.AFFINE, matrix, image.Resampling.BILINEAR
            )
            for f in frames
        ]
        expected = np.stack([np.asarray(f) for f in each])
        for row in range(SIZE):
            for column in range(SIZE):  # at the edge Pillow repeats pixels instead of blending with the fill
                place = source(name, column + 0.5, row + 0.5, level)
                inside[row, column] = all(0.5 < p < SIZE - 0.5 for p in place)
    elif name == "sharpness":
        each = [enhance.Sharpness(image.fromarray(f)).enhance(1 + 0.9 * level) for f in frames]
        expected = np.stack([np.asarray(f) for f in each])
    else:
        enhanced = lambda: getattr(enhance, name.capitalize())(picture).enhance(1 + 0.9 * level)  # noqa: E731
        expected = np.asarray(change.get(name, enhanced)()).reshape(frames.shape)
    assert inside.mean() > 0.3
    # Pillow drops the fraction where these round, and its interpolation has eight bits.
    assert np.abs(out - expected.astype(float))[:, inside].max() <= 1 + (name in GEOMETRIC)


@pytest.mark.parametrize("value", [0, 7, 255])
def test_a_clip_of_one_colour_stays_of_one_colour(value):
    pixels = torch.full((2, 3, SIZE, SIZE), value, dtype=torch.uint8)
    for name, operation in OPERATIONS.items():
        out = operation(pixels, 0.9, torch.full((3,), float(value)))
        assert out.unique().numel() == 1, name
        if name in ("autocontrast", "equalize", "color", "contrast", "sharpness", *GEOMETRIC):
            assert torch.equal(out, pixels), name


def test_magnitude_0_changes_nothing_but_what_has_no_magnitude():
    pixels = clip()
    for name, operation in OPERATIONS.items():
        if name not in ("autocontrast", "equalize"):
            assert torch.equal(operation(pixels, 0.0, FILL), pixels), name


def test_what_moves_a_frame_never_mirrors_it():
    columns = torch.linspace(60, 200, SIZE).round().to(torch.uint8).expand(1, 3, SIZE, SIZE)
    for name in GEOMETRIC:
        for level in (-1.0, 1.0):
            out = OPERATIONS[name](columns.contiguous(), level, torch.full((3,), 130.0)).float()
            steps = out.diff(dim=-1)
            assert (steps > 0).sum() > 4 * (steps < 0).sum(), name


def go(pixels, index=0, *, operations=2, magnitude=9.0, seed=0, epoch=0):
    how = Augmentation(randaugment=operations, randaugment_magnitude=magnitude)
    generator = draw_generator(seed, Kind.RANDAUGMENT, epoch, index)
    return randaugment(pixels, how, fill=FILL, generator=generator)


def test_a_still_clip_stays_still():
    still = clip(frames=1).expand(4, -1, -1, -1)
    for index in range(30):
        out = go(still, index)
        assert torch.equal(out, out[:1].expand_as(out))


def test_operations_are_drawn_from_seed_epoch_and_index_and_nothing_else(monkeypatch):
    drawn = []

    def spy(name):
        return lambda pixels, level, fill: drawn.append((name, level)) or pixels  # type: ignore[func-returns-value]

    monkeypatch.setattr(module, "OPERATIONS", {name: spy(name) for name in OPERATIONS})

    def draws(**key):
        drawn.clear()
        go(clip(), **key)
        return list(drawn)

    base = draws(operations=8)
    torch.manual_seed(3)
    np.random.seed(3)
    assert draws(operations=8) == base and len(base) == 8
    assert draws(operations=3) == base[:3]
    assert base not in [draws(operations=8, **{key: 1}) for key in ("seed", "epoch", "index")]
    many = [draw for index in range(200) for draw in draws(index=index)]
    assert {name for name, _ in many} == set(OPERATIONS)
    assert {level for _, level in many} == {-0.9, 0.9}
    counts = [sum(name == other for other, _ in many) for name in OPERATIONS]
    assert min(counts) > 400 / 14 / 3 and max(counts) < 400 / 14 * 2
    assert {level for _, level in draws(magnitude=3.0, operations=16)} == {-0.3, 0.3}


def test_frames_that_are_moved_at_once_are_those_that_are_moved_one_by_one(monkeypatch):
    one_by_one = OPERATIONS["rotate"](clip(), 0.7, FILL)
    monkeypatch.setattr(Tensor, "chunk", lambda pixels, pieces: (pixels,))
    assert torch.equal(OPERATIONS["rotate"](clip(), 0.7, FILL), one_by_one)


@pytest.mark.parametrize("name", OPERATIONS)
def test_no_operation_asks_the_device_for_a_number(name):
    """The meta device has no numbers to give."""
    there = OPERATIONS[name](clip().to("meta"), 0.7, FILL)
    assert (there.shape, there.dtype) == (clip().shape, torch.uint8)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_gives_what_the_cpu_gives():
    for name, operation in OPERATIONS.items():
        for level in (-0.9, 0.4):
            there = operation(clip().cuda(), level, FILL).cpu().int()
            assert (there - operation(clip(), level, FILL).int()).abs().max() <= 1, name
