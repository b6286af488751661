"""`tvit download` from mirrors on the loopback interface, and the catalog of data sets."""

import errno
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
import zipfile
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

import loopback
import pytest
from archives import Entry, write_rar4, write_tar, write_zip
from loopback import Server

from tvit_cli import cli, files
from tvit_cli.data import rar, transfer
from tvit_cli.data.archive_safety import Member
from tvit_cli.data.catalog import (
    CATALOG,
    CanonicalNames,
    Dataset,
    Layout,
    Part,
    Source,
    choose,
    find,
    take_clips,
    target_path,
    target_paths,
)
from tvit_cli.data.dataset_folder import Selection
from tvit_cli.data.http import Http, MirrorsFailed, Retry
from tvit_cli.data.split_files import group_of, lists_from_groups, parse_split_lists, read_classes
from tvit_cli.engine.download import DownloadResult, download
from tvit_cli.errors import DataError, RunError, SettingsError
from tvit_cli.results import Note, Progress
from tvit_cli.settings.download import DownloadSettings

CLASSES = ("Archery", "Bowling", "HandStandPushups")
HTTP = Http(timeout=5, retry=Retry(attempts=2, sleep=lambda _: None, jitter=lambda: 0.5))
needs_rar = pytest.mark.skipif(not rar.find_reader(), reason="nothing here reads RAR")


def videos(size=4000):
    """Small stand-ins for clips: 3 classes x 6 groups, by the name that the lists use."""
    draw = random.Random(7)
    return {
        f"{action}/v_{action}_g{group:02}_c01.avi": draw.randbytes(size)
        for action in CLASSES
        for group in (1, 2, 8, 9, 15, 22)
    }


VIDEOS = videos()


def split_archive(path):
    texts = {"classInd.txt": "".join(f"{index} {name}\r\n" for index, name in enumerate(CLASSES, start=1))}
    for split, (first, last) in enumerate(((1, 7), (8, 14), (15, 21)), start=1):
        for side in ("train", "test"):
            lines = [
                name + ("" if side == "test" else f" {CLASSES.index(name.split('/')[0]) + 1}")
                for name in VIDEOS
                if (first <= int(name.split("_g")[1][:2]) <= last) == (side == "test")
            ]
            texts[f"{side}list{split:02}.txt"] = "\r\n".join(lines) + "\n"
    write_zip(path, [Entry(f"ucfTrainTestlist/{name}", text.encode()) for name, text in texts.items()])
    return path.read_bytes()


@dataclass
class World:
    """A server, a catalog of one set, and the folder that it is downloaded to."""

    server: Server
    root: Path
    dataset: Dataset
    spelt: str = "HandstandPushups"  # as the flat ZIP spells it

    def run(self, **how: object) -> DownloadResult:
        given = {key: how.pop(key) for key in ("report", "http", "makers") if key in how}
        settings = DownloadSettings(name="mini", data_directory=self.root / "data", **how)  # type: ignore[arg-type]
        given.setdefault("http", HTTP)
        return download(settings, catalog=[self.dataset], **given)  # type: ignore[arg-type]

    @property
    def folder(self) -> Path:
        return self.root / "data" / "mini"

    def landed(self) -> dict[str, bytes]:
        base = self.folder / "videos"
        return {path.relative_to(base).as_posix(): path.read_bytes() for path in base.rglob("*.avi")}

    def source(self, path: str, body: bytes, layout: Layout = "ucf101", **how: object) -> Source:
        kind = "rar" if body[:3] == b"Rar" else "zip" if body[:2] == b"PK" else "tar"
        url = self.server.add(path, body, **how)
        return Source((url,), kind, layout, len(body), hashlib.sha256(body).hexdigest())  # type: ignore[arg-type]

    def use(self, *sources: Source) -> None:
        self.dataset = replace(self.dataset, videos=(Part("videos", sources),))

    def flat_zip(self) -> bytes:
        spelt = {name: name.split("/")[1].replace("HandStandPushups", self.spelt) for name in VIDEOS}
        write_zip(
            self.root / "flat.zip", [Entry(f"UCF101/{spelt[name]}", data) for name, data in VIDEOS.items()]
        )
        return (self.root / "flat.zip").read_bytes()

    def foldered(self, form: str) -> bytes:
        write = {"rar": write_rar4, "tar": write_tar}[form]
        write(self.root / "foldered", [Entry(f"UCF-101/{name}", data) for name, data in VIDEOS.items()])
        return (self.root / "foldered").read_bytes()


