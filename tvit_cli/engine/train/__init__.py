"""`tvit train`: from a folder of videos to a model folder."""

from __future__ import annotations

import math
import shlex
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object

import tvit_cli
from tvit_cli.data.layout import SUBSETS, Video, split_choice
from tvit_cli.engine.dataset import ClipFormat, DataSource, open_dataset
from tvit_cli.engine.distributed import barrier
from tvit_cli.engine.evaluate import evaluate
from tvit_cli.engine.evaluate.files import write_page
from tvit_cli.engine.evaluate.metrics import Tally
from tvit_cli.engine.evaluate.selection import find_leaks
from tvit_cli.engine.launch import (
    ImmediateStop,
    Precision,
    ProcessGroup,
    deterministic_algorithms,
    lost_rank_errors,
    make_accelerator,
)
from tvit_cli.engine.train.adapt import FEW_CLIPS, FEW_VIDEOS, fit_to_data
from tvit_cli.engine.train.batches import BatchPlan, class_weights
from tvit_cli.engine.train.build import Built, build, compile_errors, compile_model
from tvit_cli.engine.train.checkpoint import Checkpoint, checkpoint_path, list_checkpoints, load_checkpoint
from tvit_cli.engine.train.fingerprint import check_ranks_agree, data_fingerprint, digest, result_settings
from tvit_cli.engine.train.loop import fit, how_to_resume, restore
from tvit_cli.engine.train.memory import (
    find_micro_batch,
    micro_batch_limit,
    out_of_memory_errors,
    release_memory,
    resolve_batch,
    reuse_batch_settings,
)
from tvit_cli.engine.train.optim import adamw, parameter_groups
from tvit_cli.engine.train.origin import find_origin, find_reuse, keep_copy, split_after, taken_over
from tvit_cli.engine.train.run_folder import Run, check_shared, choose_run, claim, run_lock, write_settings
from tvit_cli.engine.train.state import Loop, WeightAverage, standardise_features
from tvit_cli.engine.train.trackers import Trackers, require_tensorboard
from tvit_cli.errors import DataError, ModelError, RunError, SettingsError, TvitError, plural, shorten
from tvit_cli.model import lora
from tvit_cli.model.folder import load_card, save_model
from tvit_cli.model.linear import WORTHWHILE, bf16_speedup, cast_adapters, hold_frozen
from tvit_cli.model.pretrained_config import own_clips
from tvit_cli.portable.layers import recompute_block
from tvit_cli.report.html import Context
from tvit_cli.results import (
    ClassTable,
    EvalResult,
    Event,
    Note,
    Report,
    TrainingStarts,
    TrainResult,
    once,
    silent,
)
from tvit_cli.settings.card import ModelCard
from tvit_cli.settings.eval import EvalSettings
from tvit_cli.settings.train import TrainSettings
from tvit_cli.settings.types import most_bad

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}  # by Accelerate's name of the mixed precision


def train(settings: TrainSettings, report: Report = silent) -> TrainResult:
    """Trains a model, keeps its best epoch, and writes the model folder.

    Raises DataError, ModelError or CheckpointError before the first step for unusable input; Interrupted after a
    signal, with the state saved; RunError if the run itself fails.
    """
    if settings.log_tensorboard:
        require_tensorboard()
    report = once(report)
    with (
        lost_rank_errors(),
        deterministic_algorithms(settings.deterministic, settings.device),
        ImmediateStop("Nothing is lost; start again with the same command.", report) as signals,
    ):
        release_memory()  # of the model of an earlier run of a series
        loop = set_up(settings, report)
        _claim_name(loop)
        with run_lock(loop.run) if loop.accelerator.is_main_process else nullcontext(False) as is_alone:
            _open_run(loop, is_alone=is_alone)
            try:
                with out_of_memory_errors(loop.settings, loop.device), compile_errors(loop.settings.compile):
                    fit(loop)
                last = checkpoint_path(loop.run.checkpoints, loop.step)
                signals.advice = f"All steps are done and saved. {how_to_resume(last)}"
            except (TvitError, OSError) as error:
                write_report(loop, training_result(loop, problem=str(error)))
                if isinstance(error, RunError) and error.by_all:
                    barrier(loop.accelerator)  # a rank that exits early ends rank 0 before it prints
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


