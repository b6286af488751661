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
from tvit_cli.engine.distributed import barrier, worker_count
from tvit_cli.engine.evaluate.metrics import Tally, class_counts, video_metrics
from tvit_cli.engine.launch import EXIT_CODES, StopSignals, signal_text
from tvit_cli.engine.train.batches import BatchKeys, MicroBatch, make_inputs
from tvit_cli.engine.train.checkpoint import (
    RESUME_EARLIER,
    STATE_FILE,
    Checkpoint,
    State,
    checkpoint_path,
    list_checkpoints,
    load_optimizer,
    optimizer_tensors,
    prune_checkpoints,
    save_checkpoint,
)
from tvit_cli.engine.train.fingerprint import check_fingerprint
from tvit_cli.engine.train.memory import Attempt, limit_micro_batch, memory_advice
from tvit_cli.engine.train.monitor import Clock, non_finite_names
from tvit_cli.engine.train.optim import Targets, clip_losses, loss_share, set_rates
from tvit_cli.engine.train.run_folder import train_further
from tvit_cli.engine.train.state import Loop
from tvit_cli.errors import CheckpointError, Interrupted, RunError, plural, shorten
from tvit_cli.model.lora import load_trainable, start_tensors, trainable_tensors
from tvit_cli.results import EpochDone, Note, StepDone

MOST_HOST_BOUND = 0.5  # share of steps, above which a warning is due
RECORDS_PER_EPOCH = 20  # of kind "step" in metrics.jsonl


@worker_errors(resumes=True)
def fit(loop: Loop) -> None:
    """Takes the remaining steps of the plan, or stops early with --patience."""
    if loop.patience_exceeded:
        return
    clock = Clock.of(loop.device)
    loop.model.train()
    attempt, tally = Attempt(), loop.tally.sums.clone()
    step_loss = torch.zeros((), device=loop.device)
    report = loop.report
    with StopSignals(report=report) as signals, closing(remaining_batches(loop)) as batches:
        loop.report = signals.stopping(report)
        try:
            for planned, batch in batches:
                clock.wait_ended()
                loss = attempt.run(forward_backward, loop, planned, batch)
                if loss is not None:
                    step_loss = step_loss + loss
                    clock.clips += planned.real * loop.plan.processes
                if attempt.failed and loop.plan.processes > 1:
                    _end_to_halve(loop)
                elif attempt.failed and planned.ends_step:
                    loop.tally.sums = tally
                    _halve_micro_batch(loop)
                    attempt, tally, step_loss = Attempt(), tally.clone(), torch.zeros_like(step_loss)
                elif planned.ends_step:
                    clock.update_started()
                    grad_norm = update(loop)
                    if loop.accelerator.scaler is None:  # which waits for the device
                        clock.update_ended()
                    loop.step += 1
                    _report_step(loop, planned, step_loss, grad_norm, clock)
                    step_loss = torch.zeros_like(step_loss)
                    if planned.ends_epoch:
                        end_epoch(loop, planned.epoch, grad_norm, clock)
                        clock = Clock.of(loop.device)
                    signal, due = signals.agreed(loop.accelerator, save_is_due=_save_is_due(loop))
                    if signal:
                        _stop(loop, signal)
                    if due and loop.saved_step != loop.step:
                        save(loop)
                    if planned.ends_epoch and loop.patience_exceeded:
                        return
                    tally = loop.tally.sums.clone()
                clock.wait_started()
        except Interrupted as stop:  # with `by_all` False: no batch arrived after a signal
            if stop.by_all or not (loop.step and signals.received) or loop.plan.processes > 1:
                raise
            loop.tally.sums = tally  # without the incomplete step
            loop.watch.drop(loop.step)
            _stop(loop, signals.received)
        finally:
            loop.report = report


def forward_backward(loop: Loop, planned: MicroBatch, batch: ClipBatch) -> Tensor:
    """Adds the gradients of a micro-batch; returns its contribution to the mean loss of the step."""
    settings = loop.settings
    for index, reason in batch.errors:
        loop.report_unreadable(loop.source.readable("train")[index].name, reason)
    _seed_dropout(loop, planned)
    clips, targets = make_inputs(
        planned, batch, settings=settings, preprocessing=loop.built.preprocessing, device=loop.device
    )
    if loop.samples.are_wanted:
        _keep_samples(loop, planned, batch, clips, targets)
    smoothing = settings.label_smoothing
    # The last pass of a step sums the gradients over all ranks, while they are computed.
    with nullcontext() if planned.ends_step else loop.accelerator.no_sync(loop.model):
        with loop.accelerator.autocast():
            logits = loop.model(clips)
        logits = logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
        losses = clip_losses(logits, targets, class_weights=loop.class_weights, label_smoothing=smoothing)
        loss = loss_share(losses, targets, step_clips=planned.step_clips)
        loop.accelerator.backward(loss * loop.plan.processes)  # DistributedDataParallel divides by it
    loop.watch.add(planned, losses)
    loop.tally.add(logits.detach(), losses.detach(), targets.main, targets.weights)
    return loss.detach()


