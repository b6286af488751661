"""Settings of `tvit export`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal

from pydantic import field_validator, model_validator

from tvit_cli.settings.base import Settings, setting
from tvit_cli.settings.types import MODEL, MODEL_TEXT, RUNS, RUNS_TEXT

EXPORT = "Export"

ExportFormat = Literal["safetensors", "huggingface", "onnx", "torch", "adapter"]


class ExportSettings(Settings):
    """Settings of `tvit export`."""

    # fmt: off
    model: Path | None = setting(None, MODEL_TEXT, MODEL,
        default_text="the newest under the working directory", short="-m")
    working_directory: Path = setting(RUNS, RUNS_TEXT, MODEL)
    format: ExportFormat = setting("safetensors",
        "Weights with network code (safetensors), Hugging Face folder, ONNX, torch.export program (.pt2), or "
        "LoRA adapter", MODEL, short="-f")
    with_preprocessing: bool = setting(False,
        "Includes resizing and normalisation (onnx, torch): uint8 frames in, probabilities out", EXPORT)
    int8: bool = setting(False,
        "8-bit weights (onnx), a quarter to a third of the size; the accuracy loss is measured", EXPORT,
        flag="--int8")
    clips: Path | None = setting(None, "Video or folder of videos for the parity check", EXPORT,
        default_text="test or val videos of the model's data")
    output: Path | None = setting(None, "Folder of the export", EXPORT,
        default_text="export/<format> in the run folder")
    overwrite: bool = setting(False,
        "Replaces an older export; refused where it holds files that tvit did not write", EXPORT)
    push_to_hub: str | None = setting(None, "Uploads the export to this repository of the Hugging Face hub",
        EXPORT, metavar="USER/NAME", default_text="none")
    private: bool = setting(False, "Makes the repository of --push-to-hub private", EXPORT)
    # fmt: on

    @field_validator("push_to_hub")
    @classmethod
    def _is_a_repository(cls, name: str | None) -> str | None:
        if name is not None and not re.fullmatch(r"[\w.-]+/[\w.-]+", name):  # the hub checks the name itself
            raise ValueError("it should be USER/NAME, as in ada/fencing")
        return name

    @model_validator(mode="after")
    def _settings_agree(self) -> ExportSettings:
        if self.int8 and self.format != "onnx":
            raise ValueError(f"--int8 needs --format onnx, not {self.format}. Leave it out.")
        if self.with_preprocessing and self.format not in ("onnx", "torch"):
            raise ValueError(f"--with-preprocessing needs --format onnx or torch, not {self.format}")
        if self.private and self.push_to_hub is None:
            raise ValueError("--private needs --push-to-hub. Leave it out.")
        return self
