"""A training before its first step: data looked at, the run's folder chosen, model and optimizer made."""

from __future__ import annotations

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object

from tvit_cli.data.layout import SUBSETS
from tvit_cli.data.leaks import find_leaks
from tvit_cli.engine.balance import class_weights
from tvit_cli.engine.batches import BatchPlan
from tvit_cli.engine.build import build
from tvit_cli.engine.checkpoint import load_checkpoint
from tvit_cli.engine.compiling import compiled, compiles
from tvit_cli.engine.ema import WeightAverage
from tvit_cli.engine.events import Note, Report, silent
from tvit_cli.engine.identity import digest_of, recipe, refuse_disagreement
from tvit_cli.engine.launch import make_accelerator
from tvit_cli.engine.loopstate import Loop, identity_of
from tvit_cli.engine.microbatch import as_before, find_micro_batch, resolve_batch
from tvit_cli.engine.optim import adamw, parameter_groups
from tvit_cli.engine.outofmemory import ends_with_advice
from tvit_cli.engine.parallel import share_weights
from tvit_cli.engine.run import Run, open_run
from tvit_cli.engine.saving import restore
from tvit_cli.engine.source import Source, open_source, workers_of
from tvit_cli.engine.standardise import standardise_features
from tvit_cli.engine.trackers import Trackers
from tvit_cli.errors import DataError, SettingsError
from tvit_cli.model.blocks import recomputed
from tvit_cli.settings.maxbad import most_bad
from tvit_cli.settings.train import TrainSettings


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
        n_frames=settings.n_frames,
        frame_size=settings.img_size,
        frame_grid=settings.frame_grid,
        report=report,
    )
    refuse_disagreement(gather_object([{**recipe(settings), **_seen(source)}]))
    _refuse_bad_data(settings, source, report)
    run: Run = broadcast_object_list([open_run(settings) if accelerator.is_main_process else None])[0]
    report(Note(f"Run: {run.folder}"))
    checkpoint = None if run.resume_from is None else load_checkpoint(run.resume_from)
    if checkpoint is not None:
        settings = as_before(settings, checkpoint.state.identity, accelerator.num_processes)
    standardises = standardises and settings.feature_norm and checkpoint is None
    loop = _prepare(settings, accelerator, run, source, report, standardises=standardises)
    refuse_disagreement(gather_object([identity_of(loop)]))
    if checkpoint is not None:
        restore(loop, checkpoint)
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


def _seen(source: Source) -> dict[str, object]:
    """What all processes have to see alike."""
    return {
        "classes": digest_of(source.layout.labels),
        **{f"{name} videos": digest_of(v.name for v in source.readable(name)) for name in SUBSETS},
        "frame store": "none" if source.store is None else str(source.store.parameters),
    }


def _prepare(
    settings: TrainSettings,
    accelerator: Accelerator,
    run: Run,
    source: Source,
    report: Report,
    *,
    standardises: bool,
) -> Loop:
    with ends_with_advice(settings, accelerator.device):
        built = build(settings, num_classes=len(source.layout.labels), report=report)
        built.model.to(accelerator.device)
    share_weights(built.model, accelerator)
    if settings.gradient_checkpointing:
        built.model.run_block = recomputed
    model = compiled(built.model, accelerator.device) if settings.compile else built.model
    with compiles(settings.compile):
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
                workers=workers_of(settings.num_workers),
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
