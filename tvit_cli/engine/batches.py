"""Which clips each process reads at each step of a training: index arithmetic, no I/O.

A *window* is the clips of one optimizer update, over all processes and micro-batches. Its clips depend on the
seed, the epoch and its place in the epoch only, so the update is the same however it is cut up.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from tvit_cli.engine.balance import balanced_order

# (epoch, index of the video): what a clip's frames and augmentation are drawn from. A clip that is read again in
# one epoch takes the number of an epoch after the run's last one, so that it is not the same again.
Key = tuple[int, int]


@dataclass(frozen=True)
class MicroBatch:
    """One process's share of one forward pass.

    The first `real` of `keys` count; a process that has none left reads a clip of the window again, with no
    weight, so that all processes take the same number of forward passes.
    """

    epoch: int
    step: int
    keys: tuple[Key, ...]
    real: int
    window_clips: int
    closes_window: bool
    closes_epoch: bool


@dataclass(frozen=True)
class BatchPlan:
    """The micro-batches of a run for one of `processes` processes.

    With `balance`, the class of every clip, an epoch has equally many of each class (`balanced_order`).
    """

    clips: int
    batch_size: int
    accumulation: int
    processes: int
    rank: int
    epochs: int
    seed: int
    balance: tuple[int, ...] | None = None

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer updates per epoch; the last may have fewer clips."""
        return -(-self.clips // self._window)

    @property
    def total_steps(self) -> int:
        """Optimizer updates of the whole run."""
        return self.steps_per_epoch * self.epochs

    def micro_batches(self, first_step: int = 0) -> Iterator[MicroBatch]:
        """All micro-batches from an optimizer update on, to the end of the last epoch."""
        for epoch in range(first_step // self.steps_per_epoch, self.epochs):
            order = self._order(epoch)
            first = epoch * self.steps_per_epoch
            for step in range(max(first, first_step), first + self.steps_per_epoch):
                start = (step - first) * self._window
                yield from self._window_batches(epoch, step, order[start : start + self._window])

    @property
    def _window(self) -> int:
        return self.batch_size * self.accumulation * self.processes

    def _order(self, epoch: int) -> list[Key]:
        generator = np.random.default_rng([self.seed, epoch])
        if self.balance is None:
            return [(epoch, int(index)) for index in generator.permutation(self.clips)]
        keys: list[Key] = []
        times: Counter[int] = Counter()
        for index in balanced_order(self.balance, generator):
            keys.append((epoch + times[index] * self.epochs, index))
            times[index] += 1
        return keys

    def _window_batches(self, epoch: int, step: int, window: list[Key]) -> Iterator[MicroBatch]:
        wide = self.batch_size * self.processes
        passes = -(-len(window) // wide)
        for number in range(passes):
            shared = window[number * wide : (number + 1) * wide]
            own = shared[self.rank :: self.processes]
            last = number == passes - 1
            yield MicroBatch(
                epoch=epoch,
                step=step,
                keys=tuple(own or window[:1]),
                real=len(own),
                window_clips=len(window),
                closes_window=last,
                closes_epoch=last and (step + 1) % self.steps_per_epoch == 0,
            )


class BatchKeys:
    """A DataLoader's batch sampler: the keys of a plan's micro-batches."""

    def __init__(self, plan: BatchPlan, first_step: int) -> None:
        self.plan = plan
        self.first_step = first_step

    def __iter__(self) -> Iterator[list[Key]]:
        for batch in self.plan.micro_batches(self.first_step):
            yield list(batch.keys)
