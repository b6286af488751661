"""Errors for the user: exit code 2 for mistakes that the user can mend, 1 for failures of the machine or the run.

Messages name the thing, the value, the limit and the next step.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pydantic import ValidationError

START = """\
YOUR OWN VIDEOS (one folder per class)
tvit train --path-to-data my_videos --experiment-name mine
tvit eval working_directory/mine
tvit predict clip.avi --model working_directory/mine

WITHOUT VIDEOS (on generated clips)
tvit train --preset quickstart"""  # ends the help, and errors without data


class TvitError(Exception):
    """An error with a message for the user; `exit_code` is the process's exit code."""

    exit_code = 2


class SettingsError(TvitError):
    """A flag, environment variable, or key of a config file or preset that cannot be used."""


class DataError(TvitError):
    """A data folder, manifest or split that cannot be used."""


class VideoError(DataError):
    """One video that cannot be read."""


class ModelError(TvitError):
    """Pretrained weights, a model folder or a target module that cannot be used."""


class CheckpointError(TvitError):
    """A checkpoint that cannot be resumed."""


class RunError(TvitError):
    """A failure of the machine or the run, such as a full disk or a part of the work that failed."""

    exit_code = 1

    def __init__(self, message: str, *, by_all: bool = False) -> None:
        """With `by_all`, every process of a training raises it, and the main process alone prints it."""
        super().__init__(message)
        self.by_all = by_all


class Interrupted(RunError):
    """A stop by a signal after the state was saved; `exit_code` is the signal's, `result` that of the work done."""

    def __init__(self, message: str, *, exit_code: int, result: Any = None) -> None:
        super().__init__(message, by_all=True)
        self.exit_code, self.result = exit_code, result


def shorten(names: Iterable[str], most: int = 3, separator: str = ", ") -> str:
    """The first names and the number of the others. ["a", "b", "c", "d", "e"] -> "a, b, c and 2 more" """
    every = list(names)
    more = f" and {len(every) - most} more" if len(every) > most else ""
    return separator.join(every[:most]) + more


def validation_text(error: ValidationError, whole: str) -> str:
    """The first four of pydantic's errors in a line, as "depth: Input should be …"; `whole` names the value."""
    faults = (f"{'.'.join(map(str, fault['loc'])) or whole}: {fault['msg']}" for fault in error.errors())
    return shorten(faults, 4, "; ")


def natural_key(name: str) -> list[str]:
    """Sort key of a name that counts its numbers. "clip 10" comes after "clip 2", "B" after "a"."""
    parts = re.split(r"(\d+)", name.casefold())
    numbers = (part.lstrip("0") for part in parts[1::2])
    parts[1::2] = [f"{len(number):04}{number}" for number in numbers]
    return [*parts, name]


def plural(value: int, noun: str) -> str:
    """A number with its noun. 1, group -> 1 group; 3, class -> 3 classes; 1200, video -> 1,200 videos"""
    ending = "" if value == 1 else "es" if noun.endswith("s") else "s"
    return f"{value:,} {noun}{ending}"


def size_text(size: float) -> str:
    """A size with its unit. 6960400115 -> "6.96 GB"."""
    unit, name = next(((u, n) for u, n in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")) if size >= u), (1, ""))
    return f"{size / unit:.3g} {name}" if name else f"{size:.0f} bytes"
