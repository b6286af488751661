"""Augmentation: transforms, RandAugment, mixup and CutMix."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tvit_cli.data import augment
from tvit_cli.data import augment as module
from tvit_cli.data.augment import (
    OPERATIONS,
    Augmentation,
    Kind,
    Mixing,
    draw_generator,
    eval_transform,
    mix,
    randaugment,
    train_transform,
)
from tvit_cli.settings.card import Preprocessing

CPU = torch.device("cpu")
SIZE = 32
STILL = Augmentation((1.0, 1.0), (1.0, 1.0), horizontal_flip=0, brightness=0, contrast=0, saturation=0, hue=0)
GREY = torch.tensor([0.299, 0.587, 0.114])


def card(resize="crop", **how):
    return Preprocessing(**({"n_frames": 4, "frame_size": SIZE, "resize": resize} | how))


def plain_card(resize="squash"):
    """Normalises to [0, 1] and no further."""
    return card(resize, mean=(0, 0, 0), std=(1, 1, 1))


def noise(seed, height=48, width=64, frames=4):
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (frames, height, width, 3), generator=generator, dtype=torch.uint8)
    return pixels.permute(0, 3, 1, 2)


class Copies(TorchDispatchMode):
    """Copies to another device, and whether they block."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[tuple[int, ...], bool, bool]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        there = kwargs.get("device")
        if func is torch.ops.aten._to_copy.default and there is not None and there != args[0].device:
            dense = args[0].is_contiguous() or args[0].is_contiguous(memory_format=torch.channels_last)
            self.seen.append((tuple(args[0].shape), dense, bool(kwargs.get("non_blocking"))))
        return func(*args, **kwargs)


def colour(*rgb, frames=2):
    return torch.tensor(rgb, dtype=torch.uint8).expand(frames, SIZE, SIZE, 3).clone().permute(0, 3, 1, 2)


def train(
    clips,
    keys,
    augmentation=Augmentation(),  # noqa: B008  # frozen
    preprocessing=None,
    seed=0,
    device=CPU,
):
    epochs, indices = torch.tensor(keys).T
    return train_transform(
        clips, epochs, indices, augmentation=augmentation, preprocessing=preprocessing or card(), seed=seed,
        device=device,
    )  # fmt: skip


@pytest.mark.parametrize("resize", ["crop", "squash"])
def test_a_clip_is_the_same_in_any_batch(resize):
    clips = [noise(0), noise(1, 40, 100), noise(2, 90, 30), noise(3, 32, 32)]
    keys = [(0, 5), (0, 6), (1, 5), (2, 9)]
    together = train(clips, keys, preprocessing=card(resize))
    assert together.shape == (4, 4, 3, SIZE, SIZE)
    assert together.dtype == torch.float32
    for number in range(4):
        assert torch.equal(
            train([clips[number]], [keys[number]], preprocessing=card(resize))[0], together[number]
        )
    backwards = train(clips[::-1], keys[::-1], preprocessing=card(resize))
    assert torch.equal(backwards.flip(0), together)
    shown = eval_transform(clips, preprocessing=card(resize), device=CPU)
    for number in range(4):
        alone = eval_transform([clips[number]], preprocessing=card(resize), device=CPU)
        assert torch.equal(alone[0], shown[number])


def test_draws_depend_on_seed_epoch_and_index_and_are_one_per_clip():
    still = noise(0, frames=1).expand(6, -1, -1, -1)
    for index in range(8):
        out = train([still], [(0, index)], replace(Augmentation(), hue=0.1))[0]
        assert torch.equal(out, out[:1].expand_as(out))
    base = train([noise(0)], [(0, 0)])
    others = [train([noise(0)], [(1, 0)]), train([noise(0)], [(0, 1)]), train([noise(0)], [(0, 0)], seed=1)]
    assert all(not torch.equal(base, other) for other in others)
    torch.manual_seed(5)
    assert torch.equal(base, train([noise(0)], [(0, 0)]))


