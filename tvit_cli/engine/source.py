"""The videos that a run reads: found, made if they are the demo set, checked."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tvit_cli.data.checked import unreadable_videos
from tvit_cli.data.framestore import FrameStore, find_store
from tvit_cli.data.holdout import Groups
from tvit_cli.data.layout import Layout, Video, read_layout
from tvit_cli.data.motions import is_motions, make_motions
from tvit_cli.data.remote.catalog import CATALOG
from tvit_cli.data.storeformat import is_store, read_header
from tvit_cli.engine.events import Note, Progress, Report
from tvit_cli.errors import DataError

DATA_DIRECTORY = Path("data")
MOST_FRAMES = 2**32 - 1  # of a video that a store knows
DEFAULT_NAME = "ucf101"
MOTIONS = "motions"


@dataclass(frozen=True)
class Source:
    """A data set that was read and checked."""

    root: Path  # what was found for --path-to-data: a folder, a manifest, or a frame store
    layout: Layout
    unreadable: Mapping[str, str]  # video name -> reason
    store: FrameStore | None = None  # where frames are read from instead of the videos

    def readable(self, subset: str) -> tuple[Video, ...]:
        """The videos of a subset that can be opened."""
        return tuple(v for v in self.layout.subset(subset) if v.name not in self.unreadable)


def open_source(
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
) -> Source:
    """Find a data set, read its layout, and set unreadable videos aside by name and reason.

    A frame store is used where it has `n_frames` of every video that does; where its frames are smaller than
    `frame_size`, or others than a `frame_grid` has, that is said.

    Raises DataError without data, or, with `need_training`, where a class has no readable training video.
    """
    root = find_data(path_to_data)
    if root.name == MOTIONS and not root.exists():
        make_demo_data(root, report)
    videos = videos_of(root)
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
    source = Source(root, layout, unreadable, store)
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


def videos_of(root: Path) -> Path | None:
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


def local_processes() -> int:
    """Processes of this command on this machine; where the launcher does not say, as srun, all of them."""
    return int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("WORLD_SIZE", "1"))


@contextmanager
def counted_as_before() -> Iterator[None]:
    """Within, Accelerate starts, and notes down that this process is alone on its machine; that is undone after."""
    told = "LOCAL_WORLD_SIZE" in os.environ
    try:
        yield
    finally:
        if not told:
            os.environ.pop("LOCAL_WORLD_SIZE", None)


def workers_of(given: int | None) -> int:
    """Decoding workers of this process: what was given, else `default_workers`."""
    return default_workers() if given is None else given


def default_workers(*, spare: int = 1) -> int:
    """Decoding processes for this one: its share of this machine's cores but for `spare`, at most 16."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(16, cores // local_processes() - spare))


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


def _check_classes(source: Source) -> None:
    training = {video.label for video in source.readable("train")}
    for label in source.layout.labels:
        if label not in training:
            raise DataError(
                f"{source.layout.root}: no readable training video of class {label}. "
                "Mend or remove the class, or hold fewer groups out."
            )
