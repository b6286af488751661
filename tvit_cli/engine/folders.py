"""Folders that are named to be written into."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from tvit_cli.errors import DataError


def check_folder(option: str, given: Path, folder: Path | None = None) -> None:
    """Raises DataError where a file lies in the place of a folder, or of one above it.

    It is the one given with the option, or one that lies in that.
    """
    folder = folder or given
    with suppress(PermissionError):  # to write there will tell
        place = next(path for path in (folder, *folder.parents) if path.exists())
        if not place.is_dir():
            where = "" if place == given else f"{place} "
            raise DataError(
                f"{option} {given}: {where}is a file, and a folder is wanted there. Name another folder, or move "
                "the file away."
            )
