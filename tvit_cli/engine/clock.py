"""Wall-clock facts of an epoch: throughput, and the share of time that the model waited for data."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Protocol, cast

import torch

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
