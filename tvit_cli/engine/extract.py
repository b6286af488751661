"""`tvit extract`: decodes videos once into a frame store, or checks them."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import asdict, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import TypeVar

from tvit_cli.data import framestore_format as form
from tvit_cli.data import framestore_writer as store
from tvit_cli.data.framestore import check_record, own_store
from tvit_cli.data.layout import Layout, Video, is_store, read_layout, split_choice
from tvit_cli.data.video import COUNT_SLACK, count_frames, probe
from tvit_cli.engine.dataset import find_or_make_data
from tvit_cli.engine.distributed import (
    BACKENDS,
    JOIN_TIMEOUT,
    barrier,
    default_worker_count,
    map_in_order,
    preserve_process_count,
    set_timeout,
)
from tvit_cli.errors import DataError, RunError, VideoError
from tvit_cli.files import check_folder, file_lock, is_writable
from tvit_cli.results import ExtractResult, Note, Progress, Report, Scan
from tvit_cli.settings.extract import ExtractSettings
from tvit_cli.settings.types import most_bad

R = TypeVar("R")
TIMEOUT = timedelta(days=30)  # of the barrier: the slowest rank may need hours longer than the others


def extract(
    settings: ExtractSettings,
    report: Report,
    *,
    rank: int = 0,
    processes: int = 1,
    wait_for_all: Callable[[], None] = lambda: None,
) -> ExtractResult:
    """Packs new and changed videos into the frame store and writes its index.

    Of several processes on one file system, each packs every `processes`-th video into shards of its own; rank 0
    prepares the folder and writes the index, and `wait_for_all` is the barrier between.

    Raises DataError for an existing store with other parameters or data; RunError if another extraction is running,
    if the disk is full, or, after the index is written, for more than `max_bad` unreadable videos.
    """
    layout, data = _read_data(settings, report)
    folder = own_store(data) if settings.output is None else settings.output.expanduser()
    check_folder("--output", folder)
    began = time.perf_counter()
    count = settings.frames_per_video if settings.fps is None else 0
    parameters = form.Parameters(count, settings.quality, settings.short_side, settings.fps)
    with _lock(folder) if rank == 0 else nullcontext():
        if rank == 0:
            header = form.Header(parameters, str(data.absolute()))
            _prepare(folder, header, layout, report, overwrite=settings.overwrite)
        wait_for_all()

        contents, _ = store.read_contents(folder)
        own = layout.videos[rank::processes]
        missing = [video for video in own if not _is_done(contents, video, settings, report)]
        unreadable: dict[str, str] = {}
        packing = _map(settings, partial(_pack, parameters), missing, failure=lambda path, reason: reason)
        with (
            store.ShardWriter(folder, rank=rank, shard_bytes=settings.shard_mib << 20) as writer,
            closing(packing) as results,
        ):
            for done, (video, packed) in enumerate(zip(missing, results, strict=True), start=1):
                if isinstance(packed, str):
                    unreadable[video.name] = packed
                    report(Note(f"set aside: {video.name}: {packed}", "warning"))
                else:
                    writer.add(video.name, packed)
                report(Progress("extracting", done, len(missing)))
        files = [folder / f".unreadable-{r:02d}.json" for r in range(processes)]
        files[rank].write_text(json.dumps(unreadable), encoding="utf-8")
        wait_for_all()

        if rank == 0:
            reasons: dict[str, str] = {}
            for path in files:
                reasons |= json.loads(path.read_text(encoding="utf-8"))
                path.unlink()
            store.write_index(folder, layout, dict(sorted(reasons.items())))
            if len(reasons) > (most := most_bad(settings.max_bad, len(layout.videos))):
                fault = f"{len(reasons)} of {len(layout.videos)} videos cannot be read"
                raise RunError(
                    f"{layout.root}: {fault}; --max-bad {settings.max_bad} allows {most}. The others are in the "
                    "frame store. Repair or remove the unreadable ones, then repeat this command."
                )
    return ExtractResult(
        folder=folder,
        videos=len(missing) - len(unreadable),
        skipped=len(own) - len(missing),
        unreadable=unreadable,
        bytes=writer.bytes,
        seconds=time.perf_counter() - began,
    )


def check(settings: ExtractSettings, report: Report) -> tuple[Scan, ...]:
    """Decodes every video to its end and returns properties and faults, sorted by name; writes nothing."""
    layout, _ = _read_data(settings, report)
    scans: list[Scan] = []
    with closing(_map(settings, scan_video, layout.videos, failure=_unreadable)) as found:
        for video, scan in zip(layout.videos, found, strict=True):
            scans.append(replace(scan, label=video.label))
            report(Progress("checking", len(scans), len(layout.videos)))
    return tuple(scans)


def scan_video(path: Path) -> Scan:
    """Decodes a video to its end; a video without any frame is unreadable."""
    try:
        info = asdict(probe(path))
        frames = count_frames(path)
    except VideoError as error:
        return _unreadable(path, str(error).removeprefix(f"{path}: "))
    promised, note = info.pop("promised"), info.pop("note")
    is_cut = frames < promised - COUNT_SLACK  # intact XviD files lack up to that many, too
    problem = f"truncated or damaged: {frames} of {promised} frames decode" if is_cut else note
    return Scan(**info | {"frames": frames, "problem": problem})


def process_group() -> tuple[int, int, Callable[[], None]]:
    """Rank, world size and barrier under `accelerate launch` or torchrun; 0, 1 and no barrier otherwise."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return 0, 1, lambda: None
    from accelerate import PartialState  # loads torch

    with preserve_process_count():
        state = PartialState(cpu=True, backend=BACKENDS["cpu"], timeout=JOIN_TIMEOUT)
    set_timeout(TIMEOUT)
    return state.process_index, state.num_processes, partial(barrier, state)


