"""`tvit train`: from a folder of videos to a model folder."""

from __future__ import annotations

import math
import shlex
from collections import Counter
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object

import tvit_cli
from tvit_cli.data.layout import SUBSETS, split_choice
from tvit_cli.engine.dataset import ClipFormat, DataSource, open_dataset
from tvit_cli.engine.distributed import broadcast_weights, worker_count
from tvit_cli.engine.evaluate import evaluate
from tvit_cli.engine.evaluate.files import write_page
from tvit_cli.engine.evaluate.selection import find_leaks
from tvit_cli.engine.launch import ImmediateStop, ProcessGroup, lost_rank_errors, make_accelerator
from tvit_cli.engine.train.batches import BatchPlan, class_weights
from tvit_cli.engine.train.build import build, compile_errors, compile_model, standardise_features
from tvit_cli.engine.train.checkpoint import checkpoint_path, list_checkpoints, load_checkpoint
from tvit_cli.engine.train.fingerprint import check_ranks_agree, digest, result_settings
from tvit_cli.engine.train.loop import fit, how_to_resume, restore
from tvit_cli.engine.train.memory import (
    find_micro_batch,
    out_of_memory_errors,
    release_memory,
    resolve_batch,
    reuse_batch_settings,
)
from tvit_cli.engine.train.optim import adamw, parameter_groups
from tvit_cli.engine.train.run_folder import Run, choose_run, run_lock, write_settings
from tvit_cli.engine.train.state import Loop, WeightAverage, loop_fingerprint, validated_tensors
from tvit_cli.engine.train.trackers import Trackers, require_tensorboard
from tvit_cli.errors import DataError, RunError, SettingsError, TvitError, plural
from tvit_cli.model import lora
from tvit_cli.model.folder import save_model
from tvit_cli.model.lora import load_trainable, trainable_report
from tvit_cli.portable.layers import recompute_block
from tvit_cli.report.html import Context
from tvit_cli.results import EvalResult, Note, Report, TrainingStarts, TrainResult, silent
from tvit_cli.settings.card import ModelCard
from tvit_cli.settings.eval import EvalSettings
from tvit_cli.settings.train import TrainSettings
from tvit_cli.settings.types import most_bad


def set_up(settings: TrainSettings, report: Report, *, standardises: bool = True) -> Loop:
    """A loop that is ready to run, at its checkpoint if it has one; nothing was written yet.

    `standardises` makes --feature-norm's pass over training clips, which nothing but the numbers depends on.
    """
    accelerator = make_accelerator(device=settings.device, mixed_precision=settings.mixed_precision)
    if not accelerator.is_main_process:
        report = silent
    settings = settings.model_copy(update={"mixed_precision": accelerator.mixed_precision})
    source = open_dataset(
        settings.path_to_data,
        report,
        clip=ClipFormat(settings.n_frames, settings.img_size, settings.frame_grid),
        need_test=settings.test_at_end,
        **split_choice(settings),
    )
    check_ranks_agree(gather_object([{**result_settings(settings), **_seen(source)}]))
    _refuse_bad_data(settings, source, report)
    run: Run = broadcast_object_list([choose_run(settings) if accelerator.is_main_process else None])[0]
    report(Note(f"Run: {run.folder}"))
    checkpoint = None if run.resume_from is None else load_checkpoint(run.resume_from)
    if checkpoint is not None:
        settings = reuse_batch_settings(settings, checkpoint.state.identity, accelerator.num_processes)
    standardises = standardises and settings.feature_norm and checkpoint is None
    loop = _prepare(settings, accelerator, run, source, report, standardises=standardises)
    check_ranks_agree(gather_object([loop_fingerprint(loop)]))
    if checkpoint is not None:
        restore(loop, checkpoint)
    return loop


def _refuse_bad_data(settings: TrainSettings, source: DataSource, report: Report) -> None:
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


