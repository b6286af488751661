"""What a command is told to write: its place is looked at before the work, and a failure waits for the end."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from tvit_cli.data.container import Place
from tvit_cli.errors import DataError, RunError, VideoError


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
    if not may_write(folder):
        raise DataError(
            f"{option} {given}: you may not write to {_nearest(folder).absolute()}. Name another place, or ask for "
            "access."
        )


def may_write(folder: Path) -> bool:
    """Whether files may be made in a folder, or the folder in what is there."""
    return os.access(_nearest(folder), os.W_OK | os.X_OK)


def check_file(option: str, path: Path | None, inputs: Sequence[Place]) -> None:
    """Raises DataError where a file to write is one of the inputs, or has no place that it can be written to."""
    if path is None:
        return
    check_writable(option, path, path.parent)
    if path.is_dir():
        raise DataError(f"{option} {path}: is a folder, and a file is wanted there. Name a file in it.")
    if path.exists() and any(isinstance(place, Path) and path.samefile(place) for place in inputs):
        raise DataError(f"{option} {path}: is the video itself. Name another file.")


@contextmanager
def noted(unwritten: list[str]) -> Iterator[None]:
    """Notes down why something could not be written, so that it costs nothing else."""
    try:
        yield
    except (RunError, VideoError) as error:
        unwritten.append(str(error))


def _nearest(folder: Path) -> Path:
    """The folder, or the nearest one above it that exists."""
    return next(path for path in (folder, *folder.parents) if path.exists())
