"""Field types that several verbs' settings share."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, PlainValidator


def _split(value: Any) -> Any:
    """Comma-separated text becomes a list. "q, k" -> ["q", "k"]"""
    return [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value


def _compiles(value: str) -> str:
    try:
        re.compile(value)
    except re.error as error:
        raise ValueError(f"it is not a regular expression: {error}") from error
    return value


def _count_or_auto(value: Any) -> Any:
    count = value.strip() if isinstance(value, str) else value
    if count == "auto":
        return count
    try:
        count = int(count) if isinstance(count, int | str) else 0
    except ValueError:
        count = 0
    if count < 1:
        raise ValueError("it should be a whole number, 1 or more, or auto")
    return count


Names = Annotated[tuple[str, ...], BeforeValidator(_split)]
Pattern = Annotated[str, AfterValidator(_compiles)]
CountOrAuto = Annotated[int | Literal["auto"], PlainValidator(_count_or_auto)]
Device = Literal["auto", "cpu", "cuda", "mps"]

GROUP_PATTERN = r"_g(\d+)_"  # UCF101: v_Archery_g01_c02.avi, clips of one group are cut from one recording
