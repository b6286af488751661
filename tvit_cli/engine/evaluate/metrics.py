"""Classification metrics from logits, with bootstrap intervals over groups and McNemar's test.

Clips of one group are cut from one recording and rise and fall together. Resampling videos one by one would
take them for so many independent trials and give intervals that are too narrow.
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

LEVEL = 0.95
_CHUNK = 100  # resamples drawn at once: bounds the memory

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Outcomes:
    """What became of each video, an entry for each of V."""

    labels: Sequence[int]
    said: Sequence[int | None]  # the class of the answer; None where there is none
    among_k: Sequence[bool]  # whether the label is among the k best
    confidence: Sequence[float]  # of the answer; 0 where there is none
    groups: Sequence[str]

    @property
    def right(self) -> list[bool]:
        """Whether the answer is the label."""
        return [said == label for said, label in zip(self.said, self.labels, strict=True)]


def metric_intervals(outcomes: Outcomes, *, top_k: int, seed: int = 0) -> dict[str, Interval]:
    """95 % percentile intervals of the metrics by their names; none for fewer than two groups.

    A class that a resample lacks is left out of its means.
    """
    groups = _numbers(outcomes.groups)
    count = int(groups.max()) + 1
    if count < 2:
        return {}
    labels = np.asarray(outcomes.labels, dtype=np.int64)
    right, among_k = (np.asarray(v, dtype=np.float64) for v in (outcomes.right, outcomes.among_k))
    confidence = np.asarray(outcomes.confidence, dtype=np.float64)
    answered = np.flatnonzero([said is not None for said in outcomes.said])
    said = np.asarray([said for said in outcomes.said if said is not None], dtype=np.int64)
    bins = bin_numbers(torch.from_numpy(confidence[answered])).numpy()
    gaps = (right - confidence)[answered]
    classes = int(max(labels.max(), said.max(initial=0))) + 1

    def metrics(weight: Floats) -> list[float]:
        """The metrics where each video counts as often as its weight (V,) says."""
        videos = np.bincount(labels, weight, classes)
        hits = np.bincount(labels, weight * right, classes)
        named = np.bincount(said, weight[answered], classes)
        error = np.abs(np.bincount(bins, weight[answered] * gaps, BINS)).sum()
        present = videos > 0
        return [
            hits.sum() / weight.sum(),
            weight @ among_k / weight.sum(),
            (hits[present] / videos[present]).mean(),
            (2 * hits[present] / (videos + named)[present]).mean(),
            error / max(1.0, named.sum()),
        ]

    def statistics(weights: Floats) -> Floats:
        return np.array([metrics(weight[groups]) for weight in weights]).T

    names = ("video_top1", f"video_top{top_k}", "mean_class_accuracy", "macro_f1", "calibration_error")
    found = zip(names, _resampled(count, statistics, seed), strict=True)
    return {name: _interval(values) for name, values in found}


def difference_interval(
    first: Sequence[bool], second: Sequence[bool], groups: Sequence[str], *, seed: int = 0
) -> Interval | None:
    """95 % interval of the second's accuracy less the first's on the same videos; None for one group."""
    gain = np.asarray(second, dtype=np.float64) - np.asarray(first, dtype=np.float64)
    numbers = _numbers(groups)
    sums = np.bincount(numbers, weights=gain)
    videos = np.bincount(numbers).astype(np.float64)
    if len(sums) < 2:
        return None
    (differences,) = _resampled(len(sums), lambda weights: (weights @ sums / (weights @ videos))[None], seed)
    return _interval(differences)


def mcnemar(only_first: int, only_second: int) -> float:
    """Two-sided p-value that two models differ, from the videos that just one of them knows.

    The exact binomial test (McNemar 1947): given that they disagree, either is right with probability 1/2.
    It takes videos for independent; clips of one group are not. 1 and 8 -> 0.0391
    """
    trials, fewer = only_first + only_second, min(only_first, only_second)
    tail: int = sum(math.comb(trials, k) for k in range(fewer + 1))
    ways: int = 2**trials
    return min(1.0, 2 * tail / ways)


def _numbers(groups: Sequence[str]) -> Integers:
    return np.unique(np.asarray(groups), return_inverse=True)[1].astype(np.int64)


def _resampled(groups: int, statistics: Callable[[Floats], Floats], seed: int) -> Floats:
    """(S, RESAMPLES): S statistics of groups drawn with replacement, as often as there are groups."""
    generator = np.random.default_rng(seed)
    shares = np.full(groups, 1 / groups)
    parts = [
        statistics(generator.multinomial(groups, shares, size=_CHUNK).astype(np.float64))
        for _ in range(RESAMPLES // _CHUNK)
    ]
    return np.concatenate(parts, axis=1)


def _interval(values: Floats) -> Interval:
    low, high = np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2]).tolist()
    return low, high


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