@pytest.fixture
def world(tmp_path):
    with loopback.serving() as server:
        world = World(
            server, tmp_path, Dataset("mini", "mini", 3, len(VIDEOS), "ours", "https://example.org")
        )
        world.use(world.source("/flat.zip", world.flat_zip()))
        lists = world.source("/lists.zip", split_archive(tmp_path / "lists.zip"), "lists")
        world.dataset = replace(
            world.dataset, splits=(Part("splits", (lists,)),), test_groups=((1, 7), (8, 14), (15, 21))
        )
        yield world


def test_set_lands_in_one_tidy_folder_with_its_manifest(world):
    events = []
    result = world.run(report=events.append)
    assert world.landed() == VIDEOS  # three classes, although the archive spells one of them in another way
    assert (result.classes, result.videos, result.new_files) == (3, len(VIDEOS), len(VIDEOS) + 7)
    assert result.bytes_received == world.server.sent
    assert {path.name for path in world.folder.iterdir()} == {"videos", "splits", "download.json", ".lock"}
    assert len(parse_split_lists(world.folder / "splits", 1)["test"]) == 6
    manifest = json.loads((world.folder / "download.json").read_text())
    record = manifest["files"]["videos/HandStandPushups/v_HandStandPushups_g01_c01.avi"]
    assert record["member"] == "UCF101/v_HandstandPushups_g01_c01.avi"
    data = VIDEOS["HandStandPushups/v_HandStandPushups_g01_c01.avi"]
    assert (record["bytes"], record["sha256"]) == (len(data), hashlib.sha256(data).hexdigest())
    source = manifest["sources"][record["source"]]
    assert source["url"].endswith("/flat.zip") and source["verified"] is True
    assert all(isinstance(event, Progress) for event in events)
    assert {event.task.split()[0] for event in events} == {"fetch", "unpack"}
    assert events[-1].done == events[-1].total


def test_second_run_fetches_only_what_is_missing(world):
    world.run()
    world.server.forget()
    result = world.run()
    assert world.server.requests == [] and result.new_files == 0 and result.videos == len(VIDEOS)
    world.run()
    world.server.forget()
    lost = "Archery/v_Archery_g02_c01.avi"
    (world.folder / "videos" / lost).unlink()
    before = {path: path.stat().st_mtime_ns for path in world.folder.rglob("*.avi")}
    assert world.run().new_files == 1
    assert world.landed() == VIDEOS and world.server.sent < 45_000
    assert all(path.stat().st_mtime_ns == time_ for path, time_ in before.items())


def test_verify_names_what_differs_and_repair_mends_it(world):
    with pytest.raises(DataError, match=r"has no download\.json. Run `tvit download mini` first"):
        world.run(verify=True)
    world.run()
    world.server.forget()
    gone, short, wrong = sorted(VIDEOS)[:3]
    (world.folder / "videos" / gone).unlink()
    (world.folder / "videos" / short).write_bytes(b"x")
    (world.folder / "videos" / wrong).write_bytes(VIDEOS[wrong][:-1] + b"?")
    (world.folder / "splits" / "testlist02.txt").write_text("")
    result = world.run(verify=True)
    assert [(one.path, one.kind) for one in result.differences] == [
        ("splits/testlist02.txt", "size"),
        (f"videos/{gone}", "missing"),
        (f"videos/{short}", "size"),
        (f"videos/{wrong}", "content"),
    ]
    assert world.server.requests == []
    assert world.run(repair=True).differences == ()
    assert world.landed() == VIDEOS and world.run(verify=True).differences == ()


@pytest.mark.parametrize("form", [pytest.param("rar", marks=needs_rar), "tar"])
def test_archive_with_class_folders_lands_the_same(world, form):
    world.use(world.source(f"/a.{form}", world.foldered(form)))
    world.run()
    assert world.landed() == VIDEOS


