"""Classification metrics from logits: sums and counts, divided once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from tvit_cli.report.calibration import Bin
from tvit_cli.report.matrix import ClassScore

BINS = 15  # of confidence, for its calibration


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
    """Whether each label is among the k largest logits: (V, K), (V,) -> bool (V,). Ties are as in `ranks`."""
    return ranks(logits, labels) <= k


def ranks(logits: Tensor, labels: Tensor) -> Tensor:
    """The place of each label among the classes, 1 for the best: (..., K), (...) -> (...).

    Ties count as a model that guesses would be counted at worst: all that score as high stand before the label.
    A score that is no number counts against the model.
    """
    own = logits.gather(-1, labels[..., None])  # (..., 1)
    return (~(logits < own)).sum(-1)


def confusion_matrix(predicted: Tensor, labels: Tensor, classes: int) -> Tensor:
    """Counts (K, K): row the true class, column the predicted one."""
    return torch.bincount(labels * classes + predicted, minlength=classes * classes).reshape(classes, classes)


def class_counts(logits: Tensor, labels: Tensor, names: Sequence[str]) -> dict[str, tuple[int, int]]:
    """(Videos, right answers) of each class that has a video: logits (V, K), labels (V,), the classes' names."""
    table = class_table(confusion_matrix(logits.argmax(1), labels, len(names)))
    return {name: (row.videos, row.right) for name, row in zip(names, table, strict=True) if row.videos}


def video_metrics(logits: Tensor, labels: Tensor, *, top_k: int) -> dict[str, float]:
    """Metrics of one answer per video: logits (V, K), labels (V,). Loss in nats, the rest fractions of 1."""
    videos, classes = logits.shape
    k = min(top_k, classes)
    logits = logits.double()
    table = class_table(confusion_matrix(logits.argmax(1), labels, classes))
    return {
        "videos": float(videos),
        "loss": F.cross_entropy(logits, labels).item(),
        "video_top1": top_k_right(logits, labels, 1).sum().item() / videos,
        f"video_top{k}": top_k_right(logits, labels, k).sum().item() / videos,
        "mean_class_accuracy": mean_class_accuracy(table),
    }


def class_table(confusion: Tensor, unread: Tensor | None = None) -> list[ClassScore]:
    """A row for each class of a confusion matrix (K, K); `unread` (K,) adds videos that got no answer."""
    videos = confusion.sum(1) if unread is None else confusion.sum(1) + unread
    columns = videos.tolist(), confusion.diagonal().tolist(), confusion.sum(0).tolist()
    return [ClassScore(*row) for row in zip(*columns, strict=True)]


def mean_class_accuracy(table: Sequence[ClassScore]) -> float:
    """Mean recall of the classes that have videos."""
    present = [row.recall for row in table if row.videos]
    return sum(present) / len(present)


def macro_f1(table: Sequence[ClassScore]) -> float:
    """Mean F1 of the classes that have videos."""
    present = [row.f1 for row in table if row.videos]
    return sum(present) / len(present)


def calibration_error(confidence: Tensor, right: Tensor) -> float:
    """Expected calibration error: the gap between confidence and accuracy, over equal bins of confidence.

    Confidence (V,) of the best class, whether it is right (V,). The mean over bins is weighted by their videos
    (Guo et al. 2017, arXiv:1706.04599, with its 15 bins).
    """
    gaps = torch.zeros(BINS, dtype=torch.double)
    gaps.index_add_(0, bin_numbers(confidence), right.double() - confidence.double())
    return gaps.abs().sum().item() / len(confidence)


def calibration_bins(confidence: Tensor, right: Tensor) -> list[Bin]:
    """The bins of the expected calibration error that have videos: confidence (V,), whether right (V,)."""
    number = bin_numbers(confidence)
    found = []
    for n in sorted(set(number.tolist())):
        inside = number == n
        means = confidence.double()[inside].mean().item(), right.double()[inside].mean().item()
        found.append(Bin(n / BINS, (n + 1) / BINS, int(inside.sum()), *means))
    return found


def bin_numbers(confidence: Tensor) -> Tensor:
    """Which of the bins (0, 1/15], (1/15, 2/15] … each confidence (V,) lies in."""
    return (confidence.double() * BINS).ceil().long().sub(1).clamp(0, BINS - 1)


def most_confused(confusion: Tensor, most: int = 10) -> list[tuple[int, int, int]]:
    """The commonest mistakes: (true class, said class, videos), most frequent first, at most `most`."""
    mistakes = confusion - torch.diag(confusion.diagonal())
    counts, places = mistakes.flatten().sort(descending=True, stable=True)
    classes = len(confusion)
    pairs = zip(places[:most].tolist(), counts[:most].tolist(), strict=True)
    return [(place // classes, place % classes, count) for place, count in pairs if count]
