"""Results and progress events that the engine returns to its callers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class Note:
    """A sentence for the user."""

    text: str
    level: Literal["detail", "info", "warning"] = "info"


@dataclass(frozen=True)
class Progress:
    """`done` of `total` (None: not known) units of a named piece of work."""

    what: str
    done: int
    total: int | None
    unit: Literal["", "bytes"] = ""


@dataclass(frozen=True)
class TrainingStarts:
    """The plan of a run, before its first step."""

    facts: dict[str, str]
    epochs: int
    steps_per_epoch: int
    first_step: int


@dataclass(frozen=True)
class StepDone:
    """One optimizer update; rates are means since the epoch began."""

    epoch: int
    step: int
    loss: float
    clip_top1: float
    learning_rate: float
    clips_per_second: float
    data_wait: float  # share of the time that the model waited for data


@dataclass(frozen=True)
class EpochDone:
    """One pass over the data, validated; `metrics` is the epoch's line of metrics.jsonl."""

    epoch: int
    metrics: dict[str, float] = field(default_factory=dict)
    is_best: bool = False


Event = Note | Progress | TrainingStarts | StepDone | EpochDone
Report = Callable[[Event], None]


def seconds_done(what: str, done: float, total: float | None) -> Progress:
    """How much of a video is done, in whole seconds."""
    return Progress(what, round(done), None if total is None else max(1, round(total)))


def silent(event: Event) -> None:
    """A Report that says nothing."""
