"""Settings of `tvit eval`."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import model_validator

from tvit_cli.settings import types
from tvit_cli.settings.base import flag, setting

SCORING = "Scoring"


class EvalSettings(types.InferenceSettings):
    """Settings of `tvit eval`."""

    # fmt: off
    compare: tuple[Path, Path] | None = setting(None,
        "Two models on the same videos: paired test and changed predictions", types.MODEL, metavar="A B",
        default_text="one model alone", essential=True)
    subset: Literal["train", "val", "test", "all"] = setting("test",
        "Videos to score; all: every video, for data other than the training data", types.DATA,
        essential=True)
    path_to_data: str | None = setting(None, types.DATA_TEXT, types.DATA,
        default_text="the model's training data", metavar="PATH", essential=True)
    group_pattern: types.Pattern | None = setting(None,
        "Regular expression on file names; its match is the group (one recording)", types.DATA,
        default_text="as in training", metavar="REGEX")
    split: int | None = setting(None, types.SPLIT_TEXT, types.DATA, ge=1, le=3, default_text="as in training")
    val_groups: str | None = setting(None, "Groups of the val subset: names, a count, none, or auto",
        types.DATA, default_text="as in training", metavar="NAMES|COUNT|none|auto", resettable=False)
    test_groups: str | None = setting(None, "Groups of the test subset: names, a count, none, or auto",
        types.DATA, default_text="as in training", metavar="NAMES|COUNT|none|auto", resettable=False)
    clips_per_video: int = setting(1, "Evenly spaced clips per video; their scores are averaged", SCORING,
        ge=1, le=100, essential=True)
    crops_per_clip: int = setting(1,
        "Crops per clip along the long side: the centre, or evenly from end to end", SCORING, ge=1, le=10,
        essential=True)
    flip: bool = setting(False,
        "Also scores mirrored clips; unsuitable where left and right are different classes", SCORING)
    top_k: int = setting(5, "k of the top-k accuracy", SCORING, ge=1, essential=True)
    num_workers: int | None = setting(None, "Decoding processes per GPU; 0 decodes in this process", SCORING,
        ge=0, le=256, default_text="from the CPU count")
    num_processes: int = setting(1, types.PROCESSES_TEXT, SCORING, ge=1, le=1024)
    unreadable: Literal["exclude", "wrong"] = setting("exclude",
        "Unreadable videos: excluded from all metrics, or counted as wrong", SCORING)
    shuffle_frames: bool = setting(False,
        "Shuffles frames in time (ablation): accuracy without temporal order", SCORING)
    seed: int = setting(0, "Seed of --shuffle-frames", SCORING, ge=0, lt=2**31)
    output: Path | None = setting(None, "Folder of the results", SCORING,
        default_text="eval/<subset> in the run folder, with views and other data, as in test-5x3-weizmann",
        essential=True)
    # fmt: on

    @model_validator(mode="after")
    def _settings_agree(self) -> EvalSettings:
        if self.compare is not None and self.model is not None:
            raise ValueError("--compare names both models. Leave out --model (TVIT_MODEL)")
        groups = [flag(name) for name in ("val_groups", "test_groups") if getattr(self, name) is not None]
        if self.subset == "all" and groups:
            raise ValueError(f"--subset all scores every video. Leave out {' and '.join(groups)}")
        return self
