"""A loop's state on disk: written as a checkpoint, and taken up again."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import torch

from tvit_cli.engine.checkpoint import (
    Checkpoint,
    State,
    checkpoint_path,
    load_optimizer,
    optimizer_tensors,
    prune_checkpoints,
    save_checkpoint,
)
from tvit_cli.engine.events import Note
from tvit_cli.engine.identity import check_identity
from tvit_cli.engine.loopstate import Loop, check_losses, identity_of, trainable
from tvit_cli.engine.watch import diverged, not_finite, some
from tvit_cli.model.trainable import load_trainable, start_tensors


def save(loop: Loop) -> Path:
    """Write a checkpoint and prune the others (the main process does; the rest wait); returns its path.

    Raises RunError where a loss or a weight is not finite: such a state never takes the place of a good one.
    """
    check_losses(loop)
    if names := not_finite(trainable(loop)):
        what = f"Step {loop.step}: {len(names)} weights are not finite ({some(names)}). "
        raise diverged(what, loop.settings, loop.accelerator.mixed_precision, loop.run.checkpoints)
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
                identity=identity_of(loop),
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
    check_identity(state.identity, identity_of(loop))
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
