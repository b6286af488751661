"""What `tvit export` can be told."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator, model_validator

from tvit_cli.settings.base import Settings, about

WHAT, HOW = "What is exported", "How"

ExportFormat = Literal["safetensors", "huggingface", "onnx", "torch", "adapter"]
REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")  # the hub's own check comes later, and says more


class ExportSettings(Settings):
    """Bring a trained model elsewhere, and prove that it answers the same there."""

    model: Path | None = Field(
        None,
        description="Model folder, the folder of its run, a name on the hub, or what the reference trained",
        json_schema_extra=about(WHAT, positional=True, metavar="[MODEL]"),
    )
    working_directory: Path = Field(
        Path("working_directory"),
        description="Folder that holds all runs; without MODEL, its newest model is exported",
        json_schema_extra=about(WHAT),
    )
    format: ExportFormat = Field(
        "safetensors",
        description="Weights with the network's files, a Hugging Face folder, ONNX, a .pt2 program, or the adapter",
        json_schema_extra=about(WHAT, short=("-f",)),
    )
    with_preprocessing: bool = Field(
        False,
        description="onnx, torch: resizing and normalisation inside; uint8 frames in, probabilities out",
        json_schema_extra=about(HOW),
    )
    int8: bool = Field(
        False,
        description="onnx: weights in 8 bits, a quarter to a third of the size; what it costs is measured",
        json_schema_extra=about(HOW, flag="--int8"),
    )
    clips: Path | None = Field(
        None,
        description="Folder of videos, or one video, for the proof that both answer the same",
        json_schema_extra=about(HOW, default="test or val videos of the model's data"),
    )
    output: Path | None = Field(
        None,
        description="Folder for the export",
        json_schema_extra=about(HOW, default="export/<format> in the run's folder"),
    )
    overwrite: bool = Field(
        False,
        description="Replace an older export; refused where it holds files that tvit did not write",
        json_schema_extra=about(HOW),
    )
    push_to_hub: str | None = Field(
        None,
        description="Upload the export to this repository of the Hugging Face hub",
        json_schema_extra=about(HOW, metavar="USER/NAME", default="none"),
    )
    private: bool = Field(
        False, description="--push-to-hub makes a private repository", json_schema_extra=about(HOW)
    )

    @field_validator("push_to_hub")
    @classmethod
    def _is_a_repository(cls, name: str | None) -> str | None:
        if name is not None and not REPOSITORY.fullmatch(name):
            raise ValueError("it should be USER/NAME, as in ada/fencing")
        return name

    @model_validator(mode="after")
    def _options_fit_the_format(self) -> ExportSettings:
        if self.int8 and self.format != "onnx":
            raise ValueError(f"--int8 needs --format onnx, not {self.format}. Leave it out.")
        if self.with_preprocessing and self.format not in ("onnx", "torch"):
            raise ValueError(
                f"--with-preprocessing needs --format onnx or torch, not {self.format}. Leave it out."
            )
        if self.private and self.push_to_hub is None:
            raise ValueError("--private needs --push-to-hub. Leave it out.")
        return self
