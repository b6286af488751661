"""RandAugment, and random generators keyed by (seed, kind, epoch, index).

Source: Cubuk et al., arXiv:1909.13719. The operations and their ranges are AutoAugment's (arXiv:1805.09501,
table 6) as torchvision scales them, on timm's scale of 0 (no change) to 10. Statistics (contrast, autocontrast,
equalize) are those of the whole clip, so that nothing flickers. No operation mirrors: left stays left.

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

LUMA = torch.tensor([0.299, 0.587, 0.114], dtype=torch.float64)  # grey of a colour: ITU-R BT.601
_LARGEST = 10.0  # of the scale of magnitudes

_SHEAR = 0.3  # pixels per pixel
_TRANSLATE = 150 / 331  # of the frame: AutoAugment's 150 pixels of its 331
_ROTATE = 30.0  # degrees
_ENHANCE = 0.9  # brightness, colour, contrast and sharpness have factors from 1 - 0.9 to 1 + 0.9
_POSTERIZE = 4  # dropped bits of 8


class Kind(IntEnum):
    """Purpose of a draw; each has a stream of its own, so that a change of one leaves the others unchanged."""

    OFFSETS = 0  # of frames within their segments
    ORDER = 1  # of shuffled frames
    AUGMENTATION = 2  # crop, flip, colour jitter
    RANDAUGMENT = 3
    ERASING = 4
    MIXING = 5


def draw_generator(seed: int, kind: Kind, *key: int) -> np.random.Generator:
    """A generator well mixed for neighbouring seeds and keys, unlike `seed + index`."""
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(kind, *key)))


def randaugment(
    pixels: Tensor, *, operations: int, magnitude: float, fill: Tensor, seed: int, epoch: int, index: int
) -> Tensor:
    """Applies `operations` random operations in sequence, drawn from (seed, epoch, index).

    `magnitude` is 0 to 10; its sign is drawn, too. `fill` (C,) is the colour, 0..255, of pixels from outside the
    frame.
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


def _rotate(pixels: Tensor, level: float, fill: Tensor) -> Tensor:
    angle = math.radians(_ROTATE * level)
    cos, sin = math.cos(angle), math.sin(angle)
    return _warp(pixels, [cos, -sin, 0], [sin, cos, 0], fill)


def _sharpness(pixels: Tensor, level: float) -> Tensor:
    """Smoothing averages each pixel, of weight 5, with its eight neighbours; border pixels stay unchanged."""
    side = pixels.shape[-1]
    x = pixels.flatten().short()  # neighbours are 1 and S apart; sums that wrap at the border are not used
    rows = (x[:-2] + x[1:-1]).add_(x[2:])
    sums = (rows[: -2 * side] + rows[side:-side]).add_(rows[2 * side :])
    sums.add_(x[side + 1 : -side - 1], alpha=4)
    smooth = torch.empty(pixels.shape, device=pixels.device)
    smooth.view(-1)[side + 1 : -side - 1] = sums
    smooth.div_(13).round_()
    for edge in (0, -1):
        smooth[..., edge, :] = pixels[..., edge, :]
        smooth[..., edge] = pixels[..., edge]
    return _blend(pixels, smooth, level)


def _solarize(pixels: Tensor, level: float) -> Tensor:
    """Inverts pixels from a threshold on: 256 (none) to 0 (all)."""
    threshold = math.ceil(256 * (1 - abs(level)))
    return pixels if threshold > 255 else pixels.where(pixels < threshold, pixels.bitwise_not())


def _autocontrast(pixels: Tensor) -> Tensor:
    """Stretches each channel of the clip to 0..255."""
    low = pixels.amin(dim=(0, 2, 3), keepdim=True).float()
    high = pixels.amax(dim=(0, 2, 3), keepdim=True).float()
    flat = high <= low
    scale = torch.where(flat, 1.0, 255 / (high - low))
    return _rounded(pixels.float().sub_(torch.where(flat, 0.0, low)).mul_(scale))


