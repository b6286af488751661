"""Videos that were tried before are not tried again unless they changed."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tvit_cli.data.layout import Video, read_layout
from tvit_cli.engine import dataset
from tvit_cli.engine.dataset import CHECKED, unreadable_videos

Make = Callable[..., Path]


@pytest.fixture
def videos(make_video: Make, tmp_path: Path) -> list[Video]:
    for name in ("a", "b", "c"):
        make_video(tmp_path / "run" / f"{name}_g01_.avi", frames=2)
    make_video(tmp_path / "walk" / "d_g01_.avi", frames=2)
    (tmp_path / "run" / "bad_g01_.avi").write_text("text")
    return list(read_layout(tmp_path, group_pattern="_g(..)_", val_groups="none", test_groups="none").videos)


@pytest.fixture
def tried(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Names of the files that were opened since it was last cleared."""
    names: list[str] = []
    real = dataset.decode_first
    monkeypatch.setattr(dataset, "decode_first", lambda path: names.append(path.name[0]) or real(path))
    yield names


def check(videos: list[Video], folder: Path) -> dict[str, str]:
    return unreadable_videos(videos, folder, workers=2)


def test_only_what_could_not_be_read_is_tried_again(
    videos: list[Video], tried: list[str], tmp_path: Path
) -> None:
    first = check(videos, tmp_path)
    assert list(first) == ["run/bad_g01_.avi"]
    assert sorted(tried) == ["a", "b", "b", "c", "d"]
    tried.clear()
    assert check(videos, tmp_path) == first
    assert tried == ["b"]
    assert {path.name for path in tmp_path.iterdir()} == {CHECKED, "run", "walk"}
    again = read_layout(tmp_path, group_pattern="_g(..)_", val_groups="none", test_groups="none")
    assert list(again.videos) == videos


def test_a_changed_video_is_tried_again(
    videos: list[Video], tried: list[str], make_video: Make, tmp_path: Path
) -> None:
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


def test_another_decoder_tries_all_again(
    videos: list[Video], tried: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check(videos, tmp_path)
    monkeypatch.setattr("av.__version__", "0.0")
    tried.clear()
    check(videos, tmp_path)
    assert len(tried) == 5


@pytest.mark.parametrize("text", ["", "{", "[]", '{"decoder": 1}', '{"videos": {}}'])
def test_spoilt_notes_are_made_anew(text: str, videos: list[Video], tried: list[str], tmp_path: Path) -> None:
    (tmp_path / CHECKED).write_text(text)
    check(videos, tmp_path)
    assert len(tried) == 5
    assert len(json.loads((tmp_path / CHECKED).read_text())["videos"]) == 4


def test_a_folder_that_may_not_be_written_to_is_no_fault_and_left_alone(
    videos: list[Video], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tmp_path.chmod(0o555)
    try:
        assert list(check(videos, tmp_path)) == ["run/bad_g01_.avi"]
    finally:
        tmp_path.chmod(0o755)
    assert not (tmp_path / CHECKED).exists()

    def full(*arguments: object, **keywords: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    assert list(check(videos, tmp_path)) == ["run/bad_g01_.avi"]
    assert {path.name for path in tmp_path.iterdir()} == {"run", "walk"}
