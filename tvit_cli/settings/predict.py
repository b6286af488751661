"""Settings of `tvit predict`."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import Annotated

from pydantic import BeforeValidator, Field, StringConstraints, model_validator

from tvit_cli.settings.base import flag, setting
from tvit_cli.settings.types import MODEL, InferenceSettings, Seconds

labels, timeline = (partial(setting, panel=p) for p in ("Output", "Timelines of long videos"))
files = partial(setting, None, panel="Files", default_text="nothing is written", metavar="FILE")

# A string, because a Path collapses the two slashes of a URL. A file name may begin with a blank.
Named = Annotated[
    str,
    StringConstraints(strip_whitespace=False),
    BeforeValidator(lambda value: os.fspath(value) if isinstance(value, os.PathLike) else value),
]
SHORTEST = 0.001  # seconds, a thousand times the resolution at which times are compared

ENDINGS = {"embeddings": (".safetensors",), "explain": (".png",), "annotate": (".mp4", ".mov", ".mkv")}


class PredictSettings(InferenceSettings):
    """Settings of `tvit predict`."""

    # fmt: off
    paths: Annotated[tuple[Named, ...], Field(min_length=1)] = setting(...,
        "Videos, folders, patterns such as 'clips/*.mp4', URLs, cameras (0), or - for a list or a video on stdin",
        MODEL,
        positional=True, metavar="VIDEO…", example="tvit predict clip.avi")
    int8: bool = setting(False,
        "int8 matrix products on CPUs where they are faster (up to 2 times); scores differ slightly", MODEL,
        flag="--int8")

    time_limit: int = setting(600, "Seconds of decoding per video before it counts as unreadable", MODEL, ge=1)

    top_k: int = labels(5, "Labels per video", ge=1, essential=True)
    json_lines: bool = labels(False, "Prints one JSON object per video", flag="--json", essential=True,
        printed=True)
    csv: bool = labels(False, "Prints CSV: one row per label, or per segment of a timeline", flag="--csv",
        essential=True, printed=True)

    window: Seconds = timeline(None,
        "Length of a sliding window, such as 2s or 500ms; segments of each video are shown", ge=SHORTEST,
        metavar="SECONDS", default_text="off: the whole video is one clip", essential=True)
    stride: Seconds = timeline(None, "Interval between the starts of two windows", ge=SHORTEST,
        metavar="SECONDS", default_text="a quarter of the window")
    follow: bool = timeline(False,
        "Reads a file that is still being written, a URL or stdin as a live source, with a line per window",
        flag="--follow")
    smoothing: float = timeline(2.0,
        "Transition penalty of the Viterbi smoothing in log-odds, halved at shot boundaries; 0 disables",
        ge=0)
    output: Path | None = timeline(None,
        "Folder of timelines: windows (.csv), chart (.png), subtitles; or one subtitle file (.srt, .vtt)",
        default_text="nothing is written", essential=True)

    embeddings: Path | None = files(
        "Writes one embedding per video to a .safetensors file, for search and clustering",
        essential=True)
    explain: Path | None = files(
        "Writes integrated gradients of the top label for one video, with a deletion test, to a PNG",
        essential=True)
    annotate: Path | None = files("Writes one video with its labels drawn in, to .mp4, .mov or .mkv",
        essential=True)
    # fmt: on

    @model_validator(mode="after")
    def _settings_agree(self) -> PredictSettings:
        if self.json_lines and self.csv:
            raise ValueError("--json and --csv: two output formats. Take one of them")
        for name, endings in ENDINGS.items():  # a mistyped option would overwrite a video
            path = getattr(self, name)
            if path is not None and path.suffix.lower() not in endings:
                raise ValueError(f"--{name} {path}: its name should end in {' or '.join(endings)}")
        if self.int8 and self.mixed_precision in ("bf16", "fp16"):
            raise ValueError(f"--int8: not with --mixed-precision {self.mixed_precision}. Take one of them")
        if self.int8 and self.explain is not None:
            raise ValueError("--explain needs gradients, which int8 layers lack. Leave out --int8")
        names: tuple[str, ...] = ("embeddings", "explain", "time_limit", "top_k")
        scope = "whole videos. Leave out --window"
        if self.window is None:
            names, scope = (
                ("stride", "follow", "smoothing", "output"),
                "timelines. Add --window, for example --window 2s",
            )
        for name in names:
            if name in self.model_fields_set and getattr(self, name) not in (None, False):
                raise ValueError(f"{flag(name)} applies to {scope}")
        return self
