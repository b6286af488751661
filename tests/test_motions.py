"""The demo data set, whose classes differ in the order of frames only."""

import json
import math
import re
from collections.abc import Callable

import av
import numpy as np
import pytest

from tvit_cli.data import motions
from tvit_cli.data.motions import CLASSES, GROUPS, OPPOSITES, is_motions, make_motions
from tvit_cli.errors import DataError, RunError
from tvit_cli.portable.reading import segment_indices

Change = Callable[[np.ndarray], bool]
FRAMES = 6
SIZE = 32


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("data") / "motions"
    make_motions(root, clips_per_group=1, frame_size=SIZE, frames=FRAMES)
    return root


def decoded(file):
    with av.open(str(file)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def twin(file):
    """The clip of the opposite class with the same group and number."""
    one, other = next(pair for pair in OPPOSITES if file.parent.name in pair)
    opposite = other if file.parent.name == one else one
    return file.parent.parent / opposite / file.name.replace(file.parent.name, opposite)


def clips(root):
    return sorted(root.glob("*/*/*.avi"))


def test_twins_are_each_other_backwards_and_alike_on_disk(root):
    for file in clips(root)[::3]:
        assert np.array_equal(decoded(file)[::-1], decoded(twin(file))), file
    for file in clips(root)[::3]:
        frames = decoded(file).astype(int)
        assert np.abs(frames - frames[::-1]).max() > 60, file  # of 255: the object is elsewhere or turned
    for file in clips(root)[::7]:
        # one padding byte a frame
        assert abs(file.stat().st_size - twin(file).stat().st_size) <= FRAMES, file
        with av.open(str(file)) as container:
            assert all(packet.is_keyframe for packet in container.demux(video=0) if packet.size), file
    chosen = segment_indices(motions.FRAMES, 8)
    assert [motions.FRAMES - 1 - index for index in reversed(chosen)] == chosen


def test_names_and_groups_are_those_of_ucf101_in_one_subset_each(root):
    assert len(clips(root)) == 25 * len(CLASSES)
    for file in clips(root):
        subset, label = file.parts[-3:-1]
        found = re.fullmatch(rf"v_{label}_g(\d\d)_c(\d\d)\.avi", file.name)
        assert found is not None
        assert label in CLASSES
        assert int(found[1]) in GROUPS[subset]
    groups = [group for numbers in GROUPS.values() for group in numbers]
    assert sorted(groups) == list(range(1, 26))


def test_a_group_is_one_scene_and_two_groups_are_two(root):
    def looks(group):
        return [
            np.median(decoded(file), axis=(0, 1, 2))
            for file in sorted(root.glob(f"train/*/*_g{group:02d}_*"))
        ]

    within = max(np.abs(a - b).max() for group in (1, 2, 3) for a in looks(group) for b in looks(group))
    between = min(np.abs(looks(a)[0] - looks(b)[0]).max() for a, b in ((1, 2), (1, 3), (2, 3)))
    assert within < between


def test_a_seed_gives_the_same_bytes_with_any_workers_and_another_others(root, tmp_path):
    again = tmp_path / "again"
    make_motions(again, clips_per_group=1, frame_size=SIZE, frames=FRAMES, workers=1)
    files = sorted(path.relative_to(root) for path in root.rglob("*") if path.is_file())
    assert files == sorted(path.relative_to(again) for path in again.rglob("*") if path.is_file())
    assert all((root / file).read_bytes() == (again / file).read_bytes() for file in files)
    other = tmp_path / "other"
    make_motions(other, seed=1, clips_per_group=1, frame_size=SIZE, frames=FRAMES)
    assert all(file.read_bytes() != (other / file.relative_to(root)).read_bytes() for file in clips(root))


def test_boxes_hold_the_object(root):
    boxes = json.loads((root / "boxes.json").read_text(encoding="utf-8"))
    assert sorted(boxes) == [file.relative_to(root).as_posix() for file in clips(root)]
    for name in list(boxes)[::5]:
        box = np.array(boxes[name])
        assert box.shape == (FRAMES, 4)
        assert box.min() >= 0 and box.max() <= SIZE and (box[:, 2:] > box[:, :2]).all()
        frames = decoded(root / name).astype(int)
        changed = np.abs(frames - frames[:1]).max((0, 3)) > 60  # (H, W): where the object came or went
        rows, columns = np.nonzero(changed)
        assert len(rows) > 0, name
        assert columns.min() >= box[:, 0].min() - 2 and columns.max() <= box[:, 2].max() + 2, name
        assert rows.min() >= box[:, 1].min() - 2 and rows.max() <= box[:, 3].max() + 3, name  # and its shade


@pytest.mark.parametrize(
    ("label", "change"),
    [
        ("MoveRight", lambda box: box[-1, 0] - box[0, 0] > 0.2 * SIZE),
        ("MoveUp", lambda box: box[-1, 3] - box[0, 3] < -0.2 * SIZE),
        ("Grow", lambda box: np.ptp(box[-1, [0, 2]]) > 1.4 * np.ptp(box[0, [0, 2]])),
        ("Shrink", lambda box: np.ptp(box[-1, [0, 2]]) < np.ptp(box[0, [0, 2]]) / 1.4),
    ],
)
def test_the_object_does_what_the_class_says(root, label, change):
    boxes = json.loads((root / "boxes.json").read_text(encoding="utf-8"))
    assert all(change(np.array(box)) for name, box in boxes.items() if f"/{label}/" in name)


def test_turn_clockwise_turns_clockwise_as_seen():
    path = motions._path(np.random.default_rng(0), "TurnClockwise", 64, motions.FRAMES)
    # A corner at the object's right must go down (y grows) when it turns clockwise.
    assert math.sin(float(path.angle[1] - path.angle[0])) > 0
    assert np.degrees(np.diff(path.angle)).max() < 40


def test_progress_ends_at_the_number_of_clips_and_parts_are_no_data_set(tmp_path, root):
    seen = []
    count = make_motions(
        tmp_path / "m", clips_per_group=1, frame_size=SIZE, frames=2, progress=lambda *done: seen.append(done)
    )
    assert seen[-1] == (count, count)
    assert seen == sorted(seen)
    assert is_motions(root)
    assert not is_motions(tmp_path)
    part = tmp_path / "part"
    make_motions(part, clips_per_group=1, frame_size=SIZE, frames=2)
    clips(part)[0].unlink()
    assert not is_motions(part)


@pytest.mark.parametrize(
    "text", ["", "[]", '{"version": 0, "clips": {}}', '{"version": 1}', '{"version": 1, "clips": 3}']
)
def test_a_foreign_record_is_no_data_set(tmp_path, text):
    (tmp_path / "motions.json").write_text(text, encoding="utf-8")
    assert not is_motions(tmp_path)


def test_a_folder_with_something_in_it_is_left_alone(tmp_path):
    (tmp_path / "mine.txt").write_text("keep", encoding="utf-8")
    with pytest.raises(DataError, match="Delete it or name another folder"):
        make_motions(tmp_path, clips_per_group=1)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_a_failure_on_the_way_leaves_nothing_behind(tmp_path, monkeypatch):
    def full(*_, **__):
        raise RunError("disk full")

    monkeypatch.setattr(motions, "write_video", full)
    with pytest.raises(RunError, match="disk full"):
        make_motions(tmp_path / "m", clips_per_group=1, frame_size=SIZE, frames=2)
    assert list(tmp_path.iterdir()) == []


def test_of_two_processes_that_make_it_the_slower_one_takes_what_is_there(tmp_path):
    facts = {"clips_per_group": 1, "frame_size": SIZE, "frames": 2}

    def another(done, total):
        if done == total:
            make_motions(tmp_path / "m", **facts)

    assert make_motions(tmp_path / "m", progress=another, **facts) == len(clips(tmp_path / "m"))
    assert is_motions(tmp_path / "m") and [path.name for path in tmp_path.iterdir()] == ["m"]