def set_up(settings: TrainSettings, report: Report, *, standardises: bool = True) -> Loop:
    """A loop that is ready to run, restored from its checkpoint if there is one; writes no file.

    Without `standardises`, the pass over training clips for --feature-norm is skipped.
    """
    accelerator = make_accelerator(device=settings.device, mixed_precision=settings.mixed_precision)
    if not accelerator.is_main_process:
        report = silent
    check_shared(settings.working_directory, ProcessGroup.of(accelerator))
    is_auto = settings.mixed_precision == "auto"
    settings = settings.model_copy(update={"mixed_precision": accelerator.mixed_precision})
    settings = fit_to_data(settings, report)
    origin = find_origin(settings)
    card = None if origin is None else load_card(origin.folder)
    source = open_dataset(
        settings.path_to_data,
        report,
        clip=_clip_format(settings),
        need_test=settings.test_at_end,
        **(split_choice(settings) if card is None else split_after(settings, card)),
    )
    settings = settings.model_copy(update={"clip_seconds": source.clip_seconds})
    test_videos = digest(video.name for video in source.readable("test"))
    own = {**result_settings(settings), **data_fingerprint(source), "test videos": test_videos}
    check_ranks_agree(gather_object([own]))
    _check_data(settings, source, report, card)
    clips = len(source.readable("train"))
    if not {"epochs", "clip_passes"} & settings.model_fields_set and origin is None and clips < FEW_CLIPS:
        text = f"{plural(clips, 'training clip')}, and {settings.epochs} epochs as in the reference"
        report(Note(f"{text}. --preset finetune chooses epochs and rates for few clips."))
    run: Run = broadcast_object_list([choose_run(settings) if accelerator.is_main_process else None])[0]
    report(Note(f"Run: {run.folder}"))
    checkpoint = None if run.resume_from is None else load_checkpoint(run.resume_from)
    if checkpoint is not None:
        settings = reuse_batch_settings(settings, checkpoint.state.identity, accelerator.num_processes)
    with out_of_memory_errors(settings, accelerator.device):
        built = build(settings, labels=source.layout.labels, report=report, origin=origin)
    if is_auto and accelerator.device.type == "cpu":
        chosen = _cpu_precision(built, checkpoint, report)
        settings = settings.model_copy(update={"mixed_precision": chosen})
        accelerator = make_accelerator(device="cpu", mixed_precision=chosen)
    loop = _make_loop(settings, accelerator, run, source, report, built, checkpoint)
    plan = loop.plan
    if plan.steps_per_epoch == 1:
        text = f"One step per epoch: a batch of {plan.global_batch} has all {plural(plan.clips, 'training clip')}"
        advice = f"Take a smaller one (--per-gpu-batch-size {max(1, plan.clips // 4)}), or more --epochs."
        report(
            Note(
                f"{text}, so {plural(plan.epochs, 'epoch')} take {plural(plan.epochs, 'step')}. {advice}",
                "warning",
            )
        )
    if standardises and settings.feature_norm and checkpoint is None and origin is None:
        with out_of_memory_errors(settings, accelerator.device):
            standardise_features(loop)
    if settings.ema_decay is not None:
        loop.ema = WeightAverage(loop.plain_model, settings.ema_decay)
    check_ranks_agree(gather_object([loop.fingerprint()]))
    if checkpoint is not None:
        restore(loop, checkpoint)
    if run.resume_from is not None or run.begins_again:
        limit = min(loop.plan.batch_size, micro_batch_limit(run.checkpoints))
        if limit < loop.plan.batch_size:
            loop.plan = replace(loop.plan, batch_size=int(limit))
            loop.report(Note(f"Memory ran out with more than {plural(int(limit), 'clip')} per forward pass."))
    return loop


def _cpu_precision(built: Built, checkpoint: Checkpoint | None, report: Report) -> Precision:
    """The number format that `auto` means on a CPU: the one that is faster there, or that of the checkpoint."""
    if checkpoint is not None:
        return cast(Precision, checkpoint.state.identity.get("mixed_precision", "no"))
    speedup = float(broadcast_object_list([bf16_speedup(built.config.width)])[0])
    if speedup < WORTHWHILE:
        return "no"
    fact = f"This processor multiplies bfloat16 {speedup:.1f} times as fast as float32"
    report(Note(f"{fact}: --mixed-precision bf16."))
    return "bf16"


