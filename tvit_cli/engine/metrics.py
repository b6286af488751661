"""Classification metrics from logits: sums and counts, divided once."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass
class Tally:
    """Running sums over clips: loss, right answers, count. Tensors stay on their device until `totals`."""

    sums: Tensor  # (3,) float64: loss, right answers, clips

    @classmethod
    def zeros(cls, device: torch.device) -> Tally:
        """An empty tally on a device (float32 where the device has no float64)."""
        return cls(
            torch.zeros(3, dtype=torch.float32 if device.type == "mps" else torch.float64, device=device)
        )

    def add(self, logits: Tensor, losses: Tensor, labels: Tensor, weights: Tensor) -> None:
        """Count a batch: logits (B, K), losses (B,), labels (B,), weights (B,) 1 or 0."""
        right = (logits.argmax(1) == labels) * weights
        batch = torch.stack([(losses * weights).sum(), right.sum(), weights.sum()])
        self.sums += batch.detach().to(self.sums.dtype)


def top_k_right(logits: Tensor, labels: Tensor, k: int) -> Tensor:
    """Whether each label is among the k largest logits: (V, K), (V,) -> bool (V,).

    Ties count as a model that guesses would be counted at worst: a label is right only if fewer than k
    others score as high or higher. A score that is no number counts against the model.
    """
    own = logits.gather(1, labels[:, None])  # (V, 1)
    return (~(logits < own)).sum(1) <= k


def confusion_matrix(predicted: Tensor, labels: Tensor, classes: int) -> Tensor:
    """Counts (K, K): row the true class, column the predicted one."""
    return torch.bincount(labels * classes + predicted, minlength=classes * classes).reshape(classes, classes)


def video_metrics(logits: Tensor, labels: Tensor, *, top_k: int) -> dict[str, float]:
    """Metrics of one view per video: logits (V, K), labels (V,). Loss in nats, the rest fractions of 1."""
    videos, classes = logits.shape
    k = min(top_k, classes)
    logits = logits.double()
    confusion = confusion_matrix(logits.argmax(1), labels, classes)
    per_class = confusion.sum(1)
    recall = confusion.diagonal()[per_class > 0].double() / per_class[per_class > 0]
    return {
        "videos": float(videos),
        "loss": F.cross_entropy(logits, labels).item(),
        "video_top1": top_k_right(logits, labels, 1).sum().item() / videos,
        f"video_top{k}": top_k_right(logits, labels, k).sum().item() / videos,
        "mean_class_accuracy": recall.mean().item(),
    }
