"""Atomic writes, locks, hashes, removal of tvit's own files, free space, and checks of output paths."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Final, TypeAlias

from tvit_cli.errors import DataError, Interrupted, RunError, VideoError, plural, shorten, size_text

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

Location: TypeAlias = Path | str  # a file, or the URL of a stream


@dataclass(frozen=True, eq=False)
class FrameArray:
    """A video in memory: RGB frames, uint8 (T, H, W, 3), of which `fps` are shown per second."""

    frames: NDArray[np.uint8]
    fps: float

    def __str__(self) -> str:
        return f"array of {plural(len(self.frames), 'frame')}"


Source: TypeAlias = Location | FrameArray
SPARE_BYTES: Final = 64 * 1024**2  # kept free for the rest of the system
# File systems without locks, or without locks on read-only files (NFS, Lustre, some of FUSE): tvit runs unlocked.
LOCKLESS: Final = frozenset({errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EBADF})
FULL: Final = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})  # EFBIG: a limit on file sizes

# Text that a spreadsheet would run as a formula; a number with its sign is none.
_FORMULA = re.compile(r"[=@\t\r]|[+-](?![\d.]+(e[+-]?\d+)?\Z)")


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """A temporary path with the same suffix, which replaces `path` when the block ends.

    If the block fails or the process is killed, `path` stays as it was. Missing folders are made. Raises OSError.
    """
    temporary = path.with_name(f".part-{os.getpid()}-{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        temporary.replace(path)
    finally:
        with suppress(OSError):  # the folder itself may be unreachable
            temporary.unlink()


def write_json(path: Path, value: Any, *, indent: int = 1) -> None:
    """Writes JSON atomically and durably. Raises OSError."""
    temporary = path.with_name(f".{path.name}.new")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(json.dumps(value, indent=indent, ensure_ascii=False) + "\n")
        sync(file.fileno())
    rename(temporary, path)


def csv_row(row: Iterable[object]) -> list[object]:
    """The cells of a row of CSV; text that a spreadsheet would run as a formula gets an apostrophe before it."""
    return [f"'{cell}" if isinstance(cell, str) and _FORMULA.match(cell) else cell for cell in row]


def sync(descriptor: int) -> None:
    """Waits until a file's bytes are on the disk."""
    os.fsync(descriptor)


def sync_folder(folder: Path) -> None:
    """Waits until a folder's entries are on the disk; Windows opens no folders, so nothing happens there."""
    if sys.platform != "win32":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def rename(source: Path, target: Path) -> None:
    """Renames over `target`, durably where the system can sync a folder."""
    source.replace(target)
    sync_folder(target.parent)


def sha256(path: Path, *, progress: Callable[[int, int], None] | None = None) -> str:
    """SHA-256 of a file, 64 hexadecimal digits; `progress` gets (bytes done, bytes in all). Raises OSError."""
    import hashlib  # 3 ms at start-up

    with path.open("rb") as file:
        if progress is None:
            return hashlib.file_digest(file, "sha256").hexdigest()
        digest, total = hashlib.sha256(), path.stat().st_size
        while chunk := file.read(2**20):
            digest.update(chunk)
            progress(file.tell(), total)
        return digest.hexdigest()


@contextmanager
def file_lock(lock: Path, busy: str, *, inherited: bool = True, stays: bool = True) -> Iterator[bool]:
    """Holds a lock file until the block or the process ends; yields whether the file system has locks.

    Forked processes hold an `inherited` lock, too; the other kind belongs to this process alone. The empty file
    stays, or is removed at the end; one that was removed meanwhile counts as held by another process.

    Raises RunError with the text `busy` if another process holds the lock, or if the file cannot be made.
    """
    with _open_lock(lock) as file:
        has_locks = True
        try:
            _lock(file.fileno(), inherited)
        except OSError as error:
            if error.errno not in LOCKLESS:
                raise RunError(busy) from error
            has_locks = False
        if os.fstat(file.fileno()).st_nlink == 0:  # removed since it was opened
            raise RunError(busy)
        try:
            yield has_locks
        finally:
            if not stays:
                with suppress(OSError):
                    lock.unlink()


def _open_lock(lock: Path) -> BinaryIO:
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        return lock.open("a+b")
    except OSError as error:
        if lock.is_file():  # a read-only file can be locked as well
            return lock.open("rb")
        text = f"{lock.parent}: cannot be written ({error.strerror}). Choose another folder."
        raise RunError(text) from error


if sys.platform == "win32":
    import msvcrt

    def _lock(descriptor: int, inherited: bool) -> None:
        msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
