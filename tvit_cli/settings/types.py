"""Field types and field groups shared by several verbs' settings."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BeforeValidator, Field, PlainValidator

from tvit_cli.settings.base import Settings, about


def _split(value: Any) -> Any:
    """Comma-separated text becomes a list. "q, k" -> ["q", "k"]"""
    return [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value


def _none(value: Any) -> Any:
    """The word for an empty list or table. "none" -> "" """
    return "" if isinstance(value, str) and value.strip() == "none" else value


def _pairs(value: Any) -> Any:
    """Comma-separated name=value text becomes a table. "q=16, fc1=4" -> {"q": "16", "fc1": "4"}"""
    if not isinstance(value, str):
        return value
    table: dict[str, str] = {}
    for part in _split(value):
        name, equals, number = (word.strip() for word in part.partition("="))
        if not (name and equals and number):
            raise ValueError(f"{part!r} is not of the form name=value, as in q=16,fc1=4")
        if name in table:
            raise ValueError(f"{name} is given twice")
        table[name] = number
    return table


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


def _is_train_mode(value: str) -> str:
    if not re.fullmatch(r"lora|all|classifier|last-[1-9][0-9]*", value):
        raise ValueError(
            "it should be lora, all, classifier, or last-N with a number of blocks, as in last-2"
        )
    return value


V = TypeVar("V")
Names = Annotated[tuple[str, ...], BeforeValidator(_split)]
NamesOrNone = Annotated[Names, BeforeValidator(_none)]
Pairs = Annotated[dict[str, V], BeforeValidator(_pairs), BeforeValidator(_none)]
TrainMode = Annotated[str, AfterValidator(_is_train_mode)]
Pattern = Annotated[str, AfterValidator(_compiles)]
CountOrAuto = Annotated[int | Literal["auto"], PlainValidator(_count_or_auto)]
Device = Literal["auto", "cpu", "cuda", "mps"]
MixedPrecision = Literal["auto", "no", "bf16", "fp16"]
PRECISION = "Number format of the forward pass; auto is bf16 where the GPU is fast at it, else no"

GROUP_PATTERN = r"_g(\d+)_"  # UCF101: v_Archery_g01_c02.avi, clips of one group are cut from one recording

_UNITS = {"": 1.0, "ms": 1e-3, "s": 1.0, "min": 60.0, "h": 3600.0}


def seconds(value: Any) -> Any:
    """A length of time with its unit becomes seconds, the unit of a bare number. "500ms" -> 0.5, "2s" -> 2.0"""
    if not isinstance(value, str):
        return value
    match = re.fullmatch(r"([0-9]*\.?[0-9]+)\s*([a-z]*)", value.strip())
    if match is None or match[2] not in _UNITS:
        raise ValueError("it should be a length of time, such as 2s, 500ms or 1min")
    return float(match[1]) * _UNITS[match[2]]


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


DATA = "Data"


class DataSettings(Settings):
    """A data set and its subsets."""

    path_to_data: str | None = Field(
        None,
        description="Folder of videos, CSV manifest, or a known data set's name",
        json_schema_extra=about(
            DATA,
            harmless=True,
            reference="required",
            why="`tvit download` puts it there",
            default="ucf101, else the only data set under data/",
            metavar="PATH",
        ),
    )
    group_pattern: Pattern = Field(
        GROUP_PATTERN,
        description="Regular expression on file names: clips of one recording share what it matches",
        json_schema_extra=about(DATA, metavar="REGEX"),
    )
    split: int = Field(
        1,
        ge=1,
        le=3,
        description="Official split, where the data has the lists of UCF101's three",
        json_schema_extra=about(DATA),
    )
    val_groups: str = Field(
        "auto",
        description="Groups held out of train for validation: names, a count, none, or auto (15 % of them)",
        json_schema_extra=about(DATA, metavar="NAMES|COUNT|none|auto"),
    )
    test_groups: str = Field(
        "auto",
        description="Groups held out for the final test where the data has no test subset of its own",
        json_schema_extra=about(DATA, metavar="NAMES|COUNT|none|auto"),
    )
    max_bad: MaxBad = Field(
        MAX_BAD,
        description="Most videos that may be unreadable: a count, a percentage, or the larger of two",
        json_schema_extra=about(DATA, metavar="COUNT|PERCENT%", harmless=True),
    )
