"""Batch plan of a training: the clips of each step and process, and their inputs on the device.

The clips of a step (an optimizer update, over all processes and micro-batches) depend on the seed, the epoch and
the step's position in it only. So the update is the same for any micro-batch size and number of processes.

Note [Partners]
    Partners for mixup and CutMix from within the micro-batch would make the update depend on its size; partners
    drawn from all videos would double the decoding. So clips are paired in the random order of the step, and a pair
    is assigned to one micro-batch of one process. A clip whose partner is elsewhere (odd batch sizes, the last clip
    of an odd step) has it as an `extra` key. The mixing ratio is drawn for each clip from (seed, epoch, index).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from torch import Tensor

from tvit_cli.data.augment import Augmentation, Mixing, mix, train_transform
from tvit_cli.data.clips import ClipBatch
from tvit_cli.engine.train.optim import Targets
from tvit_cli.errors import plural
from tvit_cli.portable.preprocessing import to_device
from tvit_cli.portable.reading import Key
from tvit_cli.settings.card import Preprocessing
from tvit_cli.settings.train import TrainSettings


def class_weights(labels: Sequence[int], classes: int) -> list[float]:
    """Weight of each class, inverse to its number of clips, with a mean of 1 over the clips; 0 without clips.

    Two classes of 3 and 1 clips -> 0.67, 2
    """
    counts = np.bincount(labels, minlength=classes)
    present = np.count_nonzero(counts)
    return [len(labels) / (present * int(count)) if count else 0.0 for count in counts]


def balanced_order(labels: Sequence[int], generator: np.random.Generator) -> list[int]:
    """Shuffled indices of `len(labels)` clips, equally many of each class, give or take one.

    The classes with one clip more are drawn. Within a class, clips repeat equally often, give or take once.
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
    """The clips of one process in one forward pass.

    A process with no clip left decodes one of the step again, with weight 0, so that all processes take the same
    number of forward passes.
    """

    epoch: int
    step: int
    keys: tuple[Key, ...]
    extra: tuple[Key, ...]
    partners: tuple[int, ...]  # with mixing, for each of `keys` the index of its partner in `keys + extra`
    real: int  # number of `keys` that count, the first ones
    step_clips: int  # of all processes
    ends_step: bool
    ends_epoch: bool


@dataclass(frozen=True)
class BatchPlan:
    """The micro-batches of one of `processes` processes."""

    clips: int
    batch_size: int  # clips of a micro-batch
    global_batch: int  # clips of a step
    processes: int
    rank: int
    epochs: int
    seed: int
    balance: tuple[int, ...] | None = None  # classes of the clips, for epochs in `balanced_order`
    pairs: bool = False  # whether clips have partners: see Note [Partners]
    repeats: int = 1  # repeated augmentation, under one key each; a divisor of `global_batch`

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer updates per epoch; the last may have fewer clips."""
        return -(-self.clips // (self.global_batch // self.repeats))

    @property
    def total_steps(self) -> int:
        """Optimizer updates of the whole run."""
        return self.steps_per_epoch * self.epochs

    @property
    def accumulation(self) -> int:
        """Forward passes per step; the last may have fewer clips."""
        return -(-self.global_batch // (self.batch_size * self.processes))

    def halved(self) -> BatchPlan:
        """The same steps with half the micro-batch, rounded down."""
        return replace(self, batch_size=self.batch_size // 2)

    def __str__(self) -> str:
        factors = f"{plural(self.processes, 'process')} × {self.batch_size} clips × {self.accumulation}"
        return f"global batch {self.global_batch} = {factors} accumulation"

    def micro_batches(self, first_step: int = 0) -> Iterator[MicroBatch]:
        """All micro-batches from step `first_step`, counted from 0, to the end of the last epoch."""
        videos = self.global_batch // self.repeats
        for epoch in range(first_step // self.steps_per_epoch, self.epochs):
            order = self._order(epoch)
            first = epoch * self.steps_per_epoch
            for step in range(max(first, first_step), first + self.steps_per_epoch):
                once = order[(step - first) * videos :][:videos]
                keys = [self._repeat(key, number) for number in range(self.repeats) for key in once]
                yield from self._split_step(epoch, step, keys)

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

    def _repeat(self, key: Key, number: int) -> Key:
        """The key of a clip's repeat, unique among all readings of the clip in an epoch."""
        times, epoch = divmod(key[0], self.epochs)
        return epoch + (times * self.repeats + number) * self.epochs, key[1]

    def _split_step(self, epoch: int, step: int, keys: list[Key]) -> Iterator[MicroBatch]:
        per_pass = self.batch_size * self.processes
        passes = -(-len(keys) // per_pass)
        unit = 2 if self.pairs and self.batch_size % 2 == 0 else 1  # clips assigned to a process together
        for number in range(passes):
            shared = range(number * per_pass, min((number + 1) * per_pass, len(keys)))
            own = [i for n, i in enumerate(shared) if n // unit % self.processes == self.rank]
            read = own or [0]
            partners = [_partner(i, len(keys)) for i in own] or [0] if self.pairs else []
            extra = sorted(set(partners) - set(read))
            last = number == passes - 1
            yield MicroBatch(
                epoch=epoch,
                step=step,
                keys=tuple(keys[i] for i in read),
                extra=tuple(keys[i] for i in extra),
                partners=tuple((read + extra).index(partner) for partner in partners),
                real=len(own),
                step_clips=len(keys),
                ends_step=last,
                ends_epoch=last and (step + 1) % self.steps_per_epoch == 0,
            )


def _partner(index: int, clips: int) -> int:
    """The other clip of a pair; of an odd number of clips, the last joins the pair before. 0 1 2 -> 1 0 1"""
    other = index ^ 1
    return other if other < clips else max(index - 1, 0)


@dataclass(frozen=True)
class BatchKeys:
    """Batch sampler of a DataLoader: the keys of a plan's micro-batches, partners included."""

    plan: BatchPlan
    first_step: int

    def __iter__(self) -> Iterator[list[Key]]:
        return ([*batch.keys, *batch.extra] for batch in self.plan.micro_batches(self.first_step))


def make_inputs(
    planned: MicroBatch,
    batch: ClipBatch,
    *,
    settings: TrainSettings,
    preprocessing: Preprocessing,
    device: torch.device,
) -> tuple[Tensor, Targets]:
    """The augmented clips (B, T, C, S, S) of a micro-batch, and their targets.

    Unreadable clips and those beyond `planned.real` have weight 0. A clip with an unreadable partner is not mixed.
    """
    shared = {field.name for field in fields(Augmentation)} & TrainSettings.model_fields.keys()
    own = {name: getattr(settings, name) for name in shared}
    clips = train_transform(
        batch.clips,
        batch.epochs,
        batch.indices,
        augmentation=Augmentation(crop_scale=(settings.crop_scale_min, 1.0), **own),
        preprocessing=preprocessing,
        seed=settings.seed,
        device=device,
    )
    labels = to_device(batch.labels, device)
    count = len(planned.keys)
    weights = batch.weights[:count].clone()
    weights[planned.real :] = 0
    weights = to_device(weights, device)
    if not planned.partners:
        return clips, Targets(labels, weights)
    partners = [other if batch.weights[other] else own for own, other in enumerate(planned.partners)]
    others = to_device(batch.labels[partners], device)
    mixing = Mixing(mixup=settings.mixup, cutmix=settings.cutmix)
    clips, shares = mix(clips, partners, batch.epochs, batch.indices, mixing=mixing, seed=settings.seed)
    return clips, Targets(labels[:count], weights, others, shares)