def test_no_augmentation_is_the_evaluation_view():
    clips, keys = [noise(0), noise(1, 70, 40)], [(0, 0), (0, 1)]
    shown = eval_transform(clips, preprocessing=card("squash"), device=CPU)
    assert torch.equal(train(clips, keys, STILL, card("squash")), shown)
    square = [noise(2, 48, 48)]
    assert torch.equal(
        train(square, [(0, 0)], STILL, card("crop")),
        eval_transform(square, preprocessing=card("crop"), device=CPU),
    )


def test_flips_happen_as_often_as_asked_and_move_no_other_draw():
    clip, keys = noise(0), [(0, index) for index in range(200)]
    shown = eval_transform([clip], preprocessing=card("squash"), device=CPU)[0]
    for probability, low, high in ((0.0, 0, 0), (1.0, 200, 200), (0.5, 75, 125)):
        out = train([clip] * 200, keys, replace(STILL, horizontal_flip=probability), card("squash"))
        flipped = [torch.equal(one, shown.flip(-1)) for one in out]
        assert all(torch.equal(one, shown) or was for one, was in zip(out, flipped, strict=True))
        assert low <= sum(flipped) <= high
    clip, keys = noise(0), [(0, index) for index in range(20)]
    off = train([clip] * 20, keys, replace(Augmentation(), horizontal_flip=0.0))
    on = train([clip] * 20, keys, replace(Augmentation(), horizontal_flip=1.0))
    assert torch.allclose(on.flip(-1), off, atol=1e-5)


def ramp(height, width):
    """Red grows from left to right, green from top to bottom: a crop's mean tells where it lay."""
    red = torch.linspace(0, 255, width).expand(height, width)
    green = torch.linspace(0, 255, height)[:, None].expand(height, width)
    picture = torch.stack([red, green, torch.zeros(height, width)], dim=-1).round().to(torch.uint8)
    return picture.expand(2, -1, -1, -1).permute(0, 3, 1, 2)


@pytest.mark.parametrize("resize", ["crop", "squash"])
def test_crops_keep_to_their_scale_and_ratio_and_reach_all_places(resize):
    height, width, scale, ratio = 90, 160, (0.3, 0.8), (0.75, 4 / 3)
    augmentation = replace(STILL, crop_scale=scale, crop_ratio=ratio)
    own = width / height if resize == "squash" else 1
    out = train([ramp(height, width)] * 300, [(0, i) for i in range(300)], augmentation, plain_card(resize))
    edge = out[:, 0, :, [0, -1], [0, -1]]  # (clips, channels, two corners)
    box_width = (edge[:, 0, 1] - edge[:, 0, 0]) * width
    box_height = (edge[:, 1, 1] - edge[:, 1, 0]) * height
    area, aspect = box_width * box_height / (height * width), box_width / box_height / own
    assert scale[0] - 0.06 < area.min() < 0.4
    assert 0.6 < area.max() < scale[1] + 0.06
    assert ratio[0] - 0.08 < aspect.min() < 0.85
    assert 1.15 < aspect.max() < ratio[1] + 0.08
    centres = out[:, 0].mean(dim=(2, 3))[:, :2]
    assert centres.min(dim=0).values.max() < 0.42
    assert centres.max(dim=0).values.min() > 0.58


def test_where_no_box_fits_the_largest_in_the_middle_is_taken():
    # Under `crop`, a square as large as this wide frame does not fit into it.
    out = train([ramp(40, 160)], [(0, 0)], replace(STILL, crop_scale=(1.0, 1.0)), plain_card("crop"))
    assert out[0, 0, 0, 0, 0] == pytest.approx(60 / 160, abs=0.02)
    assert out[0, 0, 0, 0, -1] == pytest.approx(100 / 160, abs=0.02)


