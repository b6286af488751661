"""Several runs, one per seed and split: trained, scored and summarised in sequence."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from accelerate.utils import broadcast_object_list

from tvit_cli.engine.distributed import barrier
from tvit_cli.engine.evaluate import evaluate, files
from tvit_cli.engine.launch import ProcessGroup, join_process_group, make_accelerator
from tvit_cli.engine.train import score_test, train
from tvit_cli.engine.train.adapt import fit_to_data
from tvit_cli.engine.train.fingerprint import check_finished_settings
from tvit_cli.engine.train.run_folder import (
    TEST,
    Run,
    check_replaceable,
    check_shared,
    claim,
    experiment_name,
)
from tvit_cli.errors import Interrupted, SettingsError
from tvit_cli.model.folder import MODEL_FOLDER, SETTINGS_FILE, load_card
from tvit_cli.report.comparison import write_series_report
from tvit_cli.report.html import Context
from tvit_cli.results import Note, Report, SeriesResult, once, silent
from tvit_cli.settings.eval import EvalSettings
from tvit_cli.settings.train import TrainSettings


def evaluate_series(settings: EvalSettings, models: dict[str, Path], report: Report = silent) -> SeriesResult:
    """Evaluates every model of a series, each on the data and split of its own training.

    summary.json and a page go to eval/<subset> in the series' folder (see `results_folder`), or to `--output`.
    Raises the errors of `evaluate`.
    """
    assert settings.model is not None
    group = join_process_group(settings.device)
    report, results = once(report if group.is_main else silent), {}
    for name, model in models.items():
        output = None if settings.output is None else settings.output / name
        own = settings.model_copy(update={"model": model, "output": output})
        results[name] = evaluate(own, report, group)
    runs = {name: result.metrics for name, result in results.items()}
    folder = settings.output or settings.model / "eval" / next(iter(results.values())).output.name
    whole = SeriesResult(folder, runs, summarise(list(runs.values())), results)
    if not group.is_main:
        return whole
    write_summary(whole)
    outputs = {name: str(result.report or result.output) for name, result in results.items()}
    again = files.reproduce_command(settings, ["--model", str(settings.model)])
    context = Context(outputs, [("Repeat this evaluation", again)], group.device)
    series = settings.model.absolute().name
    page = files.write_page(folder, lambda: write_series_report(whole, series, context), report)
    return replace(whole, report=page)


def summarise(runs: Sequence[dict[str, float]]) -> dict[str, tuple[float, float]]:
    """Mean and sample standard deviation of the metrics that all runs have. 0.8, 0.9 -> (0.85, 0.0707…)"""
    columns = {n: [run[n] for run in runs] for n in runs[0] if all(n in run for run in runs)}
    return {n: (statistics.fmean(v), statistics.stdev(v) if len(v) > 1 else 0.0) for n, v in columns.items()}


def write_summary(result: SeriesResult) -> None:
    """Writes the metrics of all runs, their means and deviations to summary.json. Raises RunError."""
    content = {
        "runs": result.runs,
        "mean": {name: mean for name, (mean, _) in result.summary.items()},
        "sd": {name: sd for name, (_, sd) in result.summary.items()},
    }
    files.write_json(result.folder / "summary.json", content)


def train_series(series: Sequence[TrainSettings], report: Report = silent) -> SeriesResult:
    """Trains one run after the other into <experiment>/seed<s>-split<n>; finished runs are kept.

    Raises SettingsError if the experiment is a single run, or a finished run has other settings; and the errors of
    `train`.
    """
    first, report = series[0], once(report)
    if first.resume_from_checkpoint is not None:
        raise SettingsError(
            f"--resume-from-checkpoint {first.resume_from_checkpoint}: each run of a series has its own. Leave "
            "it out and name the series with --experiment-name: finished runs are kept, a stopped run resumes."
        )
    accelerator = make_accelerator(device=first.device, mixed_precision="no")
    said = report if accelerator.is_main_process else silent
    series = [fit_to_data(settings, said) for settings in series]
    check_shared(first.working_directory, ProcessGroup.of(accelerator))
    folder = first.working_directory / experiment_name(first)
    claimed = claim(Run(folder, folder, None), first).folder if accelerator.is_main_process else None
    folder = broadcast_object_list([claimed])[0]
    name = folder.name
    if (folder / SETTINGS_FILE).exists():
        raise SettingsError(
            f"--experiment-name {name}: {folder} is the folder of a single run. Choose another name."
        )
    runs = {}
    for settings in series:
        run = f"seed{settings.seed}-split{settings.split}"
        runs[run] = settings.model_copy(update={"working_directory": folder, "experiment_name": run})
        if settings.overwrite:
            check_replaceable(folder / run, runs[run])
    finished = [run for run, s in runs.items() if (folder / run / MODEL_FOLDER).exists() and not s.overwrite]
    for run in finished:
        runs[run] = check_finished_settings(folder / run, runs[run], accelerator.num_processes)
    for number, (run, settings) in enumerate(runs.items()):
        report(Note(f"Run {number + 1} of {len(runs)}: {run}{' is finished' * (run in finished)}"))
        try:
            if run not in finished:
                train(settings, report)
            elif settings.test_at_end and not _tested(folder / run):
                score_test(folder / run / MODEL_FOLDER, settings, report, ProcessGroup.of(accelerator))
        except Interrupted as stop:
            raise Interrupted(
                f"{stop}\nTo resume the whole series, repeat the command with --experiment-name {name}. "
                f"{number} of its {len(runs)} runs are finished and are kept.",
                exit_code=stop.exit_code,
            ) from stop
        finally:
            with suppress(OSError):
                folder.rmdir()  # the claimed name of a series that failed before its first file
    barrier(accelerator)
    metrics = {run: _metrics(folder / run) for run in runs}
    result = SeriesResult(folder, metrics, summarise(list(metrics.values())))
    if accelerator.is_main_process:
        write_summary(result)
    return result


def _tested(run: Path) -> bool:
    return (run / TEST / files.METRICS_FILE).exists()


def _metrics(run: Path) -> dict[str, float]:
    """Validation metrics of a finished run's best epoch, and its test metrics if there are any."""
    metrics = dict(load_card(run / MODEL_FOLDER).metrics)
    if _tested(run):
        metrics |= {f"test_{name}": value for name, value in files.read_metrics(run / TEST).items()}
    return metrics
