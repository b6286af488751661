"""The batch plan, balanced sampling, class weights, and what a batch gives to the model."""

from collections import Counter, defaultdict
from itertools import pairwise

import numpy as np
import pytest
import torch
from tiny import settings

from tvit_cli.data.clips import ClipBatch
from tvit_cli.engine.train.batches import (
    BatchKeys,
    BatchPlan,
    MicroBatch,
    balanced_order,
    class_weights,
    make_inputs,
)
from tvit_cli.settings.card import Preprocessing

UNEVEN = (0,) * 12 + (1,) * 7 + (2,) * 2  # the classes of 21 clips


def plan(**changes):
    """A plan of 21 clips; `accumulation` passes make a window where `global_batch` does not say how large it is."""
    facts = {"clips": 21, "batch_size": 2, "processes": 1, "rank": 0, "epochs": 3, "seed": 0, **changes}
    window = facts["batch_size"] * facts.pop("accumulation", 2) * facts["processes"]
    return BatchPlan(**{"global_batch": window, **facts})


def windows(processes, **changes):
    """Optimizer step -> the keys that count, over all processes, sorted."""
    found = defaultdict(list)
    for rank in range(processes):
        for batch in plan(processes=processes, rank=rank, **changes).micro_batches():
            found[batch.step] += batch.keys[: batch.real]
    return {step: sorted(keys) for step, keys in found.items()}


def test_every_clip_is_read_once_per_epoch_in_an_order_of_its_own():
    for epoch in range(3):
        keys = [k for b in plan().micro_batches() if b.epoch == epoch for k in b.keys[: b.real]]
        assert sorted(keys) == [(epoch, index) for index in range(21)]
    orders = [
        tuple(index for b in plan(seed=seed).micro_batches() if b.epoch == epoch for _, index in b.keys)
        for seed in (0, 1)
        for epoch in (0, 1)
    ]
    assert len(set(orders)) == 4


CUTS = [
    {"processes": 1, "batch_size": 1, "accumulation": 8},
    {"processes": 2, "batch_size": 4, "accumulation": 1},
    {"processes": 4, "batch_size": 1, "accumulation": 2},
    {"processes": 2, "batch_size": 2, "accumulation": 2},
    {"processes": 1, "batch_size": 3, "global_batch": 8},
    {"processes": 2, "batch_size": 3, "global_batch": 8},
]
every_cut = pytest.mark.parametrize("cut", CUTS)


@every_cut
def test_updates_hold_the_same_clips_however_they_are_cut(cut):
    assert windows(**cut) == windows(processes=1, batch_size=8, accumulation=1)
    balanced = windows(processes=1, batch_size=8, accumulation=1, balance=UNEVEN)
    assert windows(**cut, balance=UNEVEN) == balanced != windows(**cut)


def test_processes_take_equally_many_passes_and_partial_windows():
    ranks = [list(plan(processes=4, rank=r, clips=9).micro_batches()) for r in range(4)]
    assert len({len(batches) for batches in ranks}) == 1
    for batches in zip(*ranks, strict=True):
        assert len({(b.step, b.ends_step, b.ends_epoch, b.step_clips) for b in batches}) == 1
        assert all(b.keys for b in batches)
    assert sum(b.real for batches in ranks for b in batches) == 9 * 3
    sizes = {b.step: b.step_clips for b in plan(epochs=1).micro_batches()}
    assert list(sizes.values()) == [4, 4, 4, 4, 4, 1]


def test_a_halved_plan_has_the_same_windows_in_more_passes():
    whole = plan(batch_size=5, accumulation=1, epochs=1)
    halved = whole.halved()
    assert (halved.batch_size, halved.accumulation, halved.global_batch) == (2, 3, 5)
    assert [b.real for b in halved.micro_batches()] == [2, 2, 1] * 4 + [1]
    assert halved.total_steps == whole.total_steps
    for step in range(whole.total_steps):
        keys = [[k for b in p.micro_batches() if b.step == step for k in b.keys] for p in (whole, halved)]
        assert keys[0] == keys[1]


@pytest.mark.parametrize("changes", [{}, {"balance": UNEVEN}], ids=["plain", "balanced"])
def test_a_plan_goes_on_from_any_step(changes):
    whole = list(plan(**changes).micro_batches())
    for step in range(plan().total_steps + 1):
        assert list(plan(**changes).micro_batches(step)) == [b for b in whole if b.step >= step]


