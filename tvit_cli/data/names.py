"""How messages and pages name a few of many."""

from __future__ import annotations

from collections.abc import Iterable

_SHOWN = 12  # how many names a message lists


def listed(names: Iterable[str]) -> str:
    """A few names, and how many more there are."""
    every = list(names)
    more = len(every) - _SHOWN
    return ", ".join(every[:_SHOWN]) + (f" and {more} more" if more > 0 else "")
