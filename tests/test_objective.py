"""The loss of an update, against numbers worked out by hand."""

import math

import pytest
import torch

from tvit_cli.engine.evaluate.metrics import Tally
from tvit_cli.engine.train import optim
from tvit_cli.engine.train.optim import Targets, loss_share

# Two classes; softmax of (0, ln 3) is (1/4, 3/4).
LOGITS = torch.tensor([[0.0, math.log(3)], [math.log(3), 0.0], [0.0, math.log(3)]])
LABELS = torch.tensor([1, 1, 0])
ONES = torch.ones(3)
MIXED = Targets(LABELS, ONES, others=torch.tensor([0, 0, 0]), shares=torch.tensor([0.3, 0.75, 0.5]))
RARE, LIKELY = math.log(4), math.log(4 / 3)  # of probability 1/4, of 3/4


def clip_losses(logits, targets, *, class_weights=(1, 1), label_smoothing=0.0):
    weights = torch.tensor(class_weights)
    return optim.clip_losses(logits, targets, class_weights=weights, label_smoothing=label_smoothing)


def test_a_clip_of_one_label_costs_its_cross_entropy():
    losses = clip_losses(LOGITS, Targets(LABELS, ONES))
    assert losses.tolist() == pytest.approx([LIKELY, RARE, RARE])


def test_smoothing_spreads_a_share_of_the_target_over_all_classes():
    # 0.9 on the label, 0.1 beside it
    losses = clip_losses(LOGITS, Targets(LABELS, ONES), label_smoothing=0.2)
    wanted = [0.9 * LIKELY + 0.1 * RARE, 0.9 * RARE + 0.1 * LIKELY, 0.9 * RARE + 0.1 * LIKELY]
    assert losses.tolist() == pytest.approx(wanted)


def test_a_mixed_clip_costs_both_labels_by_their_shares():
    losses = clip_losses(LOGITS, MIXED)
    wanted = [0.3 * LIKELY + 0.7 * RARE, 0.75 * RARE + 0.25 * LIKELY, RARE]
    assert losses.tolist() == pytest.approx(wanted)


def test_smoothing_comes_on_top_of_the_mixture():
    losses = clip_losses(LOGITS, MIXED, label_smoothing=0.2)
    on_label_1 = [0.8 * share + 0.1 for share in (0.3, 0.75, 0.0)]
    probability = [(RARE, LIKELY), (LIKELY, RARE), (RARE, LIKELY)]
    wanted = [(1 - p) * a + p * b for p, (a, b) in zip(on_label_1, probability, strict=True)]
    assert losses.tolist() == pytest.approx(wanted)


def test_both_labels_of_a_clip_weigh_what_their_classes_do():
    plain = clip_losses(LOGITS, Targets(LABELS, ONES), class_weights=(0.5, 3.0), label_smoothing=0.2)
    even = clip_losses(LOGITS, Targets(LABELS, ONES), label_smoothing=0.2)
    assert plain.tolist() == pytest.approx((even * torch.tensor([3.0, 3.0, 0.5])).tolist())
    mixed = clip_losses(LOGITS, MIXED, class_weights=(0.5, 3.0))
    assert mixed[0] == pytest.approx(0.3 * 3.0 * LIKELY + 0.7 * 0.5 * RARE)


def test_equal_labels_cost_the_same_mixed_or_not():
    same = Targets(LABELS, ONES, others=LABELS, shares=torch.tensor([0.3, 0.75, 0.5]))
    for smoothing in (0.0, 0.1):
        plain = clip_losses(LOGITS, Targets(LABELS, ONES), label_smoothing=smoothing)
        assert torch.allclose(clip_losses(LOGITS, same, label_smoothing=smoothing), plain)


def test_an_update_is_the_mean_over_its_clips_however_many_passes_it_takes():
    losses = torch.tensor([1.0, 2.0, 6.0])
    assert loss_share(losses, Targets(LABELS, ONES), step_clips=3) == 3.0
    left_out = Targets(LABELS, torch.tensor([1.0, 0.0, 1.0]))
    assert loss_share(losses, left_out, step_clips=10) == pytest.approx(0.7)


def test_training_accuracy_counts_the_label_of_the_larger_part():
    assert MIXED.main.tolist() == [0, 1, 0] and Targets(LABELS, ONES).main.tolist() == [1, 1, 0]
    tally = Tally.zeros(torch.device("cpu"))
    tally.add(LOGITS, clip_losses(LOGITS, MIXED), MIXED.main, MIXED.weights)
    assert tally.sums[1:].tolist() == [0, 3]  # predicted 1, 0, 1
    tally.add(LOGITS, ONES, Targets(LABELS, ONES).main, ONES)
    assert tally.sums[1:].tolist() == [1, 6]
