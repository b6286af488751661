"""Atomic writes, locks, free space and checks of output paths."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, Final, TypeAlias

from tvit_cli.errors import DataError, RunError, VideoError, shorten


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """The path to write to instead, with the same suffix; what is there when the block ends becomes the file.

    Where the block fails, or the process is killed in it, the file stays as it was, or absent. The folder is made
    where it is missing. Raises OSError.
    """
    beside = path.with_name(f".part-{os.getpid()}-{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield beside
        beside.replace(path)
    finally:
        with suppress(OSError):  # the folder itself may be what failed
            beside.unlink()


def files_below(folder: Path) -> list[str]:
    """Files below a folder by their relative paths with "/", sorted; a link counts as a file, whatever it leads to.

    Empty where the folder is missing or is a link itself.
    """
    found: list[str] = []
    if not folder.is_symlink():
        for root, folders, files in os.walk(folder):  # does not follow links
            links = [name for name in folders if Path(root, name).is_symlink()]
            found += [Path(root, name).relative_to(folder).as_posix() for name in (*files, *links)]
    return sorted(found)


def foreign_files(folder: Path, own: re.Pattern[str]) -> list[str]:
    """Those of `files_below` whose relative path `own` does not match."""
    return [name for name in files_below(folder) if not own.fullmatch(name)]


def remove_files(folder: Path, names: Iterable[str]) -> None:
    """Removes files below a folder in the given order, then the folders between that are empty now.

    Raises OSError.
    """
    parents: set[Path] = set()
    for name in names:
        path = folder / name
        path.unlink(missing_ok=True)
        parents |= {parent for parent in path.parents if parent.is_relative_to(folder) and parent != folder}
    for parent in sorted(parents, reverse=True):  # the deepest of each branch first
        with suppress(OSError):
            parent.rmdir()


def remove_own(folder: Path, own: re.Pattern[str]) -> None:
    """Removes the files that `own` matches, and the folder where it is empty then. Raises OSError."""
    remove_files(folder, [name for name in files_below(folder) if own.fullmatch(name)])
    if not folder.is_symlink():
        with suppress(OSError):
            folder.rmdir()


def move_files(source: Path, target: Path, names: list[str]) -> None:
    """Moves files to the same relative paths below another folder. Raises OSError."""
    for name in names:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).rename(target / name)
    remove_files(source, names)  # the folders between


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
def disk_full_errors(folder: Path, *, purpose: str, need: Callable[[], int]) -> Iterator[None]:
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
def file_lock(lock: Path, *, what: str) -> Iterator[None]:
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
        raise DataError(f"{folder}: holds files that tvit did not write: {shorten(foreign)}. Move them away.")
    shutil.rmtree(folder)


def size_text(size: float) -> str:
    """A size for people. 6960400115 -> "6.96 GB"."""
    for unit, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if size >= unit:
            return f"{size / unit:.3g} {name}"
    return f"{size:.0f} bytes"


def check_folder(option: str, given: Path, folder: Path | None = None) -> None:
    """Raises DataError where a file lies in the place of a folder, or of one above it.

    It is the one given with the option, or one that lies in that.
    """
    folder = folder or given
    with suppress(PermissionError):  # to write there will tell
        place = _nearest(folder)
        if not place.is_dir():
            where = "" if place == given else f"{place} "
            raise DataError(
                f"{option} {given}: {where}is a file, and a folder is wanted there. Name another folder, or move "
                "the file away."
            )


def check_writable(option: str, given: Path, folder: Path) -> None:
    """`check_folder`, and DataError where nothing may be written to the folder."""
    check_folder(option, given, folder)
    if not is_writable(folder):
        raise DataError(
            f"{option} {given}: you may not write to {_nearest(folder).absolute()}. Name another place, or ask for "
            "access."
        )


def is_writable(folder: Path) -> bool:
    """Whether files may be made in a folder, or the folder in what is there."""
    return os.access(_nearest(folder), os.W_OK | os.X_OK)


def check_file(option: str, path: Path | None, inputs: Sequence[Location]) -> None:
    """Raises DataError where a file to write is one of the inputs, or has no place that it can be written to."""
    if path is None:
        return
    check_writable(option, path, path.parent)
    if path.is_dir():
        raise DataError(f"{option} {path}: is a folder, and a file is wanted there. Name a file in it.")
    if path.exists() and any(isinstance(place, Path) and path.samefile(place) for place in inputs):
        raise DataError(f"{option} {path}: is the video itself. Name another file.")


@contextmanager
def collect_errors(unwritten: list[str]) -> Iterator[None]:
    """Notes down why something could not be written, so that it costs nothing else."""
    try:
        yield
    except (RunError, VideoError) as error:
        unwritten.append(str(error))


def _nearest(folder: Path) -> Path:
    """The folder, or the nearest one above it that exists."""
    return next(path for path in (folder, *folder.parents) if path.exists())


Location: TypeAlias = Path | str  # a file, or the URL of a stream
