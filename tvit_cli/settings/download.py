"""Settings of `tvit download`."""

from __future__ import annotations

from pathlib import Path

from pydantic import model_validator

from tvit_cli.settings.base import Settings, setting
from tvit_cli.settings.types import Names

SELECTION, FILES = "Selection", "Files"


class DownloadSettings(Settings):
    """Settings of `tvit download`."""

    # fmt: off
    name: str | None = setting(None, "Data set: ucf101, ucf101-subset, weizmann or motions", SELECTION,
        positional=True, metavar="NAME", example="tvit download ucf101")
    list_sets: bool = setting(False, "Lists the known data sets", SELECTION, flag="--list", printed=True)
    classes: Names = setting((), "Classes to fetch, comma-separated", SELECTION, default_text="all",
        metavar="NAMES")
    clips_per_class: int | None = setting(None, "Clips to fetch per class, spread over its groups", SELECTION,
        ge=1, default_text="all")
    data_directory: Path = setting(Path("data"), "Folder of all data sets", FILES)
    archive: Path | None = setting(None, "Local archive of the videos, or a folder of archives", FILES)
    splits_archive: Path | None = setting(None, "Local archive of the split lists", FILES)
    verify: bool = setting(False, "Compares all files with the manifest; fetches nothing", FILES)
    repair: bool = setting(False, "Verifies, then fetches missing and damaged files", FILES)
    keep_archive: bool = setting(False,
        "Keeps fetched archives beside the videos; local archives are always kept", FILES)
    # fmt: on

    @model_validator(mode="after")
    def _settings_agree(self) -> DownloadSettings:
        if self.name is None and not self.list_sets:
            raise ValueError("NAME: nothing given. `tvit download --list` shows the known data sets")
        if self.verify and self.repair:
            raise ValueError("--verify and --repair: --repair verifies first. Give one of them")
        if (self.verify or self.repair) and (self.classes or self.clips_per_class):
            raise ValueError(
                "--classes and --clips-per-class: --verify and --repair check all files. Take one kind"
            )
        return self
