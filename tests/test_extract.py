"""`tvit extract`: frame stores made by one or more processes, resumed, and checked files."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from entry import run_python

from tvit_cli.data.framestore import FrameStore, find_store
from tvit_cli.data.framestore_writer import shard_paths
from tvit_cli.data.layout import VIDEO_SUFFIXES
from tvit_cli.data.video import count_frames
from tvit_cli.data.video_writer import write_video
from tvit_cli.engine import distributed
from tvit_cli.engine.dataset import ClipFormat, open_dataset
from tvit_cli.engine.distributed import map_in_order
from tvit_cli.engine.extract import check, extract, scan_video
from tvit_cli.errors import DataError, RunError, SettingsError
from tvit_cli.portable.reading import grid_indices
from tvit_cli.results import Note, Progress, silent
from tvit_cli.settings.base import load
from tvit_cli.settings.extract import ExtractSettings
from tvit_cli.settings.types import most_bad

GROUPS = 4


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Two classes of noise clips: three records of 12 frames fill a shard of 1 MiB."""
    root = tmp_path_factory.mktemp("source")
    for number, label in enumerate(("run", "walk")):
        for group in range(GROUPS):
            frames = np.random.default_rng([number, group]).integers(0, 256, (14, 150, 192, 3), np.uint8)
            write_video(root / label / f"v_{label}_g{group:02d}_c01.avi", frames)
    return root


@pytest.fixture
def data(source, tmp_path):
    """A copy of the source that a test may spoil, with its times."""
    root = tmp_path / "data"
    for path in sorted(source.rglob("*.avi")):
        target = root / path.relative_to(source)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
    return root


def settings(data, **changes):
    facts = {"num_workers": 0, "shard_mib": 1, "path_to_data": str(data), **changes}
    if "fps" not in facts:
        facts = {"frames_per_video": 12, **facts}
    return ExtractSettings.model_validate(facts)


def run(data, report=silent, **changes):
    return extract(settings(data, **changes), report)


def pixels(folder):
    """Every frame of every clip of a store."""
    store = FrameStore(folder)
    return {
        store.name(i): store.read(i, lambda n: grid_indices(n, 12)).frames.tobytes()
        for i in range(len(store))
    }


@pytest.fixture(scope="module")
def expected(source, tmp_path_factory):
    """The frames of an undisturbed run."""
    return pixels(run(source, output=tmp_path_factory.mktemp("whole") / "frames").folder)


def test_a_store_lands_beside_the_videos_and_a_second_run_does_nothing(data, expected):
    first = run(data)
    assert first.folder == data / "frames"
    assert (first.videos, first.skipped, dict(first.unreadable)) == (2 * GROUPS, 0, {})
    assert len(shard_paths(first.folder)) == 3
    assert all(path.stat().st_size <= (1 << 20) + 2_000 for path in shard_paths(first.folder))
    assert first.bytes <= sum(path.stat().st_size for path in shard_paths(first.folder))
    assert pixels(first.folder) == expected
    again = run(data)
    assert (again.videos, again.skipped, again.bytes) == (0, 2 * GROUPS, 0)
    assert pixels(first.folder) == expected
    assert not [path.name for path in first.folder.iterdir() if path.name.startswith(".")]


def test_worker_processes_write_the_same_bytes_as_one(data, tmp_path):
    alone, together = run(data, output=tmp_path / "a"), run(data, output=tmp_path / "b", num_workers=2)
    for a, b in zip(shard_paths(alone.folder), shard_paths(together.folder), strict=True):
        assert (a.name, a.read_bytes()) == (b.name, b.read_bytes())


KILLED = """
import sys
from pathlib import Path
from tvit_cli.results import silent
from tvit_cli.engine.extract import extract
from tvit_cli.settings.extract import ExtractSettings
if __name__ == "__main__":
    extract(ExtractSettings.model_validate({settings!r}), silent)
"""


def start(data, **changes):
    facts = settings(data, **changes).model_dump(mode="json")
    return subprocess.Popen([sys.executable, "-c", KILLED.format(settings=facts)])


def wait_until(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.002)