def _seen(source: DataSource) -> dict[str, object]:
    """What all processes have to see alike."""
    return {
        "classes": digest(source.layout.labels),
        **{f"{name} videos": digest(v.name for v in source.readable(name)) for name in SUBSETS},
        "frame store": "none" if source.store is None else str(source.store.parameters),
    }


def _prepare(
    settings: TrainSettings,
    accelerator: Accelerator,
    run: Run,
    source: DataSource,
    report: Report,
    *,
    standardises: bool,
) -> Loop:
    with out_of_memory_errors(settings, accelerator.device):
        built = build(settings, num_classes=len(source.layout.labels), report=report)
        built.model.to(accelerator.device)
    broadcast_weights(built.model, accelerator)
    if settings.gradient_checkpointing:
        built.model.run_block = recompute_block
    model = compile_model(built.model, accelerator.device) if settings.compile else built.model
    with compile_errors(settings.compile):
        settings, window = resolve_batch(
            settings,
            accelerator.num_processes,
            find=lambda share: find_micro_batch(share, built, model, settings, accelerator),
        )
    assert settings.per_gpu_batch_size != "auto"
    if standardises:
        with out_of_memory_errors(settings, accelerator.device):
            standardise_features(
                built,
                source,
                accelerator,
                workers=worker_count(settings.num_workers),
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
        class_weights=torch.tensor(weights, dtype=torch.float32, device=accelerator.device),
        ema=None if settings.ema_decay is None else WeightAverage(built.model, settings.ema_decay),
    )


def plan_facts(loop: Loop) -> dict[str, str]:
    """The plan of a run by subject, in one line each."""
    settings, plan, source = loop.settings, loop.plan, loop.source
    counts = ", ".join(f"{len(source.readable(subset))} {subset}" for subset in SUBSETS)
    return {
        "data": f"{source.root}: {len(source.layout.labels)} classes, {counts}",
        "clips": f"{settings.n_frames} frames of {settings.img_size}×{settings.img_size} pixels",
        "device": f"{loop.device} × {plan.processes}, {settings.mixed_precision} mixed precision",
        "batch": str(plan),
        "schedule": f"{plural(settings.epochs, 'epoch')} of {plural(plan.steps_per_epoch, 'step')}, "
        f"{settings.warmup():g} warm-up, learning rate {settings.learning_rate:g}",
    }


def training_result(loop: Loop, *, problem: str = "") -> TrainResult:
    """The result of a run so far; `problem` is why it ended early. Records are those of the main process."""
    source = loop.source
    videos: dict[str, Counter[str]] = {label: Counter() for label in source.layout.labels}
    for video in source.layout.videos:
        if video.name not in source.unreadable:
            videos[video.label][video.subset] += 1
    return TrainResult(
        run=loop.run.folder,
        model=loop.run.model,
        best_epoch=(loop.best_step or loop.step) // loop.plan.steps_per_epoch,
        best=loop.best,
        test=None,
        epochs=loop.trackers.records("epoch"),
        steps=loop.trackers.records("step"),
        per_class=loop.trackers.per_class(loop.best_step),
        videos=videos,
        unreadable={**source.unreadable, **loop.unreadable},
        parameters=trainable_report(loop.plain_model),
        problem=problem,
    )


def write_report(loop: Loop, result: TrainResult) -> Path | None:
    """Writes the run's report in the main process and returns its path; a failure is a warning.

    A run without a finished epoch, or stopped before its first checkpoint, has no report.
    """
    from tvit_cli.report.training import write_training_report

    kept = list_checkpoints(loop.run.checkpoints)
    if not result.epochs or not loop.accelerator.is_main_process or (result.problem and not kept):
        return None
    model = shlex.quote(str(result.model))
    commands = [
        ("Label videos", f"tvit predict VIDEO --model {model}"),
        ("Score the test subset", f"tvit eval --model {model}"),
    ]
    if result.problem:
        commands = [("Resume", f"tvit train --resume-from-checkpoint {shlex.quote(str(kept[-1]))}")]
    context = Context(plan_facts(loop), commands, loop.device)
    return write_page(
        result.run,
        lambda: write_training_report(result, loop.settings, loop.samples, loop.built.preprocessing, context),
        loop.report,
    )


