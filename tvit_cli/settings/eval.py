"""Settings of `tvit eval`."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import model_validator

from tvit_cli.settings.base import Settings, flag, setting
from tvit_cli.settings.types import (
    DATA_TEXT,
    DEVICE_TEXT,
    MODEL_TEXT,
    PRECISION_TEXT,
    PROCESSES_TEXT,
    RUNS,
    RUNS_TEXT,
    SPLIT_TEXT,
    Device,
    MixedPrecision,
    Pattern,
)

SOURCE, SCORING = "Model and data", "Scoring"


class EvalSettings(Settings):
    """Settings of `tvit eval`."""

    # fmt: off
    model: Path | None = setting(None, MODEL_TEXT, SOURCE,
        default_text="the newest under the working directory", short="-m")
    working_directory: Path = setting(RUNS, RUNS_TEXT, SOURCE)
    compare: tuple[Path, Path] | None = setting(None,
        "Two models on the same videos: paired test and changed predictions", SOURCE, metavar="A B",
        default_text="one model alone")
    subset: Literal["train", "val", "test", "all"] = setting("test",
        "Videos to score; all: every video, for data other than the training data", SOURCE)
    path_to_data: str | None = setting(None, DATA_TEXT, SOURCE, default_text="the model's training data",
        metavar="PATH")
    group_pattern: Pattern | None = setting(None,
        "Regular expression on file names; its match is the group (one recording)", SOURCE,
        default_text="as in training", metavar="REGEX")
    split: int | None = setting(None, SPLIT_TEXT, SOURCE, ge=1, le=3, default_text="as in training")
    val_groups: str | None = setting(None, "Groups of the val subset: names, a count, none, or auto", SOURCE,
        default_text="as in training", metavar="NAMES|COUNT|none|auto", resettable=False)
    test_groups: str | None = setting(None, "Groups of the test subset: names, a count, none, or auto",
        SOURCE, default_text="as in training", metavar="NAMES|COUNT|none|auto", resettable=False)
    clips_per_video: int = setting(1, "Evenly spaced clips per video; their scores are averaged", SCORING,
        ge=1, le=100)
    crops_per_clip: int = setting(1,
        "Crops per clip along the long side: the centre, or evenly from end to end", SCORING, ge=1, le=10)
    flip: bool = setting(False,
        "Also scores mirrored clips; unsuitable where left and right are different classes", SCORING)
    top_k: int = setting(5, "k of the top-k accuracy", SCORING, ge=1)
    per_gpu_batch_size: int = setting(8, "Clips per GPU in one forward pass", SCORING, ge=1)
    num_workers: int | None = setting(None, "Decoding processes per GPU; 0 decodes in this process", SCORING,
        ge=0, le=256, default_text="from the CPU count")
    device: Device = setting("auto", DEVICE_TEXT, SCORING)
    mixed_precision: MixedPrecision = setting("auto", PRECISION_TEXT, SCORING)
    num_processes: int = setting(1, PROCESSES_TEXT, SCORING, ge=1, le=1024)
    unreadable: Literal["exclude", "wrong"] = setting("exclude",
        "Unreadable videos: excluded from all metrics, or counted as wrong", SCORING)
    shuffle_frames: bool = setting(False,
        "Shuffles frames in time (ablation): accuracy without temporal order", SCORING)
    seed: int = setting(0, "Seed of --shuffle-frames", SCORING, ge=0, lt=2**31)
    output: Path | None = setting(None, "Folder of the results", SCORING,
        default_text="eval/<subset> in the run folder, with -<data> for other data")
    # fmt: on

    @model_validator(mode="after")
    def _settings_agree(self) -> EvalSettings:
        if self.compare is not None and self.model is not None:
            raise ValueError("--compare names both models. Leave out --model (TVIT_MODEL)")
        groups = [flag(name) for name in ("val_groups", "test_groups") if getattr(self, name) is not None]
        if self.subset == "all" and groups:
            raise ValueError(f"--subset all scores every video. Leave out {' and '.join(groups)}")
        return self
