"""The training loop: forward, loss, backward, clip, step; validation and checkpoints between steps."""

from __future__ import annotations

import math
import shlex
import time
from collections.abc import Generator, Iterator, Mapping
from contextlib import closing, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

import numpy as np
import torch
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor

from tvit_cli.data.clips import ClipBatch, ClipDataset, load_batches, worker_errors
from tvit_cli.engine.distributed import all_reduce_gradients, any_rank
from tvit_cli.engine.evaluate.metrics import Tally, class_counts, video_metrics
from tvit_cli.engine.evaluate.scoring import merge_scores
from tvit_cli.engine.launch import EXIT_CODES, StopSignals
from tvit_cli.engine.train.batches import BatchKeys, BatchPlan, MicroBatch, make_inputs, short_side
from tvit_cli.engine.train.checkpoint import (
    Checkpoint,
    State,
    checkpoint_path,
    load_optimizer,
    optimizer_tensors,
    prune_checkpoints,
    save_checkpoint,
)
from tvit_cli.engine.train.fingerprint import check_fingerprint
from tvit_cli.engine.train.memory import Attempt, memory_advice
from tvit_cli.engine.train.monitor import Clock, divergence_error, non_finite_names, some
from tvit_cli.engine.train.optim import Targets, clip_losses, set_rates, window_share
from tvit_cli.engine.train.state import (
    Loop,
    check_losses,
    learning_rate,
    loop_fingerprint,
    num_workers,
    report_unreadable,
    score_videos,
    trainable,
    validated_tensors,
)
from tvit_cli.errors import Interrupted, RunError
from tvit_cli.model.lora import load_trainable, start_tensors
from tvit_cli.results import EpochDone, Note, Progress, StepDone


def save(loop: Loop) -> Path:
    """Write a checkpoint and prune the others (the main process does; the rest wait); returns its path.

    Raises RunError where a loss or a weight is not finite: such a state never takes the place of a good one.
    """
    check_losses(loop)
    if names := non_finite_names(trainable(loop)):
        what = f"Step {loop.step}: {len(names)} weights are not finite ({some(names)}). "
        raise divergence_error(what, loop.settings, loop.accelerator.mixed_precision, loop.run.checkpoints)
    sums = loop.accelerator.reduce(loop.tally.sums, reduction="sum").tolist()
    if loop.accelerator.is_main_process:
        scaler = loop.accelerator.scaler
        save_checkpoint(
            loop.run.checkpoints,
            state=State(
                step=loop.step,
                micro_batch=loop.plan.batch_size,
                tally=tuple(sums),
                best_step=loop.best_step,
                best=loop.best,
                identity=loop_fingerprint(loop),
                scaler={} if scaler is None else scaler.state_dict(),
            ),
            trainable=trainable(loop) | start_tensors(loop.plain_model),
            optimizer=optimizer_tensors(loop.optimizer.optimizer, loop.plain_model),
            best=loop.best_tensors,
            ema=None if loop.ema is None else loop.ema.tensors,
        )
        prune_checkpoints(loop.run.checkpoints, loop.settings.max_no_of_checkpoints, newest=loop.step)
    loop.accelerator.wait_for_everyone()
    loop.saved_step, loop.saved_at = loop.step, time.monotonic()
    return checkpoint_path(loop.run.checkpoints, loop.step)


def restore(loop: Loop, checkpoint: Checkpoint) -> None:
    """Set a loop to where a checkpoint was written. Raises CheckpointError where it is of another training."""
    state = checkpoint.state
    check_fingerprint(state.identity, loop_fingerprint(loop))
    load_trainable(loop.plain_model, checkpoint.trainable)
    load_optimizer(loop.optimizer.optimizer, loop.plain_model, checkpoint.optimizer)
    if loop.ema is not None:
        loop.ema.load(checkpoint.ema or {})
    if loop.accelerator.scaler is not None and state.scaler:
        loop.accelerator.scaler.load_state_dict(state.scaler)
    loop.step = state.step
    if state.micro_batch:
        loop.plan = replace(loop.plan, batch_size=state.micro_batch)
    loop.best, loop.best_step, loop.best_tensors = state.best, state.best_step, checkpoint.best
    if state.tally and loop.accelerator.is_main_process:
        loop.tally.sums += torch.tensor(state.tally, dtype=loop.tally.sums.dtype, device=loop.device)
    loop.report(
        Note(f"Going on from {checkpoint.path.name} ({loop.step} of {loop.plan.total_steps} steps done).")
    )


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
        loop.best_tensors = {k: v.detach().cpu().clone() for k, v in validated_tensors(loop).items()}
    record = {"kind": "epoch", "epoch": epoch + 1, "step": loop.step, **metrics, **training}
    loop.trackers.log(record)
    loop.report(EpochDone(epoch + 1, {**metrics, **training}, is_best))
    is_last = epoch + 1 == loop.settings.epochs or patience_exceeded(loop)
    if is_last or (epoch + 1) % loop.settings.save_checkpoint_interval == 0:
        save(loop)


def patience_exceeded(loop: Loop) -> bool:
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
        raise divergence_error(what, loop.settings, loop.accelerator.mixed_precision, loop.run.checkpoints)
    loop.trackers.log_per_class(
        loop.step, class_counts(scores.logits, scores.labels, loop.source.layout.labels)
    )
    return metrics | {"unreadable": float(len(scores.errors))}


def _rank(metrics: Mapping[str, float]) -> tuple[float, float]:
    """Epochs are compared by top-1, then by loss."""
    return metrics["val_video_top1"], -metrics["val_loss"]


RECORDS_PER_EPOCH = 20  # lines of kind "step" in metrics.jsonl


@worker_errors()
def fit(loop: Loop) -> None:
    """Take every step of the plan that is not done yet, until the patience is over."""
    if patience_exceeded(loop):
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
            if planned.closes_window and any_rank(attempt.failed, loop.accelerator):
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
                if planned.closes_epoch and patience_exceeded(loop):
                    return
                tally = loop.tally.sums.clone()
            clock.waits_for_data()


def _arriving(loop: Loop, signals: StopSignals) -> Generator[tuple[MicroBatch, ClipBatch], None, None]:
    """The passes; where no batch arrives after a signal, the last step's state is saved and the run stops."""
    tally = loop.tally.sums.clone()
    with closing(remaining_passes(loop)) as coming:
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


def remaining_passes(loop: Loop) -> Generator[tuple[MicroBatch, ClipBatch], None, None]:
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
    all_reduce_gradients(loop.plain_model.parameters(), loop.accelerator)
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
            f"{memory_advice(loop.settings, loop.device)}",
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
        workers=num_workers(loop),
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
