"""State of a training loop, and the moving average of its weights."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor, nn

from tvit_cli.data.layout import Video
from tvit_cli.engine.dataset import DataSource
from tvit_cli.engine.distributed import worker_count
from tvit_cli.engine.evaluate.metrics import Tally
from tvit_cli.engine.evaluate.scoring import Scores, score
from tvit_cli.engine.train.batches import BatchPlan
from tvit_cli.engine.train.build import Built
from tvit_cli.engine.train.fingerprint import fingerprint
from tvit_cli.engine.train.monitor import LossWatch, loss_error
from tvit_cli.engine.train.optim import learning_rate_at
from tvit_cli.engine.train.run_folder import Run
from tvit_cli.engine.train.trackers import Trackers
from tvit_cli.model.lora import copy_tensors, trainable_tensors
from tvit_cli.portable.vit import TemporalViT
from tvit_cli.report.film import Samples
from tvit_cli.results import Note, Report
from tvit_cli.settings.train import TrainSettings


class WeightAverage:
    """The exponential moving average of a model's trainable tensors, on their device and in their dtype.

    An adapter's two matrices are averaged each by itself, as all other tensors are, not their product.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        """The average begins as the weights are."""
        self._weights = trainable_tensors(model)
        self.tensors = {name: weight.clone() for name, weight in self._weights.items()}
        self._decay = decay

    def decay_at(self, step: int) -> float:
        """Share of the average that outlives update `step`, counted from 0; small at first, to forget the start.

        min(decay, (1 + step) / (10 + step)), as in TensorFlow: 0.1 . 0.18 . 0.25 … and 0.9 at step 80.
        """
        return min(self._decay, (1 + step) / (10 + step))

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Move the average towards the weights that update `step`, counted from 0, has left."""
        weight = 1 - self.decay_at(step)
        torch._foreach_lerp_(list(self.tensors.values()), list(self._weights.values()), weight)

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take a saved average. Raises ModelError when names or shapes differ."""
        copy_tensors(tensors, self.tensors)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Within the block the model has the average as its weights; afterwards its own, bit for bit."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for name, weight in self._weights.items():
            own = weight.clone()
            weight.copy_(self.tensors[name])
            self.tensors[name].copy_(own)


@dataclass
class Loop:
    """The parts, made once, then its state, which a checkpoint stores."""

    settings: TrainSettings
    accelerator: Accelerator
    run: Run
    source: DataSource
    built: Built
    model: nn.Module  # as it is trained: compiled, or the plain one
    optimizer: AcceleratedOptimizer
    plan: BatchPlan
    trackers: Trackers
    report: Report
    class_weights: Tensor  # (K,) float32: what a clip of each class counts in the training loss
    ema: WeightAverage | None = None

    step: int = 0
    tally: Tally = field(init=False)
    best: dict[str, float] = field(default_factory=dict)
    best_step: int = 0
    best_tensors: dict[str, Tensor] | None = None
    unreadable: dict[str, str] = field(default_factory=dict)
    watch: LossWatch = field(default_factory=LossWatch)
    samples: Samples = field(default_factory=Samples)
    saved_step: int = 0  # of the last checkpoint of this process's life, and when it was written
    saved_at: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        self.tally = Tally.zeros(self.accelerator.device)

    @property
    def plain_model(self) -> TemporalViT:
        return self.built.model

    @property
    def device(self) -> torch.device:
        device: torch.device = self.accelerator.device
        return device


def num_workers(loop: Loop) -> int:
    """Number of processes that decode for this one: --num-workers, or what the machine has cores for."""
    return worker_count(loop.settings.num_workers)


def learning_rate(loop: Loop, step: int) -> float:
    """The peak rate of a step, which layers and parts take their shares of."""
    return learning_rate_at(
        step,
        peak=loop.settings.learning_rate,
        warmup_steps=round(loop.settings.warmup() * loop.plan.steps_per_epoch),
        total_steps=loop.plan.total_steps,
    )


def trainable(loop: Loop) -> dict[str, Tensor]:
    """The tensors that the optimizer changes, sharing the model's memory."""
    return trainable_tensors(loop.plain_model)


def validated_tensors(loop: Loop) -> dict[str, Tensor]:
    """What is validated and kept: the average of the trainable tensors where there is one, else they themselves."""
    return trainable(loop) if loop.ema is None else loop.ema.tensors


def loop_fingerprint(loop: Loop) -> dict[str, object]:
    """What has to be the same when the run is resumed."""
    return fingerprint(
        loop.settings,
        labels=loop.source.layout.labels,
        training=[video.name for video in loop.source.readable("train")],
        validation=[video.name for video in loop.source.readable("val")],
        base=loop.built.base,
        network=loop.built.network(),
        frames="videos" if loop.source.store is None else f"store, {loop.source.store.parameters}",
        device=loop.device.type,
        processes=loop.plan.processes,
    )


def score_videos(
    loop: Loop,
    videos: Sequence[Video],
    *,
    rank: int = 0,
    processes: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> Scores:
    """Score videos with the model as it is now, as validation does; of several processes, this one's share."""
    return score(
        loop.plain_model,
        videos,
        loop.source.layout.labels,
        loop.built.preprocessing,
        device=loop.device,
        batch_size=loop.plan.batch_size,
        workers=num_workers(loop),
        rank=rank,
        processes=processes,
        autocast=loop.accelerator.autocast,
        store=loop.source.store,
        progress=progress,
    )


def check_losses(loop: Loop) -> None:
    """Raise RunError that names the clips where a loss since the last check is not finite."""
    if bad := loop.watch.look(loop.accelerator):
        names = [video.name for video in loop.source.readable("train")]
        raise loss_error(bad, names, loop.settings, loop.accelerator.mixed_precision, loop.run.checkpoints)


def report_unreadable(loop: Loop, name: str, reason: str) -> None:
    """Warn of a video that is left out, once in a process's life."""
    if name not in loop.unreadable:
        loop.unreadable[name] = reason
        loop.report(Note(f"left out: {name}: {reason}", "warning"))
