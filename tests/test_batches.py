"""Which clips are read when: the same updates however the work is cut up."""

from __future__ import annotations

from collections import Counter, defaultdict
from typing import Any

import pytest

from tvit_cli.engine.batches import BatchKeys, BatchPlan


def plan(**changes: Any) -> BatchPlan:
    facts = {
        "clips": 21,
        "batch_size": 2,
        "accumulation": 2,
        "processes": 1,
        "rank": 0,
        "epochs": 3,
        "seed": 0,
    }
    return BatchPlan(**{**facts, **changes})


def windows(processes: int, **changes: Any) -> dict[int, list[tuple[int, int]]]:
    """Optimizer step -> the keys that count, over all processes, sorted."""
    found = defaultdict(list)
    for rank in range(processes):
        for batch in plan(processes=processes, rank=rank, **changes).micro_batches():
            found[batch.step] += batch.keys[: batch.real]
    return {step: sorted(keys) for step, keys in found.items()}


def test_every_clip_is_read_once_per_epoch() -> None:
    for epoch in range(3):
        keys = [k for b in plan().micro_batches() if b.epoch == epoch for k in b.keys[: b.real]]
        assert sorted(keys) == [(epoch, index) for index in range(21)]


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    orders = [
        tuple(index for b in plan(seed=seed).micro_batches() if b.epoch == epoch for _, index in b.keys)
        for seed in (0, 1)
        for epoch in (0, 1)
    ]
    assert len(set(orders)) == 4


@pytest.mark.parametrize(
    "cut",
    [
        {"processes": 2, "batch_size": 4, "accumulation": 1},
        {"processes": 4, "batch_size": 1, "accumulation": 2},
    ],
)
def test_updates_hold_the_same_clips_however_they_are_cut(cut: dict[str, int]) -> None:
    assert windows(**cut) == windows(processes=1, batch_size=8, accumulation=1)


def test_processes_take_equally_many_passes_and_say_what_does_not_count() -> None:
    ranks = [list(plan(processes=4, rank=r, clips=9).micro_batches()) for r in range(4)]
    assert len({len(batches) for batches in ranks}) == 1
    for batches in zip(*ranks, strict=True):
        assert len({(b.step, b.closes_window, b.closes_epoch, b.window_clips) for b in batches}) == 1
        assert all(b.keys for b in batches)
    assert sum(b.real for batches in ranks for b in batches) == 9 * 3


def test_the_last_window_of_an_epoch_knows_how_few_clips_it_has() -> None:
    sizes = {b.step: b.window_clips for b in plan(epochs=1).micro_batches()}
    assert list(sizes.values()) == [4, 4, 4, 4, 4, 1]


def test_a_plan_goes_on_from_any_step() -> None:
    whole = list(plan().micro_batches())
    for step in range(plan().total_steps + 1):
        assert list(plan().micro_batches(step)) == [b for b in whole if b.step >= step]


def test_the_loader_is_given_the_keys_of_the_plan() -> None:
    assert list(BatchKeys(plan(), 4)) == [list(b.keys) for b in plan().micro_batches(4)]


UNEVEN = (0,) * 12 + (1,) * 7 + (2,) * 2  # the classes of 21 clips


def test_a_balanced_epoch_is_as_long_and_has_as_many_clips_of_each_class() -> None:
    assert plan(balance=UNEVEN).total_steps == plan().total_steps
    for epoch in range(3):
        keys = [k for b in plan(balance=UNEVEN).micro_batches() if b.epoch == epoch for k in b.keys[: b.real]]
        assert len(keys) == 21
        assert Counter(UNEVEN[index] for _, index in keys) == {0: 7, 1: 7, 2: 7}


def test_a_clip_that_is_read_again_in_an_epoch_is_drawn_anew() -> None:
    keys = [k for b in plan(balance=UNEVEN).micro_batches() for k in b.keys[: b.real]]
    assert len(keys) == len(set(keys)) == 3 * 21
    firsts = {(b.epoch, index) for b in plan(balance=UNEVEN).micro_batches() for _, index in b.keys}
    assert firsts <= set(keys)  # its first reading in an epoch is the one that it has without balance


@pytest.mark.parametrize(
    "cut",
    [
        {"processes": 2, "batch_size": 4, "accumulation": 1},
        {"processes": 4, "batch_size": 1, "accumulation": 2},
    ],
)
def test_balanced_updates_hold_the_same_clips_however_they_are_cut(cut: dict[str, int]) -> None:
    whole = windows(processes=1, batch_size=8, accumulation=1, balance=UNEVEN)
    assert windows(**cut, balance=UNEVEN) == whole != windows(**cut)


def test_a_balanced_plan_goes_on_from_any_step() -> None:
    whole = list(plan(balance=UNEVEN).micro_batches())
    for step in range(plan().total_steps + 1):
        assert list(plan(balance=UNEVEN).micro_batches(step)) == [b for b in whole if b.step >= step]
