"""How many unreadable videos are too many."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import AfterValidator

MAX_BAD = "3 or 1%"
_PART = re.compile(r"(\d+)|(\d+(?:\.\d+)?)\s*%")


def most_bad(value: str, videos: int) -> int:
    """The most unreadable videos that `value` allows among so many; `3 or 1%` of 1,000 is 10."""
    most = 0
    for part in value.split(" or "):
        match = _PART.fullmatch(part.strip())
        if match is None or float(match[2] or 0) > 100:
            raise ValueError(f'"{part.strip()}" is neither a count nor a percentage, as in "{MAX_BAD}"')
        most = max(most, int(match[1]) if match[1] else int(float(match[2]) * videos / 100))
    return most


def _is_max_bad(value: str) -> str:
    most_bad(value, 0)
    return value


MaxBad = Annotated[str, AfterValidator(_is_max_bad)]