@pytest.mark.parametrize("shards", [0, 1, 2])
def test_killed_and_started_again_it_goes_on_with_what_is_missing(data, expected, shards):
    folder = data / "frames"
    process = start(data)
    wait_until(lambda: list(folder.glob(f"shard-{shards - 1:05d}-*" if shards else ".shard-*.part")))
    process.kill()
    process.wait()
    kept = sum(1 for _ in shard_paths(folder))
    assert kept >= shards
    result = run(data)
    assert result.skipped == min(3 * kept, 2 * GROUPS)
    assert result.videos + result.skipped == 2 * GROUPS
    assert pixels(folder) == expected
    assert not list(folder.glob(".shard-*"))


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs /proc")
def test_workers_end_when_their_parent_is_killed(data, expected):
    process = start(data, num_workers=1)
    wait_until(lambda: list((data / "frames").glob(".shard-*.part")))
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    assert children
    process.kill()
    process.wait()

    def is_gone(pid):
        try:
            return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
        except OSError:
            return True

    wait_until(lambda: all(map(is_gone, children)), seconds=20)
    assert run(data).skipped < 2 * GROUPS
    assert pixels(data / "frames") == expected


def test_an_interrupt_keeps_what_was_done(data):
    def report(event):
        if getattr(event, "done", 0) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(data, report)
    assert run(data).skipped == 2


def test_several_processes_share_the_work_and_one_joins_it(data, expected):
    def both_at(turn):
        """Stands in for a barrier: rank 1 works while rank 0 waits for the second time."""
        waits = []

        def wait():
            waits.append(1)
            if len(waits) == turn:
                results.append(extract(settings(data), silent, rank=1, processes=2))

        return wait

    results = []
    results.append(extract(settings(data), silent, rank=0, processes=2, wait_for_all=both_at(2)))
    assert [result.videos for result in results] == [GROUPS, GROUPS]
    assert {path.name[-9:-7] for path in shard_paths(data / "frames")} == {"00", "01"}
    assert pixels(data / "frames") == expected


def test_two_processes_that_torchrun_starts_share_the_work(data, expected):
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2)
    verb = ("-m", "tvit_cli", "extract", "--path-to-data", data, "--num-workers", 0)
    result = run_python(*launcher, *verb, "--frames-per-video", 12, "--shard-mib", 1)
    assert result.code == 0, result.err
    assert {path.name[-9:-7] for path in shard_paths(data / "frames")} == {"00", "01"}
    assert pixels(data / "frames") == expected


def test_an_unreadable_video_is_recorded_by_name_and_reason(data):
    bad = data / "run" / "v_run_g00_c01.avi"
    whole = bad.read_bytes()
    bad.write_text("text")
    result = run(data)
    assert "not a video" in result.unreadable["run/v_run_g00_c01.avi"]
    store = FrameStore(result.folder)
    assert len(store) == 2 * GROUPS - 1
    assert store.unreadable == dict(result.unreadable)
    bad.write_bytes(whole)  # mended
    assert (run(data).videos, FrameStore(result.folder).unreadable) == (1, {})


def test_too_many_unreadable_videos_are_an_error_after_the_rest_is_stored(data):
    for group in range(2):
        (data / "run" / f"v_run_g{group:02d}_c01.avi").write_bytes(b"")
    with pytest.raises(RunError, match=r"2 of 8 videos cannot be read; --max-bad 1 allows 1"):
        run(data, max_bad="1")
    assert len(FrameStore(data / "frames")) == 6
    assert len(run(data, max_bad="25%").unreadable) == 2


def test_a_changed_video_is_packed_anew_and_a_touched_one_is_not(data):
    folder = run(data).folder
    changed, touched = data / "run" / "v_run_g00_c01.avi", data / "run" / "v_run_g01_c01.avi"
    write_video(changed, np.full((5, 150, 192, 3), 77, np.uint8))
    os.utime(touched)
    assert run(data).videos == 1
    clip = FrameStore(folder).read("run/v_run_g00_c01.avi", lambda n: [0])
    assert clip.frame_count == 5
    assert abs(float(clip.frames.mean()) - 77) < 2
    changed.write_text("no longer a video")
    assert run(data).unreadable
    assert FrameStore(folder).find("run/v_run_g00_c01.avi") is None  # its old frames are not given instead


