"""Wall-clock facts of an epoch: throughput, and the share of time that the model waited for data."""

from __future__ import annotations

import time

SECONDS_BETWEEN_REPORTS = 0.2  # reading the loss waits for the device, so not at every step


class Clock:
    """Started when an epoch starts."""

    def __init__(self) -> None:
        self.started = self._waiting_since = time.perf_counter()
        self._reported = 0.0
        self.waited = 0.0
        self.clips = 0

    def data_arrived(self) -> None:
        self.waited += time.perf_counter() - self._waiting_since

    def waits_for_data(self) -> None:
        self._waiting_since = time.perf_counter()

    def report_is_due(self) -> bool:
        now = time.perf_counter()
        due = now - self._reported >= SECONDS_BETWEEN_REPORTS
        if due:
            self._reported = now
        return due

    def clips_per_second(self) -> float:
        return self.clips / max(1e-9, time.perf_counter() - self.started)

    def facts(self) -> dict[str, float]:
        """Seconds, clips per second, and the share of the time that the model waited for data."""
        seconds = time.perf_counter() - self.started
        return {
            "seconds": seconds,
            "clips_per_second": self.clips / max(1e-9, seconds),
            "data_wait": self.waited / max(1e-9, seconds),
        }
