"""The watch over a training's numbers: the loss is finite, and where it is not, the clips are named."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from tvit_cli.engine.batches import MicroBatch
from tvit_cli.engine.checkpoint import list_checkpoints
from tvit_cli.errors import RunError
from tvit_cli.settings.train import TrainSettings

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
    return diverged(f"{what}\n{hint}", settings, precision, saved)


def diverged(what: str, settings: TrainSettings, precision: str, saved: Path) -> RunError:
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


def not_finite(tensors: Mapping[str, Tensor]) -> list[str]:
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
