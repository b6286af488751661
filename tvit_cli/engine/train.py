"""`tvit train`: from a folder of videos to a model folder."""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import gather_object

import tvit_cli
from tvit_cli.engine.checkpoint import checkpoint_path
from tvit_cli.engine.compiling import compiles
from tvit_cli.engine.eval import evaluate
from tvit_cli.engine.events import Note, Report, TrainingStarts, silent
from tvit_cli.engine.launch import StopsAtOnce, ends_with_the_others
from tvit_cli.engine.loop import fit, how_to_resume
from tvit_cli.engine.loopstate import Loop, kept_tensors
from tvit_cli.engine.opening import open_training
from tvit_cli.engine.outofmemory import ends_with_advice, release
from tvit_cli.engine.place import Place
from tvit_cli.engine.results import EvalResult
from tvit_cli.engine.run import held, write_settings
from tvit_cli.engine.summary import plan_facts, write_report
from tvit_cli.engine.trackers import require_tensorboard
from tvit_cli.errors import RunError, TvitError
from tvit_cli.model import lora
from tvit_cli.model.folder import save_model
from tvit_cli.model.trainable import load_trainable
from tvit_cli.settings.card import ModelCard
from tvit_cli.settings.eval import EvalSettings
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
        release()  # of a series, the model before: a GPU may hold but one
        loop = open_training(settings, report)
        with held(loop.run) if loop.accelerator.is_main_process else nullcontext(False) as is_alone:
            _open_records(loop, is_alone=is_alone)
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
