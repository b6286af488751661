"""Batches that threads and processes read ahead."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from test_framestore import build

from tvit_cli.data.clips import ClipBatch, ClipDataset, ClipItem
from tvit_cli.data.framestore import FrameStore
from tvit_cli.data.layout import Video
from tvit_cli.data.loading import explains_dead_workers, load_batches
from tvit_cli.data.storewriter import shard_paths
from tvit_cli.errors import DataError, RunError

LABELS = ("run", "walk")
KEYS = [[(epoch, i), (epoch, (i + 1) % 4)] for epoch in range(3) for i in range(4)]


@pytest.fixture(scope="module")
def videos(make_video: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> list[Video]:
    folder = tmp_path_factory.mktemp("videos")
    return [
        Video(make_video(folder / f"{n}.avi", frames=30 + n), f"{n}.avi", LABELS[n % 2], "train", None)
        for n in range(4)
    ]


@pytest.fixture
def store(videos: list[Video], tmp_path: Path) -> FrameStore:
    return build(tmp_path / "frames", videos, shard_bytes=20_000)


def dataset(videos: list[Video], store: FrameStore | None = None) -> ClipDataset:
    return ClipDataset(videos, LABELS, n_frames=8, short_side=24, seed=0, training=True, store=store)


def same(a: ClipBatch, b: ClipBatch) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.clips, b.clips, strict=True)) and torch.equal(
        a.indices, b.indices
    )


def readers() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("clips")]


@pytest.mark.parametrize("workers", [1, 3])
def test_threads_give_the_batches_of_a_store_in_their_order(
    workers: int, videos: list[Video], store: FrameStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "tvit_cli.data.framestore.MOST_OPEN_SHARDS", 1
    )  # the most they can disturb each other
    assert len(shard_paths(store.folder)) > 1
    alone = list(load_batches(dataset(videos, store), KEYS, workers=0))
    assert [batch.indices.tolist() for batch in alone] == [[i for _, i in keys] for keys in KEYS]
    together = list(load_batches(dataset(videos, store), KEYS, workers=workers))
    assert all(same(a, b) for a, b in zip(alone, together, strict=True))
    assert not readers()


def test_processes_give_the_batches_of_videos_in_their_order(videos: list[Video]) -> None:
    alone = list(load_batches(dataset(videos), KEYS, workers=0))
    together = list(load_batches(dataset(videos), KEYS, workers=1))
    assert all(same(a, b) for a, b in zip(alone, together, strict=True))


class Counting(ClipDataset):
    """Counts how many clips were read."""

    read = 0

    def __getitem__(self, key: Any) -> ClipItem:
        Counting.read += 1
        return super().__getitem__(key)


def test_threads_read_ahead_no_further_than_they_should_and_end_when_nobody_reads_on(
    videos: list[Video], store: FrameStore
) -> None:
    data = Counting(videos, LABELS, n_frames=2, short_side=24, seed=0, training=True, store=store)
    taken: list[int] = []

    def keys() -> Iterator[list[tuple[int, int]]]:
        for number in range(1_000):
            taken.append(number)
            yield [(number, 0)]

    Counting.read = 0
    batches = load_batches(data, keys(), workers=2)
    next(batches)
    deadline = time.monotonic() + 30
    while Counting.read < len(taken) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert (len(taken), Counting.read) == (4, 4)
    assert readers()
    batches.close()  # type: ignore[attr-defined]
    assert not readers()
    assert len(taken) == 4


def test_what_goes_wrong_in_a_thread_is_said_to_the_one_who_asked(
    videos: list[Video], store: FrameStore
) -> None:
    for shard in shard_paths(store.folder):
        shard.unlink()
    with pytest.raises(DataError, match="cannot be opened"):
        list(load_batches(dataset(videos, store), KEYS, workers=2))
    assert not readers()


class Dying(ClipDataset):
    """Takes its process down, as a decoder that crashes would."""

    def __getitem__(self, key: Any) -> ClipItem:
        os._exit(1)


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_process_that_dies_is_an_error_that_says_how_to_go_on(videos: list[Video]) -> None:
    data = Dying(videos, LABELS, n_frames=2, short_side=24, seed=0, training=True)
    died = r"process that decodes videos died.*--resume-from-checkpoint latest"
    with pytest.raises(RunError, match=died), explains_dead_workers():
        list(load_batches(data, KEYS, workers=1))
