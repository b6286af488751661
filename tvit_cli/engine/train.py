"""`tvit train`: from a folder of videos to a model folder."""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object

import tvit_cli
from tvit_cli.data.leaks import find_leaks
from tvit_cli.engine.balance import class_weights
from tvit_cli.engine.batches import BatchPlan
from tvit_cli.engine.build import build
from tvit_cli.engine.checkpoint import Checkpoint, checkpoint_path, load_checkpoint, load_optimizer
from tvit_cli.engine.compiling import compiled, compiles
from tvit_cli.engine.ema import WeightAverage
from tvit_cli.engine.eval import evaluate
from tvit_cli.engine.events import Note, Report, TrainingStarts, silent
from tvit_cli.engine.launch import StopsAtOnce, ends_with_the_others, make_accelerator
from tvit_cli.engine.loop import fit, how_to_resume
from tvit_cli.engine.loopstate import Loop, identity_of, kept_tensors
from tvit_cli.engine.microbatch import as_before, find_micro_batch, resolve_batch
from tvit_cli.engine.optim import adamw, parameter_groups
from tvit_cli.engine.outofmemory import ends_with_advice
from tvit_cli.engine.parallel import share_weights
from tvit_cli.engine.place import Place
from tvit_cli.engine.results import EvalResult
from tvit_cli.engine.run import Run, check_identity, held, open_run, write_settings
from tvit_cli.engine.source import Source, open_source, workers_of
from tvit_cli.engine.standardise import standardise_features
from tvit_cli.engine.summary import plan_facts, write_report
from tvit_cli.engine.trackers import Trackers, require_tensorboard
from tvit_cli.errors import DataError, RunError, SettingsError, TvitError
from tvit_cli.model import lora
from tvit_cli.model.blocks import recomputed
from tvit_cli.model.folder import save_model
from tvit_cli.model.trainable import load_trainable
from tvit_cli.settings.card import ModelCard
from tvit_cli.settings.eval import EvalSettings
from tvit_cli.settings.maxbad import most_bad
from tvit_cli.settings.train import TrainSettings


@dataclass(frozen=True)
class TrainResult:
    """Where a training left its model, and how good it is.

    `best` holds the validation metrics of the epoch that was kept (empty without validation); `test` the
    test result when it was asked for; `report` is the page, where one could be written.
    """

    run: Path
    model: Path
    best_epoch: int
    best: dict[str, float]
    test: EvalResult | None
    report: Path | None = None


def train(settings: TrainSettings, report: Report = silent) -> TrainResult:
    """Train a model, keep its best epoch, and write the model folder.

    Raises DataError, ModelError or CheckpointError before the first step where the input cannot be used;
    Interrupted after a signal, when the state has been saved; RunError when the run itself fails.
    """
    if settings.log_tensorboard:
        require_tensorboard()
    with (
        ends_with_the_others(),
        StopsAtOnce("Nothing is lost; start again with the same command.") as signals,
    ):
        loop = open_training(settings, report)
        with held(loop.run) if loop.accelerator.is_main_process else nullcontext():
            _open_records(loop)
            _announce(loop)
            try:
                with ends_with_advice(loop.settings, loop.device), compiles(loop.settings.compile):
                    fit(loop)
                last = checkpoint_path(loop.run.checkpoints, loop.step)
                signals.advice = f"All steps are done and saved. {how_to_resume(last)}"
            except (TvitError, OSError) as error:
                write_report(loop, problem=str(error))
                if isinstance(error, RunError) and error.by_all:
                    loop.accelerator.wait_for_everyone()  # else a process that ends ends the one that says why
                raise
            finally:
                loop.trackers.close()
            try:
                result = _finish(loop)
            except (TvitError, OSError) as error:
                write_report(loop, problem=str(error))
                raise
            signals.advice = f"All is done, and the model is in {result.model}."
            return replace(result, report=write_report(loop, test=result.test))


def place_of(accelerator: Accelerator) -> Place:
    """This process among those of a training."""
    return Place(
        accelerator.process_index,
        accelerator.num_processes,
        accelerator.device,
        lambda own: list(gather_object([own])),
    )