@needs_rar
def test_next_source_of_another_form_is_taken_where_the_first_fails(world):
    good = world.source("/a.rar", world.foldered("rar"))
    world.use(replace(good, urls=(f"{world.server.base}/gone.zip",), kind="zip"), good)
    events = []
    result = world.run(report=events.append)
    notes = [event.text for event in events if isinstance(event, Note)]
    assert world.landed() == VIDEOS and result.sources[-1].url.endswith("/a.rar")
    assert any("gone.zip: HTTP 404" in note for note in notes)


def test_all_sources_that_failed_are_listed(world):
    good = world.source("/flat.zip", world.flat_zip())
    world.use(
        replace(good, urls=(f"{world.server.base}/gone.zip",)),
        replace(good, sha256="0" * 64),
        replace(world.source("/page", b"<html>" * 99), kind="zip"),
    )
    with pytest.raises(MirrorsFailed) as caught:
        world.run()
    said = str(caught.value)
    assert all(word in said for word in ("404", f"{'0' * 64} is expected", "sent a page", "--archive"))
    assert not (world.folder / "videos").exists()
    left = list((world.folder / "archives").iterdir())
    assert not [path for path in left if path.suffix == ".part" or path.name == "flat.zip"]


def test_split_lists_are_made_where_their_server_is_down(world):
    world.run()
    wanted = [parse_split_lists(world.folder / "splits", split) for split in (1, 2, 3)]
    (world.root / "data").rename(world.root / "before")
    del world.server.pages["/lists.zip"]
    world.spelt = "HandStandPushups"
    world.use(world.source("/flat.zip", world.flat_zip()))
    events = []
    result = world.run(report=events.append)
    notes = [event.text for event in events if isinstance(event, Note)]
    assert [parse_split_lists(world.folder / "splits", split) for split in (1, 2, 3)] == wanted
    assert result.sources[-1].url == "made from the file names by the rule of the official lists"
    assert "HTTP 404" in notes[-1] and "made from the file names" in notes[-1]
    world.server.forget()
    world.run()
    assert world.server.requests == []


def test_chosen_classes_cost_little_more_than_their_bytes(world, monkeypatch):
    big = {f"UCF101/v_{action}_g{group:02}_c01.avi": random.Random(group).randbytes(30_000)
           for action in CLASSES for group in range(1, 26)}  # fmt: skip
    write_zip(world.root / "big.zip", [Entry(name, data) for name, data in big.items()])
    world.use(world.source("/big.zip", (world.root / "big.zip").read_bytes()))
    monkeypatch.setattr(transfer, "WHOLE_BYTES", 1000)
    world.run(classes=["Bowling", "archery"], clips_per_class=10)
    labels = sorted(path.parent.name for path in world.folder.rglob("*.avi"))
    assert labels == ["Archery"] * 10 + ["Bowling"] * 10
    lists = len(world.server.pages["/lists.zip"].body)
    directory = 32 * 1024  # asked for at once, since its size is not known before
    assert world.server.sent - lists - directory < 1.3 * 20 * 30_000
    world.server.forget()
    world.run(classes=["Archery", "Bowling"], clips_per_class=10)
    assert world.server.requests == []
    world.run(classes=["Bowling"], clips_per_class=12)
    assert len(list(world.folder.rglob("*.avi"))) >= 22
    assert world.run().videos == 75


def test_unknown_class_is_refused_with_near_names_before_the_videos(world):
    with pytest.raises(SettingsError, match=r"--classes bowlin: no such class\. Did you mean Bowling"):
        world.run(classes=["Bowlin"])
    assert {path for path, _ in world.server.requests} == {"/lists.zip"}


def test_server_without_range_serves_small_archives_only(world, monkeypatch):
    world.use(world.source("/flat.zip", world.flat_zip(), ranges=False))
    assert world.run(clips_per_class=1).videos == 3
    monkeypatch.setattr(transfer, "WHOLE_BYTES", 1000)
    with pytest.raises(MirrorsFailed, match=r"(?s)ignores Range.*leave out --classes and --clips-per-class"):
        world.run(clips_per_class=2)


def test_given_archive_is_used_without_a_request_for_it(world):
    path = world.root / "mine.bin"
    path.write_bytes(world.flat_zip())
    world.run(archive=path, splits_archive=world.root / "lists.zip")
    assert world.landed() == VIDEOS and world.server.requests == [] and path.exists()