def _clip_format(settings: TrainSettings) -> ClipFormat:
    seconds, name = settings.clip_seconds, settings.hf_model_name
    by_weights = (
        seconds is not None
        and name is not None
        and own_clips(name, settings.n_frames).get("clip_seconds") == seconds
    )
    return ClipFormat(settings.n_frames, settings.img_size, settings.frame_grid, seconds, by_weights)


def _check_data(
    settings: TrainSettings, source: DataSource, report: Report, origin: ModelCard | None
) -> None:
    videos = source.layout.videos
    most = most_bad(settings.max_bad, len(videos))
    if len(source.unreadable) > most:
        counts = f"{len(source.unreadable)} of {len(videos)} videos cannot be read"
        limit = f'--max-bad "{settings.max_bad}" allows {most}'
        advice = "Repair or remove them (see tvit extract --check), or allow more."
        raise DataError(f"{source.layout.root}: {counts}, and {limit}. {advice}")
    leaks = find_leaks(videos) + (() if origin is None else find_reuse(origin, source))
    if leaks and settings.strict:
        raise DataError(f"{source.layout.root}: " + " ".join(leaks))
    for leak in leaks:
        report(Note(leak, "warning"))
    report(class_table(source))
    for text in _doubts(source):
        report(Note(text, "warning"))
    if settings.patience is not None and not source.readable("val"):
        reason = f"{source.root} has no validation subset to compare epochs on"
        advice = "Hold out groups with --val-groups, or leave --patience out."
        raise SettingsError(f"--patience {settings.patience}: {reason}. {advice}")


def class_table(source: DataSource) -> ClassTable:
    """Videos and groups by class and subset; no groups where each is one video."""
    videos = [video for subset in SUBSETS for video in source.readable(subset)]
    has_groups = len({video.unit for video in videos}) < len(videos)

    def row(name: str, own: Sequence[Video]) -> tuple[str | int, ...]:
        cells: list[str | int] = [name]
        for subset in SUBSETS:
            units = [video.unit for video in own if video.subset == subset]
            cells += [len(units), len(set(units))] if has_groups else [len(units)]
        return tuple(cells)

    columns = [name for subset in SUBSETS for name in ((subset, "groups") if has_groups else (subset,))]
    rows = [row(label, [v for v in videos if v.label == label]) for label in source.layout.labels]
    return ClassTable(("class", *columns), tuple(rows), row("all", videos))


def _doubts(source: DataSource) -> Iterator[str]:
    """Sentences on classes that are not measured, and on too small a validation set."""
    labels = source.layout.labels
    for subset, word in (("val", "validation"), ("test", "test")):
        videos = source.readable(subset)
        missing = [label for label in labels if label not in {video.label for video in videos}]
        if videos and missing:
            text = f"No {word} video of {len(missing)} of {plural(len(labels), 'class')}: {shorten(missing)}"
            yield f"{text}. Name groups that have some with --{subset}-groups, or add videos."
    val = source.readable("val")
    if 0 < len(val) < FEW_VIDEOS:
        groups = plural(len({video.unit for video in val}), "group")
        text = f"{plural(len(val), 'validation video')} of {groups}, fewer than {FEW_VIDEOS}"
        share = f"one video is {1 / len(val):.0%} of top-1, so the choice of the best epoch is uncertain"
        yield f"{text}: {share}. Hold out more with --val-groups COUNT, or compare seeds (--seed 0,1,2)."


