"""Videos named on the command line (files, folders, patterns, URLs), and output files."""

from __future__ import annotations

import glob
import math
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any, TypeAlias
from urllib.parse import unquote, urlsplit

import numpy as np
from numpy.typing import NDArray

from tvit_cli.data.layout import VIDEO_SUFFIXES, is_hidden
from tvit_cli.errors import DataError, RunError
from tvit_cli.files import FrameArray, Location, Source, atomic_write

Video: TypeAlias = str | Path | NDArray[np.uint8] | FrameArray  # a name, or frames (T, H, W, 3)


def find_videos(names: Iterable[str | Path] | Path) -> list[Location]:
    """Files and URLs as given; the videos of folders and patterns, sorted.

    `**` in a pattern matches any number of folders. A file whose name looks like a pattern is that file.
    A name that is not in a list counts as a list of one. Raises DataError for a name without a video.
    """
    names = [names] if isinstance(names, str | Path) else names
    return [location for name in names for location in _find(name)]


def find_sources(videos: Video | Iterable[Video], fps: float = 25.0) -> list[Source]:
    """`find_videos`, and NumPy arrays of frames. Raises DataError for an array of another form, or a bad rate."""
    if not (isinstance(fps, int | float) and 0 < fps < math.inf):
        raise DataError(f"fps: {fps}: it should be a number above 0, the frames per second.")
    found: list[Source] = []
    for video in [videos] if isinstance(videos, str | Path | np.ndarray | FrameArray) else videos:
        if isinstance(video, np.ndarray | FrameArray):
            found.append(_frame_array(video, fps) if isinstance(video, np.ndarray) else video)
        else:
            found += _find(video)
    return found


def find_source(video: Video, fps: float = 25.0) -> Source:
    """The one video of a name, or an array. Raises DataError for none or several."""
    found = find_sources([video], fps)
    if len(found) > 1:
        raise DataError(f"{video}: stands for {len(found)} videos. Name one of them, such as {found[0]}.")
    return found[0]


def _frame_array(frames: NDArray[Any], fps: float) -> FrameArray:
    if frames.dtype == np.uint8 and frames.ndim == 4 and frames.shape[3] == 3 and frames.size:
        return FrameArray(frames, float(fps))
    advice = ""
    if frames.ndim == 4 and frames.shape[1] == 3 != frames.shape[3]:
        advice = " Take frames.transpose(0, 2, 3, 1)."
    elif frames.ndim == 3 and frames.shape[2] == 3:
        advice = " numpy.stack(frames) makes a video of several frames."
    elif np.issubdtype(frames.dtype, np.floating) and frames.size and frames.max() <= 1:
        advice = " Take (255 * frames).round().astype(numpy.uint8)."
    given = f"{frames.dtype} {frames.shape}"
    raise DataError(f"frames: {given}: they should be uint8 (T, H, W, 3), RGB from 0 to 255.{advice}")


def require_single_video(
    option: str, path: Path | None, locations: Sequence[Location], advice: str = "Name one, or leave it out."
) -> None:
    """Raises DataError for an option of a single video when several are given."""
    if path is not None and (count := len(locations)) > 1:
        raise DataError(f"--{option} {path}: takes one video, {count} are named. {advice}")


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
        advice = "Give the name of a video, or its frames as a NumPy array."
        raise DataError(f"{type(name).__name__}: neither a path nor a URL. {advice}")
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
