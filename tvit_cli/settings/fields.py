"""Field types that several verbs' settings share."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator


def _split(value: Any) -> Any:
    """Comma-separated text becomes a list. "q, k" -> ["q", "k"]"""
    return [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value


def _compiles(value: str) -> str:
    try:
        re.compile(value)
    except re.error as error:
        raise ValueError(f"it is not a regular expression: {error}") from error
    return value


Names = Annotated[tuple[str, ...], BeforeValidator(_split)]
Pattern = Annotated[str, AfterValidator(_compiles)]
Device = Literal["auto", "cpu", "cuda", "mps"]

GROUP_PATTERN = r"_g(\d+)_"  # UCF101: v_Archery_g01_c02.avi, clips of one group are cut from one recording
