"""Mixup and CutMix of clips: each clip of a batch is blended with its partner, or gets a tube of it.

Letters: B clips, E clips that are only partners, T frames, C channels, S the side of the model's frame.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from tvit_cli.data.draws import Kind, draw_generator
from tvit_cli.data.pixels import moved


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
    return mixed, moved(torch.tensor(shares, dtype=torch.float32), clips.device)


def _box(share: float, side: int, generator: np.random.Generator) -> tuple[int, int, int, int]:
    """Top, bottom, left, right of a square of area 1 - share about a random pixel, clipped to the frame."""
    cut = round(side * math.sqrt(1 - share))
    y, x = generator.integers(side, size=2).tolist()
    top, left = y - cut // 2, x - cut // 2
    return max(top, 0), min(top + cut, side), max(left, 0), min(left + cut, side)
