"""Metrics are sums and counts."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from tvit_cli.engine.metrics import Tally, confusion_matrix, top_k_right, video_metrics

LOGITS = torch.tensor([[3.0, 2.0, 1.0], [1.0, 2.0, 3.0], [1.0, 3.0, 2.0], [2.0, 1.0, 3.0]])
LABELS = torch.tensor([0, 2, 2, 1])


def test_top_1_and_top_k_count_videos() -> None:
    metrics = video_metrics(LOGITS, LABELS, top_k=2)
    assert metrics["video_top1"] == 0.5
    assert metrics["video_top2"] == 0.75
    assert metrics["videos"] == 4


def test_top_k_above_the_number_of_classes_is_all_of_them() -> None:
    assert video_metrics(LOGITS, LABELS, top_k=9)["video_top3"] == 1.0


def test_loss_is_the_mean_over_videos_in_nats() -> None:
    expected = (
        sum(
            math.log(sum(math.exp(x) for x in row)) - row[y]
            for row, y in zip(LOGITS.tolist(), LABELS.tolist(), strict=True)
        )
        / 4
    )
    assert video_metrics(LOGITS, LABELS, top_k=1)["loss"] == pytest.approx(expected)


def test_mean_class_accuracy_weighs_classes_equally_and_skips_absent_ones() -> None:
    labels = torch.tensor([0, 0, 0, 1])
    logits = F.one_hot(torch.tensor([0, 0, 0, 2]), 4).float()
    assert video_metrics(logits, labels, top_k=1)["mean_class_accuracy"] == 0.5


def test_a_model_that_says_nothing_is_right_about_nothing() -> None:
    assert not top_k_right(torch.zeros(3, 5), torch.tensor([0, 1, 4]), 1).any()


def test_scores_that_are_no_numbers_are_wrong() -> None:
    logits = torch.full((2, 3), float("nan"))
    assert not top_k_right(logits, torch.tensor([0, 2]), 1).any()


def test_the_confusion_matrix_has_true_classes_in_rows() -> None:
    matrix = confusion_matrix(torch.tensor([1, 1, 0]), torch.tensor([0, 1, 0]), 2)
    assert matrix.tolist() == [[1, 1], [0, 1]]


def test_a_tally_counts_only_what_has_weight() -> None:
    tally = Tally.zeros(torch.device("cpu"))
    weights = torch.tensor([1.0, 1.0, 0.0, 1.0])
    tally.add(LOGITS, torch.tensor([1.0, 2.0, 100.0, 3.0]), LABELS, weights)
    tally.add(LOGITS[:1], torch.tensor([4.0]), LABELS[:1], torch.ones(1))
    assert tally.sums.tolist() == [10.0, 3.0, 4.0]
