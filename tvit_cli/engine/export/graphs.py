"""The computations that ONNX and torch.export trace: the model, and what comes before it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim

from tvit_cli.engine.export.job import Job
from tvit_cli.engine.export.pixelgraph import PreprocessingGraph, Scoring
from tvit_cli.settings.card import ModelCard

FRAMES, PIXELS, LOGITS, SCORES = "frames", "pixel_values", "logits", "scores"
EXAMPLE_CLIPS = 2  # a size of 1 is taken for one that never changes
EXAMPLE_FRAME = (56, 72)  # height and width


@dataclass(frozen=True)
class Graph:
    """A module with an example of its input, which of the input's sizes may change, and the tensors' names."""

    module: nn.Module
    example: Tensor
    dynamic: dict[int, Any]
    input_name: str
    output_name: str

    @property
    def input_kind(self) -> str:
        """The input in words."""
        if self.input_name == FRAMES:
            return "uint8 (B, T, H, W, 3), RGB as decoded"
        return "float32 (B, T, 3, S, S), resized and normalised"


def graphs(job: Job) -> dict[str, Graph]:
    """What is exported, by file name: the model alone and its preprocessing, or one graph of both."""
    card, model = job.trained.card, job.trained.model
    if job.settings.with_preprocessing:
        both = Scoring(card.preprocessing, model).eval()
        return {"model": Graph(both, _frames(card), _any_frame(), FRAMES, SCORES)}
    preprocessing = PreprocessingGraph(card.preprocessing).eval()
    size = card.preprocessing.frame_size
    pixels = torch.zeros(EXAMPLE_CLIPS, card.preprocessing.n_frames, 3, size, size)
    return {
        "model": Graph(model, pixels, {0: Dim.DYNAMIC}, PIXELS, LOGITS),
        "preprocessing": Graph(preprocessing, _frames(card), _any_frame(), FRAMES, PIXELS),
    }


def _frames(card: ModelCard) -> Tensor:
    return torch.zeros(EXAMPLE_CLIPS, card.preprocessing.n_frames, *EXAMPLE_FRAME, 3, dtype=torch.uint8)


def _any_frame() -> dict[int, Any]:
    return {0: Dim.DYNAMIC, 2: Dim.DYNAMIC, 3: Dim.DYNAMIC}
