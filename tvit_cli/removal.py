"""Removal of files that tvit wrote. Every other file stays, and symbolic links are never followed."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

SHOWN = 3  # names in a message; the rest are counted


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


def some(names: list[str]) -> str:
    """The first names, and the number of the others. ["a", "b", "c", "d", "e"] -> "a, b, c and 2 more" """
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
