"""Preprocessing as a graph of matrix products, for formats that know no antialiased resizing of uint8.

Letters: B clips, T frames, H W pixels, S the side of the model's frame, O outputs along an axis, I inputs.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tvit_cli.settings.card import Preprocessing

# Note [The same bits without a resize operator]
# On a CPU, torch resizes uint8 with weights rounded to 16 bits and rounds to uint8 after each axis. No operator of
# ONNX does that, and one level of grey is up to a hundred times what the proof allows a logit. All of it is whole
# numbers, so a product with the matrix of these weights, in float64, gives the same bits; a test compares them
# over many sizes. The number of fractional bits depends on the largest weight of all outputs, also of those that
# the crop leaves out: they are looked at up to an aspect of MAX_ASPECT.
MAX_ASPECT = 4
WEIGHT_BITS = 15  # below 2**15: int16
MAX_PRECISION = 22


class PreprocessingGraph(nn.Module):
    """RGB frames as decoded, uint8 (B, T, H, W, 3) of any size, to what the model sees, (B, T, 3, S, S)."""

    powers: Tensor
    shift: Tensor
    scale: Tensor

    def __init__(self, preprocessing: Preprocessing) -> None:
        super().__init__()
        self.size = preprocessing.frame_size
        self.scale_to = preprocessing.scale_to
        self.crops = preprocessing.resize == "crop"
        mean = torch.tensor(preprocessing.mean, dtype=torch.float64).view(3, 1, 1)
        std = torch.tensor(preprocessing.std, dtype=torch.float64).view(3, 1, 1)
        self.register_buffer("powers", 2.0 ** torch.arange(MAX_PRECISION + 2, dtype=torch.float64))
        self.register_buffer("shift", (255 * mean).float())
        self.register_buffer("scale", (1 / (255 * std)).float())

    def forward(self, frames: Tensor) -> Tensor:
        """(B, T, H, W, 3) -> (B, T, 3, S, S)."""
        height, width = frames.shape[2:4]
        rows = torch.arange(height, dtype=torch.float64)  # (H,)
        columns = torch.arange(width, dtype=torch.float64)  # (W,)
        short = torch.minimum(rows[-1], columns[-1]) + 1
        pixels = frames.permute(0, 1, 4, 2, 3).to(torch.float64)  # (B, T, 3, H, W)
        weights, precision = self._weights(columns, short)  # (S, W)
        pixels = self._rounded(pixels @ weights.T, precision)  # (B, T, 3, H, S)
        weights, precision = self._weights(rows, short)  # (S, H)
        pixels = self._rounded(weights @ pixels, precision)  # (B, T, 3, S, S)
        return (pixels.float() - self.shift) * self.scale

    def _weights(self, inputs: Tensor, short: Tensor) -> tuple[Tensor, Tensor]:
        """Whole weights (S, I) of the outputs that the crop keeps, and their power of two."""
        count = inputs[-1] + 1
        full = torch.full_like(count, self.scale_to)
        if self.crops:
            full = (count * self.scale_to / short).round()
        outputs = torch.arange(self.size, dtype=torch.float64)
        every = torch.arange(MAX_ASPECT * self.scale_to, dtype=torch.float64)
        largest = _triangles(every.clamp(max=full - 1), inputs, count, full).max()
        first = ((full - self.size) / 2).floor()
        kept = _triangles(first + outputs, inputs, count, full)
        fits = (0.5 + largest * self.powers[1:-1]).floor() < 2**WEIGHT_BITS
        power = self.powers.index_select(0, fits.sum().reshape(1))  # (1,)
        return (kept * power + 0.5).floor(), power

    @staticmethod
    def _rounded(sums: Tensor, power: Tensor) -> Tensor:
        return ((sums + power / 2) / power).floor().clamp(0, 255)


class Scoring(nn.Module):
    """Preprocessing, model and softmax in one: uint8 (B, T, H, W, 3) -> scores (B, K)."""

    def __init__(self, preprocessing: Preprocessing, model: nn.Module) -> None:
        super().__init__()
        self.preprocessing = PreprocessingGraph(preprocessing)
        self.model = model

    def forward(self, frames: Tensor) -> Tensor:
        """(B, T, H, W, 3) -> (B, K)."""
        scores: Tensor = self.model(self.preprocessing(frames)).softmax(1)
        return scores


def _triangles(outputs: Tensor, inputs: Tensor, count: Tensor, full: Tensor) -> Tensor:
    """Weights of an antialiased bilinear resize from `count` to `full` pixels, (O,) and (I,) -> (O, I)."""
    scale = count / full
    support = scale.clamp(min=1)
    centre = ((outputs + 0.5) * scale).unsqueeze(1)  # (O, 1)
    low = (centre - support + 0.5).floor()
    high = (centre + support + 0.5).floor()
    weights = (1 - ((inputs - centre + 0.5) / support).abs()).clamp(min=0)
    weights = torch.where((inputs >= low) & (inputs < high), weights, torch.zeros_like(weights))
    return weights / weights.sum(1, keepdim=True)
