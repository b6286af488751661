"""Clip augmentation on the model's device: crops, RandAugment, colour jitter, erasing, mixup, CutMix.

RandAugment is Cubuk et al., arXiv:1909.13719. Its operations and their ranges are AutoAugment's (arXiv:1805.09501,
table 6) as torchvision scales them, on timm's scale of 0 (no change) to 10. Statistics (contrast, autocontrast,
equalize) are those of the whole clip, so that nothing flickers. No operation mirrors: left stays left.

Letters: B clips, E clips that are partners only, T frames, C channels, H W pixels, S the side of the model's frame.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tvit_cli.portable.preprocessing import (
    constant_like,
    frames_to_input,
    normalise,
    resize_frames,
    to_device,
)
from tvit_cli.settings.card import Preprocessing

LUMA = torch.tensor([0.299, 0.587, 0.114], dtype=torch.float64)  # grey of a colour: ITU-R BT.601
_LARGEST = 10.0  # of the scale of magnitudes

_SHEAR = 0.3  # pixels per pixel
_TRANSLATE = 150 / 331  # of the frame: AutoAugment's 150 pixels of its 331
_ROTATE = 30.0  # degrees
_ENHANCE = 0.9  # brightness, colour, contrast and sharpness have factors from 1 - 0.9 to 1 + 0.9
_POSTERIZE = 4  # dropped bits of 8

_BOX_ATTEMPTS = 10  # before the largest fitting box (crop) or none (erasing), as in torchvision
_ERASED_AREA, _ERASED_RATIO = (0.02, 0.33), (0.3, 3.3)  # of the frame, height to width; as in torchvision

_RGB_TO_YIQ = torch.tensor(  # NTSC; rows I and Q sum to zero, so that their rotation leaves grey unchanged
    [[0.299, 0.587, 0.114], [0.5959, -0.2746, -0.3213], [0.2115, -0.5227, 0.3112]], dtype=torch.float64
)
_YIQ_TO_RGB = torch.linalg.inv(_RGB_TO_YIQ)

# Note [Erased pixels]
# The erased box is 0, after normalisation the mean colour of the backbone's training data. The paper also fills
# with noise, slightly better for images. In a clip it would stand still or flicker, and differ between devices. A
# measured gain would change this.


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


@dataclass(frozen=True)
class Mixing:
    """Alphas of the Beta distributions of the mixing shares; 0 is off, with both each clip draws one of the two.

    `mixup` (arXiv:1710.09412) blends all pixels; `cutmix` (arXiv:1905.04899) pastes one box of the partner
    through all frames.
    """

    mixup: float = 0.0
    cutmix: float = 0.0


@dataclass(frozen=True)
class Augmentation:
    """Strength of training augmentation, in torchvision's terms.

    `crop_scale` is a share of the frame's area, `crop_ratio` width to height of the box (under `squash`, relative
    to the frame's), `horizontal_flip` a probability. Brightness, contrast and saturation draw factors from 1 - x
    to 1 + x, hue a rotation of the colour circle from -x to x. `randaugment` is a number of operations, their
    magnitude 0 to 10; `random_erasing` a probability.
    """

    crop_scale: tuple[float, float] = (0.5, 1.0)
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    horizontal_flip: float = 0.5
    brightness: float = 0.2
    contrast: float = 0.2
    saturation: float = 0.2
    hue: float = 0.0
    randaugment: int = 0
    randaugment_magnitude: float = 9.0
    random_erasing: float = 0.0


@dataclass(frozen=True, slots=True)
class _Draw:
    """Augmentation of one clip, the same for all its frames."""

    box: tuple[int, int, int, int]  # top, left, height, width
    flip: bool
    brightness: float
    contrast: float
    saturation: float
    hue: float


@torch.no_grad()
def train_transform(
    clips: Sequence[Tensor],
    epochs: Tensor,
    indices: Tensor,
    *,
    augmentation: Augmentation,
    preprocessing: Preprocessing,
    seed: int,
    device: torch.device,
) -> Tensor:
    """Augments and normalises clips, B times uint8 (T, C, H, W) -> (B, T, C, S, S).

    Random-resized crop, flip, RandAugment, colour jitter, normalisation, random erasing. The draws depend on
    (seed, epoch, index) and the frame size alone: not on the batch, the worker or the device. All frames of a clip
    share them.
    """
    size = preprocessing.frame_size
    batch = torch.empty(len(clips), *clips[0].shape[:2], size, size, device=device)
    fill = constant_like(255 * torch.tensor(preprocessing.mean), batch)
    for out, clip, epoch, index in zip(batch, clips, epochs.tolist(), indices.tolist(), strict=True):
        generator = draw_generator(seed, Kind.AUGMENTATION, epoch, index)
        draw = _draw(augmentation, clip.shape[2:], generator, preprocessing.resize == "squash")
        top, left, height, width = draw.box
        # The whole clip is moved: a box of it would first be copied out of the pinned memory.
        box = to_device(clip, device)[:, :, top : top + height, left : left + width]
        pixels = resize_frames(box, (size, size))
        if draw.flip:
            pixels = pixels.flip(3)
        if augmentation.randaugment:
            drawn = draw_generator(seed, Kind.RANDAUGMENT, epoch, index)
            pixels = randaugment(pixels, augmentation, fill=fill, generator=drawn)
        _jitter(pixels, draw, out)
        normalise(out, preprocessing.mean, preprocessing.std)
        if augmentation.random_erasing:
            _erase(out, augmentation.random_erasing, draw_generator(seed, Kind.ERASING, epoch, index))
    return batch


@torch.no_grad()
def eval_transform(
    clips: Sequence[Tensor],
    *,
    preprocessing: Preprocessing,
    device: torch.device,
    position: float = 0.5,
    flip: bool = False,
) -> Tensor:
    """A deterministic view of each clip by `frames_to_input`, B times uint8 (T, C, H, W) -> (B, T, C, S, S)."""
    size = preprocessing.frame_size
    how = preprocessing.model_dump(include={"frame_size", "resize", "mean", "std", "scale_to"})
    batch = torch.empty(len(clips), *clips[0].shape[:2], size, size, device=device)
    for out, clip in zip(batch, clips, strict=True):
        frames_to_input(clip, **how, device=device, position=position, flip=flip, out=out)
    return batch


@torch.no_grad()
def mix(
    clips: Tensor, partners: Sequence[int], epochs: Tensor, indices: Tensor, *, mixing: Mixing, seed: int
) -> tuple[Tensor, Tensor]:
    """Mixes the first B of (B+E, T, C, S, S) each with the clip at `partners` (B): (B, T, C, S, S), shares (B,).

    A share is the clip's own part of the mixture: of every pixel (mixup), or of all pixels (cutmix, after clipping
    the box to the frame). It depends on (seed, epoch, index) of the clip alone.
    """
    mixed = torch.empty_like(clips[: len(partners)])
    side = clips.shape[-1]
    shares = []
    for position, partner in enumerate(partners):
        generator = draw_generator(seed, Kind.MIXING, int(epochs[position]), int(indices[position]))
        out, own, other = mixed[position], clips[position], clips[partner]
        pastes = bool(generator.random() < 0.5) if mixing.mixup and mixing.cutmix else bool(mixing.cutmix)
        alpha = mixing.cutmix if pastes else mixing.mixup
        share = float(generator.beta(alpha, alpha))
        if pastes:  # a square of area 1 - share about a random pixel
            cut = round(side * math.sqrt(1 - share))
            y, x = (int(centre) - cut // 2 for centre in generator.integers(side, size=2))
            rows, columns = slice(max(y, 0), min(y + cut, side)), slice(max(x, 0), min(x + cut, side))
            out.copy_(own)
            out[..., rows, columns] = other[..., rows, columns]
            share = 1 - (rows.stop - rows.start) * (columns.stop - columns.start) / side**2
        else:
            torch.lerp(other, own, share, out=out)
        shares.append(share)
    return mixed, to_device(torch.tensor(shares, dtype=torch.float32), clips.device)


def _draw(how: Augmentation, frame: Sequence[int], generator: np.random.Generator, squash: bool) -> _Draw:
    # Every value is drawn, used or not: switching one augmentation off leaves the others unchanged.
    flip = bool(generator.random() < how.horizontal_flip)
    brightness, contrast, saturation, hue = generator.uniform(-1, 1, size=4).tolist()
    return _Draw(
        box=_draw_box(how, frame, generator, squash),
        flip=flip,
        brightness=max(0.0, 1 + brightness * how.brightness),
        contrast=max(0.0, 1 + contrast * how.contrast),
        saturation=max(0.0, 1 + saturation * how.saturation),
        hue=hue * how.hue,
    )


def _draw_box(
    how: Augmentation, frame: Sequence[int], generator: np.random.Generator, squash: bool
) -> tuple[int, int, int, int]:
    """Top, left, height, width of a box as torchvision's RandomResizedCrop, or the largest central one.

    Under `squash` the aspect is relative to the frame's own: the box of scale 1 is the whole frame.
    """
    height, width = frame
    own = width / height if squash else 1.0
    low, high = (own * ratio for ratio in how.crop_ratio)
    for _ in range(_BOX_ATTEMPTS):
        area = height * width * generator.uniform(*how.crop_scale)
        aspect = math.exp(generator.uniform(math.log(low), math.log(high)))
        h, w = round(math.sqrt(area / aspect)), round(math.sqrt(area * aspect))
        if 0 < h <= height and 0 < w <= width:
            top, left = generator.integers((height - h + 1, width - w + 1)).tolist()
            return top, left, h, w
    aspect = min(max(width / height, low), high)
    h, w = min(height, round(width / aspect)), min(width, round(height * aspect))
    return (height - h) // 2, (width - w) // 2, max(h, 1), max(w, 1)


def _jitter(pixels: Tensor, draw: _Draw, out: Tensor) -> None:
    """Colour jitter as one affine map of the channels, clamped to 0..255: (T, C, S, S) -> out.

    Brightness, contrast (about the clip's mean grey), saturation, hue, in this order. The last two leave grey
    unchanged, also contrast's shift along grey.
    """
    pixels = pixels.contiguous().float()
    frames = len(pixels)
    cos, sin = math.cos(2 * math.pi * draw.hue), math.sin(2 * math.pi * draw.hue)
    rotation = torch.tensor([[1, 0, 0], [0, cos, sin], [0, -sin, cos]], dtype=torch.float64)
    hue = _YIQ_TO_RGB @ rotation @ _RGB_TO_YIQ  # close to a rotation of HSV's hue (red to green), but linear
    one = torch.eye(3, dtype=torch.float64)
    saturation = draw.saturation * one + (1 - draw.saturation) * LUMA.expand(3, 3)
    matrix = constant_like(hue @ saturation * draw.contrast * draw.brightness, out)
    torch.bmm(matrix.expand(frames, 3, 3), pixels.flatten(2), out=out.view(frames, 3, -1))
    mean_grey = constant_like(LUMA, out) @ pixels.mean(dim=(0, 2, 3))
    out.add_(mean_grey * ((1 - draw.contrast) * draw.brightness)).clamp_(0, 255)


def _erase(pixels: Tensor, probability: float, generator: np.random.Generator) -> None:
    """Zeroes a random box of all frames in place (arXiv:1708.04896). See Note [Erased pixels]."""
    if generator.random() >= probability:
        return
    side = pixels.shape[-1]
    low, high = (math.log(ratio) for ratio in _ERASED_RATIO)
    for _ in range(_BOX_ATTEMPTS):
        area = side**2 * generator.uniform(*_ERASED_AREA)
        aspect = math.exp(generator.uniform(low, high))
        height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < height < side and 0 < width < side:
            top, left = generator.integers((side - height + 1, side - width + 1)).tolist()
            pixels[..., top : top + height, left : left + width] = 0
            return


def randaugment(
    pixels: Tensor, augmentation: Augmentation, *, fill: Tensor, generator: np.random.Generator
) -> Tensor:
    """Applies random operations in sequence to a clip, uint8 (T, C, S, S); the magnitude's sign is drawn, too.

    `fill` (C,) is the colour, 0..255, of pixels from outside the frame.
    """
    if pixels.is_floating_point():
        pixels = pixels.round().to(torch.uint8)
    pixels = pixels.contiguous()
    operations = list(OPERATIONS.values())
    for _ in range(augmentation.randaugment):
        operation = operations[generator.integers(len(operations))]
        sign = 1 if generator.random() < 0.5 else -1
        pixels = operation(pixels, sign * augmentation.randaugment_magnitude / _LARGEST, fill)
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
        sampled = F.grid_sample(offset, frame_grid, align_corners=False)  # bilinear, padded with zeros
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
