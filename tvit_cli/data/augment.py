"""Clip augmentation on the model's device: crops, colour jitter, erasing, mixup, CutMix.

Letters: B clips, E clips that are partners only, T frames, C channels, H W pixels, S the side of the model's frame.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tvit_cli.data.randaugment import LUMA, Kind, draw_generator, randaugment
from tvit_cli.portable.preprocessing import (
    constant_like,
    frames_to_input,
    normalise,
    resize_frames,
    to_device,
)
from tvit_cli.settings.card import Preprocessing

_BOX_ATTEMPTS = 10  # before the largest fitting box (crop) or none (erasing), as in torchvision
_ERASED_AREA = (
    0.02,
    0.33,
)  # of the frame; this and the height to width ratio are torchvision's RandomErasing
_ERASED_RATIO = (0.3, 3.3)

_RGB_TO_YIQ = torch.tensor(  # NTSC; rows I and Q sum to zero, so that their rotation leaves grey unchanged
    [[0.299, 0.587, 0.114], [0.5959, -0.2746, -0.3213], [0.2115, -0.5227, 0.3112]], dtype=torch.float64
)
_YIQ_TO_RGB = torch.linalg.inv(_RGB_TO_YIQ)

# Note [Erased pixels]
# The erased box is 0, which after normalisation is the mean colour of the backbone's training data. The paper also
# fills with noise, slightly better for images. Noise for a clip would either be one texture for all frames, which
# stands still whatever the motion, or flicker; drawn on the device it would differ between devices. A measured gain
# would change this.


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
        draw = _draw(augmentation, preprocessing, clip.shape[2:], seed, epoch, index)
        top, left, height, width = draw.box
        # The whole clip is moved: a box of it would first be copied out of the pinned memory.
        box = to_device(clip, device)[:, :, top : top + height, left : left + width]
        pixels = resize_frames(box, (size, size))
        if draw.flip:
            pixels = pixels.flip(3)
        if augmentation.randaugment:
            pixels = randaugment(
                pixels,
                operations=augmentation.randaugment,
                magnitude=augmentation.randaugment_magnitude,
                fill=fill,
                seed=seed,
                epoch=epoch,
                index=index,
            )
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
    place: float = 0.5,
    flip: bool = False,
) -> Tensor:
    """A deterministic view of each clip by `frames_to_input`, B times uint8 (T, C, H, W) -> (B, T, C, S, S)."""
    size = preprocessing.frame_size
    batch = torch.empty(len(clips), *clips[0].shape[:2], size, size, device=device)
    for out, clip in zip(batch, clips, strict=True):
        frames_to_input(
            clip,
            frame_size=size,
            resize=preprocessing.resize,
            mean=preprocessing.mean,
            std=preprocessing.std,
            device=device,
            scale_to=preprocessing.scale_to,
            place=place,
            flip=flip,
            out=out,
        )
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


def _draw(
    augmentation: Augmentation,
    preprocessing: Preprocessing,
    frame: Sequence[int],
    seed: int,
    epoch: int,
    index: int,
) -> _Draw:
    generator = draw_generator(seed, Kind.AUGMENTATION, epoch, index)
    # Every value is drawn, used or not: switching one augmentation off leaves the others unchanged.
    flip = bool(generator.random() < augmentation.horizontal_flip)
    brightness, contrast, saturation, hue = generator.uniform(-1, 1, size=4).tolist()
    return _Draw(
        box=_draw_box(augmentation, preprocessing, frame, generator),
        flip=flip,
        brightness=max(0.0, 1 + brightness * augmentation.brightness),
        contrast=max(0.0, 1 + contrast * augmentation.contrast),
        saturation=max(0.0, 1 + saturation * augmentation.saturation),
        hue=hue * augmentation.hue,
    )


def _draw_box(
    augmentation: Augmentation,
    preprocessing: Preprocessing,
    frame: Sequence[int],
    generator: np.random.Generator,
) -> tuple[int, int, int, int]:
    """Top, left, height, width of a box of random area and aspect, as torchvision's RandomResizedCrop.

    If none fits, the largest in the middle. Under `squash` the aspect is relative to the frame's own: the box of
    scale 1 is the whole frame.
    """
    height, width = frame
    own = width / height if preprocessing.resize == "squash" else 1.0
    low, high = (own * ratio for ratio in augmentation.crop_ratio)
    for _ in range(_BOX_ATTEMPTS):
        area = height * width * generator.uniform(*augmentation.crop_scale)
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
    saturation = draw.saturation * torch.eye(3, dtype=torch.float64) + (1 - draw.saturation) * LUMA.expand(
        3, 3
    )
    matrix = constant_like(hue @ saturation * draw.contrast * draw.brightness, out)
    torch.bmm(matrix.expand(frames, 3, 3), pixels.flatten(2), out=out.view(frames, 3, -1))
    mean_grey = constant_like(LUMA, out) @ pixels.mean(dim=(0, 2, 3))
    out.add_(mean_grey * ((1 - draw.contrast) * draw.brightness)).clamp_(0, 255)


def _erase(pixels: Tensor, probability: float, generator: np.random.Generator) -> None:
    """Zeroes one box through all frames with that probability, in place (arXiv:1708.04896).

    See Note [Erased pixels].
    """
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
