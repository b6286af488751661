"""What `tvit predict` can be told."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from tvit_cli.settings.base import Settings, about
from tvit_cli.settings.fields import Device

HOW = "How"


class PredictSettings(Settings):
    """Label videos with a trained model."""

    paths: tuple[Path, ...] = Field(
        min_length=1,
        description="Videos, or folders of videos",
        json_schema_extra=about(HOW, positional=True, metavar="PATH…", example="tvit predict clip.avi"),
    )
    model: Path | None = Field(
        None,
        description="Model folder, or the folder of its run",
        json_schema_extra=about(HOW, default="the newest under the working directory", short=("-m",)),
    )
    working_directory: Path = Field(
        Path("working_directory"),
        description="Folder that holds all runs",
        json_schema_extra=about(HOW),
    )
    top_k: int = Field(5, ge=1, description="Labels shown per video", json_schema_extra=about(HOW))
    json_lines: bool = Field(
        False, description="Print one JSON object per video", json_schema_extra=about(HOW, flag="--json")
    )
    per_gpu_batch_size: int = Field(
        8, ge=1, description="Clips in one forward pass", json_schema_extra=about(HOW)
    )
    device: Device = Field("auto", description="Where the model runs", json_schema_extra=about(HOW))
