"""Clips as pictures: what the model was given, turned back into pixels.

Letters: T frames, C channels, S the side of the model's frame.
"""

from __future__ import annotations

import base64
from dataclasses import dataclass, field

import simplejpeg
import torch
from torch import Tensor
from torch.nn import functional as F

from tvit_cli.settings.card import Preprocessing

MOST_FRAMES = 16  # of one strip
FRAME_SIDE = 128  # pixels of a frame in a strip, at most
JPEG_QUALITY = 85


@dataclass
class Samples:
    """The first clips of a training that the model was given, each with a caption, on the CPU."""

    wanted: int = 6
    clips: list[tuple[Tensor, str]] = field(default_factory=list)  # (T, C, S, S) float32, normalised

    @property
    def are_wanted(self) -> bool:
        """Whether there are too few yet."""
        return len(self.clips) < self.wanted

    def offer(self, clip: Tensor, caption: str) -> None:
        """Keep a copy of a clip (T, C, S, S) if more are wanted."""
        if self.are_wanted:
            self.clips.append((clip.detach().to("cpu", torch.float32, copy=True), caption))


def film_strip(clip: Tensor, preprocessing: Preprocessing) -> str:
    """A normalised clip (T, C, S, S) as one row of frames: a JPEG in a data URI."""
    pixels = to_pixels(spread(clip, MOST_FRAMES), preprocessing)
    side = min(FRAME_SIDE, pixels.shape[-1])
    if side < pixels.shape[-1]:
        pixels = F.interpolate(pixels, size=(side, side), mode="bilinear", antialias=True)
    gap = torch.full((len(pixels), 3, side, 2), 128, dtype=torch.uint8)
    row = torch.cat([pixels, gap], dim=3).permute(2, 0, 3, 1)  # (S, T, S + 2, C)
    row = row.reshape(side, -1, 3)[:, :-2].contiguous()
    return jpeg_uri(row)


def to_pixels(clip: Tensor, preprocessing: Preprocessing) -> Tensor:
    """The inverse of normalisation: float (..., C, S, S) -> uint8 of the same shape."""
    mean = torch.tensor(preprocessing.mean).view(3, 1, 1)
    std = torch.tensor(preprocessing.std).view(3, 1, 1)
    return ((clip.float().cpu() * std + mean) * 255).round().clamp(0, 255).to(torch.uint8)


def spread(clip: Tensor, most: int) -> Tensor:
    """At most `most` frames of a clip (T, ...), evenly spaced, the first and the last among them."""
    if len(clip) <= most:
        return clip
    return clip[torch.linspace(0, len(clip) - 1, most).round().long()]


def jpeg_uri(picture: Tensor) -> str:
    """A picture uint8 (H, W, 3) as the text of an <img>'s src."""
    data = simplejpeg.encode_jpeg(picture.numpy(), quality=JPEG_QUALITY, colorspace="RGB")
    return "data:image/jpeg;base64," + base64.b64encode(data).decode("ascii")