def _read_data(settings: ExtractSettings, report: Report) -> tuple[Layout, Path]:
    data = find_or_make_data(settings.path_to_data, report)
    choice = split_choice(settings)
    if settings.check:  # subsets have no effect
        choice |= {"val_groups": "none", "test_groups": "none"}
    layout = read_layout(data, need_training=not settings.check, **choice)
    for note in layout.notes:
        report(Note(note))
    return layout, data


def _lock(folder: Path) -> AbstractContextManager[bool]:
    """Excludes other extractions by a file beside the store: inside, it would create the folder."""
    path = folder.absolute()
    if not is_writable(path.parent):
        return nullcontext(False)
    return file_lock(
        path.with_name(f".{path.name}.lock"),
        f"{folder}: another process is extracting to it. Wait until it ends, then repeat this command.",
    )


def _map(
    settings: ExtractSettings,
    work: Callable[[Path], R],
    videos: Sequence[Video],
    failure: Callable[[Path, str], R],
) -> Generator[R, None, None]:
    """`work(path)` of each video in worker processes; `failure(path, reason)` if one crashes or is too slow."""

    def lost(path: Path, too_long: bool) -> R:
        slow = f"decoding took longer than {settings.time_limit} seconds (--time-limit). Encode it again"
        crash = "the decoder crashed on it. The file may be damaged; encode it again"
        return failure(path, slow if too_long else crash)

    workers = default_worker_count(spare=0) if settings.num_workers is None else settings.num_workers
    paths = [video.path for video in videos]
    return map_in_order(work, paths, workers=workers, lost=lost, seconds=settings.time_limit)


def _pack(parameters: form.Parameters, path: Path) -> store.Packed | str:
    try:
        return store.pack_video(path, parameters)
    except VideoError as error:
        return str(error).removeprefix(f"{path}: ")


def _unreadable(path: Path, reason: str) -> Scan:
    return Scan(path, problem=reason, is_readable=False)


def _is_done(contents: store.Contents, video: Video, settings: ExtractSettings, report: Report) -> bool:
    row = contents.row(video.name)
    if row is None or not store.is_unchanged(video.path, row):
        return False
    if settings.repair and (problem := check_record(contents.shard(video.name), row)):
        report(Note(f"extracted again: {video.name}: {problem}", "warning"))
        return False
    return True


def _prepare(folder: Path, header: form.Header, layout: Layout, report: Report, *, overwrite: bool) -> None:
    """Writes the header, and removes the remains of an interrupted or replaced store."""
    is_new = not is_store(folder)
    if is_new and folder.exists() and any(folder.iterdir()):
        raise DataError(f"{folder}: contains other files, no frame store. Choose another folder by --output.")
    if not is_new and overwrite:
        # The index goes first: a store without it is unfinished, and no reader opens it.
        (folder / form.INDEX).unlink(missing_ok=True)
        for path in store.shard_paths(folder):
            path.unlink()
    elif not is_new:
        found, fault = form.read_header(folder), ""
        if found.parameters != header.parameters:
            fault = f"with {found.parameters}, not {header.parameters}"
        elif _is_of_other_data(found, header, layout, folder):
            fault = f"from {found.data}; videos of {header.data} would replace those"
        if fault:
            again = "Make another with --output FOLDER, or replace it with --overwrite."
            raise DataError(f"{folder}: this frame store was made {fault}. {again}")
    try:
        form.write_header(folder, header)
    except OSError as error:
        raise RunError(f"{folder}: the frame store cannot be made here ({error.strerror}).") from error
    contents, damaged = store.read_contents(folder)
    for error_of_shard in damaged:
        report(Note(str(error_of_shard), "warning"))
    unfinished = {path for path in folder.iterdir() if form.TEMPORARY.fullmatch(path.name)}
    for path in unfinished | (set(store.shard_paths(folder)) - contents.tables.keys()):
        path.unlink()


def _is_of_other_data(found: form.Header, header: form.Header, layout: Layout, folder: Path) -> bool:
    """Whether a store has clips of other data that still exists; a store copied with its videos has not."""
    before, now = Path(found.data), Path(header.data)
    try:
        if not before.exists() or before.resolve() == now.resolve():
            return False
    except OSError:  # no permission
        return False
    folders = [data.resolve() if data.is_dir() else data.resolve().parent for data in (before, now)]
    same_folder = folders[0] == folders[1]
    if folder.resolve().parent == layout.root.resolve() and not same_folder:  # a copy
        return False
    wanted = {form.to_key(video.name) for video in layout.videos}
    return not (same_folder and wanted.issuperset(store.read_contents(folder)[0].rows))
