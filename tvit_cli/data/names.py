"""How files and classes are named: in text that can be written anywhere, and a few of many."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Iterable
from pathlib import Path

_SHOWN = 12  # how many names a message lists


def listed(names: Iterable[str]) -> str:
    """A few names, and how many more there are."""
    every = list(names)
    more = len(every) - _SHOWN
    return ", ".join(every[:_SHOWN]) + (f" and {more} more" if more > 0 else "")


def readable(name: str) -> str:
    r"""A file's name as text that can be written anywhere: a byte that is not UTF-8 in six letters, `\udcXX`."""
    return name.encode("utf-8", "backslashreplace").decode("utf-8")


def same_class(label: str) -> str:
    """What the spellings of one class have in common: neither case nor how accents are put together counts.

    macOS writes an accented letter as two characters, other systems as one.
    """
    return unicodedata.normalize("NFC", label).casefold()


def spelling(labels: Iterable[str]) -> Callable[[str], str]:
    """What spells a label as it is spelt in `labels`, where one of them is the same class; itself comes first."""
    known = list(labels)
    spelt = {same_class(label): label for label in known} | {label: label for label in known}
    return lambda label: spelt.get(label, spelt.get(same_class(label), label))


def is_hidden(path: Path) -> bool:
    """Whether a path, relative to where it was looked for, is hidden or an archiver's dropping."""
    return any(part.startswith(".") or part == "__MACOSX" for part in path.parts)