def test_evaluation_scales_the_short_side_and_takes_the_centre():
    for clip in (noise(0, 50, 90), noise(1, 90, 50), noise(2, 20, 30)):
        height, width = clip.shape[2:]
        scaled = (round(height * SIZE / min(height, width)), round(width * SIZE / min(height, width)))
        whole = F.interpolate(clip.float(), size=scaled, mode="bilinear", antialias=True)
        top, left = (scaled[0] - SIZE) // 2, (scaled[1] - SIZE) // 2
        expected = whole[:, :, top : top + SIZE, left : left + SIZE]
        out = eval_transform([clip], preprocessing=plain_card("crop"), device=CPU)[0] * 255
        assert (out - expected).abs().max() <= 1.01  # uint8 arithmetic rounds
        squashed = eval_transform([clip], preprocessing=plain_card("squash"), device=CPU)[0] * 255
        expected = F.interpolate(clip.float(), size=(SIZE, SIZE), mode="bilinear", antialias=True)
        assert (squashed - expected).abs().max() <= 1.01


@pytest.mark.parametrize("resize", ["crop", "squash"])
def test_frames_can_be_scaled_to_more_than_is_cut_from_their_centre(resize):
    clip, larger = noise(0, 50, 90), SIZE + 8
    size = (larger, larger if resize == "squash" else round(90 * larger / 50))
    whole = F.interpolate(clip.float(), size=size, mode="bilinear", antialias=True)
    top, left = (size[0] - SIZE) // 2, (size[1] - SIZE) // 2
    preprocessing = plain_card(resize).model_copy(update={"scale_to": larger})
    out = eval_transform([clip], preprocessing=preprocessing, device=CPU)[0] * 255
    assert (out - whole[:, :, top : top + SIZE, left : left + SIZE]).abs().max() <= 1.01


def test_frames_are_never_scaled_below_the_cut_and_normalised_by_channel():
    assert card().scale_to == SIZE
    with pytest.raises(ValidationError, match=f"scale_to 1 is less than frame_size {SIZE}"):
        card(scale_to=1)
    preprocessing = card(mean=(0.1, 0.2, 0.3), std=(0.5, 0.25, 0.125))
    out = eval_transform([colour(255, 51, 0)], preprocessing=preprocessing, device=CPU)[0, 0, :, 0, 0]
    assert out.tolist() == pytest.approx([(1 - 0.1) / 0.5, 0.0, -0.3 / 0.125], abs=1e-6)


def only(**how):
    return replace(STILL, **how)  # type: ignore[arg-type]


def factors_of(monkeypatch, **how):
    """Fixes what is drawn: brightness, contrast, saturation, hue."""
    draw = augment._draw
    monkeypatch.setattr(augment, "_draw", lambda *args: replace(draw(*args), **how))  # type: ignore[arg-type]


def test_jitter_means_what_it_means_in_torchvision(monkeypatch):
    clip = (noise(0).float() * 0.4 + 70).to(torch.uint8)  # away from black and white: nothing is clamped
    x = eval_transform([clip], preprocessing=plain_card(), device=CPU)[0]
    grey = torch.einsum("c,tchw->thw", GREY, x)[:, None]
    expected = {
        "brightness": 1.2 * x,
        "contrast": 1.2 * x - 0.2 * grey.mean(),
        "saturation": 1.2 * x - 0.2 * grey,
    }
    for name, wanted in expected.items():
        with monkeypatch.context() as patched:
            factors_of(patched, **{name: 1.2})
            assert torch.allclose(train([clip], [(0, 0)], STILL, plain_card())[0], wanted, atol=1e-5)
    factors_of(monkeypatch, brightness=0.9, contrast=1.3, saturation=0.7)
    wanted = 1.3 * (0.9 * x) - 0.3 * (0.9 * grey).mean()
    wanted = 0.7 * wanted + 0.3 * torch.einsum("c,tchw->thw", GREY, wanted)[:, None]
    assert torch.allclose(train([clip], [(0, 0)], STILL, plain_card())[0], wanted, atol=1e-5)


