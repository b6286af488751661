"""Frame sampling, and the data set of clips."""

import math
import pickle
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from tvit_cli.data import clips
from tvit_cli.data.clips import ClipDataset, collate
from tvit_cli.data.layout import Video
from tvit_cli.portable.reading import segment_indices

LABELS = ("run", "walk")


FRAMES = 40


@pytest.fixture(scope="module")
def videos(make_video, tmp_path_factory):
    folder = tmp_path_factory.mktemp("videos")
    return [
        Video(make_video(folder / f"{n}.avi", frames=FRAMES), f"{n}.avi", LABELS[n % 2], "train", None)
        for n in range(4)
    ]


def dataset(videos, **how):
    return ClipDataset(
        videos, LABELS, **({"n_frames": 8, "short_side": 24, "seed": 0, "training": True} | how)
    )


@pytest.fixture(scope="session")
def numbers(read_numbers):
    return lambda frames: read_numbers(frames.permute(0, 2, 3, 1).numpy())


Numbers = Callable[[torch.Tensor], list[int]]


def test_an_item_is_uint8_frames_of_a_dataset_that_can_be_pickled(videos):
    item = dataset(videos)[(3, 1)]
    assert item.frames.shape == (8, 3, 24, 32)
    assert item.frames.dtype == torch.uint8
    assert item.frames.is_contiguous(memory_format=torch.channels_last)
    assert (item.label, item.epoch, item.index, item.weight, item.error) == (1, 3, 1, 1.0, "")
    data = dataset(videos)
    assert torch.equal(pickle.loads(pickle.dumps(data))[(1, 2)].frames, data[(1, 2)].frames)
    assert len(data) == 4


def test_evaluation_takes_centres_and_training_draws_within_segments(videos, numbers):
    data = dataset(videos, training=False)
    assert numbers(data[(0, 2)].frames) == segment_indices(FRAMES, 8)
    assert torch.equal(data[(0, 2)].frames, data[(7, 2)].frames)
    data = dataset(videos)
    drawn = np.array([numbers(data[(epoch, 0)].frames) for epoch in range(30)])
    assert (drawn // 5 == np.arange(8)).all()
    assert all(len(set(column)) == 5 for column in drawn.T)  # every frame has its turn


def test_the_draw_depends_on_seed_epoch_and_index_alone(videos, numbers):
    def draw(seed, epoch, index):
        return tuple(numbers(dataset(videos, seed=seed)[(epoch, index)].frames))

    keys = [(s, e, i) for s in range(2) for e in range(2) for i in range(2)]
    first = {key: draw(*key) for key in keys}
    assert len(set(first.values())) == len(keys)
    np.random.seed(1)
    torch.manual_seed(1)
    assert {key: draw(*key) for key in reversed(keys)} == first


def test_shuffled_frames_are_the_same_frames_in_an_order_of_their_own(videos, numbers):
    plain, shuffled = (dataset(videos, training=False, shuffle_frames=on) for on in (False, True))
    orders = [numbers(shuffled[(0, index)].frames) for index in range(4)]
    for index, order in enumerate(orders):
        assert sorted(order) == numbers(plain[(0, index)].frames)
        assert order != sorted(order)
        assert order == numbers(shuffled[(5, index)].frames)
    assert len({tuple(order) for order in orders}) == 4


def test_an_unreadable_video_becomes_black_frames_of_no_weight(videos, tmp_path):
    (tmp_path / "text.avi").write_text("text")
    bad = Video(tmp_path / "text.avi", "text.avi", "walk", "train", None)
    item = dataset([videos[0], bad])[(0, 1)]
    assert item.frames.shape == (8, 3, 24, 24)
    assert not item.frames.any()
    assert (item.label, item.weight) == (1, 0.0)
    assert item.error.startswith("not a video")
    batch = collate([dataset([videos[0], bad])[(0, index)] for index in (0, 1)])
    assert batch.weights.tolist() == [1, 0]
    assert [index for index, _ in batch.errors] == [1]


def test_the_exact_count_is_remembered_after_the_first_read(videos, monkeypatch):
    asked = []
    read = clips.read_clip

    def spy(*args, frame_count, **how):
        asked.append(frame_count)
        return read(*args, frame_count=frame_count, **how)

    monkeypatch.setattr(clips, "read_clip", spy)
    data = dataset(videos)
    for key in [(0, 0), (0, 1), (1, 0), (2, 0)]:
        data[key]
    assert asked == [None, None, FRAMES, FRAMES]
    assert torch.equal(data[(2, 0)].frames, dataset(videos)[(2, 0)].frames)


def test_a_batch_keeps_each_clip_in_its_size(make_video, tmp_path):
    paths = [make_video(tmp_path / "wide.avi"), make_video(tmp_path / "tall.avi", height=64, width=48)]
    data = dataset([Video(path, path.name, "run", "train", None) for path in paths])
    batch = collate([data[(2, 0)], data[(2, 1)]])
    assert [tuple(clip.shape) for clip in batch.clips] == [(8, 3, 24, 32), (8, 3, 32, 24)]
    assert batch.epochs.tolist() == [2, 2]
    assert batch.indices.tolist() == [0, 1]
    assert (batch.labels.dtype, batch.weights.dtype) == (torch.int64, torch.float32)
    assert batch.errors == []


def test_pinning_keeps_a_batch_whole(videos, monkeypatch):
    batch = collate([dataset(videos)[(0, index)] for index in range(2)])
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self + 0)
    pinned = batch.pin_memory()
    for name in ("labels", "epochs", "indices", "weights"):
        assert torch.equal(getattr(pinned, name), getattr(batch, name))
        assert getattr(pinned, name) is not getattr(batch, name)
    assert all(a is not b and torch.equal(a, b) for a, b in zip(pinned.clips, batch.clips, strict=True))
    assert pinned.errors == batch.errors


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_worker_processes_give_the_same_clips_as_none(method, videos):
    keys = [[(epoch, index) for index in range(4)] for epoch in range(2)]

    def run(workers):
        context = method if workers else None
        loader = DataLoader(
            dataset(videos),
            batch_sampler=keys,  # type: ignore[arg-type]  # keys are (epoch, index), not numbers
            collate_fn=collate,
            num_workers=workers,
            multiprocessing_context=context,
        )
        return list(loader)

    for here, there in zip(run(0), run(1), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(here.clips, there.clips, strict=True))
        assert torch.equal(here.labels, there.labels)
        assert all(clip.is_contiguous(memory_format=torch.channels_last) for clip in there.clips)