def test_a_removed_video_leaves_the_index_and_its_empty_shard_the_disk(data):
    folder = run(data).folder
    assert FrameStore(folder).find("run/v_run_g00_c01.avi") is not None
    for group in range(3):
        (data / "run" / f"v_run_g{group:02d}_c01.avi").unlink()
    run(data)
    assert FrameStore(folder).find("run/v_run_g00_c01.avi") is None
    assert [path.name for path in shard_paths(folder)] == ["shard-00001-00.frames", "shard-00002-00.frames"]


def test_a_damaged_shard_is_made_anew(data, expected):
    folder = run(data).folder
    shard = shard_paths(folder)[1]
    shard.write_bytes(shard.read_bytes()[:-100])
    notes = []
    result = run(data, lambda event: notes.append(event.text) if isinstance(event, Note) else None)
    assert result.videos == 3
    assert any(shard.name in note and "damaged" in note for note in notes)
    assert pixels(folder) == expected


def test_repair_finds_a_flipped_bit_and_packs_that_clip_anew(data, expected):
    folder = run(data).folder
    shard = shard_paths(folder)[0]
    damaged = bytearray(shard.read_bytes())
    damaged[100_000] ^= 1
    shard.write_bytes(damaged)
    assert run(data).videos == 0
    assert run(data, repair=True).videos == 1
    assert run(data, repair=True).videos == 0
    assert pixels(folder) == expected


def test_other_parameters_are_refused_unless_told_to_overwrite(data):
    folder = run(data).folder
    with pytest.raises(DataError, match=r"made with 12 frames per video.*--output FOLDER, or .*--overwrite"):
        run(data, frames_per_video=4)
    assert len(FrameStore(folder)) == 2 * GROUPS
    assert run(data, frames_per_video=4, quality=50, short_side=60, overwrite=True).videos == 2 * GROUPS
    store = FrameStore(folder)
    clip = store.read(0, lambda n: list(range(n)))
    assert len(set(clip.indices)) == 4
    assert clip.frames.shape[1:] == (60, 77, 3)
    assert (store.parameters.quality, store.parameters.short_side) == (50, 60)


def test_quality_decides_the_size_and_other_files_are_left_alone(data, tmp_path):
    sizes = [run(data, quality=q, output=tmp_path / str(q)).bytes for q in (50, 90)]
    assert sizes[0] < 0.6 * sizes[1]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("text")
    with pytest.raises(DataError, match="contains other files"):
        run(data, output=tmp_path / "mine", overwrite=True)
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.txt"]


def test_a_store_is_replaced_without_its_foreign_files(data):
    folder = run(data).folder
    foreign = {"thesis.txt", "shard-mine.frames", ".shard-mine.part", ".unreadable-mine.json"}
    for name in foreign:
        (folder / name).write_text("mine")
    run(data)
    assert run(data, frames_per_video=4, overwrite=True).videos == 2 * GROUPS
    assert {path.name for path in folder.iterdir() if path.read_bytes() == b"mine"} == foreign
    (folder / "store.json").write_text('{"books": []}')
    with pytest.raises(DataError):
        run(data, overwrite=True)
    assert (folder / "index.frames").is_file()


def test_groups_and_subsets_are_noted_down_and_brought_up_to_date(data):
    folder = run(data, val_groups="01", test_groups="00,02").folder

    def groups(subset):
        return {video.group for video in FrameStore(folder).layout().subset(subset)}

    assert (groups("train"), groups("val"), groups("test")) == ({"03"}, {"01"}, {"00", "02"})
    assert run(data, val_groups="none", test_groups="03").videos == 0
    assert (groups("train"), groups("val"), groups("test")) == ({"00", "01", "02"}, set(), {"03"})
    run(data, group_pattern=r"c(\d+)", val_groups="none", test_groups="none")
    assert groups("train") == {"01"}


def explode(number):
    if number == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return number * number


