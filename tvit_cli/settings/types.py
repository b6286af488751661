"""Field types and settings shared by several verbs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BeforeValidator, PlainValidator

from tvit_cli.settings.base import Settings, setting


def _split(value: Any) -> Any:
    """Comma-separated text becomes a list. "q, k" -> ["q", "k"]"""
    return [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value


def _none(value: Any) -> Any:
    """An empty list or table, spelt as a word. "none" -> "" """
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
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(f"it is not a regular expression: {error}") from error
    return value


def _count_or_auto(value: Any) -> Any:
    count = str(value).strip()
    if count != "auto" and not (count.isdecimal() and int(count) > 0):
        raise ValueError("it should be a whole number, 1 or more, or auto")
    return count if count == "auto" else int(count)


def _is_train_mode(value: str) -> str:
    if not re.fullmatch(r"lora|all|classifier|probe|last-[1-9][0-9]*", value):
        raise ValueError(
            "it should be lora, all, classifier, probe, or last-N (the last N blocks), as in last-2"
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

# Panels and descriptions of settings that several verbs have.
MODEL, DATA = "Model", "Data"
MODEL_TEXT = "Model folder, run folder, name on the Hugging Face hub, or checkpoint of the reference"
DATA_TEXT = "Folder of videos, CSV manifest, or name of a known data set"
SPLIT_TEXT = "Official split, for data with the three split lists of UCF101"
RUNS_TEXT = "Folder of all runs"
DEVICE_TEXT = "Device of the model"
PRECISION_TEXT = "Mixed precision of the forward pass; auto is bf16 where it is fast, else no"
PROCESSES_TEXT = "Processes on this machine, one per GPU"
RUNS = Path("working_directory")

GROUP_PATTERN = r"_g(\d+)_"  # UCF101: v_Archery_g01_c02.avi, clips of one group are cut from one recording
MAX_BAD = "3 or 1%"
_UNITS = {"": 1.0, "ms": 1e-3, "s": 1.0, "min": 60.0, "h": 3600.0}


def seconds(value: Any) -> Any:
    """Converts a duration to seconds; seconds is the default unit. "500ms" -> 0.5, "2s" -> 2.0"""
    if not isinstance(value, str):
        return value
    match = re.fullmatch(r"([0-9]*\.?[0-9]+)\s*([a-z]*)", value.strip())
    if match is None or match[2] not in _UNITS:
        raise ValueError("it should be a duration, such as 2s, 500ms or 1min")
    return float(match[1]) * _UNITS[match[2]]


Seconds = Annotated[float | None, BeforeValidator(seconds)]


def most_bad(value: str, videos: int) -> int:
    """Unreadable videos that `value` allows of `videos`; `3 or 1%` of 1,000 is 10."""
    most = 0
    for part in value.split(" or "):
        match = re.fullmatch(r"(\d+)|(\d+(?:\.\d+)?)\s*%", part.strip())
        if match is None or float(match[2] or 0) > 100:
            raise ValueError(f'"{part.strip()}" is neither a count nor a percentage, as in "{MAX_BAD}"')
        most = max(most, int(match[1]) if match[1] else int(float(match[2]) * videos / 100))
    return most


def _is_max_bad(value: str) -> str:
    most_bad(value, 0)
    return value


MaxBad = Annotated[str, AfterValidator(_is_max_bad)]


class DataSettings(Settings):
    """Settings of a data set and its subsets."""

    # fmt: off
    path_to_data: str | None = setting(None, DATA_TEXT, DATA, resume_safe=True, reference="required",
        why="`tvit download` puts it there", default_text="ucf101, else the only data set under data/",
        metavar="PATH", essential=True)
    group_pattern: Pattern = setting(GROUP_PATTERN,
        "Regular expression on file names; its match is the group (one recording)", DATA, metavar="REGEX",
        essential=True)
    split: int = setting(1, SPLIT_TEXT, DATA, ge=1, le=3)
    val_groups: str = setting("auto",
        "Validation groups, taken from train: names, a count, none, or auto (15 %)", DATA,
        metavar="NAMES|COUNT|none|auto")
    test_groups: str = setting("auto", "Test groups, for data without a test subset", DATA,
        metavar="NAMES|COUNT|none|auto")
    max_bad: MaxBad = setting(MAX_BAD, "Most unreadable videos: a count, a percentage, or the larger of two",
        DATA, metavar="COUNT|PERCENT%", resume_safe=True)
    # fmt: on


class InferenceSettings(Settings):
    """Settings of the verbs that apply a trained model to videos."""

    # fmt: off
    model: Path | None = setting(None, MODEL_TEXT, MODEL,
        default_text="the newest under the working directory", short="-m", essential=True)
    working_directory: Path = setting(RUNS, RUNS_TEXT, MODEL)
    device: Device = setting("auto", DEVICE_TEXT, MODEL, essential=True)
    mixed_precision: MixedPrecision = setting("auto", PRECISION_TEXT, MODEL)
    per_gpu_batch_size: int = setting(8, "Clips per GPU in one forward pass", MODEL, ge=1)
    # fmt: on
