"""What `tvit extract` can be told."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field, model_validator

from tvit_cli.settings.base import about, flag
from tvit_cli.settings.types import DATA, DataSettings

FRAMES, HOW = "Frames", "How"


class ExtractSettings(DataSettings):
    """Decode videos once into a frame store that is read many times, or check them."""

    output: Path | None = Field(
        None,
        description="Folder of the frame store",
        json_schema_extra=about(DATA, default="frames/ beside the videos, where train and eval find it"),
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
    time_limit: int = Field(
        600,
        ge=1,
        description="Seconds after which a video that does not end is set aside; needs a worker process",
        json_schema_extra=about(HOW),
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

    @model_validator(mode="after")
    def _one_errand(self) -> ExtractSettings:
        if self.json_lines and not self.check:
            raise ValueError("--json: prints what --check finds. Give --check too, or leave --json out")
        unused = [flag(name) for name in ("overwrite", "repair") if getattr(self, name)]
        if self.check and unused:
            raise ValueError(f"--check writes nothing: leave out {' and '.join(unused)}")
        return self
