"""Files that are whole, or as they were before: written beside their place, then put there."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """The path to write to instead, with the same suffix; what is there when the block ends becomes the file.

    Where the block fails, or the process is killed in it, the file stays as it was, or absent. The folder is made
    where it is missing. Raises OSError.
    """
    beside = path.with_name(f".part-{os.getpid()}-{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield beside
        beside.replace(path)
    finally:
        with suppress(OSError):  # the folder itself may be what failed
            beside.unlink()
