"""Metrics as sums and counts; data leakage between train, val and test."""

import math
import os

import pytest
import torch
from torch.nn import functional as F

from tvit_cli.data.layout import Video
from tvit_cli.engine.evaluate import selection
from tvit_cli.engine.evaluate.metrics import (
    Outcomes,
    Tally,
    calibration_bins,
    calibration_error,
    class_table,
    confusion_matrix,
    difference_interval,
    macro_f1,
    mcnemar,
    metric_intervals,
    most_confused,
    ranks,
    top_k_right,
    video_metrics,
)
from tvit_cli.engine.evaluate.selection import find_leaks
from tvit_cli.results import ClassScore

LOGITS = torch.tensor([[3.0, 2.0, 1.0], [1.0, 2.0, 3.0], [1.0, 3.0, 2.0], [2.0, 1.0, 3.0]])
LABELS = torch.tensor([0, 2, 2, 1])


def test_top_k_counts_videos_and_the_loss_is_their_mean_in_nats():
    metrics = video_metrics(LOGITS, LABELS, top_k=2)
    assert metrics["video_top1"] == 0.5
    assert metrics["video_top2"] == 0.75
    assert metrics["videos"] == 4
    assert video_metrics(LOGITS, LABELS, top_k=9)["video_top3"] == 1.0
    rows = zip(LOGITS.tolist(), LABELS.tolist(), strict=True)
    losses = [math.log(sum(map(math.exp, row))) - row[label] for row, label in rows]
    assert video_metrics(LOGITS, LABELS, top_k=1)["loss"] == pytest.approx(sum(losses) / 4)


def test_equal_scores_and_nans_are_wrong_and_ranks_take_the_worst():
    assert not top_k_right(torch.zeros(3, 5), torch.tensor([0, 1, 4]), 1).any()
    logits = torch.full((2, 3), float("nan"))
    assert not top_k_right(logits, torch.tensor([0, 2]), 1).any()
    logits = torch.tensor([[[3.0, 2.0, 1.0]], [[1.0, 2.0, 2.0]], [[0.0, 0.0, 0.0]]])  # (views, B, K)
    assert ranks(logits, torch.tensor([[0], [2], [1]])).tolist() == [[1], [2], [3]]


def test_class_metrics_come_from_the_counts_of_the_confusion_matrix():
    matrix = confusion_matrix(torch.tensor([1, 1, 0]), torch.tensor([0, 1, 0]), 2)
    assert matrix.tolist() == [[1, 1], [0, 1]]
    confusion = torch.tensor([[3, 1, 0], [2, 2, 0], [0, 0, 0]])
    first, second, absent = class_table(confusion)
    assert (first.recall, first.precision, first.f1) == (3 / 4, 3 / 5, 2 * 3 / 9)
    assert (absent.recall, absent.precision, absent.f1) == (0.0, 0.0, 0.0)
    assert macro_f1([first, second, absent]) == (first.f1 + second.f1) / 2
    assert class_table(confusion, torch.tensor([1, 0, 0]))[0] == ClassScore(videos=5, right=3, predicted=5)
    confusion = torch.tensor([[9, 1, 0], [4, 5, 0], [0, 2, 7]])
    assert most_confused(confusion) == [(1, 0, 4), (2, 1, 2), (0, 1, 1)]
    assert most_confused(confusion, most=1) == [(1, 0, 4)]


def test_a_tally_and_class_means_count_only_what_has_weight():
    tally = Tally.zeros(torch.device("cpu"))
    weights = torch.tensor([1.0, 1.0, 0.0, 1.0])
    tally.add(LOGITS, torch.tensor([1.0, 2.0, 100.0, 3.0]), LABELS, weights)
    tally.add(LOGITS[:1], torch.tensor([4.0]), LABELS[:1], torch.ones(1))
    assert tally.sums.tolist() == [10.0, 3.0, 4.0]
    labels = torch.tensor([0, 0, 0, 1])
    logits = F.one_hot(torch.tensor([0, 0, 0, 2]), 4).float()
    assert video_metrics(logits, labels, top_k=1)["mean_class_accuracy"] == 0.5


def test_the_calibration_error_is_the_gap_between_confidence_and_accuracy():
    confidence, right = torch.tensor([0.9, 0.9, 0.6, 0.6]), torch.tensor([True, False, True, True])
    # Bins of 1/15: two answers at 0.9, one of them right; two at 0.6, both right.
    expected = (abs(1 - 1.8) + abs(2 - 1.2)) / 4
    assert calibration_error(confidence, right) == pytest.approx(expected)
    assert calibration_error(torch.ones(1), torch.ones(1)) == pytest.approx(0)
    low, high = calibration_bins(confidence, right)
    assert (low.videos, low.confidence, low.accuracy) == (2, pytest.approx(0.6), 1.0)
    assert (high.low, high.high, high.accuracy) == (13 / 15, 14 / 15, 0.5)
    bins = calibration_bins(confidence, right)
    assert sum(abs(b.accuracy - b.confidence) * b.videos for b in bins) / 4 == pytest.approx(expected)


