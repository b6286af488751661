"""Data leakage between train, val and test."""

import os

import pytest

from tvit_cli.data.layout import Video
from tvit_cli.engine.evaluate import selection
from tvit_cli.engine.evaluate.selection import find_leaks


def video(folder, name, subset, group, data):
    path = folder / name
    path.write_bytes(data)
    return Video(path, name, "run", subset, group)


def test_groups_on_both_sides_are_counted(tmp_path):
    videos = [
        video(tmp_path, f"{subset}{group}{i}", subset, group, os.urandom(50))
        for subset, group, i in (("train", "01", 0), ("test", "01", 0), ("test", "01", 1), ("val", "02", 0))
    ]
    (leak,) = find_leaks(videos)
    assert "share 1 groups (01), 2 videos" in leak


def test_equal_files_under_two_names_are_found(tmp_path):
    videos = [
        video(tmp_path, "a", "train", None, b"same bytes"),
        video(tmp_path, "b", "test", None, b"same bytes"),
        video(tmp_path, "c", "test", None, b"same width"),
        video(tmp_path, "d", "train", None, b"same bytes"),
    ]
    (leak,) = find_leaks(videos)
    assert "1 videos are in two subsets" in leak and "a = b" in leak


def test_a_clean_split_says_nothing_and_reads_nothing(tmp_path, monkeypatch):
    videos = [
        video(tmp_path, "a", "train", "01", b"1"),
        video(tmp_path, "b", "train", "01", b"1"),
        video(tmp_path, "c", "test", "02", b"22"),
    ]
    monkeypatch.setattr(selection, "sha256", lambda path: pytest.fail(f"{path} was read"))
    assert find_leaks(videos) == ()


def test_videos_that_are_gone_are_left_out(tmp_path):
    gone = Video(tmp_path / "gone.avi", "gone.avi", "run", "train", None)
    assert find_leaks([gone, video(tmp_path, "a", "test", None, b"1")]) == ()