def test_given_archive_does_not_wait_for_the_lists(world):
    waits = []
    path = world.root / "mine.bin"
    path.write_bytes(world.flat_zip())
    world.server.add("/lists.zip", b"", statuses=[(503, {})] * 9)
    result = world.run(archive=path, http=Http(timeout=5, retry=Retry(sleep=waits.append)))
    assert waits == [] and result.sources[-1].url.startswith("made from the file names")


def test_given_archive_with_another_hash_is_refused_with_both(world):
    (world.root / "mine.zip").write_bytes(world.flat_zip() + b"x")
    known = world.dataset.videos[0].sources[0].sha256
    with pytest.raises(DataError, match=f"has sha256 [0-9a-f]{{64}}, mini has {known}"):
        world.run(archive=world.root / "mine.zip")


def test_set_of_several_archives_lands_class_by_class(world):
    parts = []
    for action in ("bend", "wave1"):
        write_zip(
            world.root / f"{action}.zip",
            [Entry(f"{person}_{action}.avi", person.encode()) for person in ("daria", "eli")],
        )
        source = world.source(f"/{action}.zip", (world.root / f"{action}.zip").read_bytes(), "one class")
        parts.append(Part(action, (replace(source, bytes=None, sha256=None),)))
    world.dataset = replace(world.dataset, videos=tuple(parts), splits=(), test_groups=())
    result = world.run(classes=["wave1"])
    assert set(world.landed()) == {"wave1/daria_wave1.avi", "wave1/eli_wave1.avi"}
    assert [path for path, _ in world.server.requests if "bend" in path] == []
    assert result.sources[0].verified is False
    result = world.run()
    assert (result.classes, result.videos) == (2, 4)
    (world.root / "data").rename(world.root / "before")
    world.server.forget()
    assert world.run(archive=world.root).videos == 4 and world.server.requests == []
    with pytest.raises(DataError, match=r"has no bend\.zip"):
        world.root.joinpath("data").rename(world.root / "again")
        world.run(archive=world.root / "before")


def test_subset_folders_are_kept(world):
    write_tar(
        world.root / "s.tar.gz",
        [Entry(f"S/{side}/Bowling/v_{side}.avi") for side in ("train", "val", "test")],
    )
    world.use(world.source("/s.tar.gz", (world.root / "s.tar.gz").read_bytes(), "subset folders"))
    world.run()
    assert set(world.landed()) == {f"{side}/Bowling/v_{side}.avi" for side in ("train", "val", "test")}


def test_hostile_archive_of_a_mirror_writes_nothing(world):
    write_zip(world.root / "bad.zip", [Entry("UCF101/v_Archery_g01_c01.avi"), Entry("../../../x.avi")])
    world.use(world.source("/bad.zip", (world.root / "bad.zip").read_bytes()))
    with pytest.raises(MirrorsFailed, match="leads out of the folder"):
        world.run()
    assert not list(world.root.rglob("*.avi"))


def test_videos_of_somebody_else_are_not_touched(world):
    (world.folder / "videos").mkdir(parents=True)
    (world.folder / "videos" / "mine.avi").write_bytes(b"mine")
    with pytest.raises(DataError, match=r"did not put there.*`tvit train --path-to-data .*videos`"):
        world.run()
    assert world.landed() == {"mine.avi": b"mine"}


def test_archive_is_kept_where_that_is_asked_for(world):
    world.run(keep_archive=True)
    kept = world.folder / "archives" / "flat.zip"
    assert kept.read_bytes() == world.server.pages["/flat.zip"].body
    (world.folder / "videos" / min(VIDEOS)).unlink()
    assert world.run(repair=True, keep_archive=True).differences == () and kept.is_file()
    (world.folder / "videos" / min(VIDEOS)).unlink()
    assert world.run(repair=True).differences == () and not kept.exists()


def test_leftovers_of_a_killed_fetch_are_removed(world):
    archives = world.folder / "archives"
    archives.mkdir(parents=True)
    (archives / "..flat.zip.part.json.new").write_text("{")
    (archives / ".flat.zip.part").write_bytes(b"PK")
    world.run()
    assert world.landed() == VIDEOS and not archives.exists()


