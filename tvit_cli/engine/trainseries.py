"""`tvit train` with several seeds or splits: one training after the other."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from accelerate.utils import broadcast_object_list

from tvit_cli.engine.events import Note, Report, silent
from tvit_cli.engine.identity import check_recipe
from tvit_cli.engine.launch import make_accelerator
from tvit_cli.engine.results import METRICS_FILE, read_metrics
from tvit_cli.engine.run import TEST, check_replaceable, experiment_name
from tvit_cli.engine.series import SeriesResult, summarise, write_summary
from tvit_cli.engine.train import place_of, score_test, train
from tvit_cli.errors import Interrupted, SettingsError
from tvit_cli.model.folder import MODEL_FOLDER, SETTINGS_FILE, load_card
from tvit_cli.settings.train import TrainSettings


def train_series(series: Sequence[TrainSettings], report: Report = silent) -> SeriesResult:
    """Train one run after the other into <experiment>/seed<s>-split<n>; runs that are finished are kept.

    Raises SettingsError where the experiment's name is taken by something else, or a finished run of it was
    trained with other settings; otherwise what `train` raises.
    """
    first = series[0]
    if first.resume_from_checkpoint is not None:
        raise SettingsError(
            f"--resume-from-checkpoint {first.resume_from_checkpoint}: a series has a checkpoint for each run. "
            "Leave it out and name the series with --experiment-name: finished runs are kept, and one that was "
            "stopped goes on."
        )
    accelerator = make_accelerator(device=first.device, mixed_precision="no")
    name: str = broadcast_object_list([experiment_name(first)])[0]
    folder = first.working_directory / name
    if (folder / SETTINGS_FILE).exists():
        raise SettingsError(
            f"--experiment-name {name}: {folder} is the folder of a single run. Take another."
        )
    runs = {
        f"seed{s.seed}-split{s.split}": s.model_copy(
            update={"working_directory": folder, "experiment_name": f"seed{s.seed}-split{s.split}"}
        )
        for s in series
    }
    for run, settings in runs.items():
        if settings.overwrite:
            check_replaceable(folder / run, settings)
    finished = [run for run, s in runs.items() if _is_finished(folder / run) and not s.overwrite]
    for run in finished:
        runs[run] = check_recipe(folder / run, runs[run], accelerator.num_processes)
    for number, (run, settings) in enumerate(runs.items()):
        report(Note(f"Run {number + 1} of {len(runs)}: {folder / run}{' is finished' * (run in finished)}"))
        try:
            if run not in finished:
                train(settings, report)
            elif settings.test_at_end and not _tested(folder / run):
                score_test(folder / run / MODEL_FOLDER, settings, report, place_of(accelerator))
        except Interrupted as stop:
            raise Interrupted(
                f"{stop}\nOr go on with the whole series: the same command with --experiment-name {name}. "
                f"{number} of its {len(runs)} runs are finished and will be kept.",
                exit_code=stop.exit_code,
            ) from stop
    accelerator.wait_for_everyone()
    metrics = {run: _metrics(folder / run) for run in runs}
    result = SeriesResult(folder, metrics, summarise(list(metrics.values())))
    if accelerator.is_main_process:
        write_summary(result)
    return result


def _is_finished(run: Path) -> bool:
    return (run / MODEL_FOLDER).exists()


def _tested(run: Path) -> bool:
    return (run / TEST / METRICS_FILE).exists()


def _metrics(run: Path) -> dict[str, float]:
    """Validation metrics of the epoch that a finished run kept, and test metrics where they were taken."""
    metrics = dict(load_card(run / MODEL_FOLDER).metrics)
    if _tested(run):
        metrics |= {f"test_{name}": value for name, value in read_metrics(run / TEST).items()}
    return metrics
