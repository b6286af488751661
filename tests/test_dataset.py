"""The record of checked videos: only new or changed ones are decoded again."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tvit_cli.data.layout import read_layout
from tvit_cli.engine import dataset
from tvit_cli.engine.dataset import CHECKED, unreadable_videos

Make = Callable[..., Path]


@pytest.fixture
def videos(make_video, tmp_path):
    for name in ("a", "b", "c"):
        make_video(tmp_path / "run" / f"{name}_g01_.avi", frames=2)
    make_video(tmp_path / "walk" / "d_g01_.avi", frames=2)
    (tmp_path / "run" / "bad_g01_.avi").write_text("text")
    return list(read_layout(tmp_path, group_pattern="_g(..)_", val_groups="none", test_groups="none").videos)


@pytest.fixture
def tried(monkeypatch):
    """Names of the files that were opened since it was last cleared."""
    names = []
    real = dataset.decode_first
    monkeypatch.setattr(dataset, "decode_first", lambda path: names.append(path.name[0]) or real(path))
    yield names


def check(videos, folder):
    return unreadable_videos(videos, folder, workers=2)


def test_only_what_could_not_be_read_is_tried_again(videos, tried, tmp_path):
    first = check(videos, tmp_path)
    assert list(first) == ["run/bad_g01_.avi"]
    assert sorted(tried) == ["a", "b", "b", "c", "d"]
    tried.clear()
    assert check(videos, tmp_path) == first
    assert tried == ["b"]
    assert {path.name for path in tmp_path.iterdir()} == {CHECKED, "run", "walk"}
    again = read_layout(tmp_path, group_pattern="_g(..)_", val_groups="none", test_groups="none")
    assert list(again.videos) == videos


def test_a_changed_video_is_tried_again(videos, tried, make_video, tmp_path):
    check(videos, tmp_path)
    paths = {video.path.name[0]: video.path for video in videos if "bad" not in video.name}
    times = paths["a"].stat()
    make_video(paths["a"], frames=9)
    os.utime(paths["a"], ns=(times.st_atime_ns, times.st_mtime_ns))  # another size at the same time
    paths["b"].write_bytes(bytes(paths["b"].stat().st_size))  # another time at the same size
    tried.clear()
    assert sorted(check(videos, tmp_path)) == ["run/b_g01_.avi", "run/bad_g01_.avi"]
    assert sorted(tried) == ["a", "b", "b"]
    tried.clear()
    away = paths["c"].rename(tmp_path / "c.avi")
    assert "no such file" in check(videos, tmp_path)["run/c_g01_.avi"]
    assert sorted(tried) == ["b", "b", "c"]
    tried.clear()
    away.rename(paths["c"])
    assert sorted(check(videos, tmp_path)) == ["run/b_g01_.avi", "run/bad_g01_.avi"]
    assert sorted(tried) == ["b", "b"]  # what comes back as it was is still known


def test_another_decoder_tries_all_again(videos, tried, tmp_path, monkeypatch):
    check(videos, tmp_path)
    monkeypatch.setattr("av.__version__", "0.0")
    tried.clear()
    check(videos, tmp_path)
    assert len(tried) == 5


@pytest.mark.parametrize("text", ["", "{", "[]", '{"decoder": 1}', '{"videos": {}}'])
def test_spoilt_notes_are_made_anew(text, videos, tried, tmp_path):
    (tmp_path / CHECKED).write_text(text)
    check(videos, tmp_path)
    assert len(tried) == 5
    assert len(json.loads((tmp_path / CHECKED).read_text())["videos"]) == 4


def test_a_folder_that_may_not_be_written_to_is_no_fault_and_left_alone(videos, tmp_path, monkeypatch):
    tmp_path.chmod(0o555)
    try:
        assert list(check(videos, tmp_path)) == ["run/bad_g01_.avi"]
    finally:
        tmp_path.chmod(0o755)
    assert not (tmp_path / CHECKED).exists()

    def full(*arguments, **keywords):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    assert list(check(videos, tmp_path)) == ["run/bad_g01_.avi"]
    assert {path.name for path in tmp_path.iterdir()} == {"run", "walk"}


def test_new_clips_of_the_demo_set_are_counted(tmp_path, monkeypatch):
    monkeypatch.setattr(dataset, "make_motions", lambda root, **_: 1600)
    assert dataset.make_demo_data(tmp_path / "motions", lambda event: None) == 1600
