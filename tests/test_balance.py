"""Balanced sampling and class weights."""

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest

from tvit_cli.engine.train.batches import balanced_order, class_weights

LABELS = (0,) * 12 + (1,) * 6 + (2,) * 2


def order(labels, seed=0):
    return balanced_order(labels, np.random.default_rng(seed))


def test_class_weights_are_equal_in_sum_and_one_on_average():
    weights = class_weights(LABELS, 3)
    assert [12 * weights[0], 6 * weights[1], 2 * weights[2]] == pytest.approx([20 / 3] * 3)
    assert sum(weights[label] for label in LABELS) / len(LABELS) == pytest.approx(1)


def test_even_classes_weigh_one():
    assert class_weights((2, 0, 1, 1, 0, 2), 3) == [1.0, 1.0, 1.0]


def test_class_without_clips_has_no_weight():
    assert class_weights((0, 0, 0, 3), 5) == [4 / 6, 0.0, 0.0, 4 / 2, 0.0]


def test_classes_take_equal_shares_and_the_rest_goes_round():
    rest = Counter[int]()
    for seed in range(60):
        counts = Counter(LABELS[index] for index in order(LABELS, seed))
        assert sum(counts.values()) == 20 and set(counts.values()) == {6, 7}
        rest.update(label for label, count in counts.items() if count == 7)
    assert set(rest) == {0, 1, 2} and all(20 < count < 60 for count in rest.values())


def test_balanced_sampling_repeats_only_clips_of_small_classes():
    times = Counter(order(LABELS))
    assert max(times[index] for index in range(12)) == 1
    assert {times[18], times[19]} <= {3, 4}


def test_every_clip_of_a_large_class_has_its_turn():
    assert {index for seed in range(20) for index in order(LABELS, seed)} == set(range(20))


def test_the_order_is_mixed():
    labels = [LABELS[index] for index in order(LABELS)]
    assert sum(a != b for a, b in pairwise(labels)) > 6
