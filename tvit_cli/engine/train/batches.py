"""Batch plan of a training: the clips of each step and process, and their inputs on the device.

A *window* is the clips of one optimizer update, over all processes and micro-batches. Its clips depend on the
seed, the epoch and its place in the epoch only, so the update is the same however it is cut up.

Note [Partners]
    Mixup and CutMix give each clip a partner. Were it taken from the micro-batch, as image trainers do, the update
    would change with the batch size and the number of processes; were it drawn from all videos, each clip
    would cost the reading of a second. Here clips are partners two by two in the order of the window: that order
    is a random one, so a partner is as random as a drawn one, and it is the same however the window is cut. Pairs
    are dealt to one process and one micro-batch, so that both are read, and transformed, once; a clip whose
    partner lies elsewhere (odd batch sizes, the last clip of an odd window) brings it along as an `extra` key.
    What two clips share of each other is drawn for each by itself: (seed, epoch, index).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from tvit_cli.data.augment import Augmentation, Mixing, mix, train_transform
from tvit_cli.data.clips import ClipBatch
from tvit_cli.engine.train.optim import Targets
from tvit_cli.portable.preprocessing import to_device
from tvit_cli.portable.reading import Key
from tvit_cli.settings.card import Preprocessing
from tvit_cli.settings.train import TrainSettings


def class_weights(labels: Sequence[int], classes: int) -> list[float]:
    """Weight of each class, inverse to its clips, with a mean of 1 over the clips; 0 for a class without any.

    Two classes of 3 and 1 clips -> 0.67, 2
    """
    counts = np.bincount(labels, minlength=classes)
    present = np.count_nonzero(counts)
    return [len(labels) / (present * int(count)) if count else 0.0 for count in counts]


def balanced_order(labels: Sequence[int], generator: np.random.Generator) -> list[int]:
    """Indices of as many clips as there are, mixed: equally many of each class, give or take one.

    Which classes have one more is drawn. A class's clips are all read equally often, give or take once.
    """
    targets = np.asarray(labels)
    present = np.unique(targets)
    shares = np.full(len(present), len(targets) // len(present))
    shares[generator.permutation(len(present))[: len(targets) % len(present)]] += 1
    drawn = []
    for target, share in zip(present, shares, strict=True):
        own = np.flatnonzero(targets == target)
        times, more = divmod(int(share), len(own))
        drawn += [np.tile(own, times), generator.permutation(own)[:more]]
    return [int(index) for index in generator.permutation(np.concatenate(drawn))]


@dataclass(frozen=True)
class MicroBatch:
    """One process's share of one forward pass.

    The first `real` of `keys` count; a process that has none left reads a clip of the window again, with no
    weight, so that all processes take the same number of forward passes. Where clips are mixed, `partners` has
    for each of `keys` the place of its partner in `keys + extra`, else nothing.
    """

    epoch: int
    step: int
    keys: tuple[Key, ...]
    extra: tuple[Key, ...]
    partners: tuple[int, ...]
    real: int
    window_clips: int
    closes_window: bool
    closes_epoch: bool


@dataclass(frozen=True)
class BatchPlan:
    """The micro-batches of a run for one of `processes` processes.

    `batch_size` is one process's micro-batch, `global_batch` the clips of a window. With `balance`, the class of
    every clip, an epoch has equally many of each class (`balanced_order`). With `pairs` each clip has a partner:
    see Note [Partners]. With `repeats`, which divides the clips of a window, each clip is in its window that many
    times, under a key of its own each time.
    """

    clips: int
    batch_size: int
    global_batch: int
    processes: int
    rank: int
    epochs: int
    seed: int
    balance: tuple[int, ...] | None = None
    pairs: bool = False
    repeats: int = 1

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer updates per epoch; the last may have fewer clips."""
        return -(-self.clips // self._videos_per_window)

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
                start = (step - first) * self._videos_per_window
                once = order[start : start + self._videos_per_window]
                keys = [self._again(key, number) for number in range(self.repeats) for key in once]
                yield from self._window_batches(epoch, step, keys)

    @property
    def _videos_per_window(self) -> int:
        return self.global_batch // self.repeats

    @property
    def accumulation(self) -> int:
        """Forward passes per window; the last may have fewer clips."""
        return -(-self.global_batch // (self.batch_size * self.processes))

    def halved(self) -> BatchPlan:
        """The same windows in passes of half as many clips, rounded down."""
        return replace(self, batch_size=self.batch_size // 2)

    def __str__(self) -> str:
        wide = (
            f"{self.processes} {'process' if self.processes == 1 else 'processes'} × {self.batch_size} clips"
        )
        return f"global batch {self.global_batch} = {wide} × {self.accumulation} accumulation"

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

    def _again(self, key: Key, number: int) -> Key:
        """The key of a clip's repeat: the numbers of its readings in an epoch stay apart."""
        times, epoch = divmod(key[0], self.epochs)
        return epoch + (times * self.repeats + number) * self.epochs, key[1]

    def _window_batches(self, epoch: int, step: int, window: list[Key]) -> Iterator[MicroBatch]:
        wide = self.batch_size * self.processes
        passes = -(-len(window) // wide)
        dealt = 2 if self.pairs and self.batch_size % 2 == 0 else 1  # clips at a time
        for number in range(passes):
            shared = range(number * wide, min((number + 1) * wide, len(window)))
            own = [place for n, place in enumerate(shared) if n // dealt % self.processes == self.rank]
            read = own or [0]
            partners = [_partner(place, len(window)) for place in own] or [0] if self.pairs else []
            extra = sorted(set(partners) - set(read))
            last = number == passes - 1
            yield MicroBatch(
                epoch=epoch,
                step=step,
                keys=tuple(window[place] for place in read),
                extra=tuple(window[place] for place in extra),
                partners=tuple((read + extra).index(partner) for partner in partners),
                real=len(own),
                window_clips=len(window),
                closes_window=last,
                closes_epoch=last and (step + 1) % self.steps_per_epoch == 0,
            )


def _partner(place: int, clips: int) -> int:
    """The other clip of a pair; of an odd number of clips, the last joins the pair before. 0 1 2 -> 1 0 1"""
    other = place ^ 1
    return other if other < clips else max(place - 1, 0)


class BatchKeys:
    """A DataLoader's batch sampler: the keys of a plan's micro-batches, partners included."""

    def __init__(self, plan: BatchPlan, first_step: int) -> None:
        self.plan = plan
        self.first_step = first_step

    def __iter__(self) -> Iterator[list[Key]]:
        for batch in self.plan.micro_batches(self.first_step):
            yield [*batch.keys, *batch.extra]


def short_side(settings: TrainSettings) -> int:
    """Short side of the frames that workers hand over: the smallest crop still has the model's resolution."""
    return math.ceil(settings.img_size / math.sqrt(settings.crop_scale_min))


def make_inputs(
    planned: MicroBatch,
    batch: ClipBatch,
    *,
    settings: TrainSettings,
    preprocessing: Preprocessing,
    device: torch.device,
) -> tuple[Tensor, Targets]:
    """The clips (B, T, C, S, S) of a planned pass, from what was read for it, and their targets.

    Unreadable clips weigh nothing, nor do those beyond `planned.real`; a clip whose partner cannot be read is
    left unmixed.
    """
    clips = train_transform(
        batch.clips,
        batch.epochs,
        batch.indices,
        augmentation=_augmentation(settings),
        preprocessing=preprocessing,
        seed=settings.seed,
        device=device,
    )
    labels = to_device(batch.labels, device)
    own = len(planned.keys)
    weights = batch.weights[:own].clone()
    weights[planned.real :] = 0
    weights = to_device(weights, device)
    if not planned.partners:
        return clips, Targets(labels, weights)
    partners = [other if batch.weights[other] else place for place, other in enumerate(planned.partners)]
    others = to_device(batch.labels[partners], device)
    mixing = Mixing(mixup=settings.mixup, cutmix=settings.cutmix)
    clips, shares = mix(clips, partners, batch.epochs, batch.indices, mixing=mixing, seed=settings.seed)
    return clips, Targets(labels[:own], weights, others, shares)


def _augmentation(settings: TrainSettings) -> Augmentation:
    return Augmentation(
        crop_scale=(settings.crop_scale_min, 1.0),
        horizontal_flip=settings.horizontal_flip,
        brightness=settings.brightness,
        contrast=settings.contrast,
        saturation=settings.saturation,
        hue=settings.hue,
        randaugment=settings.randaugment,
        randaugment_magnitude=settings.randaugment_magnitude,
        random_erasing=settings.random_erasing,
    )
