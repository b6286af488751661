"""State of a training loop, the moving average of its weights, and standardised features."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
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
from tvit_cli.engine.evaluate.scoring import Scores, WithFeatures, clips_to_score, score
from tvit_cli.engine.launch import ProcessGroup
from tvit_cli.engine.train.batches import BatchPlan
from tvit_cli.engine.train.build import Built, clips_to_standardise
from tvit_cli.engine.train.fingerprint import BASE, data_fingerprint, result_settings
from tvit_cli.engine.train.monitor import LossWatch, divergence_error, loss_error
from tvit_cli.engine.train.optim import learning_rate_at
from tvit_cli.engine.train.run_folder import Run
from tvit_cli.engine.train.trackers import Trackers
from tvit_cli.errors import DataError, RunError
from tvit_cli.model.lora import copy_tensors, trainable_tensors
from tvit_cli.portable.layers import FeatureNorm
from tvit_cli.portable.vit import TemporalViT
from tvit_cli.report.film import Samples
from tvit_cli.results import Note, Progress, Report
from tvit_cli.settings.train import TrainSettings

STANDARDISE_BATCH = 8  # fixed, so that the last bits depend neither on the micro-batch nor on the processes


class WeightAverage:
    """Exponential moving average of a model's trainable tensors; an adapter's matrices are averaged separately."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self._weights = trainable_tensors(model)
        self.tensors = {name: weight.clone() for name, weight in self._weights.items()}
        self._decay = decay

    def decay_at(self, step: int) -> float:
        """The decay of update `step`, counted from 0; small at first, as in TensorFlow: 0.1 . 0.18 . 0.25 …"""
        return min(self._decay, (1 + step) / (10 + step))

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Moves the average towards the weights after update `step`, counted from 0."""
        weight = 1 - self.decay_at(step)
        torch._foreach_lerp_(list(self.tensors.values()), list(self._weights.values()), weight)

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Loads a saved average. Raises ModelError for other names or shapes."""
        copy_tensors(tensors, self.tensors)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Within the block the model has the averaged weights; afterwards its own, bit for bit."""
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
    """The parts of a training, made once, and its state, which a checkpoint stores."""

    settings: TrainSettings
    accelerator: Accelerator
    run: Run
    source: DataSource
    built: Built
    model: nn.Module  # `plain_model`, compiled with --compile
    optimizer: AcceleratedOptimizer
    plan: BatchPlan
    trackers: Trackers
    report: Report
    class_weights: Tensor  # (K,) float32, in the training loss
    tally: Tally
    ema: WeightAverage | None = None

    step: int = 0
    best: dict[str, float] = field(default_factory=dict)
    best_step: int = 0
    best_tensors: dict[str, Tensor] | None = None
    unreadable: dict[str, str] = field(default_factory=dict)
    watch: LossWatch = field(default_factory=LossWatch)
    samples: Samples = field(default_factory=Samples)
    saved_step: int = 0  # step and time of the last checkpoint that this process wrote
    saved_at: float = field(default_factory=time.monotonic)

    @property
    def plain_model(self) -> TemporalViT:
        """The model that is not compiled; it shares its parameters with `model`."""
        return self.built.model

    @property
    def device(self) -> torch.device:
        """The device of this process."""
        return torch.device(self.accelerator.device)

    @property
    def patience_exceeded(self) -> bool:
        """Whether the best validation result is --patience epochs old."""
        patience = self.settings.patience
        return patience is not None and self.step - self.best_step >= patience * self.plan.steps_per_epoch

    def learning_rate(self, step: int) -> float:
        """The learning rate of a step, before the factors of parameter groups."""
        peak, total = self.settings.learning_rate, self.plan.total_steps
        warmup = round(self.settings.warmup() * self.plan.steps_per_epoch)
        return learning_rate_at(step, peak=peak, warmup_steps=warmup, total_steps=total)

    def validated_tensors(self) -> dict[str, Tensor]:
        """The tensors that are validated and kept: the trainable ones, or their average with --ema-decay."""
        return trainable_tensors(self.plain_model) if self.ema is None else self.ema.tensors

    def fingerprint(self) -> dict[str, object]:
        """Settings, data, base weights and processes, compared on resume and across ranks."""
        base = self.built.base
        modes = {"deterministic": self.settings.deterministic} if self.device.type == "cuda" else {}
        return {
            **result_settings(self.settings),
            **modes,
            **data_fingerprint(self.source),
            f"{BASE} weights": None if base is None else base.sha256,
            **{f"{BASE} {name}": value for name, value in self.built.network().items()},
            "device type": self.device.type,
            "processes": self.plan.processes,
        }

    def score(
        self, videos: Sequence[Video], task: str, *, model: nn.Module | None = None, batch_size: int = 0
    ) -> Scores:
        """Scores videos with one view, by default with this model, on all ranks; every rank gets all scores."""
        labels, store = self.source.layout.labels, self.source.store
        return score(
            model or self.plain_model,
            clips_to_score(videos, labels, self.built.preprocessing, store=store),
            ProcessGroup.of(self.accelerator),
            batch_size=batch_size or self.plan.batch_size,
            workers=worker_count(self.settings.num_workers),
            autocast=self.accelerator.autocast,
            progress=lambda done, total: self.report(Progress(task, done, total)),
        )

    def check_losses(self) -> None:
        """Raises RunError that names the clips with a non-finite loss since the last check; a collective."""
        if bad := self.watch.check(self.accelerator):
            names = [video.name for video in self.source.readable("train")]
            precision = self.accelerator.mixed_precision
            raise loss_error(bad, names, self.settings, precision, self.run.checkpoints)

    def divergence_error(self, problem: str) -> RunError:
        """The error for numbers that are not finite."""
        text, precision = f"Step {self.step}: {problem} ", self.accelerator.mixed_precision
        return divergence_error(text, self.settings, precision, self.run.checkpoints)

    def report_unreadable(self, name: str, reason: str) -> None:
        """Warns of an unreadable video, once per process."""
        if name not in self.unreadable:
            self.unreadable[name] = reason
            self.report(Note(f"left out: {name}: {reason}", "warning"))


# Note [Feature mean]
# The clips of one data set look alike to a pretrained network: on Weizmann, the mean of DINOv2-S features is 2.0,
# and their deviation from it 1.1 (root mean squares). So the classifier's gradient is mostly along the mean, and
# the adapters learn from that noise. Without the mean they learn faster and better: docs/negative-results.md.


def standardise_features(loop: Loop) -> None:
    """Fits the model's `feature_norm` to training clips, preprocessed as in evaluation. See Note [Feature mean].

    Raises DataError if no clip can be read.
    """
    norm = loop.plain_model.feature_norm
    assert isinstance(norm, FeatureNorm)
    chosen = clips_to_standardise(loop.source.readable("train"))
    model = WithFeatures(loop.plain_model)
    scores = loop.score(chosen, "standardising features", model=model, batch_size=STANDARDISE_BATCH)
    if not len(scores.indices):
        raise DataError(f"{loop.source.layout.root}: none of {len(chosen)} training videos can be read.")
    norm.fit(scores.logits[:, loop.built.config.num_classes :].double())
    loop.report(Note(f"Features standardised over {len(scores.indices)} training clips.", "detail"))