def test_foreign_files_beside_the_archives_are_kept(world):
    archives = world.folder / "archives"
    archives.mkdir(parents=True)
    (archives / "thesis.txt").write_text("mine")
    # put there by hand: used, not fetched
    (archives / "flat.zip").write_bytes(world.server.pages["/flat.zip"].body)
    world.run()
    assert world.landed() == VIDEOS
    assert sorted(path.name for path in archives.iterdir()) == ["flat.zip", "thesis.txt"]


def test_disk_too_small_is_named_before_the_fetch(world, monkeypatch):
    monkeypatch.setattr(files, "free_bytes", lambda _: 64 * 1024**2 + 20_000)
    with pytest.raises(RunError, match=r"needs .* are free"):
        world.run()
    assert not [path for path, _ in world.server.requests if "flat" in path]


def test_set_that_is_made_is_made(world):
    world.dataset = replace(world.dataset, videos=(), splits=())
    with pytest.raises(DataError, match="is generated"):
        world.run()
    made = []
    result = world.run(makers={"mini": lambda folder: made.append(folder) or 18})
    assert (result.videos, result.new_files, made) == (len(VIDEOS), 18, [world.folder])
    for option in ({"classes": ["A"]}, {"clips_per_class": 1}, {"verify": True}, {"keep_archive": True}):
        with pytest.raises(SettingsError, match=r"mini is generated, .* has no effect\. Leave it out"):
            world.run(makers={"mini": made.append}, **option)
    assert made == [world.folder]


def test_an_archive_that_is_a_pipe_is_refused_and_not_waited_for(world, tmp_path):
    os.mkfifo(tmp_path / "pipe.zip")
    with pytest.raises(DataError, match=r"--archive .*pipe\.zip: is a pipe or a device"):
        world.run(archive=tmp_path / "pipe.zip")


def test_settings_that_contradict_are_refused():
    for wrong in (
        {"verify": True, "repair": True},
        {"repair": True, "classes": ["A"]},
        {"clips_per_class": 0},
    ):
        with pytest.raises(ValueError):
            DownloadSettings(name="x", **wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="--list"):
        DownloadSettings()


def test_manifest_that_is_damaged_is_named(world):
    world.run()
    (world.folder / "download.json").write_text("{")
    with pytest.raises(DataError, match="no manifest that this version of tvit can read"):
        world.run()


CHILD = """
import sys
from pathlib import Path
from tvit_cli import files
from tvit_cli.data.catalog import Dataset, Part, Source
from tvit_cli.engine.download import download
from tvit_cli.settings.download import DownloadSettings
slow = files.rename
def rename(source, target):
    print("rename", flush=True)
    sys.stdin.readline()
    slow(source, target)
files.rename = rename
catalog = [{dataset!r}]
download(DownloadSettings(name="mini", data_directory=Path({data!r})), catalog=catalog)
"""