def test_hue_turns_colours_and_leaves_grey(monkeypatch):
    red, grey = colour(150, 90, 90), colour(120, 120, 120)
    for turn, strongest in ((0.0, 0), (1 / 3, 1), (2 / 3, 2), (1.0, 0)):
        with monkeypatch.context() as patched:
            factors_of(patched, hue=turn)
            turned = train([red], [(0, 0)], STILL, plain_card())[0, 0, :, 0, 0] * 255
            same = train([grey], [(0, 0)], STILL, plain_card()) * 255
        assert turned.argmax() == strongest
        assert float(GREY @ turned) == pytest.approx(float(GREY @ torch.tensor([150.0, 90.0, 90.0])), abs=0.1)
        assert torch.allclose(same, torch.full_like(same, 120), atol=0.05)
        if turn in (0.0, 1.0):
            assert torch.allclose(turned, torch.tensor([150.0, 90.0, 90.0]), atol=0.05)


@pytest.mark.parametrize("name", ["brightness", "contrast", "saturation", "hue"])
def test_each_jitter_draws_on_both_sides_and_can_be_off(name):
    clip = colour(140, 100, 90)
    clip[:, :, : SIZE // 2] = 60
    keys = [(0, index) for index in range(60)]
    shown = eval_transform([clip], preprocessing=plain_card(), device=CPU)[0]
    assert torch.allclose(train([clip], [(0, 0)], only(**{name: 0.0}), plain_card())[0], shown, atol=1e-6)
    out = train([clip] * 60, keys, only(**{name: 0.2}), plain_card())
    change = (out[:, 0, 0, -1, 0] - shown[0, 0, -1, 0]) * 255
    assert change.min() < -0.5 < 0.5 < change.max()
    assert len(set(change.tolist())) == 60


def test_pixels_stay_between_black_and_white_down_to_one_pixel():
    wild = only(brightness=1.0, contrast=1.0, saturation=1.0, hue=0.5)
    out = train([noise(0)] * 20, [(0, index) for index in range(20)], wild, plain_card())
    assert (out.min(), out.max()) == (0, 1)
    out = train([noise(0, 1, 1)], [(0, 0)])
    assert torch.isfinite(out).all()
    assert math.isclose(float(out[0, 0, 0].std()), 0, abs_tol=1e-6)


def test_randaugment_precedes_jitter_and_keeps_the_other_draws(monkeypatch):
    clips, keys = [noise(n) for n in range(6)], [(0, index) for index in range(6)]
    off = train(clips, keys)
    assert not torch.equal(train(clips, keys, replace(Augmentation(), randaugment=2)), off)
    seen = []
    monkeypatch.setattr(augment, "randaugment", lambda pixels, *args, **how: seen.append(pixels) or pixels)  # type: ignore[func-returns-value]
    assert torch.equal(train(clips, keys, replace(Augmentation(), randaugment=2)), off)
    assert all(pixels.dtype == torch.uint8 and pixels.shape == (4, 3, SIZE, SIZE) for pixels in seen)


def test_what_comes_in_from_outside_the_frame_is_the_mean_colour(monkeypatch):
    move = {"translate_x": OPERATIONS["translate_x"]}
    monkeypatch.setattr("tvit_cli.data.augment.OPERATIONS", move)
    one = replace(STILL, randaugment=1, randaugment_magnitude=10.0)
    out = train([colour(255, 255, 255)] * 8, [(0, index) for index in range(8)], one, card("squash"))
    sides = out[:, 0, :, 16, [0, -1]]
    assert torch.allclose(sides.abs().amin(dim=(1, 2)), torch.zeros(8), atol=0.01)  # rounded to a 255th
    assert {int(side) for side in sides.abs().amin(dim=1).argmin(dim=1)} == {0, 1}


def test_erasing_leaves_one_box_of_the_mean_colour_through_all_frames():
    clips, keys = [noise(n) for n in range(120)], [(0, index) for index in range(120)]
    untouched = train(clips, keys)
    assert torch.equal(train(clips, keys, replace(Augmentation(), random_erasing=0.0)), untouched)
    out = train(clips, keys, replace(Augmentation(), random_erasing=1.0))
    areas, aspects, where = [], [], torch.zeros(SIZE, SIZE)
    for clip, before in zip(out, untouched, strict=True):
        erased = (clip == 0).all(1).all(0)  # (S, S)
        assert torch.equal(clip[..., ~erased], before[..., ~erased])
        rows, columns = erased.any(1), erased.any(0)
        assert torch.equal(erased, rows[:, None] & columns)
        areas.append(erased.float().mean().item())
        aspects.append((rows.sum() / columns.sum()).item())
        where += erased
    assert 0.01 < min(areas) < 0.06 and 0.25 < max(areas) < 0.36
    assert 0.2 < min(aspects) < 0.5 and 2 < max(aspects) < 4.5
    assert where.sum(0).min() > 0 and where.sum(1).min() > 0


def test_clips_are_erased_as_often_as_asked_and_the_same_ones_in_any_batch():
    clips, keys = [noise(n) for n in range(100)], [(2, index) for index in range(100)]
    some = replace(Augmentation(), random_erasing=0.3)
    out = train(clips, keys, some)
    erased = [bool((clip == 0).all(1).any()) for clip in out]
    assert 18 <= sum(erased) <= 42
    for number in range(5):
        assert torch.equal(train([clips[number]], [keys[number]], some)[0], out[number])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_gives_what_the_cpu_gives_but_for_rounding():
    clips = [noise(0, 48, 64).repeat_interleave(4, 2).repeat_interleave(4, 3), noise(1, 100, 60)]
    keys = [(0, 0), (3, 1)]
    gpu = torch.device("cuda")
    for resize in ("crop", "squash"):
        preprocessing = plain_card(resize)  # type: ignore[arg-type]
        shown = eval_transform(clips, preprocessing=preprocessing, device=CPU)
        assert torch.allclose(
            eval_transform(clips, preprocessing=preprocessing, device=gpu).cpu(), shown, atol=1.01 / 255
        )
        augmentation = replace(Augmentation(), hue=0.05)
        here = train(clips, keys, augmentation, preprocessing)
        there = train(clips, keys, augmentation, preprocessing, device=gpu)
        assert there.device.type == "cuda"
        assert torch.allclose(there.cpu(), here, atol=2.5 / 255)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_gives_the_same_clip_in_any_batch():
    clips, keys, gpu = [noise(0), noise(1, 40, 100)], [(0, 5), (0, 6)], torch.device("cuda")
    together = train(clips, keys, device=gpu)
    for number in range(2):
        assert torch.equal(train([clips[number]], [keys[number]], device=gpu)[0], together[number])


@pytest.mark.parametrize("kind", ["train", "eval"])
def test_whole_clips_move_to_the_device_and_nothing_waits_for_it(kind):
    """A box of a clip in pinned memory would be copied out of it first; a blocking copy would empty a GPU's queue."""
    clips = [noise(0), noise(1)]
    there = torch.device("meta")
    with Copies() as copies:
        if kind == "train":
            facts = Augmentation(hue=0.1, randaugment=2, random_erasing=1.0)
            out = train(clips, [(0, 0), (0, 1)], facts, device=there)
        else:
            out = eval_transform(clips, preprocessing=card(), device=there)
    assert out.device == there and out.shape == (2, 4, 3, SIZE, SIZE)
    assert [shape for shape, _, _ in copies.seen if len(shape) == 4] == [(4, 3, 48, 64)] * 2
    assert all(is_dense and does_not_block for _, is_dense, does_not_block in copies.seen)


SIDE = 20
FILL = torch.tensor([10.0, 128.0, 250.0])
GEOMETRIC = ("shear_x", "shear_y", "translate_x", "translate_y", "rotate")
Frames = np.ndarray  # (T, H, W, C)


def clip(seed=0, frames=3):
    """Smooth colours of 40 to 200, so that a misplaced pixel shows and a rounded one does not."""
    rows, columns, places = np.meshgrid(np.arange(SIDE), np.arange(SIDE), np.arange(frames), indexing="ij")
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
        turn, x, y = math.radians(30 * level), x - SIDE / 2, y - SIDE / 2
        return (
            math.cos(turn) * x - math.sin(turn) * y + SIDE / 2,
            math.sin(turn) * x + math.cos(turn) * y + SIDE / 2,
        )
    shift = {"shear_x": 0.3 * y, "shear_y": 0.3 * x}.get(name, 150 / 331 * SIDE) * level
    return (x + shift, y) if name.endswith("x") else (x, y + shift)


def moved(name, x, level):
    padded = np.full((len(x), 3 * SIDE, 3 * SIDE, 3), FILL.numpy())
    padded[:, SIDE : 2 * SIDE, SIDE : 2 * SIDE] = x
    out = np.empty(x.shape)
    for row in range(SIDE):
        for column in range(SIDE):
            across, down = source(name, column + 0.5, row + 0.5, level)
            left, top = math.floor(across - 0.5), math.floor(down - 0.5)
            right_share, lower_share = across - 0.5 - left, down - 0.5 - top
            square = padded[:, top + SIDE : top + SIDE + 2, left + SIDE : left + SIDE + 2]
            rows = square[:, 0] * (1 - lower_share) + square[:, 1] * lower_share
            out[:, row, column] = rows[:, 0] * (1 - right_share) + rows[:, 1] * right_share
    return out


def smoothed(x):
    out = x.copy()
    for row in range(1, SIDE - 1):
        for column in range(1, SIDE - 1):
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


@pytest.mark.parametrize("value", [0, 7, 255])
def test_a_clip_of_one_colour_stays_of_one_colour(value):
    pixels = torch.full((2, 3, SIDE, SIDE), value, dtype=torch.uint8)
    for name, operation in OPERATIONS.items():
        out = operation(pixels, 0.9, torch.full((3,), float(value)))
        assert out.unique().numel() == 1, name
        if name in ("autocontrast", "equalize", "color", "contrast", "sharpness", *GEOMETRIC):
            assert torch.equal(out, pixels), name


def test_magnitude_0_changes_nothing_and_nothing_is_mirrored():
    pixels = clip()
    for name, operation in OPERATIONS.items():
        if name not in ("autocontrast", "equalize"):
            assert torch.equal(operation(pixels, 0.0, FILL), pixels), name
    columns = torch.linspace(60, 200, SIDE).round().to(torch.uint8).expand(1, 3, SIDE, SIDE)
    for name in GEOMETRIC:
        for level in (-1.0, 1.0):
            out = OPERATIONS[name](columns.contiguous(), level, torch.full((3,), 130.0)).float()
            steps = out.diff(dim=-1)
            assert (steps > 0).sum() > 4 * (steps < 0).sum(), name


def go(pixels, index=0, *, operations=2, magnitude=9.0, seed=0, epoch=0):
    how = Augmentation(randaugment=operations, randaugment_magnitude=magnitude)
    generator = draw_generator(seed, Kind.RANDAUGMENT, epoch, index)
    return randaugment(pixels, how, fill=FILL, generator=generator)


def test_frames_move_alike_at_once_and_one_by_one(monkeypatch):
    still = clip(frames=1).expand(4, -1, -1, -1)
    for index in range(30):
        out = go(still, index)
        assert torch.equal(out, out[:1].expand_as(out))
    one_by_one = OPERATIONS["rotate"](clip(), 0.7, FILL)
    monkeypatch.setattr(Tensor, "chunk", lambda pixels, pieces: (pixels,))
    assert torch.equal(OPERATIONS["rotate"](clip(), 0.7, FILL), one_by_one)


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


EDGE = 24


def drawn_clips(count):
    return torch.rand(count, 3, 3, EDGE, EDGE, generator=torch.Generator().manual_seed(0))


def mixed_with(pixels, partners, mixing, *, seed=0, epochs=None, indices=None):
    count = len(pixels)
    return mix(
        pixels, partners, torch.tensor(epochs or [0] * count), torch.tensor(indices or list(range(count))),
        mixing=mixing, seed=seed,
    )  # fmt: skip


def pair_of(count):
    """Clips of ones, each with a partner of zeros after them: a mixture's pixels are the clip's share."""
    return torch.cat([torch.ones(count, 2, 3, EDGE, EDGE), torch.zeros(1, 2, 3, EDGE, EDGE)])


def test_mixup_blends_every_pixel_by_the_share():
    pixels = drawn_clips(5)
    mixed, shares = mixed_with(pixels, [1, 0, 4], Mixing(mixup=0.8))
    assert mixed.shape == (3, 3, 3, EDGE, EDGE) and shares.shape == (3,)
    for place, partner in enumerate([1, 0, 4]):
        share = shares[place]
        assert 0 < share < 1
        wanted = share * pixels[place] + (1 - share) * pixels[partner]
        assert torch.allclose(mixed[place], wanted, atol=1e-6)


@pytest.mark.parametrize("alpha", [0.2, 1.0, 8.0])
def test_shares_are_spread_as_the_beta_distribution(alpha):
    _, shares = mixed_with(pair_of(600), [600] * 600, Mixing(mixup=alpha))
    assert shares.mean() == pytest.approx(0.5, abs=0.06)
    assert shares.var() == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=0.2)


