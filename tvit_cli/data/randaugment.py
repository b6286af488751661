"""Random draws that depend on what they are for alone: on (seed, kind, epoch, index), never on a state.

Source: Cubuk et al., arXiv:1909.13719. The operations and their ranges are AutoAugment's (arXiv:1805.09501,
table 6) as torchvision scales them, on timm's scale of 0 to 10: 0 changes nothing and 10 most. What depends on
the pixels (contrast, autocontrast, equalize) looks at the whole clip, so that nothing flickers. None of the
operations mirrors: left stays left.

Pixels are uint8 (T, C, S, S) throughout. Letters: T frames, C channels, S the side of the model's frame.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from enum import IntEnum

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tvit_cli.portable.preprocessing import constant_like


class Kind(IntEnum):
    """What is drawn. Each kind has numbers of its own, so that one more or fewer leaves the others as they were."""

    OFFSETS = 0  # which frame of each segment
    ORDER = 1  # of shuffled frames
    AUGMENTATION = 2  # crop, flip, colour jitter
    RANDAUGMENT = 3
    ERASING = 4
    MIXING = 5


def draw_generator(seed: int, kind: Kind, *key: int) -> np.random.Generator:
    """Well mixed for neighbouring seeds and keys, unlike `seed + index`."""
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(kind, *key)))


LUMA = torch.tensor([0.299, 0.587, 0.114], dtype=torch.float64)  # grey of a colour: ITU-R BT.601
_LARGEST = 10.0  # of the scale of magnitudes

_SHEAR = 0.3  # pixels per pixel
_TRANSLATE = 150 / 331  # of the frame: AutoAugment's 150 pixels of its 331
_ROTATE = 30.0  # degrees
_ENHANCE = 0.9  # brightness, colour, contrast and sharpness go from 1 - 0.9 to 1 + 0.9
_POSTERIZE = 4  # bits that are dropped, of 8

Operation = Callable[[Tensor, float, Tensor], Tensor]


def randaugment(
    pixels: Tensor, *, operations: int, magnitude: float, fill: Tensor, seed: int, epoch: int, index: int
) -> Tensor:
    """Apply that many operations, drawn from (seed, epoch, index), one after the other.

    `magnitude` is 0 to 10; the direction of each operation that has two is drawn. `fill` (C,) is the colour,
    0..255, of what comes into the frame from outside.
    """
    generator = draw_generator(seed, Kind.RANDAUGMENT, epoch, index)
    if pixels.is_floating_point():
        pixels = pixels.round().to(torch.uint8)
    pixels = pixels.contiguous()
    names = list(OPERATIONS)
    for _ in range(operations):
        name = names[generator.integers(len(names))]
        sign = 1 if generator.random() < 0.5 else -1
        pixels = OPERATIONS[name](pixels, sign * magnitude / _LARGEST, fill)
    return pixels


def identity(pixels: Tensor, level: float, fill: Tensor) -> Tensor:
    """The clip as it is."""
    return pixels


def shear_x(pixels: Tensor, level: float, fill: Tensor) -> Tensor:
    """Move each row sideways by up to 0.3 of its distance from the top."""
    shift = _SHEAR * level
    return _moved(pixels, [[1, shift, shift], [0, 1, 0]], fill)


def shear_y(pixels: Tensor, level: float, fill: Tensor) -> Tensor:
    """Move each column up or down by up to 0.3 of its distance from the left."""
    shift = _SHEAR * level
    return _moved(pixels, [[1, 0, 0], [shift, 1, shift]], fill)


def translate_x(pixels: Tensor, level: float, fill: Tensor) -> Tensor:
    """Move the frame sideways by up to 0.45 of its width."""
    return _moved(pixels, [[1, 0, 2 * _TRANSLATE * level], [0, 1, 0]], fill)


def translate_y(pixels: Tensor, level: float, fill: Tensor) -> Tensor:
    """Move the frame up or down by up to 0.45 of its height."""
    return _moved(pixels, [[1, 0, 0], [0, 1, 2 * _TRANSLATE * level]], fill)


def rotate(pixels: Tensor, level: float, fill: Tensor) -> Tensor:
    """Turn the frame about its centre by up to 30 degrees; counter-clockwise where the level is above 0."""
    angle = math.radians(_ROTATE * level)
    cos, sin = math.cos(angle), math.sin(angle)
    return _moved(pixels, [[cos, -sin, 0], [sin, cos, 0]], fill)


def brightness(pixels: Tensor, level: float, fill: Tensor) -> Tensor:
    """Towards black, or away from it."""
    return _rounded(pixels.float().mul_(1 + _ENHANCE * level))


def color(pixels: Tensor, level: float, fill: Tensor) -> Tensor:
    """Towards each pixel's grey, or away from it."""
    return _enhanced(pixels, _grey(pixels), level)


def contrast(pixels: Tensor, level: float, fill: Tensor) -> Tensor:
    """Towards the mean grey of the clip, or away from it."""
    return _enhanced(pixels, _grey(pixels).mean().round(), level)


