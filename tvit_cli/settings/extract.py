"""Settings of `tvit extract`."""

from __future__ import annotations

from pathlib import Path

from pydantic import model_validator

from tvit_cli.settings.base import flag, setting
from tvit_cli.settings.types import DATA, DataSettings

FRAMES, PROCESSING = "Frames", "Processing"


class ExtractSettings(DataSettings):
    """Settings of `tvit extract`."""

    # fmt: off
    output: Path | None = setting(None, "Folder of the frame store", DATA,
        default_text="frames/ beside the videos, frames-NAME/ for NAME.csv: train and eval find it", essential=True)
    frames_per_video: int = setting(32, "Evenly spaced frames per video; all frames of a shorter one", FRAMES,
        ge=1, le=65535, essential=True)
    fps: float | None = setting(None, "Frames per second, by time, instead of --frames-per-video: for models with "
        "--clip-seconds", FRAMES, gt=0, le=1000)
    quality: int = setting(90, "JPEG quality", FRAMES, ge=1, le=100)
    short_side: int = setting(256, "Short side in pixels; larger frames are scaled down to it", FRAMES, ge=16,
        le=8192, essential=True)
    shard_mib: int = setting(256, "Size of a shard in MiB; an interrupted shard is decoded again", FRAMES,
        ge=1, le=65536)
    num_workers: int | None = setting(None, "Decoding processes; 0 decodes in this process", PROCESSING, ge=0,
        le=256, default_text="from the CPU count", essential=True)
    time_limit: int = setting(600, "Seconds per video before it counts as unreadable; needs a worker process",
        PROCESSING, ge=1)
    overwrite: bool = setting(False, "Replaces an existing store", PROCESSING, essential=True)
    repair: bool = setting(False, "Checks the whole store and extracts damaged clips again", PROCESSING)
    check: bool = setting(False, "Decodes every video; prints problems and a summary, with -v all videos; writes "
        "nothing", PROCESSING, essential=True)
    json_lines: bool = setting(False, "Prints one JSON object per video of --check", PROCESSING,
        flag="--json", printed=True)
    # fmt: on

    @model_validator(mode="after")
    def _settings_agree(self) -> ExtractSettings:
        if self.json_lines and not self.check:
            raise ValueError("--json: prints the results of --check. Add --check, or leave --json out")
        if self.fps is not None and "frames_per_video" in self.model_fields_set:
            raise ValueError("--fps and --frames-per-video: two choices of frames. Take one of them")
        unused = [flag(name) for name in ("overwrite", "repair") if getattr(self, name)]
        if self.check and unused:
            raise ValueError(f"--check writes nothing. Leave out {' and '.join(unused)}")
        return self
