"""What `tvit extract` can be told."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from tvit_cli.settings.base import Settings, about
from tvit_cli.settings.fields import GROUP_PATTERN, Pattern
from tvit_cli.settings.maxbad import MAX_BAD, MaxBad

DATA, FRAMES, HOW = "Data", "Frames", "How"


class ExtractSettings(Settings):
    """Decode videos once into a frame store that is read many times, or check them."""

    path_to_data: str | None = Field(
        None,
        description="Folder of videos, CSV manifest, or a known data set's name",
        json_schema_extra=about(DATA, default="ucf101, else the only data set under data/", metavar="PATH"),
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
        description="Official split noted down, where the data has the lists of UCF101's three",
        json_schema_extra=about(DATA),
    )
    val_groups: str = Field(
        "auto",
        description="Groups noted down as held out of train for validation",
        json_schema_extra=about(DATA, metavar="NAMES|COUNT|none|auto"),
    )
    test_groups: str = Field(
        "auto",
        description="Groups noted down as held out for the final test",
        json_schema_extra=about(DATA, metavar="NAMES|COUNT|none|auto"),
    )
    output: Path | None = Field(
        None,
        description="Folder of the frame store",
        json_schema_extra=about(DATA, default="frames/ beside the videos, where train and eval find it"),
    )
    max_bad: MaxBad = Field(
        MAX_BAD,
        description="Most videos that may be unreadable: a count, a percentage, or the larger of two",
        json_schema_extra=about(DATA, metavar="COUNT|PERCENT%"),
    )
    frames_per_video: int = Field(
        32,
        ge=1,
        le=65535,
        description="Frames kept of each video, evenly over its length; all of a shorter one",
        json_schema_extra=about(FRAMES),
    )
    quality: int = Field(90, ge=1, le=100, description="JPEG quality", json_schema_extra=about(FRAMES))
    short_side: int = Field(
        256,
        ge=16,
        le=8192,
        description="Short side that larger frames are scaled down to, in pixels",
        json_schema_extra=about(FRAMES),
    )
    shard_mib: int = Field(
        256,
        ge=1,
        le=65536,
        description="Size of a file of the store, in MiB; an interruption costs no more work than one",
        json_schema_extra=about(FRAMES),
    )
    num_workers: int | None = Field(
        None,
        ge=0,
        le=256,
        description="Processes that decode videos; 0 decodes in this process",
        json_schema_extra=about(HOW, default="from the CPU count"),
    )
    overwrite: bool = Field(
        False, description="Remove a store that is there and begin anew", json_schema_extra=about(HOW)
    )
    repair: bool = Field(
        False,
        description="Read the whole store first and make damaged clips anew",
        json_schema_extra=about(HOW),
    )
    check: bool = Field(
        False,
        description="Write nothing: decode every video and report what it holds and what is wrong",
        json_schema_extra=about(HOW),
    )
    json_lines: bool = Field(
        False,
        description="Print one JSON object per video of --check",
        json_schema_extra=about(HOW, flag="--json"),
    )