def _equalize(channel: Tensor) -> Tensor:
    """Equalises the histogram of one channel of the clip by Pillow's integer algorithm."""
    flat = channel.flatten().int()
    values = torch.arange(256, device=channel.device)
    if flat.device.type == "cpu":
        counts = torch.bincount(flat, minlength=256)
    else:  # torch.bincount would wait for the device's largest value
        counts = torch.zeros(256, dtype=torch.int64, device=flat.device)
        counts.scatter_add_(0, flat.long(), torch.ones_like(flat, dtype=torch.int64))
    brightest = counts.index_select(0, (values * (counts > 0)).amax().view(1))[0]
    step = (counts.sum() - brightest) // 255
    below = counts.cumsum(0) - counts
    table = ((below + step // 2) // step.clamp(min=1)).clamp(max=255)
    table = torch.where(step > 0, table, values).to(torch.uint8)
    return table.index_select(0, flat).view(channel.shape)


# (pixels, level in -1..1, fill) -> pixels. The draws depend on the order.
OPERATIONS: dict[str, Callable[[Tensor, float, Tensor], Tensor]] = {
    "identity": lambda x, level, fill: x,
    "shear_x": lambda x, level, fill: _warp(x, [1, _SHEAR * level, _SHEAR * level], [0, 1, 0], fill),
    "shear_y": lambda x, level, fill: _warp(x, [1, 0, 0], [_SHEAR * level, 1, _SHEAR * level], fill),
    "translate_x": lambda x, level, fill: _warp(x, [1, 0, 2 * _TRANSLATE * level], [0, 1, 0], fill),
    "translate_y": lambda x, level, fill: _warp(x, [1, 0, 0], [0, 1, 2 * _TRANSLATE * level], fill),
    "rotate": _rotate,  # about the centre; counter-clockwise for positive levels
    "brightness": lambda x, level, fill: _rounded(x.float().mul_(1 + _ENHANCE * level)),
    "color": lambda x, level, fill: _blend(x, _grey(x), level),
    "contrast": lambda x, level, fill: _blend(x, _grey(x).mean().round(), level),
    "sharpness": lambda x, level, fill: _sharpness(x, level),
    "posterize": lambda x, level, fill: x.bitwise_and(256 - 2 ** round(_POSTERIZE * abs(level))),
    "solarize": lambda x, level, fill: _solarize(x, level),
    "autocontrast": lambda x, level, fill: _autocontrast(x),
    "equalize": lambda x, level, fill: torch.stack([_equalize(channel) for channel in x.unbind(1)], dim=1),
}


def _warp(pixels: Tensor, to_x: list[float], to_y: list[float], fill: Tensor) -> Tensor:
    """Samples each pixel bilinearly at the source x, y of an affine map of its x, y, 1 in -1..1."""
    side = pixels.shape[-1]
    assert pixels.shape[-2] == side, "the map is in units of half the side of a square frame"
    outside = fill.to(pixels.device, torch.float32).view(-1, 1, 1)
    theta = constant_like(torch.tensor([[to_x, to_y]]), outside)
    grid = F.affine_grid(theta, [1, 1, side, side], align_corners=False)  # (1, S, S, 2)
    warped = torch.empty_like(pixels)
    # By frame, so that a CPU reuses a small buffer instead of fresh pages.
    pieces = len(pixels) if pixels.device.type == "cpu" else 1
    for out, frames in zip(warped.chunk(pieces), pixels.chunk(pieces), strict=True):
        offset = frames.float() - outside  # padding with 0 becomes `fill`
        frame_grid = grid.expand(len(offset), -1, -1, -1)
        sampled = F.grid_sample(
            offset, frame_grid, mode="bilinear", padding_mode="zeros", align_corners=False
        )
        out.copy_(_rounded(sampled.add_(outside)))
    return warped


def _blend(pixels: Tensor, dull: Tensor, level: float) -> Tensor:
    """Extrapolates from `dull` (factor 0) through the pixels (factor 1)."""
    factor = 1 + _ENHANCE * level
    return _rounded(pixels.float().mul_(factor).add_(dull, alpha=1 - factor))


def _grey(pixels: Tensor) -> Tensor:
    """(T, C, S, S) -> (T, 1, S, S), rounded."""
    red, green, blue = LUMA.tolist()
    x = pixels[:, 0:1].float().mul_(red)
    return x.add_(pixels[:, 1:2], alpha=green).add_(pixels[:, 2:3], alpha=blue).round_()


def _rounded(pixels: Tensor) -> Tensor:
    return pixels.round_().clamp_(0, 255).to(torch.uint8)
