"""The model card: everything that a prediction depends on, as it is stored beside the weights."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

CARD_VERSION = 1
IMAGENET_MEAN = (
    0.485,
    0.456,
    0.406,
)  # ImageNet channel statistics, in [0, 1]; torchvision's reference training
IMAGENET_STD = (0.229, 0.224, 0.225)

Level = Annotated[float, Field(allow_inf_nan=False)]
Spread = Annotated[float, Field(gt=0, allow_inf_nan=False)]
ResizeMode = Literal["crop", "squash"]


class Preprocessing(BaseModel):
    """How a video becomes the model's input; the same at evaluation, prediction and export."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    n_frames: int = Field(ge=1, description="Frames per clip, one from each equal share of the video")
    frame_grid: int | None = Field(
        default=None, ge=1, description="Frames of each video, evenly spaced, that a clip is drawn from"
    )
    frame_size: int = Field(ge=1, description="Height and width of a frame, in pixels")
    resize: ResizeMode = Field(
        default="crop", description="crop: short side, then centre; squash: whole frame"
    )
    scale_to: int = Field(
        default_factory=lambda facts: facts.get("frame_size", 1),  # without one, that is the error
        ge=1,
        description="What is scaled to this many pixels before frame_size of them are cut from the centre",
    )
    mean: tuple[Level, Level, Level] = IMAGENET_MEAN
    std: tuple[Spread, Spread, Spread] = IMAGENET_STD

    @model_validator(mode="after")
    def _frames_are_large_enough_to_be_cut(self) -> Preprocessing:
        if self.scale_to < self.frame_size:
            raise ValueError(f"scale_to {self.scale_to} is less than frame_size {self.frame_size}")
        return self


class BaseWeights(BaseModel):
    """Where the backbone's first weights came from."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    revision: str | None = None
    sha256: str | None = None


class ModelCard(BaseModel):
    """`card.json` of a model folder."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    card_version: int = CARD_VERSION
    tvit_version: str
    labels: tuple[str, ...]
    model: dict[str, Any]
    preprocessing: Preprocessing
    base: BaseWeights | None = None
    weights_sha256: str
    settings: dict[str, Any] = Field(default_factory=dict)
    held_out: dict[str, tuple[str, ...]] = Field(default_factory=dict)  # subset -> its groups, by name
    metrics: dict[str, float] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _labels_match_the_classifier(self) -> ModelCard:
        classes = self.model.get("num_classes")
        if classes != len(self.labels):
            raise ValueError(f"{len(self.labels)} labels for a classifier of {classes} classes")
        if len(set(self.labels)) < len(self.labels):
            raise ValueError("a label stands there twice")
        return self