def partners(processes, **changes):
    """Key of each clip that counts -> key of its partner, over all processes; every read key is wanted."""
    found = {}
    for rank in range(processes):
        for batch in plan(processes=processes, rank=rank, pairs=1, **changes).micro_batches():
            read = batch.keys + batch.extra
            assert len(read) == len(set(read)) and len(batch.partners) == len(batch.keys)
            assert set(range(len(batch.keys), len(read))) <= set(batch.partners)
            assert batch.real <= len(batch.keys) <= changes.get("batch_size", 2)
            for key, partner in list(zip(batch.keys, batch.partners, strict=True))[: batch.real]:
                found[key] = read[partner]
    return found


@every_cut
def test_partners_are_the_same_however_an_update_is_cut(cut):
    whole = partners(processes=1, batch_size=8, accumulation=1)
    assert partners(**cut) == whole
    assert windows(**cut, pairs=1) == windows(processes=1, batch_size=8, accumulation=1)
    assert len(whole) == 21 * 3
    assert all(key != partner and key[0] == partner[0] for key, partner in whole.items())
    assert sum(whole[partner] == key for key, partner in whole.items()) == 60  # 21 is odd: one joins a pair


def test_pairs_are_read_by_one_process_and_nothing_is_read_twice():
    facts = {"clips": 64, "batch_size": 4, "accumulation": 2, "processes": 4, "pairs": 1}
    for rank in range(4):
        batches = list(plan(**facts, rank=rank).micro_batches())
        assert all(not b.extra and b.real == 4 for b in batches)
    odd = [
        b for rank in range(2) for b in plan(batch_size=3, processes=2, rank=rank, pairs=1).micro_batches()
    ]
    assert any(b.extra for b in odd)


def test_pairs_are_drawn_anew_and_a_lone_clip_is_its_own_partner():
    (batch,) = plan(clips=1, epochs=1, pairs=1).micro_batches()
    assert (batch.keys, batch.extra, batch.partners) == (((0, 0),), (), (0,))
    pairs = partners(processes=1, batch_size=8, accumulation=1)
    by_epoch = [{k[1]: v[1] for k, v in pairs.items() if k[0] == epoch} for epoch in range(3)]
    assert by_epoch[0] != by_epoch[1] != by_epoch[2]


