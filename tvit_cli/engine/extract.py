"""`tvit extract`: videos decoded once into a frame store, or checked."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from tvit_cli.data.framestore import check_record
from tvit_cli.data.framestore_format import (
    FOLDER,
    INDEX,
    TEMPORARY,
    Header,
    Parameters,
    read_header,
    to_key,
    write_header,
)
from tvit_cli.data.framestore_writer import (
    Contents,
    Packed,
    ShardWriter,
    is_unchanged,
    pack_video,
    read_contents,
    shard_paths,
    write_index,
)
from tvit_cli.data.layout import Layout, Video, is_store, read_layout
from tvit_cli.data.video import COUNT_SLACK, count_frames, expected_frame_count, probe
from tvit_cli.engine.dataset import MOTIONS, find_data, make_demo_data
from tvit_cli.engine.distributed import default_worker_count, map_in_order, preserve_process_count
from tvit_cli.errors import DataError, RunError, VideoError
from tvit_cli.files import check_folder, file_lock, is_writable
from tvit_cli.results import CheckResult, ExtractResult, Note, Progress, Report, Scan
from tvit_cli.settings.extract import ExtractSettings
from tvit_cli.settings.types import most_bad


def scan_video(path: Path) -> Scan:
    """Decodes a video to its end and says what it is; one that gives no frame is not readable."""
    try:
        info = probe(path)
        frames = count_frames(path)
        promised = expected_frame_count(path)
    except VideoError as error:
        return Scan(path, problem=str(error).removeprefix(f"{path}: "), is_readable=False)
    problem = ""
    if frames < promised - COUNT_SLACK:  # up to that many are missing from sound XviD files too
        problem = f"truncated or damaged: {frames} frames decode of {promised} that the file promises"
    return Scan(
        path=path,
        codec=info.codec,
        width=info.width,
        height=info.height,
        frames=frames,
        seconds=info.seconds,
        rate=info.rate,
        rotation=info.rotation,
        problem=problem,
    )


MIB = 1 << 20


def extract(
    settings: ExtractSettings,
    report: Report,
    *,
    rank: int = 0,
    processes: int = 1,
    wait_for_all: Callable[[], None] = lambda: None,
) -> ExtractResult:
    """Pack the videos that the store does not hold yet, and write its index.

    Of several processes, started alike on one file system, each takes every `processes`-th video and writes
    shards of its own; rank 0 prepares the folder before and joins the index after, and `wait_for_all` is the
    barrier between. A video that was changed since is packed anew.

    Raises DataError where a store with other parameters, or of other data, is in the way, RunError where another
    extraction is busy in it, where the disk is full or, after the index was written, where more than `max_bad`
    videos are unreadable.
    """
    layout, data = _read_data(settings, report)
    folder = (layout.root / FOLDER) if settings.output is None else settings.output.expanduser()
    check_folder("--output", folder)
    with _alone(folder) if rank == 0 else nullcontext():
        return _extract(settings, report, folder, layout, data, rank, processes, wait_for_all)


def _alone(folder: Path) -> AbstractContextManager[bool]:
    """Keeps other extractions out of a store by a file beside it: inside, it would make a folder of none yet.

    Where nothing may be written there, nobody is kept out.
    """
    place = folder.absolute()
    if not is_writable(place.parent):
        return nullcontext(False)
    return file_lock(
        place.with_name(f".{place.name}.lock"),
        f"{folder}: another process is extracting to it. Wait until it ends, then repeat this command.",
    )


def _extract(
    settings: ExtractSettings,
    report: Report,
    folder: Path,
    layout: Layout,
    data: Path,
    rank: int,
    processes: int,
    wait_for_all: Callable[[], None],
) -> ExtractResult:
    began = time.perf_counter()
    parameters = Parameters(settings.frames_per_video, settings.quality, settings.short_side)
    if rank == 0:
        _prepare(
            folder, Header(parameters, str(data.absolute())), layout, report, overwrite=settings.overwrite
        )
    wait_for_all()

    contents, _ = read_contents(folder)
    own = layout.videos[rank::processes]
    missing = [video for video in own if not _is_done(contents, video, repair=settings.repair, report=report)]
    unreadable: dict[str, str] = {}
    jobs = [(video.path, parameters) for video in missing]
    workers = default_worker_count(spare=0) if settings.num_workers is None else settings.num_workers
    with ShardWriter(folder, rank=rank, shard_bytes=settings.shard_mib * MIB) as writer:
        results = map_in_order(
            _pack,
            jobs,
            workers=workers,
            lost=lambda job, too_long: _lost(settings, too_long),
            seconds=settings.time_limit,
        )
        for done, (video, packed) in enumerate(zip(missing, results, strict=True), start=1):
            if isinstance(packed, str):
                unreadable[video.name] = packed
                report(Note(f"set aside: {video.name}: {packed}", "warning"))
            else:
                writer.add(video.name, packed)
            report(Progress("extracting", done, len(missing)))
    _reasons_file(folder, rank).write_text(json.dumps(unreadable), encoding="utf-8")
    wait_for_all()

    if rank == 0:
        everyones = _collect_reasons(folder, processes)
        write_index(folder, layout, everyones)
        _refuse_too_many(len(everyones), len(layout.videos), settings.max_bad, layout.root)
    return ExtractResult(
        folder=folder,
        videos=len(missing) - len(unreadable),
        skipped=len(own) - len(missing),
        unreadable=unreadable,
        bytes=writer.bytes,
        seconds=time.perf_counter() - began,
    )


def process_place() -> tuple[int, int, Callable[[], None]]:
    """This process's rank, how many there are, and a barrier, as `accelerate launch` or torchrun started them."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return 0, 1, lambda: None
    from accelerate import PartialState  # only here: it loads torch

    with preserve_process_count():
        state = PartialState(cpu=True)
    return state.process_index, state.num_processes, state.wait_for_everyone


