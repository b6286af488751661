"""How sure a result is: bootstrap over whole groups, and a paired test of two models on the same videos.

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

from tvit_cli.engine.metrics import BINS, bin_numbers

RESAMPLES = 2000
LEVEL = 0.95
_CHUNK = 100  # resamples drawn at once: bounds the memory

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]
Interval = tuple[float, float]


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
