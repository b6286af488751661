"""How many clips go into an update, and how many of them into one forward pass: as told, or as many as fit."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from torch.nn import functional as F

from tvit_cli.engine.build import Built
from tvit_cli.engine.memory import MOMENTS, MemoryModel, free_bytes, memory_model, peak_bytes
from tvit_cli.engine.outofmemory import Attempt, advice, release
from tvit_cli.engine.parallel import least_of_them
from tvit_cli.engine.source import local_processes
from tvit_cli.errors import RunError, SettingsError
from tvit_cli.settings.train import DEFAULT_MICRO_BATCH, TrainSettings


def global_batch(settings: TrainSettings, processes: int) -> int:
    """Clips per update: as given, else micro-batch × accumulation × processes; for an automatic one, the default's.

    Raises SettingsError where a given one cannot be cut into equal passes.
    """
    micro = settings.per_gpu_batch_size
    wide = (DEFAULT_MICRO_BATCH if micro == "auto" else micro) * processes
    if settings.global_batch_size is None:
        return wide * settings.gradient_accumulation_steps
    wide = processes if micro == "auto" else wide
    if settings.global_batch_size % wide:
        below = settings.global_batch_size // wide * wide
        of = f"{processes} processes" if micro == "auto" else f"{processes} × --per-gpu-batch-size {micro}"
        raise SettingsError(
            f"--global-batch-size {settings.global_batch_size}: no multiple of {of}. "
            f"Take {f'{below} or ' if below else ''}{below + wide}."
        )
    return settings.global_batch_size


def resolve_batch(
    settings: TrainSettings, processes: int, *, find: Callable[[int], int]
) -> tuple[TrainSettings, int]:
    """The settings with a number for an automatic micro-batch, and the clips of an update.

    `find` tells how many of one process's clips of an update go into a pass; it is asked only for `auto`.
    """
    clips = global_batch(settings, processes)
    if settings.per_gpu_batch_size != "auto":
        return settings, clips
    found = {
        "per_gpu_batch_size": find(clips // processes),
        "gradient_accumulation_steps": 1,
        "global_batch_size": clips,
    }
    return settings.model_copy(update=found), clips


def as_before(settings: TrainSettings, before: Mapping[str, Any], processes: int) -> TrainSettings:
    """The settings with what a run of them has found where they say `auto`: nothing is looked for twice."""
    if settings.mixed_precision == "auto":
        settings = settings.model_copy(update={"mixed_precision": before["mixed_precision"]})
    return resolve_batch(settings, processes, find=lambda share: int(before["per_gpu_batch_size"]))[0]


def largest_that_fits(
    share: int, model: MemoryModel, *, free: int, fits: Callable[[int], bool]
) -> int | None:
    """The most clips per pass that divide a process's share of an update and fit; None where not even one does.

    What the model says is too much for `free` bytes is not tried; the rest is, the largest first.
    """
    for clips in range(share, 0, -1):
        if share % clips == 0 and model.needed(clips) - model.weights <= free and fits(clips):
            return clips
    return None


def find_micro_batch(
    share: int, built: Built, model: nn.Module, settings: TrainSettings, accelerator: Accelerator
) -> int:
    """The micro-batch that all processes can take, measured on their devices, the model's weights in place.

    Raises RunError where one clip is too much.
    """
    device = accelerator.device
    probe = Probe(built, model, accelerator, averages=settings.ema_decay is not None)
    if (terms := Attempt().run(probe.memory_model)) is None:  # two clips are too many to measure
        found = 1 if probe.fits(1) else None
    else:
        # On a CPU an allocation that is too large does not fail, it ends the process later: the model decides.
        tried = probe.fits if device.type != "cpu" else lambda clips: True
        free = free_bytes(device, local_processes())
        found = largest_that_fits(share, terms, free=free, fits=tried)
    least = least_of_them(found or 0, accelerator)
    if not least:
        raise RunError(
            f"--per-gpu-batch-size auto: not even one clip fits into the memory of {device}. "
            f"{advice(settings, device)}",
            by_all=True,
        )
    return least


class Probe:
    """Forward and backward passes of empty clips, to see what they take."""

    def __init__(
        self, built: Built, model: nn.Module, accelerator: Accelerator, *, averages: bool = False
    ) -> None:
        """`averages` says whether a moving average of the trained weights is kept."""
        self._built = built
        self._averages = averages
        self._model = model
        self._accelerator = accelerator

    def memory_model(self) -> MemoryModel:
        """The terms of a training step of this model on this device."""
        device = self._accelerator.device
        model = self._built.model  # compiled, it takes less; how much less, the device says
        try:
            self.run(model, 1)  # makes the gradients, and what libraries make once
            return memory_model(
                model,
                lambda clips: peak_bytes(lambda: self.run(model, clips), device),
                averages=self._averages,
            )
        finally:
            model.zero_grad(set_to_none=True)

    def fits(self, clips: int) -> bool:
        """Whether a pass of so many clips finds its memory, beside the optimizer's moments and the average."""
        trainable = [p for p in self._built.model.parameters() if p.requires_grad]
        attempt = Attempt()
        copies = MOMENTS + self._averages
        others = attempt.run(lambda: [torch.empty_like(p) for p in trainable for _ in range(copies)])
        attempt.run(self.run, self._model, clips)
        del others
        self._model.zero_grad(set_to_none=True)
        release()
        return not attempt.failed

    def run(self, model: nn.Module, clips: int) -> None:
        """One forward and backward pass of so many clips; it leaves gradients."""
        size, frames = self._built.preprocessing.frame_size, self._built.preprocessing.n_frames
        device = self._accelerator.device
        batch = torch.zeros(clips, frames, 3, size, size, device=device)
        labels = torch.zeros(clips, dtype=torch.long, device=device)
        model.train()
        with self._accelerator.autocast():
            logits = model(batch)
        self._accelerator.backward(F.cross_entropy(logits.float(), labels))
