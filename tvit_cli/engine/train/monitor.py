"""Monitoring of a training: non-finite losses traced to clips, throughput, time waiting for data."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Protocol, cast

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from tvit_cli.engine.train.batches import MicroBatch
from tvit_cli.engine.train.checkpoint import list_checkpoints
from tvit_cli.errors import RunError
from tvit_cli.settings.train import TrainSettings

SECONDS_BETWEEN_REPORTS = 0.2  # reading the loss waits for the device, so not at every step


class Mark(Protocol):
    """A moment in a device's queue of work; `torch.cuda.Event` is one."""

    def record(self) -> None:
        """Put the mark at the end of the queue."""

    def query(self) -> bool:
        """Whether the device has come to the mark."""

    def elapsed_time(self, other: Mark) -> float:
        """Milliseconds from this mark to another that the device has come to as well."""


class Clock:
    """Started when an epoch starts. See Note [Who waits for data]."""

    def __init__(self, make_mark: Callable[[], Mark] | None = None) -> None:
        self.started = time.perf_counter()
        self._make_mark = make_mark
        self._marks: deque[tuple[Mark, Mark]] = deque()
        self._reported = 0.0
        self._waited = 0.0
        self.clips = 0
        self.waits_for_data()

    @classmethod
    def of(cls, device: torch.device) -> Clock:
        """A clock for a model on a device."""
        if device.type != "cuda":
            return cls()
        return cls(cast("Callable[[], Mark]", partial(torch.cuda.Event, enable_timing=True)))

    def waits_for_data(self) -> None:
        self._waiting_since = time.perf_counter()
        self._work_ends = self._mark()

    def data_arrived(self) -> None:
        arrival = self._mark()
        if self._work_ends is not None and arrival is not None:
            self._marks.append((self._work_ends, arrival))
        else:
            self._waited += time.perf_counter() - self._waiting_since

    def report_is_due(self) -> bool:
        now = time.perf_counter()
        due = now - self._reported >= SECONDS_BETWEEN_REPORTS
        if due:
            self._reported = now
        return due

    def facts(self) -> dict[str, float]:
        """Seconds, clips per second, and the share of the time that the model waited for data."""
        seconds = max(1e-9, time.perf_counter() - self.started)
        while self._marks and self._marks[0][1].query():
            before, arrival = self._marks.popleft()
            self._waited += before.elapsed_time(arrival) / 1000
        return {
            "seconds": seconds,
            "clips_per_second": self.clips / seconds,
            "data_wait": self._waited / seconds,
        }

    def _mark(self) -> Mark | None:
        if self._make_mark is None:
            return None
        mark = self._make_mark()
        mark.record()
        return mark


# Note [Who waits for data]
# ~~~~~~~~~~~~~~~~~~~~~~~~~
# On a CPU the loop itself computes, so the model waits exactly while the loop waits for its next batch. A GPU
# has a queue: the loop runs ahead of it, and may stand waiting for a batch while the GPU still works on the
# last. What counts there is how long the queue was empty. One mark is put at its end when the loop begins to
# wait, another when the batch is there: the GPU's time between the two is nothing while it has work, and else
# the time that it stood idle. Marks are read when their time has come anyway, so that nothing waits for them.


MOST_NAMES = 8  # clips named in the message


@dataclass(frozen=True)
class BadClip:
    """A clip whose loss is not finite: the update it was for, its index in the training videos, its loss.

    `mixed_with` is the index of the clip that was mixed into it, if one was.
    """

    step: int
    index: int
    loss: float
    window_clips: int
    mixed_with: int | None = None


@dataclass
class LossWatch:
    """Remembers the losses since the last look, on their device, so that no step waits for them."""

    _recent: list[tuple[MicroBatch, Tensor]] = field(default_factory=list)

    def saw(self, planned: MicroBatch, losses: Tensor) -> None:
        """Note the losses (B,) of a micro-batch; those past its `real` clips do not count."""
        if planned.real:
            self._recent.append((planned, losses.detach()[: planned.real]))

    def forget(self, step: int) -> None:
        """Drop what was noted of an update that is begun anew."""
        self._recent = [(planned, losses) for planned, losses in self._recent if planned.step != step]

    def look(self, accelerator: Accelerator) -> list[BadClip]:
        """The clips of the first update with a loss that is not finite; nothing where all are.

        All processes have to look together, and get the same answer. Waits for the device.
        """
        recent, self._recent = self._recent, []
        finite = torch.ones((), dtype=torch.bool, device=accelerator.device)
        if recent:
            finite = torch.cat([losses for _, losses in recent]).isfinite().all()
        if not accelerator.reduce((~finite).float(), reduction="sum").item():
            return []
        own = [
            BadClip(
                planned.step, planned.keys[place][1], loss, planned.window_clips, _partner(planned, place)
            )
            for planned, losses in recent
            for place, loss in enumerate(losses.tolist())
            if not math.isfinite(loss)
        ]
        bad: list[BadClip] = gather_object(own)
        first = min(clip.step for clip in bad)
        return [clip for clip in bad if clip.step == first]


def _partner(planned: MicroBatch, place: int) -> int | None:
    return (planned.keys + planned.extra)[planned.partners[place]][1] if planned.partners else None


def loss_error(
    bad: Sequence[BadClip], names: Sequence[str], settings: TrainSettings, precision: str, saved: Path
) -> RunError:
    """What to say of clips whose loss is not finite; `names` are those of all training videos."""
    shown = []
    for clip in bad[:MOST_NAMES]:
        mixed = "" if clip.mixed_with is None else f", mixed with {names[clip.mixed_with]}"
        shown.append(f"  {names[clip.index]}{mixed}: {clip.loss}")
    if len(bad) > MOST_NAMES:
        shown.append(f"  and {len(bad) - MOST_NAMES} more")
    clips = bad[0].window_clips
    what = (
        f"Step {bad[0].step + 1}: the loss of {len(bad)} of its {clips} clips is not finite:\n"
        + "\n".join(shown)
    )
    hint = "All clips of the step: the run diverged. " if len(bad) == clips else "Look at these clips first. "
    return divergence_error(f"{what}\n{hint}", settings, precision, saved)


def divergence_error(what: str, settings: TrainSettings, precision: str, saved: Path) -> RunError:
    """An error for numbers that are not finite: what is saved in the folder of checkpoints, and what may help.

    `precision` is the number format in use.
    """
    kept = list_checkpoints(saved)
    state = (
        f"The last good state is kept: {kept[-1]}."
        if kept
        else "No checkpoint had been written yet, and none of this state was."
    )
    steps = [f"a smaller --learning-rate (it is {settings.learning_rate:g})", "a longer --warmup-epochs"]
    if settings.max_grad_norm is None:
        steps.append("--max-grad-norm 1")
    if precision != "no":
        steps.append("--mixed-precision no")
    advice = (
        f"Going on from there would take the same steps again: start a new run with {', or '.join(steps)}."
    )
    return RunError(f"{what}{state}\n{advice}", by_all=True)


def non_finite_names(tensors: Mapping[str, Tensor]) -> list[str]:
    """The names of the tensors that hold a NaN or an infinity. Waits for the device, once."""
    if not tensors:
        return []
    flags = torch.stack([tensor.isfinite().all() for tensor in tensors.values()]).tolist()
    return [name for name, finite in zip(tensors, flags, strict=True) if not finite]


def some(names: Iterable[str]) -> str:
    """The first few of many names. a, b, c and 9 more"""
    every = list(names)
    more = f" and {len(every) - 3} more" if len(every) > 3 else ""
    return ", ".join(every[:3]) + more
