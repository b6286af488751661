"""Data set of a run: location, layout, unreadable videos, frame store; makes the demo set if absent."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Unpack

import av

from tvit_cli.data.catalog import CATALOG, find
from tvit_cli.data.framestore import FrameStore, find_store
from tvit_cli.data.framestore_format import Parameters, read_header
from tvit_cli.data.layout import (
    VIDEO_SUFFIXES,
    Layout,
    SplitChoice,
    Video,
    is_hidden,
    is_store,
    read_layout,
    similar_names,
)
from tvit_cli.data.motions import is_motions, make_motions
from tvit_cli.data.video import decode_first, stated_seconds
from tvit_cli.errors import START, DataError, VideoError, size_text
from tvit_cli.files import atomic_write
from tvit_cli.results import Note, Progress, Report

CHECKED = ".checked.json"  # hidden: not a class
DATA_DIRECTORY = Path("data")
DEFAULT_NAME = "ucf101"
MOTIONS = "motions"


@dataclass(frozen=True)
class ClipFormat:
    """Frames of a clip, frame size in pixels, frame grid, and seconds of a clip of a model's input.

    `by_weights`: the seconds are those of pretrained weights, and give way to videos that are all shorter.
    """

    n_frames: int = 1
    frame_size: int = 1
    frame_grid: int | None = None
    clip_seconds: float | None = None
    by_weights: bool = False


@dataclass(frozen=True)
class DataSource:
    """A data set whose layout is read and whose videos are checked."""

    root: Path  # a folder, a manifest, or a frame store
    layout: Layout
    unreadable: Mapping[str, str]  # video name -> reason
    store: FrameStore | None = None  # replaces the videos as source of frames
    clip_seconds: float | None = None  # that the clips show

    def readable(self, subset: str) -> tuple[Video, ...]:
        """The readable videos of a subset."""
        return tuple(v for v in self.layout.subset(subset) if v.name not in self.unreadable)


def open_dataset(
    path_to_data: str | None,
    report: Report,
    *,
    clip: ClipFormat | None = None,
    need_training: bool = True,
    need_test: bool = False,
    **choice: Unpack[SplitChoice],
) -> DataSource:
    """Finds a data set, reads its layout, and reports unreadable videos by name and reason.

    A frame store is used if it has all frames that a `clip` needs. Frames that are too small, or off the frame
    grid, cause a warning.

    Raises DataError without data or, with `need_training`, for a class without readable training video, and for
    clips longer than every video.
    """
    clip = clip or ClipFormat()
    root = find_or_make_data(path_to_data, report)
    videos = video_root(root)
    if videos is None:
        layout = FrameStore(root).layout()
        report(Note("The videos are gone: subsets and groups are those of the extraction.", "warning"))
        if need_test and not layout.subset("test"):
            raise DataError(f"{root}: has no test subset. Leave out --test-at-end.")
    else:
        layout = read_layout(videos, need_training=need_training, need_test=need_test, **choice)
    for note in layout.notes:
        report(Note(note))
    if need_training:
        clip = _fitting(clip, layout, None if videos else FrameStore(root), report)
    store = _usable_store(root, layout, clip, report, has_videos=videos is not None)
    if store is None:
        unreadable = unreadable_videos(
            layout.videos,
            layout.root,
            workers=min(8, os.cpu_count() or 1),
            progress=lambda done, total: report(Progress("checking videos", done, total)),
        )
    else:
        names = {video.name for video in layout.videos}  # the store also lists videos deleted since
        unreadable = {name: why for name, why in store.unreadable.items() if videos is None or name in names}
    for name, reason in unreadable.items():
        report(Note(f"set aside: {name}: {reason}", "warning"))
    source = DataSource(root, layout, unreadable, store, clip.clip_seconds)
    missing = sorted(set(layout.labels) - {video.label for video in source.readable("train")})
    if need_training and missing:
        fault = f"no readable training video of class {missing[0]}"
        raise DataError(f"{layout.root}: {fault}. Repair or remove the class, or hold fewer groups out.")
    return source


def _fitting(clip: ClipFormat, layout: Layout, store: FrameStore | None, report: Report) -> ClipFormat:
    """The clip, of the whole video where all videos are shorter than pretrained weights ask for."""
    if (seconds := clip.clip_seconds) is None:
        return clip
    longest = 0.0
    for video in layout.videos:
        with suppress(VideoError, OSError):  # unreadable ones are reported later
            index = None if store is None else store.find(video.name)
            length = stated_seconds(video.path) if store is None or index is None else store.seconds(index)
            longest = max(longest, length)
        if longest >= seconds:
            return clip
    if not longest:  # no header has a length
        return clip
    fault = f"longer than every video of {layout.root}; the longest lasts {longest:.2f} s"
    if not clip.by_weights:
        most = math.floor(longest * 100) / 100
        advice = f"Take at most --clip-seconds {most:g}s, or leave it out: clips show whole videos"
        raise DataError(f"--clip-seconds {seconds:g}: {fault}. {advice}.")
    report(Note(f"The weights' clips of {seconds:.3g} s are {fault}. So clips show whole videos.", "warning"))
    return replace(clip, clip_seconds=None)


def find_or_make_data(path_to_data: str | None, report: Report) -> Path:
    """`find_data`; makes the demo data set if it is chosen and absent."""
    root = find_data(path_to_data)
    if root.name == MOTIONS and not root.exists():
        make_demo_data(root, report)
    return root


def find_data(path_to_data: str | None) -> Path:
    """The chosen folder or manifest; None chooses data/ucf101, or the only data set in data/."""
    folders = [p for p in DATA_DIRECTORY.glob("*/") if not p.name.startswith(".")]
    known = sorted(folder.name for folder in folders if _has_videos(folder))
    if path_to_data is None:
        if DEFAULT_NAME in known:
            return DATA_DIRECTORY / DEFAULT_NAME
        if len(known) == 1:
            return DATA_DIRECTORY / known[0]
        if known:
            found = f"{DATA_DIRECTORY}/ holds {', '.join(known)}"
            raise DataError(f"No data set chosen: {found}. Name one with --path-to-data PATH.")
        size = size_text(find(DEFAULT_NAME).bytes or 0)
        raise DataError(
            f"No data set chosen: {DATA_DIRECTORY}/ is empty or missing.\n\n{START}\n\n"
            f"KNOWN DATA SETS\ntvit download --list\ntvit download {DEFAULT_NAME}  ({size})"
        )
    path = Path(path_to_data).expanduser()
    can_fetch = path.name in {dataset.name for dataset in CATALOG}
    if path.exists() and (not can_fetch or path.is_file() or _has_videos(path)):
        return path
    if path.parent == Path() and not path.suffix and path.name in (*known, MOTIONS):
        return DATA_DIRECTORY / path.name
    if path.name == MOTIONS and path.absolute().parent == DATA_DIRECTORY.absolute():
        return path
    near = "" if path.exists() else similar_names(path)
    others = f" Under {DATA_DIRECTORY}/: {', '.join(known)}." if known else ""
    fetch = f" Fetch it: tvit download {path.name}." if can_fetch else ""
    fault = "no videos in this folder" if path.exists() else "no such folder or file"
    raise DataError(f"--path-to-data {path_to_data}: {fault}.{near}{others}{fetch}")


def _has_videos(folder: Path) -> bool:
    """Whether a folder is a frame store or has videos as deep as a layout does; a failed download has neither."""
    return is_store(folder) or any(
        path.suffix.lower() in VIDEO_SUFFIXES and not is_hidden(path.relative_to(folder))
        for pattern in ("*", "*/*", "*/*/*", "*/*/*/*")
        for path in folder.glob(pattern)
    )


def data_name(root: Path) -> str:
    """The name of a data set: its folder's, or its manifest's without suffix."""
    return root.stem if root.is_file() else root.absolute().resolve().name


def video_root(root: Path) -> Path | None:
    """The folder or manifest of the videos: `root`, or the source of a frame store; None if that is gone."""
    if not is_store(root):
        return root
    source = Path(read_header(root).data)
    return source if source.exists() else None


def make_demo_data(root: Path, report: Report) -> int:
    """Makes the demo data set unless it is complete; returns the number of new clips."""
    if is_motions(root):
        return 0
    report(Note(f"Making the demo data set in {root} (8 classes that differ in the order of frames)."))
    return make_motions(
        root,
        workers=os.cpu_count() or 1,
        progress=lambda done, total: report(Progress("making clips", done, total)),
    )


def _usable_store(
    root: Path, layout: Layout, clip: ClipFormat, report: Report, *, has_videos: bool
) -> FrameStore | None:
    """The frame store of a data set if it is up to date and has the frames of a clip; reports all it lacks."""
    folder = find_store(root)
    if folder is None:
        return None
    store = FrameStore(folder)

    def warn(text: str) -> None:
        report(Note(f"{folder}: {text}", "warning"))

    if outdated := store.outdated(layout.videos):
        warn(
            f"not used: {len(outdated)} of {len(layout.videos)} videos (such as {outdated[0]}) are new or changed. "
            f"Update it with `{store.header.command(folder)}`."
        )
        return None
    stored, size, fps = store.parameters.frames_per_video, store.parameters.short_side, store.parameters.fps
    has = f"{stored} frames" if fps is None else f"{fps:g} frames per second"
    command = replace(store.header, parameters=Parameters()).command(folder)
    if clip.clip_seconds is not None:
        needed = clip.n_frames / clip.clip_seconds
        command += f" --fps {max(fps or 0, 2 * needed):.4g}"  # twice as many places for a clip to begin
    else:
        command += f" --frames-per-video {max(stored, clip.n_frames)}"
    command += f" --short-side {max(size, clip.frame_size)}"
    command += f" --quality {store.parameters.quality} --overwrite"
    if clip.clip_seconds is not None and (fps is None or fps < needed * (1 - 1e-6)):
        asks = f"clips of {clip.n_frames} frames in {clip.clip_seconds:.4g} s need {needed:.4g} per second, by time"
        if has_videos:
            warn(f"not used: it has {store.parameters}; {asks}. Replace it with `{command}`.")
            return None
        advice = "The videos are gone, so restore them first, or take --clip-seconds none"
        raise DataError(
            f"{folder}: it has {store.parameters}; {asks}. Replace it with `{command}`. {advice}."
        )
    if clip.clip_seconds is None and (short := store.short_of(clip.n_frames)):
        warn(
            f"not used: it has {has} of {short} of its {len(store)} videos, {clip.n_frames} are needed. "
            f"Replace it with `{command}`."
        )
        if has_videos:
            return None
        raise DataError(f"{root}: too few frames, and the videos are gone. Restore them, then extract again.")
    report(Note(f"Frames are read from {folder} ({store.parameters}), not from the videos."))
    if small := store.smaller_than(clip.frame_size):
        warn(
            f"{small} of its {len(store)} videos have {size} pixels and are scaled up: the model takes "
            f"{clip.frame_size}. Replace it with `{command}`."
        )
    is_own = clip.frame_grid in (None, stored) if fps is None else clip.clip_seconds is not None
    if not is_own and store.short_of(2**32 - 1):  # some frames are not stored
        grid = "a clip" if clip.frame_grid is None else f"--frame-grid {clip.frame_grid}"
        warn(f"{grid} takes the nearest of its {has}{' per video' * (fps is None)}.")
    return store


def unreadable_videos(
    videos: Sequence[Video], folder: Path, *, workers: int, progress: Callable[[int, int], None] | None = None
) -> dict[str, str]:
    """`check_videos` of videos that are new or changed since the last check: name -> reason.

    The cache file in `folder` lists readable videos with size and mtime; others are checked every time. A read-only
    folder gets no cache.
    """
    path, decoder = folder / CHECKED, f"PyAV {av.__version__}"
    cached: dict[str, list[int]] = {}
    with suppress(OSError, ValueError, KeyError, TypeError, RecursionError):  # no cache: all are checked
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["decoder"] == decoder:
            cached = dict(content["videos"])
    now: dict[str, list[int]] = {}
    for video in videos:
        with suppress(OSError):  # check_videos gives the reason
            status = video.path.stat()
            now[video.name] = [status.st_size, status.st_mtime_ns]
    changed = [v for v in videos if v.name not in now or now[v.name] != cached.get(v.name)]
    reasons = check_videos(changed, workers=workers, progress=progress) if changed else {}
    new = {v.name: now[v.name] for v in changed if v.name in now and v.name not in reasons}
    with suppress(OSError):
        if new and folder.stat().st_mode & 0o222:  # root could write to a read-only folder
            with atomic_write(path) as temporary:
                text = json.dumps({"decoder": decoder, "videos": {**cached, **new}})
                temporary.write_text(text, encoding="utf-8")
    return reasons


def check_videos(
    videos: Sequence[Video], *, workers: int, progress: Callable[[int, int], None] | None = None
) -> dict[str, str]:
    """Decodes the first frame of every video: name -> reason for unreadable ones.

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
        pool.shutdown(cancel_futures=True)  # after an interruption, pending videos are skipped
    return dict(sorted(reasons.items()))