def train(settings: TrainSettings, report: Report = silent) -> TrainResult:
    """Train a model, keep its best epoch, and write the model folder.

    Raises DataError, ModelError or CheckpointError before the first step where the input cannot be used;
    Interrupted after a signal, when the state has been saved; RunError when the run itself fails.
    """
    if settings.log_tensorboard:
        require_tensorboard()
    with (
        lost_rank_errors(),
        ImmediateStop("Nothing is lost; start again with the same command.") as signals,
    ):
        release_memory()  # of a series, the model before: a GPU may hold but one
        loop = set_up(settings, report)
        with run_lock(loop.run) if loop.accelerator.is_main_process else nullcontext(False) as is_alone:
            _open_records(loop, is_alone=is_alone)
            _announce(loop)
            try:
                with out_of_memory_errors(loop.settings, loop.device), compile_errors(loop.settings.compile):
                    fit(loop)
                last = checkpoint_path(loop.run.checkpoints, loop.step)
                signals.advice = f"All steps are done and saved. {how_to_resume(last)}"
            except (TvitError, OSError) as error:
                write_report(loop, training_result(loop, problem=str(error)))
                if isinstance(error, RunError) and error.by_all:
                    loop.accelerator.wait_for_everyone()  # else a process that ends ends the one that says why
                raise
            finally:
                loop.trackers.close()
            try:
                result = _finish(loop)
            except (TvitError, OSError) as error:
                write_report(loop, training_result(loop, problem=str(error)))
                raise
            signals.advice = f"All is done, and the model is in {result.model}."
            return replace(result, report=write_report(loop, result))


def process_group_of(accelerator: Accelerator) -> ProcessGroup:
    """This process among those of a training."""
    return ProcessGroup(
        accelerator.process_index,
        accelerator.num_processes,
        accelerator.device,
        lambda own: list(gather_object([own])),
    )


def score_test(model: Path, settings: TrainSettings, report: Report, place: ProcessGroup) -> EvalResult:
    """Score the test subset with a model folder: all processes of its training do, in its batches."""
    assert settings.per_gpu_batch_size != "auto"
    return evaluate(
        EvalSettings(
            model=model,
            top_k=settings.top_k,
            device=settings.device,
            num_workers=settings.num_workers,
            per_gpu_batch_size=settings.per_gpu_batch_size,
            mixed_precision=settings.mixed_precision,
        ),
        report,
        place,
    )


def _open_records(loop: Loop, *, is_alone: bool) -> None:
    """Write the run's settings and open its metrics: the first files touched, once all was found good."""
    run, settings = loop.run, loop.settings
    if loop.accelerator.is_main_process:
        own: dict[str, object] = {
            "experiment_name": run.folder.name,
            "working_directory": run.folder.parent,
            "checkpoint_dir": run.checkpoints.name,
            "path_to_data": str(loop.source.root),
        }
        write_settings(run, settings.model_copy(update=own), is_alone=is_alone)
    loop.trackers.cut_after(loop.step)
    if settings.log_wandb:
        config = settings.model_dump(mode="json")
        loop.trackers.open_wandb(name=run.folder.name, config=config, report=loop.report)
    if settings.log_tensorboard:
        loop.trackers.open_tensorboard(loop.step)


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
    result = training_result(loop)
    if loop.step < loop.plan.total_steps:
        epochs = f"for {settings.patience} epochs" if settings.patience != 1 else "in the epoch after it"
        loop.report(
            Note(f"Stopped early: epoch {result.best_epoch} is the best, and none was better {epochs}.")
        )
    load_trainable(
        loop.plain_model, validated_tensors(loop) if loop.best_tensors is None else loop.best_tensors
    )
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
        test = score_test(loop.run.model, fitting, loop.report, process_group_of(loop.accelerator))
    return replace(result, test=test)
