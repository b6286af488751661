"""Videos named on the command line: files, folders, patterns, URLs."""

from __future__ import annotations

import glob
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from urllib.parse import unquote, urlsplit

from tvit_cli.data.layout import VIDEO_SUFFIXES, Video, is_hidden, printable
from tvit_cli.errors import DataError
from tvit_cli.files import Location

_URL = re.compile(r"[a-z][a-z0-9+.-]+://", re.IGNORECASE)  # two letters at least: C:// is a drive


def find_videos(names: Iterable[str | Path]) -> list[Location]:
    """What names stand for: files as they are given, folders and patterns as the videos they hold, sorted.

    `**` in a pattern stands for any number of folders. A file whose name looks like a pattern is that file.
    Raises DataError for a name that stands for nothing.
    """
    return [place for name in names for place in _found(name)]


def find_video(name: str | Path) -> Location:
    """The one video that a name stands for. Raises DataError where it is none, or several."""
    places = find_videos([name])
    if len(places) > 1:
        raise DataError(f"{name}: stands for {len(places)} videos. Name one of them, such as {places[0]}.")
    return places[0]


def require_single_video(option: str, path: Path | None, places: Sequence[Location]) -> None:
    """Refuse an option whose file is of one video where several are named. Raises DataError."""
    if path is not None and len(places) > 1:
        raise DataError(f"--{option} {path}: is of one video, and {len(places)} are named.")


def as_video(place: Location, label: str) -> Video:
    """A place as a video to score; the label is one that nobody asks for."""
    path, url = (Path(place), place) if isinstance(place, str) else (place, "")
    return Video(path=path, name=printable(str(place)), label=label, subset="test", group=None, url=url)


def _found(name: str | Path) -> list[Location]:
    if not str(name):
        raise DataError('"": an empty name. Is a variable of the shell not set?')
    if isinstance(name, str) and _URL.match(name):
        try:
            parts = urlsplit(name)
        except ValueError as error:
            raise DataError(f"{name}: is no URL ({error}).") from error
        if parts.scheme.lower() != "file":
            return [name]
        name = unquote(parts.path)
    path = Path(name)
    if path.is_dir():
        inside = _videos_below(path)
        if not inside:
            raise DataError(f"{path}: no video in this folder.")
        return inside
    if path.exists():
        return [path]
    if not glob.has_magic(str(path)):
        raise DataError(f"{path}: no such file or folder.")
    found = glob.glob(str(path), recursive=True)  # noqa: PTH207  # Path.glob takes no absolute pattern
    matches = [Path(match) for match in sorted(found)]
    videos = {
        place: None for match in matches for place in (_videos_below(match) if match.is_dir() else [match])
    }
    if not videos:
        raise DataError(f"{path}: no file matches this pattern.")
    return list(videos)


def _videos_below(folder: Path) -> list[Location]:
    return [
        *sorted(
            path
            for path in folder.rglob("*")
            if path.suffix.lower() in VIDEO_SUFFIXES
            and path.is_file()
            and not is_hidden(path.relative_to(folder))
        )
    ]