def test_a_job_that_takes_its_process_down_is_named_and_the_others_go_on():
    results = list(map_in_order(explode, range(2, 6), workers=1, lost=lambda job, too_long: -job))
    assert results == [4, -3, 16, 25]


def hang(seconds):
    """Sleeps where no Python code can wake it, as a decoder would."""
    import ctypes

    ctypes.CDLL(None).usleep(int(1e6 * seconds))
    return seconds


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="this system has no alarm clock")
def test_a_job_that_hangs_is_named_and_the_others_go_on():
    results = map_in_order(
        hang, [0.01, 60, 0.02], workers=1, lost=lambda job, too_long: (job, too_long), seconds=2
    )
    assert list(results) == [0.01, (60, True), 0.02]


def stop(path):
    """Stops its process, as SIGSTOP does, which no timer of its own can end: always, or the first time."""
    if path and not Path(path).exists():
        Path(path).touch(exist_ok=False)
        os.kill(os.getpid(), signal.SIGSTOP)
    return path


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="this system has no alarm clock")
def test_a_stopped_worker_is_ended_at_the_time_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(distributed, "SECONDS_TO_END_ITSELF", 1)
    jobs = ["", str(tmp_path / "once"), ""]
    assert list(map_in_order(stop, jobs, workers=1, lost=lambda job, late: late, seconds=0.5)) == jobs


def touch_late(path):
    if path:
        time.sleep(2)
        Path(path).touch()


def test_an_interrupt_ends_videos_that_are_being_decoded(tmp_path):
    jobs = ["", str(tmp_path / "late")]
    with (
        pytest.raises(KeyboardInterrupt),
        contextlib.closing(map_in_order(touch_late, jobs, workers=2, lost=lambda job, late: None)) as results,
    ):
        next(results)
        raise KeyboardInterrupt
    assert not Path(jobs[1]).exists()


def test_the_time_limit_is_what_a_lost_video_is_measured_by(data, monkeypatch):
    asked = []

    def lose_all(work, jobs, *, workers, lost, seconds):
        asked.append(seconds)
        yield from [lost(job, number == 0) for number, job in enumerate(jobs)]

    monkeypatch.setattr("tvit_cli.engine.extract.map_in_order", lose_all)
    reasons = list(run(data, time_limit=7, max_bad="100%").unreadable.values())
    assert "longer than 7 seconds (--time-limit)" in reasons[0]
    assert all("crashed" in reason for reason in reasons[1:])
    scans = check(settings(data, check=True, time_limit=9), silent)
    assert "longer than 9 seconds (--time-limit)" in scans[0].problem
    assert asked == [7, 9]


def fail(number):
    raise ZeroDivisionError(number)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_mistake_of_ours_in_a_worker_is_not_hidden(workers):
    with pytest.raises(ZeroDivisionError):
        list(map_in_order(fail, [1], workers=workers, lost=lambda job, too_long: -job))