@pytest.mark.parametrize("processes", [1, 2])
def test_repeats_of_a_video_are_in_one_window_under_keys_of_their_own(processes):
    found = windows(processes, batch_size=12 // processes, accumulation=1, repeats=3)
    assert len(found) == plan(batch_size=12, accumulation=1, repeats=3).total_steps == 6 * 3
    for step, keys in found.items():
        epoch = step // 6
        videos = {index for _, index in keys}
        assert sorted(keys) == sorted((epoch + 3 * n, index) for n in range(3) for index in videos)
    every = [key for keys in found.values() for key in keys]
    assert len(set(every)) == len(every) == 21 * 3 * 3
    assert partners(processes, batch_size=12 // processes, accumulation=1, repeats=3).keys() == set(every)


def test_once_each_is_what_there_was_before_repeats():
    assert list(plan(repeats=1).micro_batches()) == list(plan().micro_batches())
    first = {
        step: [k for k in keys if k[0] < 3] for step, keys in windows(1, batch_size=8, repeats=2).items()
    }
    assert first == windows(1, batch_size=8, accumulation=1)  # half of a window that is twice as large


def test_the_loader_is_given_the_keys_of_the_plan():
    assert list(BatchKeys(plan(), 4)) == [list(b.keys) for b in plan().micro_batches(4)]
    paired = plan(batch_size=3, pairs=1)
    read = list(BatchKeys(paired, 4))
    assert read == [[*b.keys, *b.extra] for b in paired.micro_batches(4)]
    assert max(map(len, read)) == 4


def test_a_balanced_epoch_is_as_long_and_draws_repeats_anew():
    assert plan(balance=UNEVEN).total_steps == plan().total_steps
    for epoch in range(3):
        keys = [k for b in plan(balance=UNEVEN).micro_batches() if b.epoch == epoch for k in b.keys[: b.real]]
        assert len(keys) == 21
        assert Counter(UNEVEN[index] for _, index in keys) == {0: 7, 1: 7, 2: 7}
    keys = [k for b in plan(balance=UNEVEN).micro_batches() for k in b.keys[: b.real]]
    assert len(keys) == len(set(keys)) == 3 * 21
    firsts = {(b.epoch, index) for b in plan(balance=UNEVEN).micro_batches() for _, index in b.keys}
    assert firsts <= set(keys)  # its first reading in an epoch is the one that it has without balance
    keys = [k for b in plan(balance=UNEVEN, repeats=2, pairs=1).micro_batches() for k in b.keys[: b.real]]
    assert len(keys) == len(set(keys)) == 3 * 21 * 2
    once = {k for b in plan(balance=UNEVEN).micro_batches() for k in b.keys if k[0] < 3}
    assert once <= set(keys)


LABELS = (0,) * 12 + (1,) * 6 + (2,) * 2


def order(labels, seed=0):
    return balanced_order(labels, np.random.default_rng(seed))


def test_class_weights_are_equal_in_sum_and_one_on_average():
    weights = class_weights(LABELS, 3)
    assert [12 * weights[0], 6 * weights[1], 2 * weights[2]] == pytest.approx([20 / 3] * 3)
    assert sum(weights[label] for label in LABELS) / len(LABELS) == pytest.approx(1)
    assert class_weights((2, 0, 1, 1, 0, 2), 3) == [1.0, 1.0, 1.0]
    assert class_weights((0, 0, 0, 3), 5) == [4 / 6, 0.0, 0.0, 4 / 2, 0.0]  # classes without clips


def test_classes_take_equal_shares_and_the_rest_goes_round():
    rest = Counter[int]()
    for seed in range(60):
        counts = Counter(LABELS[index] for index in order(LABELS, seed))
        assert sum(counts.values()) == 20 and set(counts.values()) == {6, 7}
        rest.update(label for label, count in counts.items() if count == 7)
    assert set(rest) == {0, 1, 2} and all(20 < count < 60 for count in rest.values())


def test_balanced_sampling_mixes_and_repeats_only_clips_of_small_classes():
    times = Counter(order(LABELS))
    assert max(times[index] for index in range(12)) == 1
    assert {times[18], times[19]} <= {3, 4}
    assert {index for seed in range(20) for index in order(LABELS, seed)} == set(range(20))
    labels = [LABELS[index] for index in order(LABELS)]
    assert sum(a != b for a, b in pairwise(labels)) > 6


STILL = {"crop_scale_min": 1.0, "horizontal_flip": 0, "brightness": 0, "contrast": 0, "saturation": 0}
READ = [(0, 5), (0, 6), (0, 7)]  # the last only as a partner


def go(*, unreadable=(), real=2, **changes):
    """A pass of two clips, white 0 and black 1; a grey one, 2, is the partner of the second."""
    pairs = changes.get("mixup", 0) or changes.get("cutmix", 0)
    read = READ if pairs else READ[:2]
    planned = MicroBatch(
        epoch=0, step=0, keys=tuple(READ[:2]), extra=tuple(read[2:]), partners=(1, 2) if pairs else (),
        real=real, step_clips=3, ends_step=True, ends_epoch=False,
    )  # fmt: skip
    batch = ClipBatch(
        clips=[torch.full((2, 3, 16, 16), value, dtype=torch.uint8) for value in (255, 0, 127)[: len(read)]],
        labels=torch.arange(len(read)),
        epochs=torch.tensor([epoch for epoch, _ in read]),
        indices=torch.tensor([index for _, index in read]),
        weights=torch.tensor([float(place not in unreadable) for place in range(len(read))]),
        errors=[],
    )
    return make_inputs(
        planned,
        batch,
        settings=settings(**{**STILL, **changes}),
        preprocessing=Preprocessing(n_frames=2, frame_size=16, mean=(0, 0, 0), std=(1, 1, 1)),
        device=torch.device("cpu"),
    )


def test_without_mixing_each_clip_has_its_label():
    clips, targets = go()
    assert clips.shape == (2, 2, 3, 16, 16)
    assert clips.mean(dim=(1, 2, 3, 4)).tolist() == [1.0, 0.0]
    assert targets.labels.tolist() == [0, 1] and targets.weights.tolist() == [1, 1]
    assert targets.others is None and targets.shares is None


def test_mixed_clips_have_both_labels_and_partners_add_no_loss():
    for changes in ({"mixup": 1.0}, {"cutmix": 1.0}):
        clips, targets = go(**changes)
        assert clips.shape == (2, 2, 3, 16, 16)
        assert targets.labels.tolist() == [0, 1] and targets.weights.tolist() == [1, 1]
        assert targets.others is not None and targets.others.tolist() == [1, 2]
        assert targets.shares is not None
        white, grey = targets.shares[0], (1 - targets.shares[1]) * 127 / 255
        assert torch.allclose(clips.mean(dim=(1, 2, 3, 4)), torch.stack([white, grey]), atol=1e-5)


def test_a_clip_is_not_mixed_with_one_that_cannot_be_read():
    for changes in ({"mixup": 1.0}, {"cutmix": 1.0}):
        clips, targets = go(**changes, unreadable=(1,))
        assert torch.equal(clips[0], torch.ones_like(clips[0]))
        assert targets.others is not None and targets.others.tolist() == [0, 2]
        assert targets.weights.tolist() == [1, 0]


def test_clips_beyond_the_real_ones_weigh_nothing():
    assert go(real=1)[1].weights.tolist() == [1, 0]
    assert go(real=0, mixup=1.0)[1].weights.tolist() == [0, 0]