def sharpness(pixels: Tensor, level: float, fill: Tensor) -> Tensor:
    """Towards a smoothed frame, or away from it; the outermost pixels stay as they are.

    Each pixel is smoothed with its eight neighbours, of weight 1 beside its own 5.
    """
    side = pixels.shape[-1]
    x = (
        pixels.flatten().short()
    )  # neighbours are 1 and S apart; what wraps around the frame's edge is not used
    rows = (x[:-2] + x[1:-1]).add_(x[2:])
    sums = (rows[: -2 * side] + rows[side:-side]).add_(rows[2 * side :])
    sums.add_(x[side + 1 : -side - 1], alpha=4)
    smooth = torch.empty(pixels.shape, device=pixels.device)
    smooth.view(-1)[side + 1 : -side - 1] = sums
    smooth.div_(13).round_()
    for edge in (0, -1):
        smooth[..., edge, :] = pixels[..., edge, :]
        smooth[..., edge] = pixels[..., edge]
    return _enhanced(pixels, smooth, level)


def posterize(pixels: Tensor, level: float, fill: Tensor) -> Tensor:
    """Drop up to 4 of the 8 bits of each pixel."""
    dropped = round(_POSTERIZE * abs(level))
    return pixels.bitwise_and(256 - 2**dropped)


def solarize(pixels: Tensor, level: float, fill: Tensor) -> Tensor:
    """Invert the pixels that are as bright as a threshold of 256 (none) down to 0 (all)."""
    threshold = math.ceil(256 * (1 - abs(level)))
    return pixels if threshold > 255 else pixels.where(pixels < threshold, pixels.bitwise_not())


def autocontrast(pixels: Tensor, level: float, fill: Tensor) -> Tensor:
    """Stretch each channel of the clip to 0..255."""
    low = pixels.amin(dim=(0, 2, 3), keepdim=True).float()
    high = pixels.amax(dim=(0, 2, 3), keepdim=True).float()
    flat = high <= low
    scale = torch.where(flat, 1.0, 255 / (high - low))
    return _rounded(pixels.float().sub_(torch.where(flat, 0.0, low)).mul_(scale))


def equalize(pixels: Tensor, level: float, fill: Tensor) -> Tensor:
    """Spread each channel of the clip so that all values are about as frequent: Pillow's integer algorithm."""
    channels = [_equalized(channel) for channel in pixels.unbind(1)]
    return torch.stack(channels, dim=1)


OPERATIONS: dict[str, Operation] = {
    operation.__name__: operation
    for operation in (
        identity, shear_x, shear_y, translate_x, translate_y, rotate, brightness, color, contrast, sharpness,
        posterize, solarize, autocontrast, equalize,
    )
}  # fmt: skip


def _moved(pixels: Tensor, matrix: list[list[float]], fill: Tensor) -> Tensor:
    """Each pixel is taken, bilinearly, from the place that the matrix gives: x, y, 1 in -1..1 -> x, y."""
    side = pixels.shape[-1]
    assert pixels.shape[-2] == side, "a matrix in units of half the frame wants square frames"
    outside = fill.to(pixels.device, torch.float32).view(-1, 1, 1)
    theta = constant_like(torch.tensor([matrix]), outside)
    grid = F.affine_grid(theta, [1, 1, side, side], align_corners=False)  # (1, S, S, 2)
    moved = torch.empty_like(pixels)
    # By frame: a CPU then uses one small piece of memory again and again, instead of fetching fresh pages.
    pieces = len(pixels) if pixels.device.type == "cpu" else 1
    for out, frames in zip(moved.chunk(pieces), pixels.chunk(pieces), strict=True):
        above = frames.float() - outside  # what comes in from beside the frame is 0, hence `fill`
        shown = F.grid_sample(
            above,
            grid.expand(len(above), -1, -1, -1),
            mode="bilinear",
            padding_mode="zeros",
            align_corners=False,
        )
        out.copy_(_rounded(shown.add_(outside)))
    return moved


def _enhanced(pixels: Tensor, dull: Tensor, level: float) -> Tensor:
    """On the line from the dull picture (0) through the given one (1)."""
    factor = 1 + _ENHANCE * level
    return _rounded(pixels.float().mul_(factor).add_(dull, alpha=1 - factor))


def _grey(pixels: Tensor) -> Tensor:
    """(T, C, S, S) -> (T, 1, S, S), rounded."""
    red, green, blue = LUMA.tolist()
    x = pixels[:, 0:1].float().mul_(red)
    return x.add_(pixels[:, 1:2], alpha=green).add_(pixels[:, 2:3], alpha=blue).round_()


def _rounded(pixels: Tensor) -> Tensor:
    return pixels.round_().clamp_(0, 255).to(torch.uint8)


def _equalized(channel: Tensor) -> Tensor:
    places = channel.flatten().int()
    values = torch.arange(256, device=channel.device)
    counts = _counts(places)
    brightest = counts.index_select(0, (values * (counts > 0)).amax().view(1))[0]
    step = (counts.sum() - brightest) // 255
    below = counts.cumsum(0) - counts
    table = ((below + step // 2) // step.clamp(min=1)).clamp(max=255)
    table = torch.where(step > 0, table, values).to(torch.uint8)
    return table.index_select(0, places).view(channel.shape)


def _counts(places: Tensor) -> Tensor:
    """How often each of 256 values occurs, int64 (256,)."""
    if places.device.type == "cpu":
        return torch.bincount(places, minlength=256)
    # torch.bincount would ask the device for the largest value, and wait for the answer.
    counts = torch.zeros(256, dtype=torch.int64, device=places.device)
    return counts.scatter_add_(0, places.long(), torch.ones_like(places, dtype=torch.int64))