def update(loop: Loop) -> Tensor:
    """One optimizer update with clipped gradients; returns the gradient norm before clipping."""
    settings = loop.settings
    set_rates(loop.optimizer, loop.learning_rate(loop.step))
    limit = math.inf if settings.max_grad_norm is None else settings.max_grad_norm
    norm: Tensor = loop.accelerator.clip_grad_norm_(loop.model.parameters(), limit)
    loop.optimizer.step()
    loop.optimizer.zero_grad()
    if loop.ema is not None:
        loop.ema.update(loop.step)
    return norm


def end_epoch(loop: Loop, epoch: int, grad_norm: Tensor, clock: Clock) -> None:
    """Validates, logs, keeps the best weights, and saves."""
    loop.check_losses()
    for name, reason in gather_object(list(loop.unreadable.items())):
        loop.report_unreadable(name, reason)
    loss, right, clips = loop.accelerator.reduce(loop.tally.sums, reduction="sum").tolist()
    loop.tally = Tally.zeros(loop.device)
    if not clips:
        text = f"Epoch {epoch + 1}: no training video could be read. Check that the disk is still mounted."
        raise RunError(text, by_all=True)
    throughput = clock.facts()
    if throughput.get("host_bound", 0.0) > MOST_HOST_BOUND:
        advice = "a larger --per-gpu-batch-size" + ("" if loop.settings.compile else ", or --compile")
        loop.report(
            Note(f"In most steps the GPU waits for Python to launch its kernels. Give {advice}.", "warning")
        )
    metrics: dict[str, float] = {
        "train_loss": loss / clips,
        "train_clip_top1": right / clips,
        "learning_rate": loop.learning_rate(loop.step - 1),
        "grad_norm": float(grad_norm),
    }
    if loop.ema is not None:
        metrics["ema_decay"] = loop.ema.decay_at(loop.step - 1)
    with nullcontext() if loop.ema is None else loop.ema.in_place():
        validation = _validate(loop)
    metrics |= {f"val_{name}": value for name, value in validation.items()}
    is_best = bool(validation) and (not loop.best or _quality(metrics) > _quality(loop.best))
    is_best = broadcast_object_list([is_best])[0]  # all ranks must stop early together
    if is_best:
        loop.best, loop.best_step = metrics, loop.step
        loop.best_tensors = {k: v.detach().cpu().clone() for k, v in loop.validated_tensors().items()}
    loop.trackers.log({"kind": "epoch", "epoch": epoch + 1, "step": loop.step, **metrics, **throughput})
    loop.report(EpochDone(epoch + 1, {**metrics, **throughput}, is_best))
    is_last = epoch + 1 == loop.settings.epochs or loop.patience_exceeded
    if is_last or (epoch + 1) % loop.settings.save_checkpoint_interval == 0:
        save(loop)


def _validate(loop: Loop) -> dict[str, float]:
    if not (videos := loop.source.readable("val")):
        return {}
    scores = loop.score(videos, "validating")
    for index, reason in scores.errors.items():
        loop.report_unreadable(videos[index].name, reason)
    if not len(scores.indices):
        text = f"{loop.source.layout.root}: none of the {len(videos)} val videos can be read."
        raise RunError(text, by_all=True)
    metrics = video_metrics(scores.logits, scores.labels, top_k=loop.settings.top_k)
    if not math.isfinite(metrics["loss"]):
        raise loop.divergence_error(f"the validation loss is {metrics['loss']}.")
    counts = class_counts(scores.logits, scores.labels, loop.source.layout.labels)
    loop.trackers.log_per_class(loop.step, counts)
    return metrics | {"unreadable": float(len(scores.errors))}


def _quality(metrics: Mapping[str, float]) -> tuple[float, float]:
    """Sort key of epochs: top-1, then loss."""
    return metrics["val_video_top1"], -metrics["val_loss"]


