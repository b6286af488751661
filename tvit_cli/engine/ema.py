"""A moving average of the trained weights, which is validated and kept in their place."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from tvit_cli.model.trainable import copy_tensors, trainable_tensors


class WeightAverage:
    """The exponential moving average of a model's trainable tensors, on their device and in their dtype.

    An adapter's two matrices are averaged each by itself, as all other tensors are, not their product.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        """The average begins as the weights are."""
        self._weights = trainable_tensors(model)
        self.tensors = {name: weight.clone() for name, weight in self._weights.items()}
        self._decay = decay

    def decay_at(self, step: int) -> float:
        """Share of the average that outlives update `step`, counted from 0; small at first, to forget the start.

        min(decay, (1 + step) / (10 + step)), as in TensorFlow: 0.1 . 0.18 . 0.25 … and 0.9 at step 80.
        """
        return min(self._decay, (1 + step) / (10 + step))

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Move the average towards the weights that update `step`, counted from 0, has left."""
        weight = 1 - self.decay_at(step)
        torch._foreach_lerp_(list(self.tensors.values()), list(self._weights.values()), weight)

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take a saved average. Raises ModelError when names or shapes differ."""
        copy_tensors(tensors, self.tensors)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Within the block the model has the average as its weights; afterwards its own, bit for bit."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for name, weight in self._weights.items():
            own = weight.clone()
            weight.copy_(self.tensors[name])
            self.tensors[name].copy_(own)
