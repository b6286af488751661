"""Classification metrics from logits, with bootstrap intervals over groups and McNemar's test.

Clips of one group come from one recording and are correlated. Resampling single videos would treat them as
independent and give too narrow intervals.

Letters: V videos, B clips, K classes, S statistics.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

from tvit_cli.results import BINS, RESAMPLES, Bin, ClassScore, Interval

_CHUNK = 100  # resamples in memory at once

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Outcomes:
    """Labels and predictions of V videos, by class index."""

    labels: Sequence[int]
    predicted: Sequence[int | None]  # None for an unreadable video
    in_top_k: Sequence[bool]
    confidence: Sequence[float]  # of the prediction; 0 for an unreadable video
    groups: Sequence[str]


def metric_intervals(outcomes: Outcomes, *, top_k: int, seed: int = 0) -> dict[str, Interval]:
    """95 % percentile intervals by metric name; none for fewer than two groups.

    A class without videos in a resample is left out of its means.
    """
    groups = np.unique(np.asarray(outcomes.groups), return_inverse=True)[1]
    count = int(groups.max()) + 1
    if count < 2:
        return {}
    labels = np.asarray(outcomes.labels, dtype=np.int64)
    read = np.flatnonzero([predicted is not None for predicted in outcomes.predicted])
    predicted = np.asarray([p for p in outcomes.predicted if p is not None], dtype=np.int64)
    right = np.zeros(len(labels))
    right[read] = predicted == labels[read]
    in_top_k, confidence = (np.asarray(v, dtype=np.float64) for v in (outcomes.in_top_k, outcomes.confidence))
    bins = bin_numbers(torch.from_numpy(confidence[read])).numpy()
    gaps = (right - confidence)[read]
    classes = int(max(labels.max(), predicted.max(initial=0))) + 1

    def metrics(weight: Floats) -> list[float]:
        """The metrics with weights (V,) of the videos."""
        videos = np.bincount(labels, weight, classes)
        hits = np.bincount(labels, weight * right, classes)
        predictions = np.bincount(predicted, weight[read], classes)
        error = np.abs(np.bincount(bins, weight[read] * gaps, BINS)).sum()
        present = videos > 0
        return [
            hits.sum() / weight.sum(),
            weight @ in_top_k / weight.sum(),
            (hits[present] / videos[present]).mean(),
            (2 * hits[present] / (videos + predictions)[present]).mean(),
            error / max(1.0, predictions.sum()),
        ]

    names = ("video_top1", f"video_top{top_k}", "mean_class_accuracy", "macro_f1", "calibration_error")
    found = _bootstrap(count, lambda draws: np.array([metrics(draw[groups]) for draw in draws]).T, seed)
    return dict(zip(names, found, strict=True))


def difference_interval(
    first: Sequence[bool], second: Sequence[bool], groups: Sequence[str], *, seed: int = 0
) -> Interval | None:
    """95 % interval of the second model's accuracy minus the first's on the same videos; None for one group."""
    gain = np.asarray(second, dtype=np.float64) - np.asarray(first, dtype=np.float64)
    numbers = np.unique(np.asarray(groups), return_inverse=True)[1]
    sums = np.bincount(numbers, weights=gain)
    videos = np.bincount(numbers).astype(np.float64)
    if len(sums) < 2:
        return None
    return _bootstrap(len(sums), lambda weights: (weights @ sums / (weights @ videos))[None], seed)[0]


def mcnemar(only_first: int, only_second: int) -> float:
    """Two-sided p-value of McNemar's exact test (1947), from the videos that only one of two models gets right.

    Under the null hypothesis, either model is right with probability 1/2 on each. It assumes independent videos;
    clips of one group are not. 1 and 8 -> 0.0391
    """
    trials, fewer = only_first + only_second, min(only_first, only_second)
    tail: int = sum(math.comb(trials, k) for k in range(fewer + 1))
    return min(1.0, float(2 * tail / 2**trials))


def _bootstrap(groups: int, statistics: Callable[[Floats], Floats], seed: int) -> list[Interval]:
    """Percentile intervals of S statistics; `statistics` maps group counts (draws, groups) to (S, draws)."""
    generator = np.random.default_rng(seed)
    shares = np.full(groups, 1 / groups)
    draws = (generator.multinomial(groups, shares, size=_CHUNK) for _ in range(RESAMPLES // _CHUNK))
    parts = [statistics(counts.astype(np.float64)) for counts in draws]
    ends = [(1 - 0.95) / 2, (1 + 0.95) / 2]
    rows = [np.quantile(values, ends).tolist() for values in np.concatenate(parts, axis=1)]
    return [(low, high) for low, high in rows]


@dataclass
class Tally:
    """Running sums over clips, on their device."""

    sums: Tensor  # (3,) float64: loss, correct predictions, clips

    @classmethod
    def zeros(cls, device: torch.device) -> Tally:
        """An empty tally on a device, in float32 on MPS, which has no float64."""
        precision = torch.float32 if device.type == "mps" else torch.float64
        return cls(torch.zeros(3, dtype=precision, device=device))

    def add(self, logits: Tensor, losses: Tensor, labels: Tensor, weights: Tensor) -> None:
        """Adds a batch: logits (B, K), losses (B,), labels (B,), weights (B,) 1 or 0."""
        right = (logits.argmax(1) == labels) * weights
        batch = torch.stack([(losses * weights).sum(), right.sum(), weights.sum()])
        self.sums += batch.detach().to(self.sums.dtype)


def top_k_right(logits: Tensor, labels: Tensor, k: int) -> Tensor:
    """Whether each label is among the k largest logits: (V, K), (V,) -> bool (V,). Ties as in `ranks`."""
    return ranks(logits, labels) <= k


def ranks(logits: Tensor, labels: Tensor) -> Tensor:
    """Rank of each label among the classes, 1 for the best: (..., K), (...) -> (...).

    Ties and NaN count against the model: the label comes after all classes with the same score.
    """
    own = logits.gather(-1, labels[..., None])  # (..., 1)
    return (~(logits < own)).sum(-1)


def confusion_matrix(predicted: Tensor, labels: Tensor, classes: int) -> Tensor:
    """Counts (K, K): rows are true classes, columns predicted ones."""
    return torch.bincount(labels * classes + predicted, minlength=classes * classes).reshape(classes, classes)


def class_counts(logits: Tensor, labels: Tensor, names: Sequence[str]) -> dict[str, tuple[int, int]]:
    """(Videos, correct predictions) of each class with videos: logits (V, K), labels (V,), names of the classes."""
    table = class_table(confusion_matrix(logits.argmax(1), labels, len(names)))
    return {name: (row.videos, row.right) for name, row in zip(names, table, strict=True) if row.videos}


def video_metrics(logits: Tensor, labels: Tensor, *, top_k: int) -> dict[str, float]:
    """Metrics of one prediction per video: logits (V, K), labels (V,). Loss in nats, others in [0, 1]."""
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
    """Scores of each class from a confusion matrix (K, K); `unread` (K,) adds unreadable videos, as wrong."""
    videos = confusion.sum(1) if unread is None else confusion.sum(1) + unread
    columns = videos.tolist(), confusion.diagonal().tolist(), confusion.sum(0).tolist()
    return [ClassScore(*row) for row in zip(*columns, strict=True)]


def mean_class_accuracy(table: Sequence[ClassScore]) -> float:
    """Mean recall of the classes with videos."""
    present = [row.recall for row in table if row.videos]
    return sum(present) / len(present)


def macro_f1(table: Sequence[ClassScore]) -> float:
    """Mean F1 of the classes with videos."""
    present = [row.f1 for row in table if row.videos]
    return sum(present) / len(present)


def calibration_error(confidence: Tensor, right: Tensor) -> float:
    """Expected calibration error over 15 equal bins of confidence (Guo et al. 2017, arXiv:1706.04599).

    Mean gap between confidence and accuracy, weighted by the bins' videos: confidence (V,), whether correct (V,).
    """
    gaps = torch.zeros(BINS, dtype=torch.double)
    gaps.index_add_(0, bin_numbers(confidence), right.double() - confidence.double())
    return gaps.abs().sum().item() / len(confidence)


def calibration_bins(confidence: Tensor, right: Tensor) -> list[Bin]:
    """Bins of the expected calibration error with videos: confidence (V,), whether correct (V,)."""
    number = bin_numbers(confidence)
    found = []
    for n in sorted(set(number.tolist())):
        inside = number == n
        means = (values.double()[inside].mean().item() for values in (confidence, right))
        found.append(Bin(n / BINS, (n + 1) / BINS, int(inside.sum()), *means))
    return found


def bin_numbers(confidence: Tensor) -> Tensor:
    """Index of the bin (0, 1/15], (1/15, 2/15] … of each confidence (V,)."""
    return (confidence.double() * BINS).ceil().long().sub(1).clamp(0, BINS - 1)


def most_confused(confusion: Tensor, most: int = 10) -> list[tuple[int, int, int]]:
    """The most frequent mistakes, at most `most`: (true class, predicted class, videos)."""
    mistakes = confusion - torch.diag(confusion.diagonal())
    counts, cells = mistakes.flatten().sort(descending=True, stable=True)
    classes = len(confusion)
    pairs = zip(cells[:most].tolist(), counts[:most].tolist(), strict=True)
    return [(*divmod(cell, classes), count) for cell, count in pairs if count]
