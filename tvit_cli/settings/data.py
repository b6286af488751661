"""Which videos, and how they are divided: what every verb that reads a data set can be told."""

from __future__ import annotations

from pydantic import Field

from tvit_cli.settings.base import Settings, about
from tvit_cli.settings.fields import GROUP_PATTERN, Pattern
from tvit_cli.settings.maxbad import MAX_BAD, MaxBad

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