def test_check_tells_what_files_hold_and_writes_nothing(data):
    (data / "run" / "v_run_g00_c01.avi").write_bytes(b"")
    cut = data / "walk" / "v_walk_g00_c01.avi"
    cut.write_bytes(cut.read_bytes()[: cut.stat().st_size // 2])
    scans = check(settings(data, check=True), silent)
    assert len(scans) == 2 * GROUPS
    unreadable = [scan for scan in scans if not scan.is_readable]
    assert [scan.path.name for scan in unreadable] == ["v_run_g00_c01.avi"]
    assert "empty" in unreadable[0].problem
    good = next(scan for scan in scans if scan.path.name == "v_run_g01_c01.avi")
    assert (good.codec, good.width, good.height, good.frames, good.rate) == ("mpeg4", 192, 150, 14, 25)
    assert (round(good.seconds, 3), good.rotation, good.problem) == (0.56, 0, "")
    broken = next(scan for scan in scans if scan.path == cut)
    assert broken.problem == f"truncated or damaged: {count_frames(cut)} of 14 frames decode"
    assert not (data / "frames").exists()


def test_a_header_that_counts_two_frames_too_many_is_no_fault(packed_xvid):
    scan = scan_video(packed_xvid)
    assert (scan.frames, scan.problem) == (39, "")


@pytest.mark.parametrize(
    ("value", "videos", "most"),
    [
        ("3 or 1%", 100, 3),
        ("3 or 1%", 1_000, 10),
        ("0", 50, 0),
        ("2.5%", 200, 5),
        ("7", 3, 7),
        ("10 % or 1", 5, 1),
    ],
)
def test_most_bad_is_the_larger_of_what_is_given(value, videos, most):
    assert most_bad(value, videos) == most


@pytest.mark.parametrize("value", ["", "-1", "101%", "few", "3 and 1%"])
def test_other_words_are_refused_as_max_bad(value):
    with pytest.raises(ValueError, match="neither a count nor a percentage"):
        ExtractSettings(max_bad=value)


@pytest.mark.real
def test_every_odd_file_is_told_apart(real_data):
    paths = [path for path in sorted((real_data / "odd").iterdir()) if path.suffix in VIDEO_SUFFIXES]
    for path in paths[::4]:
        scan = scan_video(path)
        assert scan.is_readable or scan.problem
        json.dumps({name: str(value) for name, value in vars(scan).items()})
        if scan.is_readable:
            assert scan.frames == count_frames(path)


@pytest.mark.parametrize("below", ["", "store"])
def test_a_file_in_the_place_of_the_store_is_called_one(source, tmp_path, below):
    (tmp_path / "frames").write_text("notes")
    given = tmp_path / "frames" / below
    with pytest.raises(DataError, match=f"--output {given}: .*is a file, not a folder. Move it, or name an"):
        extract(settings(source, output=given), silent)
    assert (tmp_path / "frames").read_text() == "notes"


def test_repaired_or_removed_videos_are_no_longer_listed_as_failed(data):
    mended, removed = data / "run" / "v_run_g00_c01.avi", data / "run" / "v_run_g01_c01.avi"
    whole = mended.read_bytes()
    for path in (mended, removed):
        path.write_text("text")
    store = FrameStore(run(data).folder)
    removed.unlink()
    facts = {"group_pattern": "g(..)", "val_groups": "none", "test_groups": "none", "split": 1}
    found = open_dataset(str(data), report=silent, **facts)
    assert found.store is not None and list(found.unreadable) == ["run/v_run_g00_c01.avi"]
    mended.write_bytes(whole)
    notes = []
    found = open_dataset(str(data), report=notes.append, **facts)
    assert found.store is None and found.unreadable == {}
    assert any("1 of 7 videos (such as run/v_run_g00_c01.avi) are new or changed" in str(n) for n in notes)
    assert store.outdated(found.layout.videos) == ["run/v_run_g00_c01.avi"]


def test_second_extraction_into_a_busy_store_is_refused(data):
    refused = []

    def again(event):
        if isinstance(event, Progress) and not refused:
            with pytest.raises(RunError, match="another process is extracting to it") as error:
                run(data)
            refused.append(str(error.value))

    assert run(data, again).videos == 2 * GROUPS and refused
    assert run(data).videos == 0


def write_manifests(data):
    """Halves of the videos: first.csv and second.csv."""
    rows = [f"{path.relative_to(data)},{path.parent.name}" for path in sorted(data.glob("*/*.avi"))]
    for name, own in (("first", rows[::2]), ("second", rows[1::2])):
        (data / f"{name}.csv").write_text("\n".join(["path,label", *own]) + "\n")


def test_two_manifests_in_one_folder_have_stores_of_their_own(data):
    write_manifests(data)
    for name in ("first", "second"):
        result, manifest = run(data / f"{name}.csv"), data / f"{name}.csv"
        assert (result.folder, result.videos) == (data / f"frames-{name}", GROUPS)
        assert find_store(manifest) == result.folder
        assert (
            FrameStore(result.folder).header.command(result.folder)
            == f"tvit extract --path-to-data {manifest} --frames-per-video 12"
        )
    assert find_store(data) is None and run(data).folder == data / "frames"


def test_the_command_of_a_warning_updates_a_store_with_its_own_parameters(data):
    for own in ({"short_side": 64}, {"fps": 2, "quality": 80}):
        folder = run(data, overwrite=True, **own).folder
        words = FrameStore(folder).header.command(folder).split()[2:]
        given = {name.removeprefix("--").replace("-", "_"): value for name, value in pairwise(words)}
        options = {key: value for key, value in given.items() if key in ExtractSettings.model_fields}
        assert extract(ExtractSettings(**options, num_workers=0), silent).skipped == len(FrameStore(folder))


def test_a_manifest_keeps_the_store_that_it_has_in_frames(data):
    write_manifests(data)
    run(data / "first.csv", output=data / "frames")
    assert run(data / "first.csv").folder == find_store(data / "first.csv") == data / "frames"
    assert run(data / "second.csv").folder == data / "frames-second"


def test_a_store_of_other_data_is_not_emptied_for_these(data, tmp_path):
    write_manifests(data)
    folder = run(data / "first.csv", output=data / "frames").folder
    before = {path: path.read_bytes() for path in folder.iterdir()}
    said = r"first\.csv; videos of .* would replace .*Make another with --output"
    with pytest.raises(DataError, match=said):
        run(data / "second.csv", output=folder)
    assert {path: path.read_bytes() for path in folder.iterdir()} == before
    assert run(data / "second.csv", output=tmp_path / "other").videos == GROUPS
    assert run(data / "second.csv", output=folder, overwrite=True).videos == GROUPS
    assert run(data).videos == GROUPS  # all that the store has, and more
    copied = tmp_path / "copied"
    shutil.copytree(data, copied)
    for path in copied.glob("*.csv"):
        path.unlink()
    run(data, overwrite=True)
    shutil.rmtree(copied / "frames")
    shutil.copytree(data / "frames", copied / "frames")
    assert run(copied).videos == 0  # a copy with its store is a data set of its own


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ({"json_lines": True}, "--json: prints the results of --check"),
        (
            {"check": True, "repair": True, "overwrite": True},
            "--check writes nothing. Leave out --overwrite and --re",
        ),
    ],
)
def test_options_without_an_effect_are_refused(flags, sentence):
    with pytest.raises(SettingsError, match=sentence):
        load(ExtractSettings, flags=flags, environ={})


