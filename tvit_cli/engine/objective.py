"""What a training minimises: the mean cross-entropy of an update's clips, each of one label or of two.

What a clip counts may depend on its class. Pure functions of tensors. Letters: B clips, K classes.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class Targets:
    """What the clips of one forward pass show, and which of them count.

    Of a mixed clip, `labels` and `others` are both right, for `shares` and 1 - `shares` of it.
    """

    labels: Tensor  # int64 (B,)
    weights: Tensor  # float (B,): 1, or 0 for a clip that does not count
    others: Tensor | None = None  # int64 (B,)
    shares: Tensor | None = None  # float (B,), 0 to 1

    @property
    def main(self) -> Tensor:
        """The label of the larger part of each clip: what a right answer is in the training accuracy."""
        if self.others is None or self.shares is None:
            return self.labels
        return self.labels.where(self.shares >= 0.5, self.others)


def clip_losses(logits: Tensor, targets: Targets, *, class_weights: Tensor, label_smoothing: float) -> Tensor:
    """Cross-entropy in nats of each clip, times the weight of its class: logits (B, K), weights (K,) -> (B,).

    Of a mixed clip, that of both labels by their shares; where classes weigh the same, this is the cross-entropy
    against the mixed, then smoothed target.
    """

    def of(labels: Tensor) -> Tensor:
        losses = F.cross_entropy(logits, labels, label_smoothing=label_smoothing, reduction="none")
        return losses * class_weights[labels]

    losses = of(targets.labels)
    if targets.others is None or targets.shares is None:
        return losses
    others = of(targets.others)
    return targets.shares * losses + (1 - targets.shares) * others


def window_share(losses: Tensor, targets: Targets, *, window_clips: int) -> Tensor:
    """What one forward pass adds to the mean loss of an update of that many clips, over all its passes."""
    return (losses * targets.weights).sum() / window_clips