def score_test(model: Path, settings: TrainSettings, report: Report, place: Place) -> EvalResult:
    """Score the test subset with a model folder: all processes of its training do, in its batches."""
    assert settings.per_gpu_batch_size != "auto"
    return evaluate(
        EvalSettings(
            model=model,
            top_k=settings.top_k,
            device=settings.device,
            num_workers=settings.num_workers,
            per_gpu_batch_size=settings.per_gpu_batch_size,
        ),
        report,
        place,
    )


def open_training(settings: TrainSettings, report: Report, *, standardises: bool = True) -> Loop:
    """A loop that is ready to run, at its checkpoint if it has one; nothing was written yet.

    `standardises` makes --feature-norm's pass over training clips, which nothing but the numbers depends on.
    """
    accelerator = make_accelerator(device=settings.device, mixed_precision=settings.mixed_precision)
    if not accelerator.is_main_process:
        report = silent
    settings = settings.model_copy(update={"mixed_precision": accelerator.mixed_precision})
    source = open_source(
        settings.path_to_data,
        group_pattern=settings.group_pattern,
        val_groups=settings.val_groups,
        test_groups=settings.test_groups,
        split=settings.split,
        need_test=settings.test_at_end,
        report=report,
    )
    _refuse_bad_data(settings, source, report)
    run: Run = broadcast_object_list([open_run(settings) if accelerator.is_main_process else None])[0]
    report(Note(f"Run: {run.folder}"))
    checkpoint = None if run.resume_from is None else load_checkpoint(run.resume_from)
    if checkpoint is not None:
        settings = as_before(settings, checkpoint.state.identity, accelerator.num_processes)
    standardises = standardises and settings.feature_norm and checkpoint is None
    loop = _prepare(settings, accelerator, run, source, report, standardises=standardises)
    if checkpoint is not None:
        _resume(loop, checkpoint)
    return loop


def _refuse_bad_data(settings: TrainSettings, source: Source, report: Report) -> None:
    """Raise DataError for more unreadable videos than --max-bad allows, or, with --strict, for any leak.

    Raises SettingsError for --patience without a validation subset.
    """
    videos = source.layout.videos
    most = most_bad(settings.max_bad, len(videos))
    if len(source.unreadable) > most:
        raise DataError(
            f"{source.layout.root}: {len(source.unreadable)} of {len(videos)} videos cannot be read, and "
            f'--max-bad "{settings.max_bad}" allows {most}. Mend or remove them (tvit extract --check names '
            "them all), or allow more."
        )
    leaks = find_leaks(videos)
    if leaks and settings.strict:
        raise DataError(f"{source.layout.root}: " + " ".join(leaks))
    for leak in leaks:
        report(Note(leak, "warning"))
    if settings.patience is not None and not source.readable("val"):
        raise SettingsError(
            f"--patience {settings.patience}: {source.root} has no validation subset to tell which epoch is "
            "better. Hold groups out for it with --val-groups, or leave --patience out."
        )


def _prepare(
    settings: TrainSettings,
    accelerator: Accelerator,
    run: Run,
    source: Source,
    report: Report,
    *,
    standardises: bool,
) -> Loop:
    built = build(settings, num_classes=len(source.layout.labels), report=report)
    built.model.to(accelerator.device)
    share_weights(built.model, accelerator)
    if settings.gradient_checkpointing:
        built.model.run_block = recomputed
    model = accelerator.prepare_model(built.model, evaluation_mode=True)  # in evaluation mode it adds no DDP
    model = compiled(model, accelerator.device) if settings.compile else model
    settings, window = resolve_batch(
        settings,
        accelerator.num_processes,
        find=lambda share: find_micro_batch(share, built, model, settings, accelerator),
    )
    assert settings.per_gpu_batch_size != "auto"
    if standardises:
        with ends_with_advice(settings, accelerator.device):
            standardise_features(
                built,
                source,
                accelerator,
                workers=workers_of(settings.num_workers, accelerator.num_processes),
                report=report,
            )
    optimizer = adamw(
        parameter_groups(
            built.model,
            weight_decay=settings.weight_decay,
            bias_weight_decay=settings.bias_weight_decay,
            norm_weight_decay=settings.norm_weight_decay,
            layer_decay=settings.layer_decay,
            temporal_rate=settings.temporal_share(),
        ),
        learning_rate=settings.learning_rate,
        betas=(settings.adam_beta1, settings.adam_beta2),
        epsilon=settings.adam_epsilon,
    )
    labels = source.layout.labels
    position = {label: number for number, label in enumerate(labels)}
    targets = tuple(position[video.label] for video in source.readable("train"))
    plan = BatchPlan(
        clips=len(targets),
        batch_size=settings.per_gpu_batch_size,
        global_batch=window,
        processes=accelerator.num_processes,
        rank=accelerator.process_index,
        epochs=settings.epochs,
        seed=settings.seed,
        balance=targets if settings.balanced_sampling else None,
        pairs=settings.mixup > 0 or settings.cutmix > 0,
        repeats=settings.repeats,
    )
    even = settings.class_weights == "none"
    weights = [1.0] * len(labels) if even else class_weights(targets, len(labels))
    return Loop(
        settings,
        accelerator,
        run,
        source,
        built,
        model,
        accelerator.prepare_optimizer(optimizer),
        plan,
        trackers=Trackers(run.folder if accelerator.is_main_process else None),
        report=report,
        class_weights=torch.tensor(weights, device=accelerator.device),
        ema=None if settings.ema_decay is None else WeightAverage(built.model, settings.ema_decay),
    )