def test_cutmix_pastes_one_box_in_all_frames_and_returns_its_share():
    count = 200
    mixed, shares = mixed_with(pair_of(count), [count] * count, Mixing(cutmix=1.0))
    for clip, share in zip(mixed, shares, strict=True):
        assert torch.equal(clip, clip[:1, :1].expand_as(clip))
        pasted = clip[0, 0] == 0
        assert share == pytest.approx(1 - pasted.float().mean().item(), abs=1e-6)
        rows, columns = pasted.any(1), pasted.any(0)
        assert torch.equal(pasted, rows[:, None] & columns)
        assert rows.int().diff().abs().sum() <= 2 and columns.int().diff().abs().sum() <= 2
    assert shares.min() < 0.2 and shares.max() > 0.95
    centre = (mixed[:, 0, 0] == 0).float().mean(0)
    assert centre.min() > 0.1  # every pixel is pasted over now and then


def test_mixing_draws_which_keeps_lone_clips_and_takes_tiny_alphas():
    count = 200
    mixed, _ = mixed_with(pair_of(count), [count] * count, Mixing(mixup=1.0, cutmix=1.0))
    pasted = sum(set(clip.unique().tolist()) <= {0.0, 1.0} for clip in mixed)
    assert 70 < pasted < 130
    pixels = drawn_clips(1)
    for mixing in (Mixing(mixup=0.8), Mixing(cutmix=1.0)):
        assert torch.equal(mixed_with(pixels, [0], mixing)[0], pixels)
    mixed, shares = mixed_with(pair_of(50), [50] * 50, Mixing(mixup=1e-6))
    assert set(shares.round(decimals=3).tolist()) == {0.0, 1.0}
    assert torch.isfinite(mixed).all()


@pytest.mark.parametrize("mixing", [Mixing(mixup=0.8), Mixing(cutmix=1.0), Mixing(0.4, 0.4)])
def test_a_mixture_depends_on_its_key_and_not_on_its_batch(mixing):
    pixels = drawn_clips(4)
    together, shares = mixed_with(pixels, [1, 0, 3, 2], mixing, epochs=[3] * 4, indices=[7, 8, 9, 10])
    for place, partner in enumerate([1, 0, 3, 2]):
        alone, share = mixed_with(
            pixels[[place, partner]], [1], mixing, epochs=[3, 3], indices=[7 + place, 0]
        )
        assert torch.equal(alone[0], together[place]) and torch.equal(share[0], shares[place])
    one = Mixing(mixup=0.8)
    base = mixed_with(pixels, [1], one, epochs=[3] * 4)[1]
    assert base != mixed_with(pixels, [1], one, epochs=[4] * 4)[1]
    assert base != mixed_with(pixels, [1], one, epochs=[3] * 4, indices=[1, 1, 1, 1])[1]
    assert base != mixed_with(pixels, [1], one, epochs=[3] * 4, seed=1)[1]
    torch.manual_seed(9)
    assert base == mixed_with(pixels, [1], one, epochs=[3] * 4)[1]
