"""Videos named on the command line (files, folders, patterns, URLs), and output files."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from urllib.parse import unquote, urlsplit

from tvit_cli.data.layout import VIDEO_SUFFIXES, is_hidden
from tvit_cli.errors import DataError, RunError
from tvit_cli.files import Location, atomic_write


def find_videos(names: Iterable[str | Path] | Path) -> list[Location]:
    """Files and URLs as given; the videos of folders and patterns, sorted.

    `**` in a pattern matches any number of folders. A file whose name looks like a pattern is that file.
    A name that is not in a list counts as a list of one. Raises DataError for a name without a video.
    """
    names = [names] if isinstance(names, str | Path) else names
    return [location for name in names for location in _find(name)]


def find_video(name: str | Path) -> Location:
    """The one video of a name. Raises DataError for none or several."""
    found = find_videos([name])
    if len(found) > 1:
        raise DataError(f"{name}: stands for {len(found)} videos. Name one of them, such as {found[0]}.")
    return found[0]


def require_single_video(option: str, path: Path | None, locations: Sequence[Location]) -> None:
    """Raises DataError for an option of a single video when several are given."""
    if path is not None and (count := len(locations)) > 1:
        raise DataError(f"--{option} {path}: takes one video, {count} are named. Name one, or leave it out.")


@contextmanager
def output_file(option: str, path: Path) -> Iterator[Path]:
    """`atomic_write` of an option's file. Raises RunError where it cannot be written; an older file then stays."""
    from safetensors import SafetensorError

    try:
        with atomic_write(path) as temporary:
            yield temporary
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise RunError(
            f"{option} {path}: cannot be written ({reason}). Free some space, or name another file."
        ) from error


def _find(name: str | Path) -> Sequence[Location]:
    if not isinstance(name, str | os.PathLike):  # a caller in Python
        raise DataError(f"{type(name).__name__}: neither a path nor a URL. Give the name of a video file.")
    if not str(name):
        raise DataError('"": an empty name. Is a variable of the shell not set?')
    if isinstance(name, str) and re.match("[A-Za-z][A-Za-z0-9+.-]+://", name):  # C:// is a drive
        try:
            parts = urlsplit(name)
        except ValueError as error:
            raise DataError(f"{name}: is no URL ({error}). Correct it.") from error
        if parts.scheme.lower() != "file":
            return [name]
        name = unquote(parts.path)
    path = Path(name)
    if path.is_dir():
        if not (inside := _videos_below(path)):
            raise DataError(f"{path}: no video in this folder. Name another one.")
        return inside
    if path.exists():
        return [path]
    if not glob.has_magic(str(path)):
        raise DataError(f"{path}: no such file or folder. Check its name.")
    matches = map(Path, sorted(glob.glob(str(path), recursive=True)))  # noqa: PTH207  # Path.glob: no absolute ones
    videos = chain.from_iterable(_videos_below(match) if match.is_dir() else [match] for match in matches)
    if not (found := list(dict.fromkeys(videos))):
        raise DataError(f"{path}: no file matches this pattern. Check it.")
    return found


def _videos_below(folder: Path) -> list[Path]:
    files = (path for path in folder.rglob("*") if path.suffix.lower() in VIDEO_SUFFIXES and path.is_file())
    return sorted(path for path in files if not is_hidden(path.relative_to(folder)))
