"""Files that are whole or absent: one writer at a time, room looked for first, renamed when synced."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, Final

from tvit_cli.errors import DataError, RunError
from tvit_cli.removal import foreign_files, some

FreeBytes = Callable[[Path], int]
SPARE_BYTES: Final = 64 * 1024**2  # left free, so that the system beside us does not stumble
# No locks on this file system (NFS, Lustre, some of FUSE), or none on a file that may only be read (NFS): better
# without one than not at all.
LOCKLESS: Final = frozenset({errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EBADF})
FULL: Final = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})  # EFBIG: a limit on file sizes


def free_bytes(folder: Path) -> int:
    """Bytes that may still be written in `folder`, or in its nearest parent that exists."""
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def require_free(folder: Path, need: int, *, purpose: str, free: FreeBytes = free_bytes) -> None:
    """Raise RunError where fewer than `need` bytes are free; nothing has been written then."""
    have = free(folder)
    if need + SPARE_BYTES > have:
        raise RunError(
            f"{folder}: {purpose} needs {size_text(need)}, {size_text(have)} are free "
            f"({size_text(SPARE_BYTES)} are left alone). Free {size_text(need + SPARE_BYTES - have)}, "
            "or name a folder on another disk with --data-directory."
        )


@contextlib.contextmanager
def full_disk_named(folder: Path, *, purpose: str, need: Callable[[], int]) -> Iterator[None]:
    """Turn a disk that fills up meanwhile into a RunError; `need` tells how many bytes are still to come."""
    try:
        yield
    except OSError as error:
        if error.errno not in FULL:
            raise
        raise RunError(
            f"{folder}: no room left while {purpose} ({error.strerror}); {size_text(need())} more are "
            "needed. Free them and run the same command again: it goes on from here."
        ) from error


@contextlib.contextmanager
def held(lock: Path, *, what: str) -> Iterator[None]:
    """Hold a lock file for this process; it falls with the process, however that ends.

    Raises RunError at once where another process holds it; where the file system has no locks, nothing is held.
    The empty file stays: removing it would let a third process lock a file that a second one still waits for.
    """
    with _opened(lock) as file:
        try:
            _lock(file.fileno())
        except OSError as error:
            if error.errno not in LOCKLESS:
                raise RunError(
                    f"{lock}: another process is busy with {what}. "
                    "Wait for it to end, then run this command again."
                ) from error
        yield


def _opened(lock: Path) -> BinaryIO:
    """A lock file, made unless it is there; one that may only be read can be locked as well."""
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        return lock.open("a+b")
    except OSError as error:
        if lock.is_file():
            return lock.open("rb")
        raise RunError(f"{lock.parent}: cannot be written ({error.strerror}).") from error


if sys.platform == "win32":
    import msvcrt

    def _lock(descriptor: int) -> None:
        msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
else:
    import fcntl

    def _lock(descriptor: int) -> None:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


def write_json(path: Path, value: Any) -> None:
    """Write JSON beside `path` and rename it over `path` when it is on the disk."""
    beside = path.with_name(f".{path.name}.new")
    with beside.open("w", encoding="utf-8") as file:
        json.dump(value, file, indent=1, ensure_ascii=False)
        file.write("\n")
        sync(file.fileno())
    rename(beside, path)


def sync(descriptor: int) -> None:
    """Wait until a file's bytes are on the disk."""
    os.fsync(descriptor)


def rename(source: Path, target: Path) -> None:
    """Rename over `target`, durably where the system lets a folder be synced."""
    source.replace(target)
    if sys.platform != "win32":
        descriptor = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def remove_work(folder: Path, own: re.Pattern[str]) -> None:
    """Removes a working folder, if it is there, whose files `own` matches by their relative paths.

    Raises DataError where something else lies in it or in its place; nothing is removed then.
    """
    if not os.path.lexists(folder):
        return
    if folder.is_symlink() or not folder.is_dir():
        raise DataError(f"{folder}: is in the way, and tvit did not write it. Move it away.")
    if foreign := foreign_files(folder, own):
        raise DataError(f"{folder}: holds files that tvit did not write: {some(foreign)}. Move them away.")
    shutil.rmtree(folder)


def size_text(size: float) -> str:
    """A size for people. 6960400115 -> "6.96 GB"."""
    for unit, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if size >= unit:
            return f"{size / unit:.3g} {name}"
    return f"{size:.0f} bytes"
