"""How messages name what is on disk: the name that was meant, and a few of many."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches

_SHOWN = 12  # how many names a message lists


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """The question for a word that is none of the known ones, after a space; empty where none is near."""
    spelt = {name.casefold(): name for name in known}
    near = get_close_matches(word.casefold(), spelt, n=3)
    return f" Did you mean {' or '.join(spelt[name] for name in near)}?" if near else ""


def listed(names: Iterable[str]) -> str:
    """A few names, and how many more there are."""
    every = list(names)
    more = len(every) - _SHOWN
    return ", ".join(every[:_SHOWN]) + (f" and {more} more" if more > 0 else "")
