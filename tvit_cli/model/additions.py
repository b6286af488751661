"""What pretrained image weights have nothing for: parts that see time.

They are trained in full, whatever is frozen. Beside pretrained weights each starts so that it adds nothing.

Letters: B clips, T' times, P patches per frame, D width.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

INIT_STD = 0.02  # of the truncated normal; ViT's official code (arXiv:2010.11929) draws positions with it
LEAST_DEVIATION = 0.1  # of a feature, as a share of the mean one
ROUNDING = 1e-5  # of a feature's size: batches of other sizes give one clip float32 features up to 1e-6 apart


class Addition(nn.Module):
    """A part that an image ViT lacks.

    A part that `is_map` holds linear layers. One step moves their output by the rate times the sum of all inputs,
    an offset or a gate by the rate alone: a rate that suits those and LoRA's thin matrices is too large for maps.
    """

    is_map = False

    def start(self, *, generator: torch.Generator | None, from_scratch: bool) -> None:
        """Sets the first values, once all linear layers inside have theirs; without `from_scratch` zeros."""
        raise NotImplementedError


class TemporalEmbedding(Addition):
    """Adds to each patch when it is seen; interpolated linearly for clips of another length."""

    def __init__(self, n_times: int, width: int) -> None:
        super().__init__()
        self.embedding = nn.Parameter(torch.empty(1, n_times, 1, width))

    def forward(self, patches: Tensor) -> Tensor:
        """(B, T', P, D) -> (B, T', P, D)."""
        embedding: Tensor = self.embedding
        n_times = patches.shape[1]
        if n_times != embedding.shape[1]:
            embedding = resize_times(embedding, n_times)
        return patches + embedding

    def start(self, *, generator: torch.Generator | None, from_scratch: bool) -> None:
        if from_scratch:
            truncated_normal(self.embedding, generator)
        else:
            nn.init.zeros_(self.embedding)


class TokenIndexedEmbedding(TemporalEmbedding):
    """Adds to each patch the row of its number in the clip, modulo the rows, where its frame's would be right.

    The reference implementation's mistake: what it has trained answers as it did with it alone.
    """

    def forward(self, patches: Tensor) -> Tensor:
        """(B, T', P, D) -> (B, T', P, D)."""
        embedding: Tensor = self.embedding
        tokens = torch.arange(patches.shape[1] * patches.shape[2], device=patches.device)  # (T'*P,)
        rows = embedding[:, tokens % embedding.shape[1]]  # (1, T'*P, 1, D)
        return patches + rows.view(1, *patches.shape[1:])


class Gate(Addition):
    """Scales each channel, beside pretrained weights from nothing (LayerScale, arXiv:2103.17239)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.empty(width))

    def forward(self, tokens: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        return tokens * self.gate

    def start(self, *, generator: torch.Generator | None, from_scratch: bool) -> None:
        nn.init.constant_(self.gate, float(from_scratch))


class FeatureNorm(Addition):
    """Shifts and scales each feature, and is trained with what reads them.

    `fit` starts it at the mean and deviation over some clips, so that what all clips share weighs nothing to begin
    with: data-dependent initialisation, ActNorm, arXiv:1807.03039.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.empty(width))
        self.scale = nn.Parameter(torch.empty(width))

    def forward(self, features: Tensor) -> Tensor:
        """(B, D) -> (B, D)."""
        return (features - self.shift) * self.scale

    def start(self, *, generator: torch.Generator | None, from_scratch: bool) -> None:
        nn.init.zeros_(self.shift)
        nn.init.ones_(self.scale)

    @torch.no_grad()
    def fit(self, features: Tensor) -> None:
        """Take mean and deviation of features, (clips, D); those that hardly differ are not blown up."""
        deviation = features.std(dim=0, correction=0)  # (D,)
        self.shift.copy_(features.mean(dim=0))
        # Else all clips are one, and how far others lie from it is not known.
        if deviation.mean() > ROUNDING * features.abs().mean():
            self.scale.copy_(1 / deviation.clamp_min(LEAST_DEVIATION * float(deviation.mean())))


def resize_times(embedding: Tensor, n_times: int) -> Tensor:
    """A temporal embedding interpolated linearly, (1, T', 1, D) -> (1, new T', 1, D)."""
    lines = embedding[:, :, 0].transpose(1, 2)  # (1, D, T')
    lines = F.interpolate(lines, size=n_times, mode="linear", align_corners=False)
    return lines.transpose(1, 2).unsqueeze(2)


def truncated_normal(parameter: Tensor, generator: torch.Generator | None) -> None:
    """Normal numbers of std 0.02, none beyond two deviations, from the inverse of their distribution.

    `nn.init.trunc_normal_` draws other numbers from the same seed in other torch versions, and takes longer.
    """
    within = math.erf(2 / math.sqrt(2))
    parameter.uniform_(-within, within, generator=generator).erfinv_().mul_(INIT_STD * math.sqrt(2))