def save(loop: Loop) -> Path:
    """Writes a checkpoint and prunes the others (rank 0 does, the others wait); returns its path.

    Raises RunError if a loss or a weight is not finite: such a state never replaces a good one.
    """
    loop.check_losses()
    trainable = trainable_tensors(loop.plain_model)
    if names := non_finite_names(trainable):
        raise loop.divergence_error(f"{len(names)} weights are not finite ({shorten(names)}).")
    sums = loop.accelerator.reduce(loop.tally.sums, reduction="sum").tolist()
    if loop.accelerator.is_main_process:
        scaler = loop.accelerator.scaler
        save_checkpoint(
            loop.run.checkpoints,
            state=State(
                step=loop.step,
                micro_batch=loop.plan.batch_size,
                global_batch=loop.plan.global_batch,
                tally=tuple(sums),
                best_step=loop.best_step,
                best=loop.best,
                identity=loop.fingerprint(),
                scaler={} if scaler is None else scaler.state_dict(),
            ),
            trainable=trainable | start_tensors(loop.plain_model),
            optimizer=optimizer_tensors(loop.optimizer.optimizer, loop.plain_model),
            best=loop.best_tensors,
            ema=None if loop.ema is None else loop.ema.tensors,
        )
        prune_checkpoints(loop.run.checkpoints, loop.settings.max_no_of_checkpoints, newest=loop.step)
    barrier(loop.accelerator)
    loop.saved_step, loop.saved_at = loop.step, time.monotonic()
    return checkpoint_path(loop.run.checkpoints, loop.step)


def restore(loop: Loop, checkpoint: Checkpoint) -> None:
    """Restores the state of a checkpoint. Raises CheckpointError if it belongs to another training."""
    state = checkpoint.state
    more_epochs = train_further(loop.run.folder, loop.settings)
    check_fingerprint(state.identity, loop.fingerprint(), more_epochs=more_epochs)
    _check_state(loop, checkpoint)
    load_trainable(loop.plain_model, checkpoint.trainable)
    moments = str(checkpoint.path / "optimizer.safetensors")
    load_optimizer(loop.optimizer.optimizer, loop.plain_model, checkpoint.optimizer, moments)
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
    done = f"{loop.step} of {loop.plan.total_steps} steps done"
    loop.report(Note(f"Resuming from {checkpoint.path.name} ({done})."))
    before, now = state.identity.get("processes", 0), loop.plan.processes
    if before != now:
        text = f"The checkpoint was written by {plural(before, 'process')}, and this is {now}"
        loop.report(Note(f"{text}: updates are the same up to rounding and the draws of dropout.", "warning"))


def _check_state(loop: Loop, checkpoint: Checkpoint) -> None:
    """Raises CheckpointError for a state that this training cannot have reached."""
    state, plan, scaler = checkpoint.state, loop.plan, loop.accelerator.scaler
    best = state.best.keys()
    reachable = {
        "step": state.step <= plan.total_steps,
        "best_step": state.best_step <= state.step,
        "micro_batch": state.micro_batch <= max(plan.batch_size, plan.global_batch),
        "tally": len(state.tally) in (0, len(loop.tally.sums)),
        "best": not best or best >= {"val_video_top1", "val_loss"},
        "scaler": not (scaler and state.scaler) or scaler.state_dict().keys() == state.scaler.keys(),
    }
    if wrong := [f"{name} {getattr(state, name)}" for name, holds in reachable.items() if not holds]:
        problem = f"damaged ({shorten(wrong)} cannot be in this run of {plural(plan.total_steps, 'step')})"
        raise CheckpointError(f"{checkpoint.path / STATE_FILE}: {problem}. {RESUME_EARLIER}")


def how_to_resume(checkpoint: Path) -> str:
    """The command that resumes from a checkpoint."""
    return f"Resume with:\n  tvit train --resume-from-checkpoint {shlex.quote(str(checkpoint))}"


def _save_is_due(loop: Loop) -> bool:
    steps, minutes = loop.settings.save_every_steps, loop.settings.save_every_minutes
    is_late = minutes is not None and time.monotonic() - loop.saved_at >= 60 * minutes
    return is_late or bool(steps and loop.step % steps == 0)


def _stop(loop: Loop, signal: str) -> NoReturn:
    # A checkpoint that exists is not written again: it would be missing for a moment.
    is_saved = loop.saved_step == loop.step
    path = checkpoint_path(loop.run.checkpoints, loop.step) if is_saved else save(loop)
    done = f"after step {loop.step} of {loop.plan.total_steps}; all is saved. {how_to_resume(path)}"
    raise Interrupted(f"Stopped by {signal_text(signal)} {done}", exit_code=EXIT_CODES[signal])


def remaining_batches(loop: Loop) -> Generator[tuple[MicroBatch, ClipBatch], None, None]:
    """The remaining micro-batches with their clips; restarted at the current step when the plan changes."""
    plan = None
    while plan is not loop.plan:
        plan = loop.plan
        for planned, batch in zip(plan.micro_batches(loop.step), _batches(loop), strict=True):
            yield planned, batch
            if plan is not loop.plan:
                break


