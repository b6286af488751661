"""What `tvit predict` can be told."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

from pydantic import BeforeValidator, Field, StringConstraints, model_validator

from tvit_cli.settings.base import Settings, about, flag
from tvit_cli.settings.types import PRECISION, Device, MixedPrecision, seconds

HOW, SHOWN, LONG, MORE = "How", "What is shown", "Long videos", "What is written"

# A string, not a Path, which would make one slash of a URL's two. A file's name may begin with a blank.
Named = Annotated[
    str,
    StringConstraints(strip_whitespace=False),
    BeforeValidator(lambda value: os.fspath(value) if isinstance(value, os.PathLike) else value),
]
Seconds = Annotated[float | None, BeforeValidator(seconds)]
SHORTEST = 0.001  # seconds: times are compared to a thousandth of that


ENDINGS = {"embeddings": (".safetensors",), "explain": (".png",), "annotate": (".mp4", ".mov", ".mkv")}


class PredictSettings(Settings):
    """Label videos with a trained model."""

    paths: tuple[Named, ...] = Field(
        min_length=1,
        description="Videos, folders of videos, patterns such as 'clips/*.mp4', URLs, or - for a list on stdin",
        json_schema_extra=about(HOW, positional=True, metavar="VIDEO…", example="tvit predict clip.avi"),
    )
    model: Path | None = Field(
        None,
        description="Model folder, the folder of its run, a name on the hub, or what the reference trained",
        json_schema_extra=about(HOW, default="the newest under the working directory", short=("-m",)),
    )
    working_directory: Path = Field(
        Path("working_directory"),
        description="Folder that holds all runs",
        json_schema_extra=about(HOW),
    )
    per_gpu_batch_size: int = Field(
        8, ge=1, description="Clips in one forward pass", json_schema_extra=about(HOW)
    )
    device: Device = Field("auto", description="Where the model runs", json_schema_extra=about(HOW))
    mixed_precision: MixedPrecision = Field("auto", description=PRECISION, json_schema_extra=about(HOW))

    int8: bool = Field(
        False,
        description="Compute in 8 bits on a CPU, if that is faster there (up to twice); scores differ a little",
        json_schema_extra=about(HOW, flag="--int8"),
    )

    top_k: int = Field(5, ge=1, description="Labels shown per video", json_schema_extra=about(SHOWN))
    json_lines: bool = Field(
        False, description="Print one JSON object per video", json_schema_extra=about(SHOWN, flag="--json")
    )
    csv: bool = Field(
        False,
        description="Print CSV: a row per label, or per segment of a timeline",
        json_schema_extra=about(SHOWN, flag="--csv"),
    )

    window: Seconds = Field(
        None,
        ge=SHORTEST,
        description="Slide a window of this length over each video and show what happens when: 2s, 500ms",
        json_schema_extra=about(LONG, metavar="SECONDS", default="off: the whole video is one clip"),
    )
    stride: Seconds = Field(
        None,
        ge=SHORTEST,
        description="From one window's start to the next one's",
        json_schema_extra=about(LONG, metavar="SECONDS", default="a quarter of the window"),
    )
    smoothing: float = Field(
        2.0,
        ge=0,
        description="How much more likely a change of label must make what is seen to be believed, half as much "
        "where the video is cut; 0 believes all",
        json_schema_extra=about(LONG),
    )
    output: Path | None = Field(
        None,
        description="Folder for each timeline's windows (timeline.csv) and picture (timeline.png)",
        json_schema_extra=about(LONG, default="nothing is written"),
    )

    embeddings: Path | None = Field(
        None,
        description="A .safetensors file for what the classifier sees of each video, for search and clustering",
        json_schema_extra=about(MORE, default="nothing is written", metavar="FILE"),
    )
    explain: Path | None = Field(
        None,
        description="A PNG for one video: its frames, where in them the best label is seen, and a test of that",
        json_schema_extra=about(MORE, default="nothing is written", metavar="FILE"),
    )

    annotate: Path | None = Field(
        None,
        description="A video file (.mp4, .mov, .mkv) for one video with its labels written into the picture",
        json_schema_extra=about(MORE, default="nothing is written", metavar="FILE"),
    )

    @model_validator(mode="after")
    def _options_have_an_effect(self) -> PredictSettings:
        if self.json_lines and self.csv:
            raise ValueError("--json and --csv are two forms of one answer: take one of them")
        for name, endings in ENDINGS.items():  # else a video whose name slipped in there would be overwritten
            path = getattr(self, name)
            if path is not None and path.suffix.lower() not in endings:
                raise ValueError(f"--{name} {path}: its name should end in {' or '.join(endings)}")
        if self.int8 and self.mixed_precision in ("bf16", "fp16"):
            raise ValueError(
                f"--int8 and --mixed-precision {self.mixed_precision} are two formats of numbers: take one of them"
            )
        if self.int8 and self.explain is not None:
            raise ValueError("--explain follows gradients, which 8 bits have none of: leave out --int8")
        if self.window is None:
            for name in ("stride", "smoothing", "output"):
                if name in self.model_fields_set and getattr(self, name) is not None:
                    raise ValueError(
                        f"--{name} is of timelines: say --window as well, for example --window 2s"
                    )
        else:
            for name in ("embeddings", "explain", "top_k"):
                if name in self.model_fields_set and getattr(self, name) is not None:
                    raise ValueError(f"{flag(name)} is of whole videos: leave out --window")
        return self