def test_segments_are_taken_at_centres_offsets_and_the_last_frame():
    assert segment_indices(8, 4) == [1, 3, 5, 7]
    assert segment_indices(90, 3) == [15, 45, 75]
    assert segment_indices(8, 8) == list(range(8))
    assert segment_indices(8, 8, [0.999] * 8) == list(range(8))
    assert segment_indices(3, 5) == [0, 1, 2, 2, 2]
    assert segment_indices(1, 4, [0.9, 0.1, 0.5, 0.0]) == [0, 0, 0, 0]
    assert segment_indices(100, 4, [0.0] * 4)[0] == 0
    assert segment_indices(100, 4, [math.nextafter(1.0, 0.0)] * 4)[-1] == 99


@pytest.mark.parametrize("frame_count", [9, 17, 64, 301])
def test_each_frame_stays_in_its_segment_and_in_time_order(frame_count):
    n_frames = 8
    for at in (0.0, 0.25, 0.5, math.nextafter(1.0, 0.0)):
        indices = segment_indices(frame_count, n_frames, [at] * n_frames)
        assert indices == sorted(indices)
        for segment, index in enumerate(indices):
            start, end = segment * frame_count / n_frames, (segment + 1) * frame_count / n_frames
            assert math.floor(start) <= index < math.ceil(end)


@pytest.mark.parametrize(
    ("frame_count", "n_frames", "offsets"),
    [(0, 8, None), (8, 0, None), (8, 2, [0.5]), (8, 2, [0.5, 1.0]), (8, 2, [-0.1, 0.5])],
)
def test_what_has_no_answer_is_refused(frame_count, n_frames, offsets):
    with pytest.raises(ValueError, match=r"frames cannot be chosen|offsets in"):
        segment_indices(frame_count, n_frames, offsets)