def test_killed_before_a_rename_it_goes_on(world):
    """Lasting changes are renames: the process is killed before the 1st, 3rd, 5th ..."""
    code = CHILD.format(dataset=world.dataset, data=str(world.root / "data"))
    for stop in range(1, 40, 2):
        with subprocess.Popen(
            [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as child:
            assert child.stdout is not None and child.stdin is not None
            for _ in range(stop - 1):
                if child.stdout.readline() != "rename\n":
                    break
                child.stdin.write("\n")
                child.stdin.flush()
            else:
                if child.stdout.readline() == "rename\n":
                    child.send_signal(signal.SIGKILL)
                    child.wait()
                    assert world.landed().items() <= VIDEOS.items()
                    world.run()
                    assert world.landed() == VIDEOS and world.run(verify=True).differences == ()
                    assert not [path for path in world.folder.iterdir() if "incoming" in path.name]
                    (world.root / "data").rename(world.root / f"before{stop}")
                    continue
            child.wait()
            assert child.returncode == 0 and world.landed() == VIDEOS
            assert stop > 8  # so many steps were tried
            return
    pytest.fail("the download never came to its end")


def test_killed_while_receiving_it_goes_on(world):
    page = world.server.pages["/flat.zip"]
    page.chunk, page.seconds_per_chunk = 2000, 0.02
    code = CHILD.format(dataset=world.dataset, data=str(world.root / "data")).replace(
        "files.rename = rename", ""
    )
    with subprocess.Popen([sys.executable, "-c", code]) as child:
        while world.server.sent < 0.3 * len(page.body):
            time.sleep(0.005)
        child.send_signal(signal.SIGKILL)
    page.seconds_per_chunk = 0
    world.server.forget()
    world.run()
    assert world.landed() == VIDEOS and world.server.sent < 0.8 * len(page.body)


@pytest.fixture
def real():
    folder = os.environ.get("TVIT_TEST_DATA")
    if not folder:
        pytest.skip("TVIT_TEST_DATA is not set")
    return Path(folder) / "archives"


@pytest.mark.real
@pytest.mark.parametrize(
    "name", ["flat.zip", pytest.param(".rar", marks=needs_rar), pytest.param("-solid.rar", marks=needs_rar)]
)
def test_real_archives_land_with_their_lists(world, real, name):
    path = real / f"UCF101-mini{name if name[0] in '.-' else '-' + name}"
    lists = world.source("/real-lists.zip", (real / "UCF101TrainTestSplits-mini.zip").read_bytes(), "lists")
    world.dataset = replace(world.dataset, splits=(Part("splits", (lists,)),))
    body = path.read_bytes()
    world.use(world.source(f"/{path.name}", body, cut_after=int(0.3 * len(body)), cuts=1))
    result = world.run()
    assert result.videos == (8 if "solid" in name else 48)
    assert world.server.sent == len(body) + len(world.server.pages["/real-lists.zip"].body)
    with zipfile.ZipFile(real / "UCF101-mini-flat.zip") as archive:
        for clip, data in world.landed().items():
            assert data == archive.read(f"UCF101/{Path(clip).name}")
    split = parse_split_lists(world.folder / "splits", 1)
    assert {f"{action}/{file}" for action, file in split["train"] + split["test"]} >= set(world.landed())


@pytest.mark.real
def test_real_classes_cost_little_more_than_their_bytes(world, real, monkeypatch):
    lists = world.source("/real-lists.zip", (real / "UCF101TrainTestSplits-mini.zip").read_bytes(), "lists")
    world.dataset = replace(world.dataset, splits=(Part("splits", (lists,)),))
    world.use(world.source("/a.zip", (real / "UCF101-mini-flat.zip").read_bytes()))
    monkeypatch.setattr(transfer, "WHOLE_BYTES", 1000)
    world.run(classes=["Bend", "Walk"], clips_per_class=4)
    with zipfile.ZipFile(real / "UCF101-mini-flat.zip") as archive:
        packed = sum(archive.getinfo(f"UCF101/{Path(clip).name}").compress_size for clip in world.landed())
    cost = world.server.sent - len(world.server.pages["/real-lists.zip"].body) - 32 * 1024
    assert len(world.landed()) == 8 and cost < 1.3 * packed


@pytest.mark.parametrize("name", ["ucf101", "motions"])
@pytest.mark.parametrize(("folder", "file"), [("data", "data"), ("data/sets", "data"), ("sets", "sets/NAME")])
def test_a_file_in_the_place_of_the_data_directory_is_called_one(tmp_path, name, folder, file, capsys):
    given, taken = tmp_path / folder, tmp_path / file.replace("NAME", name)
    taken.parent.mkdir(exist_ok=True)
    taken.write_text("notes")
    with pytest.raises(SystemExit) as stopped:
        cli.run(["download", name, "--data-directory", str(given)])
    assert stopped.value.code == 2
    said = " ".join(capsys.readouterr().err.split())
    where = "" if given == taken else f"{taken} "
    assert said.startswith(
        f"error: --data-directory {given}: {where}is a file, not a folder. Move it, or name"
    )
    assert taken.read_text() == "notes"


def test_a_file_system_without_locks_is_downloaded_to(world, monkeypatch):
    def none(descriptor, inherited):
        raise OSError(errno.ENOLCK, "no locks available")

    monkeypatch.setattr(files, "_lock", none)
    world.run()
    assert world.landed() == VIDEOS


def test_data_that_may_only_be_read_is_verified(world, monkeypatch):
    world.run()
    really = Path.open

    def read_only(path, mode="r", *rest, **more):
        if set(mode) & set("aw+x"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return really(path, mode, *rest, **more)

    monkeypatch.setattr(Path, "open", read_only)
    assert world.run(verify=True).differences == ()
    (world.folder / ".lock").unlink()
    with pytest.raises(RunError, match=r"mini: cannot be written \(Permission denied\)"):
        world.run()


PUSHUPS = "videos/HandStandPushups/v_HandStandPushups_g01_c01.avi"


def test_known_sets_are_found_and_unknown_ones_get_near_names():
    assert [dataset.name for dataset in CATALOG] == ["ucf101", "ucf101-subset", "weizmann", "motions"]
    assert find("UCF101").clips == 13_320
    with pytest.raises(SettingsError, match=r"Did you mean ucf101"):
        find("ucf-101")
    with pytest.raises(SettingsError, match="Known: ucf101, ucf101-subset, weizmann, motions"):
        find("kinetics")


def test_catalog_holds_together():
    for dataset in CATALOG:
        for part in dataset.videos + dataset.splits:
            assert part.sources
            for source in part.sources:
                assert all(url.startswith("https://") for url in source.urls)
                assert source.sha256 is None or len(bytes.fromhex(source.sha256)) == 32
        names = [part.name for part in dataset.videos]
        assert len(set(names)) == len(names) and len(names) in (0, 1, dataset.classes)
    assert find("ucf101").bytes == 6_960_400_115 + 113_943
    assert find("weizmann").bytes is None


@pytest.mark.parametrize(
    ("member", "layout", "goes"),
    [
        ("UCF101/v_HandstandPushups_g01_c01.avi", "ucf101", PUSHUPS),
        ("UCF-101/handstandpushups/v_HandStandPushups_g01_c01.avi", "ucf101", PUSHUPS),
        ("UCF-101/Bowling/odd name.avi", "ucf101", "videos/Bowling/odd name.avi"),
        ("UCF-101/Bowling/Thumbs.db", "ucf101", None),
        ("__MACOSX/UCF-101/Bowling/v_Bowling_g01_c01.avi", "ucf101", None),
        ("UCF-101/Bowling/._v_Bowling_g01_c01.avi", "ucf101", None),
        ("S/val/Bowling/v_Bowling_g01_c01.avi", "subset folders", "videos/val/Bowling/v_Bowling_g01_c01.avi"),
        ("UCF101_subset/readme.avi", "subset folders", None),
        ("daria_bend.avi", "one class", "videos/part/daria_bend.avi"),
        ("a/Bowling/x.mp4", "class folders", "videos/Bowling/x.mp4"),
        ("x.mp4", "class folders", None),
        ("ucfTrainTestlist/classInd.txt", "lists", "splits/classInd.txt"),
    ],
)
def test_member_goes_to_its_class(member, layout, goes):
    names = CanonicalNames(["HandStandPushups"], ["v_HandStandPushups_g01_c01.avi"])
    placed = target_path(PurePosixPath(member), layout, part="part", names=names)
    assert placed == (PurePosixPath(goes) if goes else None)


def test_spellings_make_one_class_and_one_file_of_two_is_refused():
    names = ["UCF101/v_HandStandPushups_g01_c01.avi", "UCF101/v_HandstandPushups_g02_c01.avi"]
    members = [Member(index, name, 1) for index, name in enumerate(names)]
    placed = target_paths(members, "ucf101", part="p", names=CanonicalNames())
    assert {path.parent.name for path in placed.values()} == {"HandStandPushups"}
    members = [Member(0, "x/A/a.avi", 1), Member(1, "y/A/a.avi", 1)]
    with pytest.raises(DataError, match=r"would both become videos/A/a\.avi"):
        target_paths(members, "class folders", part="p", names=CanonicalNames())
    with pytest.raises(DataError, match="nothing in the archive"):
        target_paths([Member(0, "readme.md", 1)], "ucf101", part="p", names=CanonicalNames())


def clips(action, groups=25, each=3):
    return [
        PurePosixPath(f"videos/{action}/v_{action}_g{group:02}_c{clip:02}.avi")
        for group in range(1, groups + 1)
        for clip in range(1, each + 1)
    ]


def test_few_clips_come_from_groups_far_apart():
    taken = take_clips(clips("A") + clips("B"), 5)
    assert sorted(path.name for path in taken if path.parent.name == "A") == [
        f"v_A_g{group:02}_c01.avi" for group in (1, 6, 11, 16, 21)
    ]
    assert len(taken) == 10
    assert len(take_clips(clips("A"), 30)) == 30
    assert len({group_of(path.name) for path in take_clips(clips("A"), 30)}) == 25
    assert take_clips(clips("A", 2), 100) == set(clips("A", 2))
    assert len(take_clips([PurePosixPath(f"videos/run/{name}_run.avi") for name in "abcde"], 2)) == 2


def test_class_selection_ignores_case_and_names_unknown_classes():
    paths = clips("Archery", 2) + clips("Bowling", 2)
    assert choose(paths, Selection(classes=("archery",))) == set(clips("Archery", 2))
    with pytest.raises(SettingsError, match=r"--classes archry: no such class\. Did you mean Archery"):
        choose(paths, Selection(classes=("archry",)))


def write_lists(folder, *, train, test, classes="1 A\r\n2 B\n"):
    folder.mkdir(exist_ok=True)
    for name, text in (("classInd", classes), ("trainlist01", train), ("testlist01", test)):
        (folder / f"{name}.txt").write_bytes(text.encode())
    return folder


def test_lists_are_read_with_any_line_ends_labels_and_case(tmp_path):
    folder = write_lists(
        tmp_path,
        train="A/v_A_g08_c01.avi 1\r\nb/v_B_g08_c01.avi 2\n\n",
        test="A/v_A_g01_c01.avi\r\nB/v_B_g01_c01.avi 2\r",
    )
    assert parse_split_lists(folder, 1) == {
        "train": [("A", "v_A_g08_c01.avi"), ("B", "v_B_g08_c01.avi")],
        "test": [("A", "v_A_g01_c01.avi"), ("B", "v_B_g01_c01.avi")],
    }


@pytest.mark.parametrize(
    ("train", "test", "says"),
    [
        ("C/v_C_g08_c01.avi 1\n", "", r"line 1: .* names a class"),
        ("A/v_A_g08_c01.avi 2\n", "", "wrong label: A is 1"),
        ("A/x.avi 1\n", "A/x.avi\n", r"is in trainlist01\.txt too"),
    ],
)
def test_list_that_contradicts_is_named_by_its_line(tmp_path, train, test, says):
    with pytest.raises(DataError, match=says):
        parse_split_lists(write_lists(tmp_path, train=train, test=test), 1)


def test_missing_list_and_split_are_named(tmp_path):
    with pytest.raises(DataError, match=r"classInd\.txt: cannot be read"):
        parse_split_lists(tmp_path, 1)
    with pytest.raises(DataError, match="splits 1 to 3"):
        parse_split_lists(tmp_path, 4)
    write_lists(tmp_path, train="", test="", classes="Archery\n")
    with pytest.raises(DataError, match="line 1"):
        read_classes(tmp_path)


@pytest.mark.real
@pytest.mark.parametrize(("split", "train", "test"), [(1, 9537, 3783), (2, 9586, 3734), (3, 9624, 3696)])
def test_official_lists_are_read_and_follow_from_the_groups(split, train, test, tmp_path):
    root = os.environ.get("TVIT_TEST_DATA")
    if not root:
        pytest.skip("TVIT_TEST_DATA is not set")
    folder = Path(root) / "ucfTrainTestlist"
    subsets = parse_split_lists(folder, split)
    assert (len(subsets["train"]), len(subsets["test"])) == (train, test)
    assert len(read_classes(folder)) == len({action for action, _ in subsets["train"]}) == 101
    groups = {name: {(action, group_of(file)) for action, file in side} for name, side in subsets.items()}
    assert not groups["train"] & groups["test"]
    everything = subsets["train"] + subsets["test"]
    for name, text in lists_from_groups(everything, find("ucf101").test_groups).items():
        (tmp_path / name).write_text(text)
    made = parse_split_lists(tmp_path, split)
    assert {k: set(side) for k, side in made.items()} == {k: set(side) for k, side in subsets.items()}
    assert read_classes(tmp_path) == read_classes(folder)
