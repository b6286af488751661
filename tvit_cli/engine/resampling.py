"""How sure a result is: bootstrap over whole groups, and a paired test of two models on the same videos.

Clips of one group are cut from one recording and rise and fall together. Resampling videos one by one would
take them for so many independent trials and give intervals that are too narrow.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

RESAMPLES = 2000
LEVEL = 0.95
_CHUNK = 100  # resamples drawn at once: bounds the memory

Floats = npt.NDArray[np.float64]
Interval = tuple[float, float]


def accuracy_intervals(
    right: Sequence[bool], classes: Sequence[int], groups: Sequence[str], *, seed: int = 0
) -> dict[str, Interval]:
    """95 % percentile intervals of `video_top1` and `mean_class_accuracy`; none for fewer than two groups.

    `right`, `classes` and `groups` have one entry per video. A class that a resample lacks is left out of it.
    """
    hits, videos = _counts(right, classes, groups)  # (G, K) each
    if len(hits) < 2:
        return {}

    def statistics(weights: Floats) -> Floats:
        drawn_hits, drawn = weights @ hits, weights @ videos  # (R, K)
        present = drawn > 0
        recall = np.divide(drawn_hits, drawn, out=np.zeros_like(drawn), where=present)
        return np.stack([drawn_hits.sum(1) / drawn.sum(1), recall.sum(1) / present.sum(1)])

    top1, per_class = _resampled(len(hits), statistics, seed)
    return {"video_top1": _interval(top1), "mean_class_accuracy": _interval(per_class)}


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


def _counts(right: Sequence[bool], classes: Sequence[int], groups: Sequence[str]) -> tuple[Floats, Floats]:
    numbers, labels = _numbers(groups), np.asarray(classes, dtype=np.int64)
    shape = (int(numbers.max()) + 1, int(labels.max()) + 1)
    videos, hits = np.zeros(shape), np.zeros(shape)
    np.add.at(videos, (numbers, labels), 1.0)
    np.add.at(hits, (numbers, labels), np.asarray(right, dtype=np.float64))
    return hits, videos


def _numbers(groups: Sequence[str]) -> npt.NDArray[np.int64]:
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
