"""What `tvit download` can be told."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field, model_validator

from tvit_cli.settings.base import Settings, about
from tvit_cli.settings.types import Names

WHAT, HOW = "What is fetched", "How"


class DownloadSettings(Settings):
    """Bring a known data set into a tidy folder; run again, it does what is missing and nothing else."""

    name: str | None = Field(
        None,
        description="Data set: ucf101, ucf101-subset, weizmann, motions",
        json_schema_extra=about(WHAT, positional=True, metavar="NAME", example="tvit download ucf101"),
    )
    list_sets: bool = Field(
        False, description="Show the known data sets", json_schema_extra=about(WHAT, flag="--list")
    )
    classes: Names = Field(
        (),
        description="Fetch these classes only, comma-separated",
        json_schema_extra=about(WHAT, default="all", metavar="NAMES"),
    )
    clips_per_class: int | None = Field(
        None,
        ge=1,
        description="Fetch so many clips of each class, spread over its groups",
        json_schema_extra=about(WHAT, default="all"),
    )
    data_directory: Path = Field(
        Path("data"), description="Folder that holds all data sets", json_schema_extra=about(HOW)
    )
    archive: Path | None = Field(
        None,
        description="Archive of the videos that is here already (a folder of them where the set has several)",
        json_schema_extra=about(HOW),
    )
    splits_archive: Path | None = Field(
        None,
        description="Archive of the split lists that is here already",
        json_schema_extra=about(HOW),
    )
    verify: bool = Field(
        False,
        description="Read every file and compare it with the manifest; fetch nothing",
        json_schema_extra=about(HOW),
    )
    repair: bool = Field(
        False,
        description="Verify, then fetch anew what is missing or damaged",
        json_schema_extra=about(HOW),
    )
    keep_archive: bool = Field(
        False,
        description="Keep the archives beside the videos; those that tvit did not fetch are always kept",
        json_schema_extra=about(HOW),
    )

    @model_validator(mode="after")
    def _one_errand(self) -> DownloadSettings:
        if self.name is None and not self.list_sets:
            raise ValueError("NAME: nothing given. `tvit download --list` shows the known data sets")
        if self.verify and self.repair:
            raise ValueError("--verify and --repair: repair verifies first, so give one of them")
        if (self.verify or self.repair) and (self.classes or self.clips_per_class):
            raise ValueError(
                "--classes and --clips-per-class choose what to fetch; "
                "--verify and --repair take what was fetched. Leave one of the two out"
            )
        return self