def _make_loop(
    settings: TrainSettings,
    accelerator: Accelerator,
    run: Run,
    source: DataSource,
    report: Report,
    built: Built,
    checkpoint: Checkpoint | None,
) -> Loop:
    labels = source.layout.labels
    with out_of_memory_errors(settings, accelerator.device):
        built.model.to(accelerator.device)
    if (dtype := AUTOCAST.get(accelerator.mixed_precision)) is not None:
        hold_frozen(built.model, dtype, exclude=built.model.classifier.modules())
        if not settings.compile:  # hooks would break the graph, and PEFT's layers compute
            cast_adapters(built.model, lora.ADAPTER)
    if settings.gradient_checkpointing:
        built.model.run_block = recompute_block
    model = compile_model(built.model, accelerator.device) if settings.compile else built.model
    with compile_errors(settings.compile):
        find = partial(find_micro_batch, built=built, model=model, settings=settings, accelerator=accelerator)
        processes = accelerator.num_processes
        if checkpoint is not None:
            processes = checkpoint.state.identity.get("processes", processes)
        settings, global_batch = resolve_batch(settings, processes, find=find)
    if checkpoint is not None and checkpoint.state.global_batch:
        global_batch = checkpoint.state.global_batch
    assert settings.per_gpu_batch_size != "auto"
    shared = ("weight_decay", "bias_weight_decay", "norm_weight_decay", "layer_decay", "classifier_rate")
    own: dict[str, Any] = {name: getattr(settings, name) for name in shared}
    groups = parameter_groups(built.model, temporal_rate=settings.temporal_share(), **own)
    rate, betas = settings.learning_rate, (settings.adam_beta1, settings.adam_beta2)
    optimizer = adamw(groups, learning_rate=rate, betas=betas, epsilon=settings.adam_epsilon)
    classes = {label: number for number, label in enumerate(labels)}
    targets = tuple(classes[video.label] for video in source.readable("train"))
    plan = BatchPlan(
        clips=len(targets),
        batch_size=settings.per_gpu_batch_size,
        global_batch=global_batch,
        processes=accelerator.num_processes,
        rank=accelerator.process_index,
        epochs=settings.epochs,
        seed=settings.seed,
        balance=targets if settings.balanced_sampling else None,
        pairs=settings.mixup > 0 or settings.cutmix > 0,
        repeats=settings.repeats,
    )
    model, prepared = accelerator.prepare(model, optimizer)
    is_uniform = settings.class_weights == "none"
    weights = [1.0] * len(labels) if is_uniform else class_weights(targets, len(labels))
    return Loop(
        settings,
        accelerator,
        run,
        source,
        built,
        model,
        prepared,
        plan,
        trackers=Trackers(run.folder if accelerator.is_main_process else None),
        report=report,
        class_weights=torch.tensor(weights, dtype=torch.float32, device=accelerator.device),
        tally=Tally.zeros(accelerator.device),
    )


def _claim_name(loop: Loop) -> None:
    """Gives an unnamed run the next free name if another training has taken its own during the set-up."""
    is_main = loop.accelerator.is_main_process
    run: Run = broadcast_object_list([claim(loop.run, loop.settings) if is_main else None])[0]
    if run != loop.run:
        loop.report(Note(f"Run: {run.folder}; another training has just taken {loop.run.folder.name}"))
        loop.run = run
        loop.trackers = Trackers(run.folder if is_main else None)


def _open_run(loop: Loop, *, is_alone: bool) -> None:
    """Writes the run's settings, opens its trackers and reports its plan: the first files, after all checks."""
    run, settings, classes = loop.run, loop.settings, len(loop.source.layout.labels)
    if loop.accelerator.is_main_process:
        own: dict[str, object] = {
            "experiment_name": run.folder.name,
            "working_directory": run.folder.parent,
            "checkpoint_dir": run.checkpoints.name,
            "path_to_data": str(loop.source.root),
        }
        write_settings(run, settings.model_copy(update=own), is_alone=is_alone)
        if loop.built.origin is not None and run.resume_from is None:
            keep_copy(loop.built.origin, run)
    loop.trackers.cut_after(loop.step)
    if settings.log_wandb:
        config = settings.model_dump(mode="json")
        loop.trackers.open_wandb(name=run.folder.name, config=config, report=loop.report)
    if settings.log_tensorboard:
        loop.trackers.open_tensorboard(loop.step)
    steps = loop.plan.steps_per_epoch
    loop.report(TrainingStarts(plan_facts(loop), settings.epochs, steps, first_step=loop.step))
    if settings.top_k > classes and "top_k" in settings.model_fields_set:
        text = f"--top-k {settings.top_k}: the data has {classes} classes, so top-{classes} is reported."
        loop.report(Note(text, "warning"))


