"""Atomic writes."""

import errno
import resource

import numpy as np
import pytest

from tvit_cli.data.video_writer import video_writer
from tvit_cli.engine.predict import explain
from tvit_cli.engine.predict.timeline import write_timeline
from tvit_cli.errors import RunError
from tvit_cli.files import atomic_write, disk_full_errors
from tvit_cli.results import Segment, Timeline


def test_a_file_is_put_in_its_place_when_all_of_it_is_written(tmp_path):
    path = tmp_path / "new" / "out.csv"
    for text in ("old", "new"):
        with atomic_write(path) as beside:
            beside.write_text(text)
            assert beside.suffix == ".csv" and beside.name.startswith(".")
            assert path.exists() == (text == "new")
        assert path.read_text() == text and [*path.parent.iterdir()] == [path]


def test_a_disk_that_is_full_leaves_the_older_file_and_nothing_beside_it(tmp_path):
    path = tmp_path / "out.csv"
    for before in (None, "old"):
        if before is not None:
            path.write_text(before)
        with pytest.raises(OSError, match="No space left"), atomic_write(path) as beside:
            beside.write_text("half")
            raise OSError(errno.ENOSPC, "No space left on device")
        assert [p.read_text() for p in tmp_path.iterdir()] == ([] if before is None else [before])


def test_a_folder_that_cannot_be_made_is_the_error_that_is_told(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(FileExistsError, match="file"), atomic_write(tmp_path / "file" / "out.csv"):
        pass


@pytest.fixture
def little_room():
    """No file may grow beyond 4 KiB, as on a disk that is nearly full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.usefixtures("little_room")
def test_a_timeline_that_a_disk_has_no_room_for_leaves_the_older_one(tmp_path):
    scores = np.full((1000, 2), 0.5)
    timeline = Timeline(
        video="long.mp4", labels=("a", "b"), seconds=100.0, window=1.0, stride=0.1, scores=scores,
        smoothed=scores, segments=(Segment(0.0, 100.0, "a", 0.5),),
        pictures=((1.0, np.zeros((9, 9, 3), np.uint8)),),
    )  # fmt: skip
    for name in ("timeline.csv", "timeline.png"):
        (tmp_path / name).write_text("old")
    with pytest.raises(RunError, match=r"--output .*: cannot be written \(File too large\)"):
        write_timeline(tmp_path, timeline)
    assert [path.read_text() for path in tmp_path.iterdir()] == ["old", "old"]


@pytest.mark.usefixtures("little_room")
def test_a_film_strip_that_a_disk_has_no_room_for_leaves_the_older_one(tmp_path, monkeypatch):
    monkeypatch.setattr(explain, "explanation_png", lambda *given: bytes(10_000))
    nothing = None
    path = tmp_path / "why.png"
    path.write_text("old")
    with pytest.raises(RunError, match=r"--explain .*why\.png: cannot be written \(File too large\)"):
        explain.write_explanation(path, nothing, nothing)
    assert [p.read_text() for p in tmp_path.iterdir()] == ["old"]


@pytest.mark.usefixtures("little_room")
def test_a_video_that_a_disk_has_no_room_for_leaves_nothing(tmp_path):
    pictures = np.random.default_rng(0).integers(0, 256, (5, 64, 64, 3), dtype=np.uint8)
    with pytest.raises(RunError, match="could not be written"), video_writer(tmp_path / "out.mp4") as writer:
        for number, picture in enumerate(pictures):
            writer.write(picture, number / 5, (number + 1) / 5)
    assert not any(tmp_path.iterdir())


def test_full_disk_names_no_negative_size(tmp_path):
    with (
        pytest.raises(RunError, match="; more space is needed"),
        disk_full_errors(tmp_path, purpose="fetching", need=lambda: -209711104),
    ):
        raise OSError(errno.ENOSPC, "No space left")