def _open_records(loop: Loop) -> None:
    """Write the run's settings and open its metrics: the first files touched, once all was found good."""
    run, settings = loop.run, loop.settings
    if loop.accelerator.is_main_process:
        own: dict[str, object] = {
            "experiment_name": run.folder.name,
            "working_directory": run.folder.parent,
            "checkpoint_dir": run.checkpoints.name,
            "path_to_data": str(loop.source.root),
        }
        write_settings(run, settings.model_copy(update=own))
    loop.trackers.cut_after(loop.step)
    if settings.log_wandb:
        config = settings.model_dump(mode="json")
        loop.trackers.open_wandb(name=run.folder.name, config=config, report=loop.report)
    if settings.log_tensorboard:
        loop.trackers.open_tensorboard(loop.step)


def _resume(loop: Loop, checkpoint: Checkpoint) -> None:
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


def _announce(loop: Loop) -> None:
    settings, plan, layout = loop.settings, loop.plan, loop.source.layout
    loop.report(
        TrainingStarts(
            facts=plan_facts(loop),
            epochs=settings.epochs,
            steps_per_epoch=plan.steps_per_epoch,
            first_step=loop.step,
        )
    )
    if settings.top_k > len(layout.labels):
        clamped = f"the data has {len(layout.labels)} classes, so top-{len(layout.labels)} is reported."
        loop.report(Note(f"--top-k {settings.top_k}: {clamped}", "warning"))


def _finish(loop: Loop) -> TrainResult:
    """Write the model folder from the best epoch, and score the test subset if that was asked for."""
    settings, layout = loop.settings, loop.source.layout
    best_epoch = (loop.best_step or loop.step) // loop.plan.steps_per_epoch
    if loop.step < loop.plan.total_steps:
        epochs = f"for {settings.patience} epochs" if settings.patience != 1 else "in the epoch after it"
        loop.report(Note(f"Stopped early: epoch {best_epoch} is the best, and none was better {epochs}."))
    load_trainable(loop.plain_model, kept_tensors(loop) if loop.best_tensors is None else loop.best_tensors)
    if loop.accelerator.is_main_process:
        card = ModelCard(
            tvit_version=tvit_cli.__version__,
            labels=layout.labels,
            model=loop.built.config.to_dict(),
            preprocessing=loop.built.preprocessing,
            base=loop.built.base,
            weights_sha256="",
            settings={**settings.model_dump(mode="json"), "path_to_data": str(loop.source.root)},
            held_out=layout.held_out,
            metrics={k: v for k, v in loop.best.items() if k.startswith("val_") and math.isfinite(v)},
        )
        save_model(loop.run.model, lora.merged_state_dict(loop.plain_model), card)
    loop.accelerator.wait_for_everyone()
    test = None
    if settings.test_at_end:
        fitting = settings.model_copy(update={"per_gpu_batch_size": loop.plan.batch_size})
        test = score_test(loop.run.model, fitting, loop.report, place_of(loop.accelerator))
    return TrainResult(
        run=loop.run.folder,
        model=loop.run.model,
        best_epoch=best_epoch,
        best=loop.best,
        test=test,
    )
