"""Data sets of a run: found, read, checked for unreadable videos; the demo set is made if absent."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import av

from tvit_cli.data.catalog import CATALOG
from tvit_cli.data.framestore import FrameStore, find_store
from tvit_cli.data.framestore_format import read_header
from tvit_cli.data.layout import Groups, Layout, Video, is_store, read_layout
from tvit_cli.data.motions import is_motions, make_motions
from tvit_cli.data.video import decode_first
from tvit_cli.errors import DataError, VideoError
from tvit_cli.files import atomic_write
from tvit_cli.results import Note, Progress, Report

CHECKED = ".checked.json"  # hidden, so that it is no class to who reads the folder

_WRITABLE = stat.S_IWUSR | stat.S_IWGRP | stat.S_IWOTH
_Facts = list[int]  # bytes and mtime_ns of a file


def unreadable_videos(
    videos: Sequence[Video],
    folder: Path,
    *,
    workers: int,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, str]:
    """`check_videos` of those that are new or changed since `folder` noted them down: name -> reason.

    Only readable videos are noted, each with its size and time; what could not be read is tried every time.
    Where the folder cannot be written to, nothing is remembered.
    """
    known = _read(folder / CHECKED)
    now = {video.name: facts for video in videos if (facts := _facts(video.path)) is not None}
    unknown = [video for video in videos if video.name not in now or now[video.name] != known.get(video.name)]
    if not unknown:
        return {}
    reasons = check_videos(unknown, workers=workers, progress=progress)
    new = {v.name: now[v.name] for v in unknown if v.name in now and v.name not in reasons}
    with suppress(OSError):
        if new and folder.stat().st_mode & _WRITABLE:  # root could, but whoever said no meant it
            noted = {"decoder": _decoder(), "videos": {**known, **new}}
            with atomic_write(folder / CHECKED) as beside:
                beside.write_text(json.dumps(noted), encoding="utf-8")
    return reasons


def check_videos(
    videos: Sequence[Video], *, workers: int, progress: Callable[[int, int], None] | None = None
) -> dict[str, str]:
    """Decodes the first frame of every video: name -> reason for those that cannot be read.

    `progress(done, total)` is called in the caller's thread.
    """
    reasons: dict[str, str] = {}
    pool = ThreadPoolExecutor(max_workers=max(1, workers))
    try:
        tasks = {pool.submit(decode_first, video.path): video for video in videos}
        for done, task in enumerate(as_completed(tasks), start=1):
            video = tasks[task]
            try:
                task.result()
            except VideoError as error:
                reasons[video.name] = str(error).removeprefix(f"{video.path}: ")
            if progress is not None:
                progress(done, len(videos))
    finally:
        pool.shutdown(cancel_futures=True)  # stopped half-way, nobody waits for the rest
    return dict(sorted(reasons.items()))


def _facts(path: Path) -> _Facts | None:
    try:
        facts = path.stat()
    except OSError:
        return None  # check_videos tells why
    return [facts.st_size, facts.st_mtime_ns]


def _decoder() -> str:
    """What is readable depends on who reads."""
    return f"PyAV {av.__version__}"


def _read(path: Path) -> dict[str, _Facts]:
    try:
        noted = json.loads(path.read_text(encoding="utf-8"))
        return dict(noted["videos"]) if noted["decoder"] == _decoder() else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}  # absent or spoilt: all are tried, and it is written anew


DATA_DIRECTORY = Path("data")
MOST_FRAMES = 2**32 - 1  # of a video that a store knows
DEFAULT_NAME = "ucf101"
MOTIONS = "motions"


@dataclass(frozen=True)
class DataSource:
    """A data set that was read and checked."""

    root: Path  # what was found for --path-to-data: a folder, a manifest, or a frame store
    layout: Layout
    unreadable: Mapping[str, str]  # video name -> reason
    store: FrameStore | None = None  # where frames are read from instead of the videos

    def readable(self, subset: str) -> tuple[Video, ...]:
        """The videos of a subset that can be opened."""
        return tuple(v for v in self.layout.subset(subset) if v.name not in self.unreadable)


def open_dataset(
    path_to_data: str | None,
    *,
    group_pattern: str,
    val_groups: Groups,
    test_groups: Groups,
    split: int,
    report: Report,
    need_training: bool = True,
    need_test: bool = False,
    n_frames: int = 1,
    frame_size: int = 1,
    frame_grid: int | None = None,
) -> DataSource:
    """Find a data set, read its layout, and set unreadable videos aside by name and reason.

    A frame store is used where it has `n_frames` of every video that does; where its frames are smaller than
    `frame_size`, or others than a `frame_grid` has, that is said.

    Raises DataError without data, or, with `need_training`, where a class has no readable training video.
    """
    root = find_data(path_to_data)
    if root.name == MOTIONS and not root.exists():
        make_demo_data(root, report)
    videos = video_root(root)
    if videos is None:
        layout = FrameStore(root).layout()
        report(
            Note("Its videos are gone: subsets and groups are those noted down when it was made.", "warning")
        )
        if need_test and not layout.subset("test"):
            raise DataError(f"{root}: holds no test subset. Leave out --test-at-end.")
    else:
        layout = read_layout(
            videos,
            group_pattern=group_pattern,
            val_groups=val_groups,
            test_groups=test_groups,
            split=split,
            need_training=need_training,
            need_test=need_test,
        )
    for note in layout.notes:
        report(Note(note))
    store = _find_store(root, layout, report)
    if store is not None and not _suffices(store, n_frames, frame_size, frame_grid, report):
        if videos is None:
            raise DataError(f"{root}: holds too few frames, and the videos that it was made from are gone.")
        store = None
    unreadable = _unreadable(layout, report) if store is None else store.unreadable
    if videos is not None:
        names = {video.name for video in layout.videos}  # those that were removed since are nobody's concern
        unreadable = {name: reason for name, reason in unreadable.items() if name in names}
    for name, reason in unreadable.items():
        report(Note(f"set aside: {name}: {reason}", "warning"))
    source = DataSource(root, layout, unreadable, store)
    if need_training:
        _check_classes(source)
    return source


def find_data(path_to_data: str | None) -> Path:
    """The folder or manifest that a run reads: what was given, else what lies under data/."""
    folders = [p for p in DATA_DIRECTORY.glob("*/") if not p.name.startswith(".")]
    # A download that failed leaves a folder with nothing but its lock.
    known = sorted(p.name for p in folders if any(not inside.name.startswith(".") for inside in p.iterdir()))
    if path_to_data is None:
        if DEFAULT_NAME in known:
            return DATA_DIRECTORY / DEFAULT_NAME
        if len(known) == 1:
            return DATA_DIRECTORY / known[0]
        found = (
            f"{DATA_DIRECTORY}/ holds {', '.join(known)}"
            if known
            else f"there is nothing in {DATA_DIRECTORY}/"
        )
        raise DataError(
            f"No data set chosen: {found}. Name one with --path-to-data PATH, or fetch one: "
            f"tvit download {DEFAULT_NAME}."
        )
    path = Path(path_to_data).expanduser()
    if path.exists():
        return path
    is_name = path.parent == Path() and not path.suffix
    if is_name and (path.name in known or path.name == MOTIONS):
        return DATA_DIRECTORY / path.name
    if path.name == MOTIONS and path.absolute().parent == DATA_DIRECTORY.absolute():
        return path
    beside = f" Under {DATA_DIRECTORY}/: {', '.join(known)}." if known else ""
    fetch = f" Fetch it: tvit download {path.name}." if path.name in (d.name for d in CATALOG) else ""
    raise DataError(f"--path-to-data {path_to_data}: no such folder or file.{beside}{fetch}")


def data_name(root: Path) -> str:
    """What a data set is called: by its folder, or its manifest."""
    return root.stem if root.is_file() else root.absolute().resolve().name


def video_root(root: Path) -> Path | None:
    """What holds the videos: the root itself, or what a frame store was made from; None where that is gone."""
    if not is_store(root):
        return root
    made_from = Path(read_header(root).data)
    return made_from if made_from.exists() else None


def make_demo_data(root: Path, report: Report) -> None:
    """Make the embedded data set unless a complete one is there."""
    if is_motions(root):
        return
    report(Note(f"Making the demo data set in {root} (8 classes that only the order of frames tells apart)."))
    make_motions(
        root,
        workers=os.cpu_count() or 1,
        progress=lambda done, total: report(Progress("making clips", done, total)),
    )


def _find_store(root: Path, layout: Layout, report: Report) -> FrameStore | None:
    """The frame store of a data set, if it holds every video as it is now."""
    folder = find_store(root)
    if folder is None:
        return None
    store = FrameStore(folder)
    if outdated := store.outdated(layout.videos):
        report(
            Note(
                f"{folder}: not used, since {len(outdated)} of {len(layout.videos)} videos (such as "
                f"{outdated[0]}) are new or changed. Bring it up to date with "
                f"`{store.header.command(folder)}`.",
                "warning",
            )
        )
        return None
    return store


def _suffices(
    store: FrameStore, n_frames: int, frame_size: int, frame_grid: int | None, report: Report
) -> bool:
    """Whether a store has the frames that are asked for; what else it lacks is said."""
    kept, size = store.parameters.frames_per_video, store.parameters.short_side
    larger = (
        f"--frames-per-video {max(kept, n_frames)} --short-side {max(size, frame_size)} "
        f"--quality {store.parameters.quality} --overwrite"
    )
    command = store.header.command(store.folder, larger)
    if short := store.short_of(n_frames):
        why = f"it has {kept} frames of {short} of its {len(store)} videos, and {n_frames} are asked for"
        report(Note(f"{store.folder}: not used, since {why}. Make it anew with `{command}`.", "warning"))
        return False
    report(Note(f"Frames are read from {store.folder} ({store.parameters}), not from the videos."))
    if small := store.smaller_than(frame_size):
        report(
            Note(
                f"{store.folder}: {small} of its {len(store)} videos are kept with {size} pixels, and the model "
                f"takes {frame_size}: frames are scaled up; those of a video itself are sharper. Make it anew with "
                f"`{command}`.",
                "warning",
            )
        )
    if frame_grid is not None and frame_grid != kept and store.short_of(MOST_FRAMES):
        report(
            Note(
                f"{store.folder}: has {kept} frames of a video, --frame-grid {frame_grid} takes the nearest of "
                "them; from a video itself it takes others.",
                "warning",
            )
        )
    return True


def _unreadable(layout: Layout, report: Report) -> dict[str, str]:
    return unreadable_videos(
        layout.videos,
        layout.root,
        workers=min(8, os.cpu_count() or 1),
        progress=lambda done, total: report(Progress("checking videos", done, total)),
    )


def _check_classes(source: DataSource) -> None:
    training = {video.label for video in source.readable("train")}
    for label in source.layout.labels:
        if label not in training:
            raise DataError(
                f"{source.layout.root}: no readable training video of class {label}. "
                "Mend or remove the class, or hold fewer groups out."
            )
