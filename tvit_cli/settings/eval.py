"""What `tvit eval` can be told."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from tvit_cli.settings.base import Settings, about, flag
from tvit_cli.settings.types import PRECISION, Device, MixedPrecision, Pattern

WHAT, HOW = "What is scored", "How"


class EvalSettings(Settings):
    """Score a trained model on a subset, from one deterministic view of each video."""

    model: Path | None = Field(
        None,
        description="Model folder, the folder of its run, a name on the hub, or what the reference trained",
        json_schema_extra=about(WHAT, default="the newest under the working directory", short=("-m",)),
    )
    working_directory: Path = Field(
        Path("working_directory"),
        description="Folder that holds all runs",
        json_schema_extra=about(WHAT),
    )
    compare: tuple[Path, Path] | None = Field(
        None,
        description="Two models on the same videos: a paired test, and what the second answers otherwise",
        json_schema_extra=about(WHAT, metavar="A B", default="one model alone"),
    )
    subset: Literal["train", "val", "test", "all"] = Field(
        "test",
        description="Videos that are scored; all is every one, for data that is not the training's",
        json_schema_extra=about(WHAT),
    )
    path_to_data: str | None = Field(
        None,
        description="Folder of videos, CSV manifest, or a known data set's name",
        json_schema_extra=about(WHAT, default="the data that the model was trained on", metavar="PATH"),
    )
    group_pattern: Pattern | None = Field(
        None,
        description="Regular expression on file names that names a video's group",
        json_schema_extra=about(WHAT, default="as in training", metavar="REGEX"),
    )
    split: int | None = Field(
        None,
        ge=1,
        le=3,
        description="Official split, where the data has the lists of UCF101's three",
        json_schema_extra=about(WHAT, default="as in training"),
    )
    val_groups: str | None = Field(
        None,
        description="Groups of the val subset: names, a count, none, or auto",
        json_schema_extra=about(
            WHAT, default="as in training", metavar="NAMES|COUNT|none|auto", resettable=False
        ),
    )
    test_groups: str | None = Field(
        None,
        description="Groups of the test subset: names, a count, none, or auto",
        json_schema_extra=about(
            WHAT, default="as in training", metavar="NAMES|COUNT|none|auto", resettable=False
        ),
    )
    clips_per_video: int = Field(
        1,
        ge=1,
        le=100,
        description="Clips of each video, at even places in time; their scores are averaged",
        json_schema_extra=about(HOW),
    )
    crops_per_clip: int = Field(
        1,
        ge=1,
        le=10,
        description="Crops of each clip along the long side of its frames: the centre, or evenly from end to end",
        json_schema_extra=about(HOW),
    )
    flip: bool = Field(
        False,
        description="Look at each clip mirrored as well; not where left and right are different classes",
        json_schema_extra=about(HOW),
    )
    top_k: int = Field(5, ge=1, description="k of the top-k accuracy", json_schema_extra=about(HOW))
    per_gpu_batch_size: int = Field(
        8, ge=1, description="Clips per GPU in one forward pass", json_schema_extra=about(HOW)
    )
    num_workers: int | None = Field(
        None,
        ge=0,
        le=256,
        description="Processes per GPU that decode videos; 0 decodes in this process",
        json_schema_extra=about(HOW, default="from the CPU count"),
    )
    device: Device = Field("auto", description="Where the model runs", json_schema_extra=about(HOW))
    mixed_precision: MixedPrecision = Field("auto", description=PRECISION, json_schema_extra=about(HOW))
    num_processes: int = Field(
        1,
        ge=1,
        le=1024,
        description="Processes of this machine that share the work, one per GPU",
        json_schema_extra=about(HOW),
    )
    unreadable: Literal["exclude", "wrong"] = Field(
        "exclude",
        description="Videos that cannot be read are left out of all metrics, or counted as wrong answers",
        json_schema_extra=about(HOW),
    )
    shuffle_frames: bool = Field(
        False,
        description="Put each clip's frames in a random order first: what is left is what single frames tell",
        json_schema_extra=about(HOW),
    )
    seed: int = Field(0, ge=0, lt=2**31, description="Seed of --shuffle-frames", json_schema_extra=about(HOW))
    output: Path | None = Field(
        None,
        description="Folder for the results",
        json_schema_extra=about(HOW, default="eval/<subset> in the run's folder, with -<data> on other data"),
    )

    @model_validator(mode="after")
    def _one_errand(self) -> EvalSettings:
        if self.compare is not None and self.model is not None:
            raise ValueError("--compare names both models: leave out --model (TVIT_MODEL)")
        groups = [flag(name) for name in ("val_groups", "test_groups") if getattr(self, name) is not None]
        if self.subset == "all" and groups:
            raise ValueError(f"--subset all scores every video: leave out {' and '.join(groups)}")
        return self
