"""Which videos can be read: remembered in the data folder, so that each is tried only once."""

from __future__ import annotations

import json
import stat
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from pathlib import Path

import av

from tvit_cli.data.layout import Video
from tvit_cli.data.video import decode_first
from tvit_cli.data.whole import whole_file
from tvit_cli.errors import VideoError

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
            with whole_file(folder / CHECKED) as beside:
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
