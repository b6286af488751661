"""The page at the end of a command: one that cannot be written costs no numbers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Protocol, TypeVar

from tvit_cli.engine.events import Note, Report


class Facts(Protocol):
    """What a page says, and the folder that it goes to."""

    @property
    def folder(self) -> Path:
        """The folder of the page."""


F = TypeVar("F", bound=Facts)


def write_page(write: Callable[[F], Path], facts: F, report: Report) -> Path | None:
    """Write a page of the facts and return its path; None, with a warning, where it cannot be written."""
    try:
        return write(facts)
    except OSError as error:
        report(Note(f"{facts.folder}: the report could not be written ({error.strerror}).", "warning"))
        return None
