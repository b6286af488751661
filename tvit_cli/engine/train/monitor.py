"""Monitoring of a training: non-finite losses traced to clips, throughput, time waiting for data."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from tvit_cli.engine.train.batches import MicroBatch
from tvit_cli.engine.train.checkpoint import list_checkpoints
from tvit_cli.errors import RunError
from tvit_cli.settings.train import TrainSettings

SECONDS_BETWEEN_REPORTS = 0.2  # reading the loss synchronises with the device, so not at every step
MOST_NAMES = 8  # clips named in an error

# Note [Data wait]
# ~~~~~~~~~~~~~~~~
# On a CPU the loop itself computes, so the model waits while the loop waits for its next batch. A GPU has a queue,
# and the loop may wait while the GPU still works: there only the time with an empty queue counts. An event is
# recorded when the loop begins to wait, another when the batch arrives. The time between them on the GPU is the
# time that it was idle. Events are read once they have completed, so nothing is synchronised.
# The queue is also empty if Python launches kernels slower than the GPU computes them. So an event is recorded
# before each update: if it has completed when the update is launched, the GPU has nothing left to do.


class Clock:
    """Throughput and data-loading time of an epoch. See Note [Data wait]."""

    def __init__(self, make_event: Callable[[], Any] | None = None) -> None:
        """`make_event` makes a marker in a device's stream, such as `torch.cuda.Event`."""
        self.started, self.clips = time.perf_counter(), 0
        self._make_event = make_event
        self._waits: deque[tuple[Any, Any]] = deque()
        self._reported = self._waited = 0.0
        self._updates = self._late = 0
        self.wait_started()

    @classmethod
    def of(cls, device: torch.device) -> Clock:
        """A clock for a model on a device."""
        return cls(partial(torch.cuda.Event, enable_timing=True) if device.type == "cuda" else None)

    def wait_started(self) -> None:
        """Marks the request for the next batch."""
        self._waiting_since = time.perf_counter()
        self._work_ends = self._record()

    def wait_ended(self) -> None:
        """Marks the arrival of the batch."""
        if (arrival := self._record()) is not None:
            self._waits.append((self._work_ends, arrival))
        else:
            self._waited += time.perf_counter() - self._waiting_since

    def update_started(self) -> None:
        """Marks the start of an update's launches."""
        self._before_update = self._record()

    def update_ended(self) -> None:
        """Marks their end: the update is late if the device has already done all work before it."""
        if self._before_update is not None:
            self._updates += 1
            self._late += self._before_update.query()

    def report_is_due(self) -> bool:
        """Whether SECONDS_BETWEEN_REPORTS have passed since the last report; a report is then assumed."""
        now = time.perf_counter()
        due = now - self._reported >= SECONDS_BETWEEN_REPORTS
        self._reported = now if due else self._reported
        return due

    def facts(self) -> dict[str, float]:
        """Seconds, clips per second, and `data_wait`: share of the time that the model waited for data.

        On a GPU also `host_bound`: share of the steps whose update was launched late.
        """
        seconds = max(1e-9, time.perf_counter() - self.started)
        while self._waits and self._waits[0][1].query():
            before, arrival = self._waits.popleft()
            self._waited += before.elapsed_time(arrival) / 1000
        rate, wait = self.clips / seconds, self._waited / seconds
        late = {"host_bound": self._late / self._updates} if self._updates else {}
        return {"seconds": seconds, "clips_per_second": rate, "data_wait": wait, **late}

    def _record(self) -> Any:
        if self._make_event is None:
            return None
        event = self._make_event()
        event.record()
        return event


@dataclass(frozen=True)
class BadClip:
    """A clip with a loss that is not finite."""

    step: int
    index: int  # in the training videos
    loss: float
    step_clips: int
    mixed_with: int | None = None  # the index of its mixup or CutMix partner


@dataclass
class LossWatch:
    """Losses since the last check, kept on their device, so that no step synchronises."""

    _recent: list[tuple[MicroBatch, Tensor]] = field(default_factory=list)

    def add(self, planned: MicroBatch, losses: Tensor) -> None:
        """Adds the losses (B,) of a micro-batch; those beyond its `real` clips are ignored."""
        if planned.real:
            self._recent.append((planned, losses.detach()[: planned.real]))

    def drop(self, step: int) -> None:
        """Removes the losses of a step that is repeated."""
        self._recent = [(planned, losses) for planned, losses in self._recent if planned.step != step]

    def check(self, accelerator: Accelerator) -> list[BadClip]:
        """The clips of the first step with a loss that is not finite; empty if all are finite.

        A collective: all processes call it and get the same result. Synchronises with the device.
        """
        recent, self._recent = self._recent, []
        every = [losses for _, losses in recent] or [torch.zeros(1, device=accelerator.device)]
        finite = torch.cat(every).isfinite().all()
        if not accelerator.reduce((~finite).float(), reduction="sum").item():
            return []
        own = []
        for planned, losses in recent:
            keys = planned.keys + planned.extra
            for i, loss in enumerate(losses.tolist()):
                if not math.isfinite(loss):
                    partner = keys[planned.partners[i]][1] if planned.partners else None
                    own.append(BadClip(planned.step, keys[i][1], loss, planned.step_clips, partner))
        bad: list[BadClip] = gather_object(own)
        first = min(clip.step for clip in bad)
        return [clip for clip in bad if clip.step == first]


def loss_error(
    bad: Sequence[BadClip], names: Sequence[str], settings: TrainSettings, precision: str, checkpoints: Path
) -> RunError:
    """The error for clips with a loss that is not finite; `names` are those of all training videos."""
    clips = bad[0].step_clips
    lines = [f"Step {bad[0].step + 1}: the loss of {len(bad)} of its {clips} clips is not finite:"]
    for clip in bad[:MOST_NAMES]:
        mixed = "" if clip.mixed_with is None else f", mixed with {names[clip.mixed_with]}"
        lines.append(f"  {names[clip.index]}{mixed}: {clip.loss}")
    if len(bad) > MOST_NAMES:
        lines.append(f"  and {len(bad) - MOST_NAMES} more")
    hint = "All clips of the step: the run diverged. " if len(bad) == clips else "Check these clips first. "
    return divergence_error("\n".join([*lines, hint]), settings, precision, checkpoints)


def divergence_error(problem: str, settings: TrainSettings, precision: str, checkpoints: Path) -> RunError:
    """The error for numbers that are not finite; `precision` is the number format in use."""
    kept = list_checkpoints(checkpoints)
    state = f"The last good checkpoint is {kept[-1]}." if kept else "No checkpoint had been written yet."
    changes = [f"a smaller --learning-rate (it is {settings.learning_rate:g})", "a longer --warmup-epochs"]
    if settings.max_grad_norm is None:
        changes.append("--max-grad-norm 1")
    if precision != "no":
        changes.append("--mixed-precision no")
    return RunError(
        f"{problem}{state}\nA resumed run would diverge again: start a new run with {', or '.join(changes)}.",
        by_all=True,
    )


def non_finite_names(tensors: Mapping[str, Tensor]) -> list[str]:
    """The names of the tensors with a NaN or an infinity. Synchronises with the device, once."""
    flags = [tensor.isfinite().all() for tensor in tensors.values()]
    finite = torch.stack(flags).tolist() if flags else []
    return [name for name, is_finite in zip(tensors, finite, strict=True) if not is_finite]