def check(settings: ExtractSettings, report: Report) -> CheckResult:
    """Decode every video to its end and tell what it holds and what is wrong; write nothing."""
    layout, _ = _read_data(settings, report)
    paths = [video.path for video in layout.videos]
    workers = default_worker_count(spare=0) if settings.num_workers is None else settings.num_workers
    scans: list[Scan] = []
    for scan in map_in_order(
        scan_video,
        paths,
        workers=workers,
        lost=lambda p, too_long: Scan(p, problem=_lost(settings, too_long), is_readable=False),
        seconds=settings.time_limit,
    ):
        scans.append(scan)
        report(Progress("checking", len(scans), len(paths)))
    return CheckResult(tuple(scans))


def _read_data(settings: ExtractSettings, report: Report) -> tuple[Layout, Path]:
    data = find_data(settings.path_to_data)
    if data.name == MOTIONS and not data.exists():
        make_demo_data(data, report)
    layout = read_layout(
        data,
        group_pattern=settings.group_pattern,
        val_groups=settings.val_groups,
        test_groups=settings.test_groups,
        split=settings.split,
    )
    for note in layout.notes:
        report(Note(note))
    return layout, data


def _prepare(folder: Path, header: Header, layout: Layout, report: Report, *, overwrite: bool) -> None:
    """Makes the folder ready to take shards: its header written, what a killed run left removed."""
    if not is_store(folder):
        if folder.exists() and any(folder.iterdir()):
            raise DataError(
                f"{folder}: holds other files and is no frame store. Give another folder with --output."
            )
        _or_run_error(folder, lambda: write_header(folder, header))
        return
    if overwrite:
        # The index goes first: without it the store is unfinished, and nobody reads half of it.
        (folder / INDEX).unlink(missing_ok=True)
        for path in shard_paths(folder):
            path.unlink()
    else:
        found = read_header(folder)
        if found.parameters != header.parameters:
            raise DataError(
                f"{folder}: this frame store was made with {found.parameters}; asked for are "
                f"{header.parameters}. Replace it with --overwrite, or make another with --output FOLDER."
            )
        if _is_of_other_data(found, header, layout, folder):
            raise DataError(
                f"{folder}: this frame store was made from {found.data}, whose videos would leave it for those "
                f"of {header.data}. Make another with --output FOLDER, or replace it with --overwrite."
            )
    _or_run_error(folder, lambda: write_header(folder, header))
    contents, damaged = read_contents(folder)
    for error in damaged:
        report(Note(str(error), "warning"))
    leftovers = {path for path in folder.iterdir() if TEMPORARY.fullmatch(path.name)}
    for path in leftovers | (set(shard_paths(folder)) - set(contents.shards)):
        path.unlink()


def _is_of_other_data(found: Header, header: Header, layout: Layout, folder: Path) -> bool:
    """Whether a store has clips of data that is still there and is not what is to be extracted.

    A store that was copied together with its videos is now one of the copies.
    """
    before, now = Path(found.data), Path(header.data)
    try:
        is_other = before.exists() and before.resolve() != now.resolve()
    except OSError:  # somebody else's
        return False
    is_copy = folder.resolve().parent == layout.root.resolve() and _root(before) != _root(now)
    if not is_other or is_copy:
        return False
    wanted = {to_key(video.name) for video in layout.videos}
    holds_them_all = wanted.issuperset(read_contents(folder)[0].rows)
    return not (holds_them_all and _root(before) == _root(now))


def _root(data: Path) -> Path:
    return data.resolve() if data.is_dir() else data.resolve().parent


def _or_run_error(folder: Path, write: Callable[[], None]) -> None:
    try:
        write()
    except OSError as error:
        raise RunError(f"{folder}: the frame store cannot be made here ({error.strerror}).") from error


def _is_done(contents: Contents, video: Video, *, repair: bool, report: Report) -> bool:
    row = contents.row(video.name)
    if row is None or not is_unchanged(video.path, row):
        return False
    if repair and (problem := check_record(contents.shard(video.name), row)):
        report(Note(f"made anew: {video.name}: {problem}", "warning"))
        return False
    return True


def _pack(job: tuple[Path, Parameters]) -> Packed | str:
    """A packed video, or why it cannot be read."""
    path, parameters = job
    try:
        return pack_video(path, parameters)
    except VideoError as error:
        return str(error).removeprefix(f"{path}: ")


def _lost(settings: ExtractSettings, too_long: bool) -> str:
    """Why a video took its process down."""
    if too_long:
        return f"decoding took longer than {settings.time_limit} seconds (--time-limit). Encode it anew"
    return "the decoder crashed on it. The file may be damaged; encode it anew"


def _reasons_file(folder: Path, rank: int) -> Path:
    return folder / f".unreadable-{rank:02d}.json"


def _collect_reasons(folder: Path, processes: int) -> dict[str, str]:
    reasons: dict[str, str] = {}
    for rank in range(processes):
        path = _reasons_file(folder, rank)
        reasons |= json.loads(path.read_text(encoding="utf-8"))
        path.unlink()
    return dict(sorted(reasons.items()))


def _refuse_too_many(unreadable: int, videos: int, max_bad: str, root: Path) -> None:
    most = most_bad(max_bad, videos)
    if unreadable > most:
        raise RunError(
            f"{root}: {unreadable} of {videos} videos cannot be read; --max-bad {max_bad} allows {most}. The "
            "others are in the frame store. Mend or remove those, and run the same command again."
        )