def test_existing_store_or_unwritable_folder_is_refused(data, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert run(data, output=".").videos == 2 * GROUPS and (tmp_path / ".here.lock").exists()
    (tmp_path / ".here.lock").unlink()
    really = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path and really(path, mode))
    assert run(data, output=".").skipped == 2 * GROUPS and not (tmp_path / ".here.lock").exists()


def test_a_store_that_has_less_than_is_asked_for_is_not_used_or_said_to(data):
    facts = {"group_pattern": "g(..)", "val_groups": "none", "test_groups": "none", "split": 1}
    run(data, short_side=100)  # 12 of 14 frames, 100 of 150 pixels

    def opened(**wanted):
        notes = []
        found = open_dataset(
            str(data), report=lambda event: notes.append(str(event)), clip=ClipFormat(**wanted), **facts
        )
        return found.store is not None, " ".join(note for note in notes if "warning" in note)

    assert opened(n_frames=12, frame_size=100, frame_grid=12) == (True, "")
    is_used, said = opened(n_frames=13)
    assert not is_used and "it has 12 frames of 8 of its 8 videos, 13 are needed" in said
    assert "--frames-per-video 13 --short-side 100 --quality 90 --overwrite" in said
    is_used, said = opened(frame_size=101)
    assert is_used and "8 of its 8 videos have 100 pixels and are scaled up: the model takes 101" in said
    is_used, said = opened(frame_grid=14)
    assert is_used and "--frame-grid 14 takes the nearest" in said
    run(data, fps=2, overwrite=True)
    is_used, said = opened(n_frames=13)
    assert not is_used and "it has 2 frames per second of 8 of its 8 videos, 13 are needed" in said
    is_used, said = opened()
    assert is_used and "a clip takes the nearest of its 2 frames per second" in said
    run(data, short_side=300, frames_per_video=20, overwrite=True)  # all that there is
    assert opened(n_frames=64, frame_size=512, frame_grid=9) == (True, "")
