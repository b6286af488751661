"""Clip augmentation on the model's device: crops, colour jitter, erasing, mixup, CutMix.

Letters: B clips, E clips that are only partners, T frames, C channels, S the side of the model's frame.

Letters: B clips, T frames, C channels, H W pixels, S the side of the model's frame.
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


@dataclass(frozen=True)
class Mixing:
    """Alphas of the Beta distributions that shares are drawn from; 0 is off. With both, each clip draws which.

    `mixup` (arXiv:1710.09412) blends all pixels; `cutmix` (arXiv:1905.04899) pastes one box of the partner
    through all frames.
    """

    mixup: float = 0.0
    cutmix: float = 0.0


@torch.no_grad()
def mix(
    clips: Tensor, partners: Sequence[int], epochs: Tensor, indices: Tensor, *, mixing: Mixing, seed: int
) -> tuple[Tensor, Tensor]:
    """Mix the first B of (B+E, T, C, S, S) each with the clip at `partners` (B): (B, T, C, S, S), shares (B,).

    A share is how much of the mixture is the clip itself: of every pixel (mixup), or of all pixels (cutmix,
    counted after the box was clipped to the frame). It depends on (seed, epoch, index) of the clip alone.
    """
    mixed = torch.empty_like(clips[: len(partners)])
    shares = []
    for place, partner in enumerate(partners):
        key = (int(epochs[place]), int(indices[place]))
        generator = draw_generator(seed, Kind.MIXING, *key)
        out, own, other = mixed[place], clips[place], clips[partner]
        pastes = bool(generator.random() < 0.5) if mixing.mixup and mixing.cutmix else bool(mixing.cutmix)
        alpha = mixing.cutmix if pastes else mixing.mixup
        share = float(generator.beta(alpha, alpha))
        if pastes:
            top, bottom, left, right = _box(share, own.shape[-1], generator)
            out.copy_(own)
            out[..., top:bottom, left:right] = other[..., top:bottom, left:right]
            share = 1 - (bottom - top) * (right - left) / own.shape[-1] ** 2
        else:
            torch.lerp(other, own, share, out=out)
        shares.append(share)
    return mixed, to_device(torch.tensor(shares, dtype=torch.float32), clips.device)


def _box(share: float, side: int, generator: np.random.Generator) -> tuple[int, int, int, int]:
    """Top, bottom, left, right of a square of area 1 - share about a random pixel, clipped to the frame."""
    cut = round(side * math.sqrt(1 - share))
    y, x = generator.integers(side, size=2).tolist()
    top, left = y - cut // 2, x - cut // 2
    return max(top, 0), min(top + cut, side), max(left, 0), min(left + cut, side)


_BOX_ATTEMPTS = 10  # boxes drawn before the largest fitting one (a crop) or none (erasing), as in torchvision
_ERASED_AREA = (0.02, 0.33)  # of the frame; this and height to width are torchvision's RandomErasing
_ERASED_RATIO = (0.3, 3.3)

_RGB_TO_YIQ = torch.tensor(  # NTSC; rows I and Q sum to zero, so that turning them leaves grey alone
    [[0.299, 0.587, 0.114], [0.5959, -0.2746, -0.3213], [0.2115, -0.5227, 0.3112]], dtype=torch.float64
)
_YIQ_TO_RGB = torch.linalg.inv(_RGB_TO_YIQ)


@dataclass(frozen=True)
class Augmentation:
    """How much a training clip is changed; the meanings are torchvision's.

    `crop_scale` is a share of the frame's area, `crop_ratio` width to height of the box (under `squash`,
    beside that of the frame), `horizontal_flip` a probability. Brightness, contrast and saturation draw a
    factor from 1 - x to 1 + x, hue a turn of the colour circle from -x to x. `randaugment` is a number of
    operations, their magnitude 0 to 10; `random_erasing` a probability.
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
    """What is done to every frame of one clip."""

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
    """Each clip, uint8 (T, C, H, W), augmented and normalised: (B, T, C, S, S).

    Random-resized crop, flip, RandAugment, colour jitter, normalisation, random erasing. What is drawn depends
    on (seed, epoch, index) and the frame's size alone: not on the batch, the worker or the device. All frames
    of a clip share it.
    """
    size = preprocessing.frame_size
    batch = _empty(clips, size, device)
    fill = constant_like(255 * torch.tensor(preprocessing.mean), batch)
    for out, clip, epoch, index in zip(batch, clips, epochs.tolist(), indices.tolist(), strict=True):
        draw = _draw(augmentation, preprocessing, clip.shape[2:], seed, epoch, index)
        # The whole clip moves: a box of it would be copied first, out of the pinned memory.
        pixels = resize_frames(_boxed(to_device(clip, device), draw.box), (size, size))
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
    """A deterministic view of each clip, as `frames_to_input` gives it: (T, C, H, W) each -> (B, T, C, S, S)."""
    batch = _empty(clips, preprocessing.frame_size, device)
    for out, clip in zip(batch, clips, strict=True):
        frames_to_input(
            clip,
            frame_size=preprocessing.frame_size,
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


def _empty(clips: Sequence[Tensor], size: int, device: torch.device) -> Tensor:
    frames, channels = clips[0].shape[:2]
    return torch.empty(len(clips), frames, channels, size, size, device=device)


def _draw(
    augmentation: Augmentation,
    preprocessing: Preprocessing,
    frame: Sequence[int],
    seed: int,
    epoch: int,
    index: int,
) -> _Draw:
    generator = draw_generator(seed, Kind.AUGMENTATION, epoch, index)
    # Each kind of change draws whether it is on or not: switching one off leaves the others as they were.
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
    """Top, left, height, width of a box of random area and aspect; if none fits, the largest in the middle.

    The algorithm is torchvision's RandomResizedCrop. Under `squash` the aspect is counted from the frame's
    own, so that the box of scale 1 is the whole frame.
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


def _boxed(clip: Tensor, box: tuple[int, int, int, int]) -> Tensor:
    top, left, height, width = box
    return clip[:, :, top : top + height, left : left + width]


def _jitter(pixels: Tensor, draw: _Draw, out: Tensor) -> None:
    """Colour jitter as one affine map of the channels, clamped to valid pixels: (T, C, S, S) -> out.

    Brightness, contrast (about the clip's mean grey), saturation, hue, in this order. The last two leave grey
    as it is, so contrast's shift along grey passes through them unchanged.
    """
    pixels = pixels.contiguous().float()
    matrix = _hue_matrix(draw.hue) @ _saturation_matrix(draw.saturation) * draw.contrast * draw.brightness
    frames = len(pixels)
    torch.bmm(constant_like(matrix, out).expand(frames, 3, 3), pixels.flatten(2), out=out.view(frames, 3, -1))
    mean_grey = constant_like(LUMA, out) @ pixels.mean(dim=(0, 2, 3))
    out.add_(mean_grey * ((1 - draw.contrast) * draw.brightness)).clamp_(0, 255)


def _saturation_matrix(factor: float) -> Tensor:
    """Moves each pixel along the line from its grey to its colour."""
    return factor * torch.eye(3, dtype=torch.float64) + (1 - factor) * LUMA.expand(3, 3)


def _hue_matrix(turn: float) -> Tensor:
    """Turns the plane of I and Q; close to a turn of HSV's hue (red to green), and linear."""
    cos, sin = math.cos(2 * math.pi * turn), math.sin(2 * math.pi * turn)
    rotation = torch.tensor([[1, 0, 0], [0, cos, sin], [0, -sin, cos]], dtype=torch.float64)
    turned: Tensor = _YIQ_TO_RGB @ rotation @ _RGB_TO_YIQ
    return turned


def _erase(pixels: Tensor, probability: float, generator: np.random.Generator) -> None:
    """With that probability, in place: 0 in one box through all frames (arXiv:1708.04896).

    See Note [What erasing leaves].
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


# Note [What erasing leaves]
# The box is filled with 0, which after normalisation is the mean colour of the data that the backbone was trained
# on. The paper also fills with noise, and finds that slightly better for images. Noise for a clip would either
# be one picture for all frames, a texture that stands still whatever the motion, or flicker; and drawn on the
# device it would differ between devices. A measured gain would change this.
