"""Viterbi smoothing of window scores, and segments of one label.

Letters: W windows, J cells of one stride each, K classes.

Note [How a timeline is smoothed]
The time line is cut into cells as long as the stride. A cell's scores are the mean over all windows that overlap
it, weighed by how much: windows lie evenly around the cell, so that a boundary is not moved to either side. Then
labels are chosen for all cells at once, as the path with the largest sum of log scores less a price for each
change of label (Viterbi's algorithm). A label that shows up for a moment between two others, such as a window
over a cut that looks like a third thing, costs two changes instead of one and goes to its neighbours, each cell
to the nearer in score; a least length of segments would move such a boundary by half of it. The price is
`smoothing` nats times the windows over a cell, since the evidence of one window counts in that many cells.

Where windows across a boundary show one side of it only, as those of sure models do, they leave open by as much
as half a window where it lies. A change of label is likelier where the video is cut than where it goes on, so that
it costs half the price there. Nothing goes to a cut that the scores speak against, and a video without cuts is
smoothed as if there were none.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import groupby

import numpy as np
from numpy.typing import NDArray

from tvit_cli.results import Segment

Scores = NDArray[np.float64]

LEAST_SCORE = 1e-6  # of which a logarithm is taken: no single cell decides alone
AT_A_CUT = 0.5  # of the price of a change


def smooth(scores: Scores, *, window: float, stride: float, cells: int) -> Scores:
    """Mean scores of the windows over each cell, (W, K) -> (J, K). See Note [How a timeline is smoothed].

    Window w covers [w * stride, w * stride + window). Cells behind the last window take its scores.
    """
    total = np.zeros((cells, scores.shape[1]))
    weight = np.zeros((cells, 1))
    for later in range(min(cells, math.ceil(window / stride - 1e-9))):
        overlap = min(stride, window - later * stride)
        count = min(len(scores), cells - later)
        total[later : later + count] += overlap * scores[:count]
        weight[later : later + count] += overlap
    covered = int((weight > 0).sum())
    total[:covered] /= weight[:covered]
    total[covered:] = scores[-1]
    return total


def change_prices(price: float, *, cells: int, stride: float, cuts: Sequence[float]) -> NDArray[np.float64]:
    """What a change of label costs at the start of each cell, (J,): less at those nearest to a cut, in seconds."""
    prices = np.full(cells, price)
    for time in cuts:
        nearest = math.floor(time / stride + 0.5)
        if nearest < cells:
            prices[nearest] = AT_A_CUT * price
    return prices


def best_path(scores: Scores, *, prices: NDArray[np.float64]) -> list[int]:
    """Labels (J,) with the largest sum of log scores (J, K) less the price (J,) of a change at a cell's start."""
    gains = np.log(np.maximum(scores, LEAST_SCORE))
    best = gains[0]
    came_from = np.empty(scores.shape, np.int64)
    stays = np.arange(scores.shape[1])
    for cell in range(1, len(gains)):
        other = int(best.argmax())
        changed = best[other] - prices[cell]
        changes = changed > best
        came_from[cell] = np.where(changes, other, stays)
        best = np.where(changes, changed, best) + gains[cell]
    path = [int(best.argmax())]
    for cell in range(len(gains) - 1, 0, -1):
        path.append(int(came_from[cell, path[-1]]))
    return path[::-1]


def find_segments(
    smoothed: Scores,
    labels: Sequence[str],
    *,
    stride: float,
    seconds: float,
    price: float,
    cuts: Sequence[float] = (),
    begin: float = 0.0,
) -> tuple[Segment, ...]:
    """Neighbouring cells of one label, merged; the first starts at `begin`, the last one ends at `seconds`.

    `price` is that of a change of label, `cuts` are times in seconds. See Note [How a timeline is smoothed].
    """
    segments = []
    first = 0
    within = [cut - begin for cut in cuts if begin <= cut < seconds]
    prices = change_prices(price, cells=len(smoothed), stride=stride, cuts=within)
    for label, run in groupby(best_path(smoothed, prices=prices)):
        last = first + len(list(run))
        end = seconds if last == len(smoothed) else begin + last * stride
        score = float(smoothed[first:last, label].mean())
        segments.append(Segment(begin + first * stride, end, labels[label], score))
        first = last
    return tuple(segments)
