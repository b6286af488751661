"""The training loop: forward, loss, backward, clip, step; between two steps, an epoch may end or a run stop."""

from __future__ import annotations

import math
import shlex
import time
from collections.abc import Generator, Iterator
from contextlib import closing
from pathlib import Path
from typing import NoReturn

import numpy as np
import torch
from torch import Tensor

from tvit_cli.data.clips import ClipBatch, ClipDataset
from tvit_cli.data.loading import explains_dead_workers, load_batches
from tvit_cli.engine.batches import BatchKeys, BatchPlan, MicroBatch
from tvit_cli.engine.checkpoint import checkpoint_path
from tvit_cli.engine.clock import Clock
from tvit_cli.engine.epochend import end_epoch, is_patience_over
from tvit_cli.engine.events import Note, StepDone
from tvit_cli.engine.inputs import make_inputs, short_side
from tvit_cli.engine.launch import EXIT_CODES, StopSignals
from tvit_cli.engine.loopstate import Loop, check_losses, learning_rate, report_unreadable, workers
from tvit_cli.engine.objective import Targets, clip_losses, window_share
from tvit_cli.engine.optim import set_rates
from tvit_cli.engine.outofmemory import Attempt, advice
from tvit_cli.engine.parallel import any_of_them, sum_gradients
from tvit_cli.engine.saving import save
from tvit_cli.errors import Interrupted, RunError

RECORDS_PER_EPOCH = 20  # lines of kind "step" in metrics.jsonl


@explains_dead_workers()
def fit(loop: Loop) -> None:
    """Take every step of the plan that is not done yet, until the patience is over."""
    if is_patience_over(loop):
        return
    clock = Clock.of(loop.device)
    loop.model.train()
    attempt, tally = Attempt(), loop.tally.sums.clone()
    window_loss = torch.zeros((), device=loop.device)
    with StopSignals() as signals, closing(_arriving(loop, signals)) as coming:
        for planned, batch in coming:
            clock.data_arrived()
            loss = attempt.run(forward_backward, loop, planned, batch)
            if loss is not None:
                window_loss = window_loss + loss
                clock.clips += planned.real * loop.plan.processes
            if planned.closes_window and any_of_them(attempt.failed, loop.accelerator):
                loop.tally.sums = tally
                _halve_micro_batch(loop)
                attempt, tally, window_loss = Attempt(), tally.clone(), torch.zeros_like(window_loss)
            elif planned.closes_window:
                grad_norm = update(loop)
                loop.step += 1
                _report_step(loop, planned, window_loss, grad_norm, clock)
                window_loss = torch.zeros_like(window_loss)
                if planned.closes_epoch:
                    end_epoch(loop, planned.epoch, grad_norm, clock)
                    clock = Clock.of(loop.device)
                every = loop.settings.save_every_steps
                due = bool(every and loop.step % every == 0) or _minutes_are_over(loop)
                name, due = signals.agreed(loop.accelerator, save_is_due=due)
                if name:
                    _stop(loop, name)
                if due and loop.saved_step != loop.step:
                    save(loop)
                if planned.closes_epoch and is_patience_over(loop):
                    return
                tally = loop.tally.sums.clone()
            clock.waits_for_data()


def _arriving(loop: Loop, signals: StopSignals) -> Generator[tuple[MicroBatch, ClipBatch], None, None]:
    """The passes; where no batch arrives after a signal, the last step's state is saved and the run stops."""
    tally = loop.tally.sums.clone()
    with closing(passes(loop)) as coming:
        while True:
            try:
                item = next(coming, None)
            except Interrupted:
                if not loop.step or not signals.received or loop.plan.processes > 1:
                    raise
                loop.tally.sums = tally  # the window that was begun is dropped
                loop.watch.forget(loop.step)
                _stop(loop, signals.received)
            if item is None:
                return
            yield item
            if item[0].closes_window:
                tally = loop.tally.sums.clone()


def passes(loop: Loop) -> Generator[tuple[MicroBatch, ClipBatch], None, None]:
    """What is left of the plan with its clips; begun anew from the window where the micro-batch was changed."""
    plan = None
    while plan is not loop.plan:
        plan = loop.plan
        for planned, batch in zip(plan.micro_batches(loop.step), _batches(loop), strict=True):
            yield planned, batch
            if plan is not loop.plan:
                break


def forward_backward(loop: Loop, planned: MicroBatch, batch: ClipBatch) -> Tensor:
    """This process's share of the window's mean loss; its gradients are added to those that are there."""
    settings = loop.settings
    for index, reason in batch.errors:
        report_unreadable(loop, loop.source.readable("train")[index].name, reason)
    torch.manual_seed(_mix(settings.seed, planned, loop.plan))  # all dropout: no state to store
    clips, targets = make_inputs(
        planned, batch, settings=settings, preprocessing=loop.built.preprocessing, device=loop.device
    )
    if loop.samples.are_wanted:
        _keep_samples(loop, planned, batch, clips, targets)
    with loop.accelerator.autocast():
        logits = loop.model(clips)
    logits = logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
    losses = clip_losses(
        logits, targets, class_weights=loop.class_weights, label_smoothing=settings.label_smoothing
    )
    loss = window_share(losses, targets, window_clips=planned.window_clips)
    loop.accelerator.backward(loss)
    loop.watch.saw(planned, losses)
    loop.tally.add(logits.detach(), losses.detach(), targets.main, targets.weights)
    return loss.detach()