else:
    import fcntl

    def _lock(descriptor: int, inherited: bool) -> None:
        (fcntl.flock if inherited else fcntl.lockf)(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


def files_below(folder: Path) -> list[str]:
    """Sorted relative paths (with "/") of the files below a folder; links count as files and are not followed.

    Empty if the folder is missing or a link itself.
    """
    found: list[str] = []
    if not folder.is_symlink():
        for root, folders, files in os.walk(folder):
            links = [name for name in folders if Path(root, name).is_symlink()]
            found += [Path(root, name).relative_to(folder).as_posix() for name in (*files, *links)]
    return sorted(found)


def foreign_files(folder: Path, own: re.Pattern[str]) -> list[str]:
    """The `files_below` whose relative paths `own` does not match."""
    return [name for name in files_below(folder) if not own.fullmatch(name)]


def remove_files(folder: Path, names: Iterable[str]) -> None:
    """Removes files below a folder in the given order, then the folders that this empties. Raises OSError."""
    parents: set[Path] = set()
    for name in names:
        path = folder / name
        path.unlink(missing_ok=True)
        parents |= {parent for parent in path.parents if parent.is_relative_to(folder) and parent != folder}
    for parent in sorted(parents, reverse=True):  # deepest first
        with suppress(OSError):
            parent.rmdir()


def remove_own(folder: Path, own: re.Pattern[str]) -> None:
    """Removes the files that `own` matches, and the folder if that empties it. Raises OSError."""
    remove_files(folder, [name for name in files_below(folder) if own.fullmatch(name)])
    if not folder.is_symlink():
        with suppress(OSError):
            folder.rmdir()


def move_files(source: Path, target: Path, names: list[str]) -> None:
    """Moves files to the same relative paths below another folder. Raises OSError."""
    for name in names:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).rename(target / name)
    remove_files(source, names)  # leaves the emptied folders to be removed


def remove_work(folder: Path, own: re.Pattern[str]) -> None:
    """Removes a working folder if it exists and `own` matches the relative paths of all its files.

    Raises DataError for foreign files, or if `folder` is a link or a file; nothing is removed then.
    """
    if not os.path.lexists(folder):
        return
    if folder.is_symlink() or not folder.is_dir():
        raise DataError(f"{folder}: is in the way, and tvit did not write it. Move it away.")
    if foreign := foreign_files(folder, own):
        raise DataError(f"{folder}: holds files that tvit did not write: {shorten(foreign)}. Move them away.")
    shutil.rmtree(folder)


def free_bytes(folder: Path) -> int:
    """Free bytes on the disk of `folder`, or of its nearest parent that exists."""
    return shutil.disk_usage(_nearest(folder)).free


def require_free(folder: Path, need: int, *, purpose: str) -> None:
    """Raises RunError if fewer than `need` bytes and a reserve are free."""
    have = free_bytes(folder)
    if need + SPARE_BYTES > have:
        space = f"{size_text(have)} are free ({size_text(SPARE_BYTES)} are kept in reserve)"
        advice = f"Free {size_text(need + SPARE_BYTES - have)}, or take another disk (--data-directory)."
        raise RunError(f"{folder}: {purpose} needs {size_text(need)}, {space}. {advice}")


@contextmanager
def disk_full_errors(folder: Path, *, purpose: str, need: Callable[[], int]) -> Iterator[None]:
    """Turns a full disk into a RunError; `need` returns the bytes that are still to come."""
    try:
        yield
    except OSError as error:
        if error.errno not in FULL:
            raise
        amount = f"{size_text(left)} more are needed" if (left := need()) > 0 else "more space is needed"
        reason = f"disk full while {purpose} ({error.strerror}); {amount}"
        raise RunError(f"{folder}: {reason}. Free space and run the same command again to resume.") from error


def check_folder(option: str, given: Path, folder: Path | None = None) -> None:
    """Raises DataError if `folder` or a parent is a file.

    `given` is the value of `option`; `folder` is the same or lies below it.
    """
    with suppress(PermissionError):  # writing will report it
        nearest = _nearest(folder or given)
        if not nearest.is_dir():
            file = "" if nearest == given else f"{nearest} "
            raise DataError(
                f"{option} {given}: {file}is a file, not a folder. Move it, or name another folder."
            )


def check_writable(option: str, given: Path, folder: Path) -> None:
    """`check_folder`, and DataError without write permission."""
    check_folder(option, given, folder)
    if not is_writable(folder):
        parent = _nearest(folder).absolute()
        raise DataError(f"{option} {given}: no write permission in {parent}. Name another folder.")


def is_writable(folder: Path) -> bool:
    """Whether files can be made in a folder, or the folder in its nearest parent."""
    return os.access(_nearest(folder), os.W_OK | os.X_OK)


def check_file(option: str, path: Path | None, inputs: Sequence[Location]) -> None:
    """Raises DataError if an output file is a folder, one of the inputs, or cannot be written."""
    if path is None:
        return
    check_writable(option, path, path.parent)
    if path.is_dir():
        raise DataError(f"{option} {path}: is a folder, not a file. Name a file in it.")
    if path.exists() and any(isinstance(source, Path) and path.samefile(source) for source in inputs):
        raise DataError(f"{option} {path}: is the video itself. Name another file.")


@contextmanager
def collect_errors(errors: list[str]) -> Iterator[None]:
    """Collects the text of a RunError or VideoError, so that later work goes on; a stop is raised."""
    try:
        yield
    except Interrupted:
        raise
    except (RunError, VideoError) as error:
        errors.append(str(error))


def _nearest(folder: Path) -> Path:
    return next(path for path in (folder, *folder.parents) if path.exists())
