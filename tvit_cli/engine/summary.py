"""What a training leaves to be looked at: the facts of its loop, gathered for the report."""

from __future__ import annotations

import shlex
from pathlib import Path

from tvit_cli.engine.checkpoint import list_checkpoints
from tvit_cli.engine.loopstate import Loop
from tvit_cli.engine.pages import write_page
from tvit_cli.engine.results import EvalResult
from tvit_cli.report.words import plural


def plan_facts(loop: Loop) -> dict[str, str]:
    """What a run is going to do, in a line for each part."""
    settings, plan, source = loop.settings, loop.plan, loop.source
    counts = ", ".join(f"{len(source.readable(s))} {s}" for s in ("train", "val", "test"))
    return {
        "data": f"{source.root}: {len(source.layout.labels)} classes, {counts}",
        "clips": f"{settings.n_frames} frames of {settings.img_size}×{settings.img_size} pixels",
        "device": f"{loop.device} × {plan.processes}, {settings.mixed_precision} mixed precision",
        "batch": str(plan),
        "schedule": f"{plural(settings.epochs, 'epoch')} of {plural(plan.steps_per_epoch, 'step')}, "
        f"{settings.warmup():g} warm-up, learning rate {settings.learning_rate:g}",
    }


def write_report(loop: Loop, *, problem: str = "", test: EvalResult | None = None) -> Path | None:
    """Write the run's report, if this is the main process and an epoch is done; returns its path.

    `problem` is why the run ended early; one that has no checkpoint yet begins again, and has no report. One that
    cannot be written is a warning: it costs no training.
    """
    from tvit_cli.report.training import TrainingFacts, write_training_report

    epochs = loop.trackers.records("epoch")
    if not epochs or not loop.accelerator.is_main_process:
        return None
    if problem and not list_checkpoints(loop.run.checkpoints):
        return None
    parameters = list(loop.plain_model.parameters())
    facts = TrainingFacts(
        folder=loop.run.folder,
        settings=loop.settings,
        preprocessing=loop.built.preprocessing,
        device=loop.device,
        plan=plan_facts(loop),
        steps_per_epoch=loop.plan.steps_per_epoch,
        problem=problem,
        epochs=epochs,
        steps=loop.trackers.records("step"),
        best_step=loop.best_step,
        per_class=loop.trackers.per_class(loop.best_step),
        videos=_videos(loop),
        unreadable={**loop.source.unreadable, **loop.unreadable},
        samples=loop.samples,
        parameters=(
            sum(p.numel() for p in parameters if p.requires_grad),
            sum(p.numel() for p in parameters),
        ),
        commands=_commands(loop, is_done=not problem),
        test={} if test is None else test.metrics,
        test_interval=None if test is None else test.intervals.get("video_top1"),
    )
    return write_page(write_training_report, facts, loop.report)


def _videos(loop: Loop) -> dict[str, dict[str, int]]:
    """Class -> subset -> videos that can be read."""
    counts: dict[str, dict[str, int]] = {label: {} for label in loop.source.layout.labels}
    for video in loop.source.layout.videos:
        if video.name not in loop.source.unreadable:
            own = counts[video.label]
            own[video.subset] = own.get(video.subset, 0) + 1
    return counts


def _commands(loop: Loop, *, is_done: bool) -> list[tuple[str, str]]:
    """What to type next."""
    if not is_done:
        kept = list_checkpoints(loop.run.checkpoints)
        return (
            [("Go on", f"tvit train --resume-from-checkpoint {shlex.quote(str(kept[-1]))}")] if kept else []
        )
    model = shlex.quote(str(loop.run.model))
    return [
        ("Label videos", f"tvit predict VIDEO --model {model}"),
        ("Score the test subset", f"tvit eval --model {model}"),
    ]
