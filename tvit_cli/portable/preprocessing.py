"""Preprocessing without augmentation: uint8 frames resized, cropped, normalised.

Letters: T frames, C channels, H W pixels, S side of the model's frame.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


@torch.no_grad()
def frames_to_input(
    clip: Tensor,
    *,
    frame_size: int,
    resize: str,
    mean: Sequence[float],
    std: Sequence[float],
    device: torch.device | str = "cpu",
    scale_to: int | None = None,
    position: float = 0.5,
    flip: bool = False,
    out: Tensor | None = None,
) -> Tensor:
    """One clip as model input, uint8 (T, C, H, W) -> float32 (T, C, S, S), written to `out` if given.

    `crop` scales the short side to S and cuts S pixels of the long one at `position`: 0 left or top, 0.5 centre,
    1 right or bottom. `squash` scales the whole frame to S x S. With `scale_to`, larger than S, both scale to that
    size before S x S pixels are cut. `flip` mirrors left and right.
    """
    height = width = side = frame_size if scale_to is None else scale_to
    if resize == "crop":
        height, width = (round(length * side / min(clip.shape[2:])) for length in clip.shape[2:])
    pixels = resize_frames(to_device(clip, device), (height, width))
    top, left = int((height - frame_size) * position), int((width - frame_size) * position)
    view = pixels[:, :, top : top + frame_size, left : left + frame_size]
    if out is None:
        out = torch.empty(view.shape, device=view.device)
    out.copy_(view.flip(3) if flip else view)
    normalise(out, mean, std)
    return out


def resize_frames(clip: Tensor, size: tuple[int, int]) -> Tensor:
    """Antialiased bilinear, (T, C, H, W) -> (T, C, *size); on a CPU in uint8, channels last, which is faster."""
    if tuple(clip.shape[2:]) == size:
        return clip
    is_cpu = clip.device.type == "cpu"
    clip = clip.contiguous(memory_format=torch.channels_last) if is_cpu else clip.float()
    return F.interpolate(clip, size=size, mode="bilinear", antialias=True)


def normalise(pixels: Tensor, mean: Sequence[float], std: Sequence[float]) -> None:
    """In place: 0..255 -> (x / 255 - mean) / std, by channel, (..., C, H, W)."""
    shift = 255 * torch.tensor(mean, dtype=torch.float64).view(-1, 1, 1)
    scale = 1 / (255 * torch.tensor(std, dtype=torch.float64).view(-1, 1, 1))
    pixels.sub_(constant_like(shift, pixels)).mul_(constant_like(scale, pixels))


def constant_like(numbers: Tensor, pixels: Tensor) -> Tensor:
    """Numbers in the dtype and on the device of `pixels`, without a synchronisation."""
    return to_device(numbers.to(pixels.dtype), pixels.device)


def to_device(tensor: Tensor, device: torch.device | str) -> Tensor:
    """On the device, asynchronously except on MPS, which may read the source after it was freed."""
    return tensor.to(device, non_blocking=torch.device(device).type != "mps")