def update(loop: Loop) -> Tensor:
    """One optimizer update with clipped gradients; returns the gradient's norm before clipping."""
    settings = loop.settings
    sum_gradients(loop.plain_model.parameters(), loop.accelerator)
    set_rates(loop.optimizer, learning_rate(loop, loop.step))
    limit = math.inf if settings.max_grad_norm is None else settings.max_grad_norm
    norm: Tensor = loop.accelerator.clip_grad_norm_(loop.model.parameters(), limit)
    loop.optimizer.step()
    loop.optimizer.zero_grad()
    if loop.ema is not None:
        loop.ema.update(loop.step)
    return norm


def _halve_micro_batch(loop: Loop) -> None:
    """Forget the window that was begun; it starts anew in smaller passes. See Note [Out of memory]."""
    loop.optimizer.zero_grad()
    loop.watch.forget(loop.step)
    before = loop.plan.batch_size
    if before == 1:
        raise RunError(
            f"Step {loop.step + 1}: out of memory with a single clip per forward pass. "
            f"{advice(loop.settings, loop.device)}",
            by_all=True,
        )
    loop.plan = loop.plan.halved()
    loop.report(
        Note(
            f"Step {loop.step + 1}: out of memory with {before} clips per forward pass. From here on there are "
            f"{loop.plan.batch_size}, and updates are the same: {loop.plan}.",
            "warning",
        )
    )


def _minutes_are_over(loop: Loop) -> bool:
    limit = loop.settings.save_every_minutes
    return limit is not None and time.monotonic() - loop.saved_at >= 60 * limit


def _stop(loop: Loop, name: str) -> NoReturn:
    # A checkpoint that is there is not written again: for a moment it would not be there.
    is_saved = loop.saved_step == loop.step
    path = checkpoint_path(loop.run.checkpoints, loop.step) if is_saved else save(loop)
    raise Interrupted(
        f"Stopped by {name} after step {loop.step} of {loop.plan.total_steps}; all is saved. {how_to_resume(path)}",
        exit_code=EXIT_CODES[name],
    )


def how_to_resume(checkpoint: Path) -> str:
    """What to type to go on from a checkpoint."""
    return f"Go on with:\n  tvit train --resume-from-checkpoint {shlex.quote(str(checkpoint))}"


def _batches(loop: Loop) -> Iterator[ClipBatch]:
    """Everything that is left of the run in one pass, so that workers read ahead across epochs."""
    dataset = ClipDataset(
        loop.source.readable("train"),
        loop.source.layout.labels,
        n_frames=loop.settings.n_frames,
        short_side=short_side(loop.settings),
        seed=loop.settings.seed,
        training=True,
        store=loop.source.store,
        grid=loop.settings.frame_grid,
    )
    return load_batches(
        dataset,
        BatchKeys(loop.plan, loop.step),
        workers=workers(loop),
        pin_memory=loop.device.type == "cuda",
    )


def _mix(seed: int, planned: MicroBatch, plan: BatchPlan) -> int:
    """A well mixed 63-bit seed for one forward pass of one process: of its first key, which no other has."""
    epoch, index = planned.keys[0]
    entropy = [seed, planned.step, index + epoch // plan.epochs * plan.clips, plan.rank]
    return int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0] >> 1)


def _keep_samples(loop: Loop, planned: MicroBatch, batch: ClipBatch, clips: Tensor, targets: Targets) -> None:
    """Keep clips as the model is given them for the report: those that were read and count."""
    videos = loop.source.readable("train")
    shown = [f"{video.label} · {video.path.name}" for video in (videos[i] for i in batch.indices.tolist())]
    for place in targets.weights.nonzero().flatten().tolist():
        caption = shown[place]
        if targets.shares is not None and (share := float(targets.shares[place])) < 1:
            caption += f", mixed with {shown[planned.partners[place]]} ({1 - share:.0%})"
        loop.samples.offer(clips[place], caption)


def _report_step(loop: Loop, planned: MicroBatch, loss: Tensor, grad_norm: Tensor, clock: Clock) -> None:
    number = loop.step - planned.epoch * loop.plan.steps_per_epoch
    every = max(1, loop.plan.steps_per_epoch // RECORDS_PER_EPOCH)
    rate = learning_rate(loop, loop.step - 1)
    if number % every == 0:
        check_losses(loop)
        total = loop.accelerator.reduce(loss, reduction="sum")
        loop.trackers.log(
            {
                "kind": "step",
                "epoch": planned.epoch + 1,
                "step": loop.step,
                "train_loss": float(total),
                "learning_rate": rate,
                "grad_norm": float(grad_norm),
            }
        )
    if clock.report_is_due():
        if loop.plan.processes == 1:  # several look together, and their clocks differ
            check_losses(loop)
        sums = loop.tally.sums.tolist()
        clips, facts = max(1.0, sums[2]), clock.facts()
        loop.report(
            StepDone(
                epoch=planned.epoch + 1,
                step=loop.step,
                loss=sums[0] / clips,
                clip_top1=sums[1] / clips,
                learning_rate=rate,
                clips_per_second=facts["clips_per_second"],
                data_wait=facts["data_wait"],
            )
        )