def outcomes(right, groups, labels=None):
    """Videos that are answered with their label or with the next class, all with confidence 0.7."""
    labels = labels or [0] * len(right)
    said = [label if known else label + 1 for label, known in zip(labels, right, strict=True)]
    return Outcomes(labels, said, right, [0.7] * len(right), groups)


def test_intervals_resample_whole_groups_and_weigh_classes_equally():
    right = [True] * 50 + [False] * 50
    alone = metric_intervals(outcomes(right, [f"{n}" for n in range(100)]), top_k=5)["video_top1"]
    # Ten groups that are right or wrong as a whole are ten trials, not a hundred.
    grouped = metric_intervals(outcomes(right, [f"{n // 10}" for n in range(100)]), top_k=5)["video_top1"]
    assert alone[0] == pytest.approx(0.40, abs=0.02) and alone[1] == pytest.approx(0.60, abs=0.02)
    assert grouped[0] == pytest.approx(0.20, abs=0.05) and grouped[1] == pytest.approx(0.80, abs=0.05)
    assert metric_intervals(outcomes(right, ["one"] * 100), top_k=5) == {}
    right, labels = [True] * 90 + [False] * 10, [0] * 90 + [1] * 10
    found = metric_intervals(outcomes(right, [f"{n}" for n in range(100)], labels), top_k=5)
    assert found["mean_class_accuracy"] == (0.5, 0.5)


def test_intervals_of_groups_that_are_all_alike_are_the_metrics_themselves():
    logits = torch.randn(12, 4, generator=torch.Generator().manual_seed(0)).repeat(5, 1)
    labels = torch.arange(12).remainder(3).repeat(5)
    metrics = video_metrics(logits, labels, top_k=2)
    confidence, said = logits.double().softmax(1).max(1)
    table = class_table(confusion_matrix(said, labels, 4))
    expected = {
        "video_top1": metrics["video_top1"],
        "video_top2": metrics["video_top2"],
        "mean_class_accuracy": metrics["mean_class_accuracy"],
        "macro_f1": macro_f1(table),
        "calibration_error": calibration_error(confidence, said == labels),
    }
    own = Outcomes(
        labels.tolist(), said.tolist(), top_k_right(logits, labels, 2).tolist(), confidence.tolist(),
        [f"{n // 12}" for n in range(60)],
    )  # fmt: skip
    found = metric_intervals(own, top_k=2)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name] == (pytest.approx(value), pytest.approx(value)), name


def test_a_video_without_an_answer_is_wrong_and_has_no_confidence():
    right = [True] * 40
    own = outcomes(right, [f"{n // 10}" for n in range(40)])
    half = Outcomes(own.labels, [0, None] * 20, [True, False] * 20, [1.0, 0.0] * 20, own.groups)
    found = metric_intervals(half, top_k=1)
    assert found["video_top1"] == (0.5, 0.5) and found["calibration_error"] == (0, 0)
    assert found["macro_f1"] == (pytest.approx(2 / 3), pytest.approx(2 / 3))


def test_differences_of_models_are_resampled_by_group_and_tested():
    first, second = [False] * 30 + [True] * 70, [True] * 100
    low, high = difference_interval(first, second, [f"{n}" for n in range(100)]) or (0, 0)
    assert low == pytest.approx(0.21, abs=0.02) and high == pytest.approx(0.39, abs=0.02)
    assert difference_interval(first, second, ["one"] * 100) is None
    assert mcnemar(0, 0) == 1.0 and mcnemar(5, 5) == 1.0
    assert mcnemar(1, 8) == mcnemar(8, 1) == pytest.approx(2 * (1 + 9) / 512)
    assert mcnemar(0, 2000) == 0.0 or mcnemar(0, 2000) < 1e-300


def video(folder, name, subset, group, data):
    path = folder / name
    path.write_bytes(data)
    return Video(path, name, "run", subset, group)


def test_groups_on_both_sides_are_a_leak_and_clean_splits_are_not(tmp_path):
    videos = [
        video(tmp_path, f"{subset}{group}{i}", subset, group, os.urandom(50))
        for subset, group, i in (("train", "01", 0), ("test", "01", 0), ("test", "01", 1), ("val", "02", 0))
    ]
    (leak,) = find_leaks(videos)
    assert "share 1 groups (01), 2 videos" in leak
    gone = Video(tmp_path / "gone.avi", "gone.avi", "run", "train", None)
    assert find_leaks([gone, video(tmp_path, "a", "test", None, b"1")]) == ()


def test_equal_files_are_a_leak_and_a_clean_split_reads_nothing(tmp_path, monkeypatch):
    rows = (("a", "train", "same"), ("b", "test", "same"), ("c", "test", "size"), ("d", "train", "same"))
    (leak,) = find_leaks([video(tmp_path, a, subset, None, data.encode()) for a, subset, data in rows])
    assert "1 videos are in two subsets" in leak and "a = b" in leak
    rows = (("a", "train", "01", b"1"), ("b", "train", "01", b"1"), ("c", "test", "02", b"22"))
    videos = [video(tmp_path, *row) for row in rows]
    monkeypatch.setattr(selection, "sha256", lambda path: pytest.fail(f"{path} was read"))
    assert find_leaks(videos) == ()
