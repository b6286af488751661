"""The end of an epoch: validate, remember the best, save."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import nullcontext

from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor

from tvit_cli.engine.clock import Clock
from tvit_cli.engine.events import EpochDone, Progress
from tvit_cli.engine.loopstate import (
    Loop,
    check_losses,
    kept_tensors,
    learning_rate,
    report_unreadable,
    score_videos,
)
from tvit_cli.engine.metrics import Tally, class_counts, video_metrics
from tvit_cli.engine.saving import save
from tvit_cli.engine.scoring import merge_scores
from tvit_cli.engine.watch import diverged
from tvit_cli.errors import RunError


def end_epoch(loop: Loop, epoch: int, grad_norm: Tensor, clock: Clock) -> None:
    """Validate, log, remember the best, save."""
    check_losses(loop)
    for name, reason in gather_object(list(loop.unreadable.items())):
        report_unreadable(loop, name, reason)
    sums = loop.accelerator.reduce(loop.tally.sums, reduction="sum").tolist()
    loop.tally = Tally.zeros(loop.device)
    if not sums[2]:
        raise RunError(
            f"Epoch {epoch + 1}: no training video could be read. Is the disk still there?", by_all=True
        )
    training = clock.facts()
    metrics: dict[str, float] = {
        "train_loss": sums[0] / sums[2],
        "train_clip_top1": sums[1] / sums[2],
        "learning_rate": learning_rate(loop, loop.step - 1),
        "grad_norm": float(grad_norm),
    }
    if loop.ema is not None:
        metrics["ema_decay"] = loop.ema.decay_at(loop.step - 1)
    with nullcontext() if loop.ema is None else loop.ema.in_place():
        validation = _validate(loop)
    metrics |= {f"val_{name}": value for name, value in validation.items()}
    is_best = bool(validation) and (not loop.best or _rank(metrics) > _rank(loop.best))
    is_best = broadcast_object_list([is_best])[0]  # it decides when all processes stop
    if is_best:
        loop.best, loop.best_step = metrics, loop.step
        loop.best_tensors = {k: v.detach().cpu().clone() for k, v in kept_tensors(loop).items()}
    record = {"kind": "epoch", "epoch": epoch + 1, "step": loop.step, **metrics, **training}
    loop.trackers.log(record)
    loop.report(EpochDone(epoch + 1, {**metrics, **training}, is_best))
    is_last = epoch + 1 == loop.settings.epochs or is_patience_over(loop)
    if is_last or (epoch + 1) % loop.settings.save_checkpoint_interval == 0:
        save(loop)


def is_patience_over(loop: Loop) -> bool:
    """Whether the last better validation result is --patience epochs ago."""
    patience = loop.settings.patience
    return patience is not None and loop.step - loop.best_step >= patience * loop.plan.steps_per_epoch


def _validate(loop: Loop) -> dict[str, float]:
    """Metrics of the val subset, or nothing where there is none."""
    videos = loop.source.readable("val")
    if not videos:
        return {}
    own = score_videos(
        loop,
        videos,
        rank=loop.plan.rank,
        processes=loop.plan.processes,
        progress=lambda done, total: loop.report(Progress("validating", done, total)),
    )
    scores = merge_scores(gather_object([own]))
    for index, reason in scores.errors.items():
        report_unreadable(loop, videos[index].name, reason)
    if not len(scores.indices):
        raise RunError(
            f"{loop.source.layout.root}: none of the {len(videos)} val videos can be read.", by_all=True
        )
    metrics = video_metrics(scores.logits, scores.labels, top_k=loop.settings.top_k)
    if not math.isfinite(metrics["loss"]):
        what = f"Step {loop.step}: the validation loss is {metrics['loss']}. "
        raise diverged(what, loop.settings, loop.accelerator.mixed_precision, loop.run.checkpoints)
    loop.trackers.log_per_class(
        loop.step, class_counts(scores.logits, scores.labels, loop.source.layout.labels)
    )
    return metrics | {"unreadable": float(len(scores.errors))}


def _rank(metrics: Mapping[str, float]) -> tuple[float, float]:
    """Epochs are compared by top-1, then by loss."""
    return metrics["val_video_top1"], -metrics["val_loss"]
