"""Classes with unequally many training clips, evened out: by weights in the loss, or in the order of the clips."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def class_weights(labels: Sequence[int], classes: int) -> list[float]:
    """Weight of each class, inverse to its clips, with a mean of 1 over the clips; 0 for a class without any.

    Two classes of 3 and 1 clips -> 0.67, 2
    """
    counts = np.bincount(labels, minlength=classes)
    present = np.count_nonzero(counts)
    return [len(labels) / (present * int(count)) if count else 0.0 for count in counts]


def balanced_order(labels: Sequence[int], generator: np.random.Generator) -> list[int]:
    """Indices of as many clips as there are, mixed: equally many of each class, give or take one.

    Which classes have one more is drawn. A class's clips are all read equally often, give or take once.
    """
    targets = np.asarray(labels)
    present = np.unique(targets)
    shares = np.full(len(present), len(targets) // len(present))
    shares[generator.permutation(len(present))[: len(targets) % len(present)]] += 1
    drawn = []
    for target, share in zip(present, shares, strict=True):
        own = np.flatnonzero(targets == target)
        times, more = divmod(int(share), len(own))
        drawn += [np.tile(own, times), generator.permutation(own)[:more]]
    return [int(index) for index in generator.permutation(np.concatenate(drawn))]