def _batches(loop: Loop) -> Iterator[ClipBatch]:
    """The clips of all remaining steps in one pass, so that workers prefetch across epochs."""
    settings = loop.settings
    dataset = ClipDataset(
        loop.source.readable("train"),
        loop.source.layout.labels,
        n_frames=settings.n_frames,
        # The smallest random crop still has the model's resolution.
        short_side=math.ceil(settings.img_size / math.sqrt(settings.crop_scale_min)),
        seed=settings.seed,
        training=True,
        store=loop.source.store,
        grid=settings.frame_grid,
        clip_seconds=settings.clip_seconds,
    )
    keys, workers = BatchKeys(loop.plan, loop.step), worker_count(settings.num_workers)
    return load_batches(dataset, keys, workers=workers, pin_memory=loop.device.type == "cuda")


def _halve_micro_batch(loop: Loop) -> None:
    """Discards the current step and repeats it with half the micro-batch. See Note [Out of memory]."""
    loop.optimizer.zero_grad()
    loop.watch.drop(loop.step)
    clips = plural(loop.plan.batch_size, "clip")
    text = f"Step {loop.step + 1}: out of memory with {clips} per forward pass."
    if loop.plan.batch_size == 1:
        raise RunError(f"{text} {memory_advice(loop.settings, loop.device)}")
    loop.plan = loop.plan.halved()
    smaller = f"From here on there are {loop.plan.batch_size}, and updates are the same: {loop.plan}."
    loop.report(Note(f"{text} {smaller}", "warning"))


def _end_to_halve(loop: Loop) -> NoReturn:
    """Ends one of several processes that is out of memory; the resumed run has half the micro-batch."""
    clips = plural(loop.plan.batch_size, "clip")
    text = f"Step {loop.step + 1}: process {loop.plan.rank} is out of memory with {clips} per forward pass."
    if loop.plan.batch_size == 1:
        raise RunError(f"{text} {memory_advice(loop.settings, loop.device)}")
    smaller = loop.plan.halved()
    limit_micro_batch(loop.run.checkpoints, smaller.batch_size)
    whole = list_checkpoints(loop.run.checkpoints)
    size, total = f"--per-gpu-batch-size {smaller.batch_size}", f"--global-batch-size {smaller.global_batch}"
    again = how_to_resume(whole[-1]) if whole else f"Start again with {size} {total}."
    error = RunError(f"{text} With {smaller.batch_size}, updates are the same. {again}")
    error.exit_code = EXIT_CODES["SIGUSR1"]
    raise error


def _seed_dropout(loop: Loop, planned: MicroBatch) -> None:
    """Seeds the global generator by the pass's first key, unique to pass and rank: no state to checkpoint."""
    plan, (epoch, index) = loop.plan, planned.keys[0]
    entropy = [loop.settings.seed, planned.step, index + epoch // plan.epochs * plan.clips, plan.rank]
    torch.manual_seed(int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0] >> 1))


def _keep_samples(loop: Loop, planned: MicroBatch, batch: ClipBatch, clips: Tensor, targets: Targets) -> None:
    videos = [loop.source.readable("train")[index] for index in batch.indices.tolist()]
    names = [f"{video.label} · {video.path.name}" for video in videos]
    for i in targets.weights.nonzero().flatten().tolist():
        caption = names[i]
        if targets.shares is not None and (share := float(targets.shares[i])) < 1:
            caption += f", mixed with {names[planned.partners[i]]} ({1 - share:.0%})"
        loop.samples.offer(clips[i], caption, videos[i].path)


def _report_step(loop: Loop, planned: MicroBatch, loss: Tensor, grad_norm: Tensor, clock: Clock) -> None:
    epoch, step, rate = planned.epoch + 1, loop.step, loop.learning_rate(loop.step - 1)
    every = max(1, loop.plan.steps_per_epoch // RECORDS_PER_EPOCH)
    if (step - planned.epoch * loop.plan.steps_per_epoch) % every == 0:
        loop.check_losses()
        total = float(loop.accelerator.reduce(loss, reduction="sum"))
        record = {"kind": "step", "epoch": epoch, "step": step, "train_loss": total}
        loop.trackers.log({**record, "learning_rate": rate, "grad_norm": float(grad_norm)})
    if clock.report_is_due():
        if loop.plan.processes == 1:  # the check is a collective, and the clocks of ranks differ
            loop.check_losses()
        total_loss, right, clips = loop.tally.sums.tolist()
        facts, clips = clock.facts(), max(1.0, clips)
        throughput, wait = facts["clips_per_second"], facts["data_wait"]
        loop.report(StepDone(epoch, step, total_loss / clips, right / clips, rate, throughput, wait))
