"""Model card, stored beside the weights: labels, network, preprocessing, origin and metrics."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, model_validator

CARD_VERSION = 1
# Channel statistics of ImageNet in [0, 1], from torchvision's reference training.
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

Finite = Annotated[float, Field(allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
ResizeMode = Literal["crop", "squash"]


class Preprocessing(BaseModel, frozen=True, extra="forbid"):
    """Preprocessing of a video: the same in evaluation, prediction and export."""

    n_frames: int = Field(ge=1, description="Frames per clip, one from each segment")
    frame_grid: int | None = Field(default=None, ge=1, description="Evenly spaced frames to sample from")
    clip_seconds: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = Field(
        default=None, description="Seconds of a video that a clip shows; None: all of it"
    )
    frame_size: int = Field(ge=1, description="Height and width of a frame, in pixels")
    resize: ResizeMode = "crop"  # crop: short side to scale_to; squash: both sides
    scale_to: int = Field(
        default_factory=lambda values: values.get("frame_size", 1),  # a missing frame_size is an error itself
        ge=1,
        description="Resized frame size before the centre crop of frame_size",
    )
    mean: tuple[Finite, Finite, Finite] = IMAGENET_MEAN
    std: tuple[Positive, Positive, Positive] = IMAGENET_STD

    @model_validator(mode="after")
    def _crop_fits(self) -> Preprocessing:
        if self.scale_to < self.frame_size:
            raise ValueError(f"scale_to {self.scale_to} is less than frame_size {self.frame_size}")
        return self


class BaseWeights(BaseModel, frozen=True, extra="forbid"):
    """Origin of the backbone's pretrained weights."""

    name: str
    revision: str | None = None
    sha256: str | None = None
    licence: str | None = None

    @property
    def terms(self) -> str:
        """The licence as a sentence, where it does not allow every use of a model trained from the weights."""
        licence = self.licence or ""
        if "nc" in licence.lower().split("-"):
            return f"licence {licence}: not for commercial use, nor is a model trained from it"
        if licence.startswith("other"):
            return f"licence {licence}: its terms hold for a model trained from it, too. Read them first"
        return ""


class ModelCard(BaseModel, frozen=True, extra="forbid"):
    """`card.json` of a model folder."""

    card_version: int = Field(default=CARD_VERSION, ge=1, strict=True)
    tvit_version: str
    labels: tuple[str, ...]
    model: dict[str, Any]
    preprocessing: Preprocessing
    base: BaseWeights | None = None
    weights_sha256: str
    settings: dict[str, Any] = Field(default_factory=dict)
    held_out: dict[str, tuple[str, ...]] = Field(default_factory=dict)  # subset -> names of its groups
    metrics: dict[str, float] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _labels_match_the_classifier(self) -> ModelCard:
        classes = self.model.get("num_classes")
        if classes != len(self.labels):
            raise ValueError(f"{len(self.labels)} labels for a classifier of {classes} classes")
        if len(set(self.labels)) < len(self.labels):
            raise ValueError("duplicate labels")
        return self