def _finish(loop: Loop) -> TrainResult:
    settings, layout = loop.settings, loop.source.layout
    result = training_result(loop)
    if loop.step < loop.plan.total_steps:
        epochs = f"for {settings.patience} epochs" if settings.patience != 1 else "in the epoch after it"
        text = f"Stopped early: epoch {result.best_epoch} is the best, and none was better {epochs}."
        loop.report(Note(text))
    best = loop.validated_tensors() if loop.best_tensors is None else loop.best_tensors
    lora.load_trainable(loop.plain_model, best)
    if loop.accelerator.is_main_process:
        reload_frozen(loop)
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
    barrier(loop.accelerator)
    if not settings.test_at_end:
        return result
    settings = settings.model_copy(update={"per_gpu_batch_size": loop.plan.batch_size})
    test = score_test(loop.run.model, settings, loop.report, ProcessGroup.of(loop.accelerator))
    return replace(result, test=test)


def reload_frozen(loop: Loop) -> None:
    """Gives weights that `hold_frozen` rounded their values in float32, read again, for adapters to be merged."""
    weights = loop.plain_model.named_parameters()
    rounded = {name: weight for name, weight in weights if weight.dtype != torch.float32}
    if not rounded:
        return
    built = build(loop.settings, labels=loop.source.layout.labels, report=silent, origin=loop.built.origin)
    if built.base != loop.built.base:
        problem = "the file has changed since the training started, and adapters are merged into its weights"
        raise ModelError(f"{loop.settings.pretrained}: {problem}. Restore it, then resume the run.")
    exact = built.model.state_dict()
    for name, weight in rounded.items():
        weight.data = exact[name].to(weight.device)


def score_test(model: Path, settings: TrainSettings, report: Report, group: ProcessGroup) -> EvalResult:
    """Scores the test subset with a model folder on all ranks, with the micro-batch of the training."""
    assert settings.per_gpu_batch_size != "auto"
    shared = ("top_k", "device", "num_workers", "per_gpu_batch_size", "mixed_precision")
    own = {name: getattr(settings, name) for name in shared}

    def unless_known(event: Event) -> None:
        if not isinstance(event, Note) or event.level == "warning":
            report(event)

    return evaluate(EvalSettings(model=model, **own), unless_known, group)


def plan_facts(loop: Loop) -> dict[str, str]:
    """The plan of a run by subject, in one line each."""
    settings, plan, source = loop.settings, loop.plan, loop.source
    counts = ", ".join(f"{len(source.readable(subset))} {subset}" for subset in SUBSETS)
    origin = loop.built.origin
    first = {} if origin is None else {"from": taken_over(settings, origin.labels, source.layout.labels)}
    rate, factor = settings.learning_rate, settings.classifier_rate
    rates = f"{rate:g}" if factor == 1 else f"{rate:g}, of the classifier {factor * rate:g}"
    return first | {
        "data": f"{source.root}: {plural(len(source.layout.labels), 'class')}, {counts} videos",
        "clips": f"{plural(settings.n_frames, 'frame')} of {settings.img_size}×{settings.img_size} pixels"
        + ("" if settings.clip_seconds is None else f" in {settings.clip_seconds:.3g} s"),
        "device": f"{loop.device} × {plan.processes}, {settings.mixed_precision} mixed precision",
        "batch": str(plan),
        "schedule": f"{plural(settings.epochs, 'epoch')} of {plural(plan.steps_per_epoch, 'step')}, "
        f"warm-up {settings.warmup():g} epochs, learning rate {rates}",
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
        parameters=lora.trainable_report(loop.plain_model),
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
    commands = {
        "Label videos": f"predict VIDEO --model {model}",
        "Score the test subset": f"eval --model {model}",
    }
    if result.problem:
        commands = {"Resume": f"train --resume-from-checkpoint {shlex.quote(str(kept[-1]))}"}
    lines = [(title, f"tvit {command}") for title, command in commands.items()]
    context, preprocessing = Context(plan_facts(loop), lines, loop.device), loop.built.preprocessing
    write = partial(write_training_report, result, loop.settings, loop.samples, preprocessing, context)
    return write_page(result.run, write, loop.report)
